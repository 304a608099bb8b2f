"""Measuring recipes for a report, and finding the measured one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moshi_mlx.errors import ConfigError
from moshi_mlx.hub import CheckpointFiles

from .convert import dequantize, quantize
from .distill import Tuned, distill
from .evaluate import calibrate, codes_of, cost_of, make_subject, read_recording, what_it_says, words
from .recipes import Plan, Recipe, make_plan
from .report import Entry, Report
from .sensitivity import CANDIDATES, as_rows, measured_plan, unit_of
from .source import Source
from .terminal import Bar

__all__ = ["measure_recipes", "target_bytes", "weight_errors"]

CODEC_RATE = 24000

LESSONS = 6
"""Conversations that distilling learns from."""


def target_bytes(args: argparse.Namespace, source: Source) -> int | None:
    """The size that modules may take together, None if no target was given."""
    if args.target_bpw is not None:
        weights = sum(m.copies * m.rows * m.width for m in source.modules)
        return int(args.target_bpw * weights / 8)
    if args.target_size is not None:
        names = {m.name for m in source.modules}
        rest = sum(v.nbytes for name, v in source.tensors.items() if name.rpartition(".")[0] not in names)
        return int(args.target_size * 1e6) - rest
    return None


def measure_recipes(
    args: argparse.Namespace,
    files: CheckpointFiles,
    source: Source,
    recipes: Sequence[Recipe],
    plan: Plan | None,
    bar: Bar,
) -> tuple[Report, Plan | None, Tuned]:
    """Measure a plan and other recipes on calibration tokens; the whole dense model is in memory meanwhile.

    Returns
    -------
    tuple
        The report; the plan if it was found or changed here; and what was distilled.
    """
    bar.stage("reading the model")
    target = target_bytes(args, source)
    subject = make_subject(source)
    config = source.config.lm
    recording = pcm = None
    if args.calibration is not None:
        if not config.user_q:
            raise ConfigError(f"{files.source} listens to nobody: leave out --calibration")
        pcm = read_recording(Path(args.calibration), CODEC_RATE)
        recording = codes_of(pcm, files, config)
    bar.stage("sampling calibration tokens")
    calibration = calibrate(subject, args.frames, recording)
    if not calibration.tokens.size:
        raise ConfigError("too few frames to measure on: ask for more --frames, or give a longer recording")
    reference = subject.outputs(calibration)
    report = Report(
        files.source, calibration.origin, source.modules, sum(m.bytes(None, source.dtype.size) for m in source.modules)
    )
    found: Plan | None = None
    if target is not None:
        dense = [m for m in source.modules if m.part in ("conditions", "cross-attention")]
        units = {unit_of(m) for m in source.modules} - {unit_of(m) for m in dense}
        bar.stage("measuring what each part is worth", len(units) * len(CANDIDATES))
        found, sensitivity = measured_plan(
            subject,
            source.modules,
            calibration,
            reference,
            target - sum(m.bytes(None) for m in dense),
            progress=bar.advance,
        )
        report.sensitivity = as_rows(sensitivity)
    tuned: Tuned = {}
    distilled: Plan | None = None
    chosen = found or plan
    if args.distill and chosen is not None:
        bar.stage("sampling conversations to learn from")
        lessons = [calibrate(subject, args.frames, recording, seed=1 + i) for i in range(LESSONS)]
        bar.stage("distilling", args.distill)
        tuned = distill(subject, chosen, lessons, args.distill, progress=bar.advance)
        distilled = Plan(f"{chosen.name}, distilled", chosen.choices, chosen.skipped)
    plans = [p for p in (distilled, found, plan) if p is not None]
    plans += [make_plan(source.modules, recipe) for recipe in recipes]
    talks = files.tokenizer is not None and bool(config.n_q) and source.config.model_type != "tts"
    spoken: np.ndarray | None = None
    if talks:
        bar.stage("listening to the source")
        spoken = what_it_says(subject, None, calibration)
        report.said = words(spoken.tolist(), files.tokenizer)
    for each in plans:
        bar.stage(f"measuring {each.name}")
        parts = tuned if each is distilled else {}
        cost = cost_of(subject, each, calibration, reference, parts)
        entry = Entry(
            each,
            each.bytes(source.modules, source.dtype.size),
            each.bits_per_weight(source.modules, source.dtype.size),
            cost,
            weight_errors(source, each, parts),
        )
        if spoken is not None:
            says = what_it_says(subject, each, calibration, parts)
            entry.said = words(says.tolist(), files.tokenizer)
            entry.same_text = float((says == spoken).mean()) if len(says) else None
        report.entries.append(entry)
    return report, distilled or found, tuned


def weight_errors(source: Source, plan: Plan, tuned: Tuned | None = None) -> dict[str, float]:
    """Relative error ``|w' - w| / |w|`` of every module."""
    import mlx.core as mx

    errors: dict[str, float] = {}
    for module in source.modules:
        q, was = plan.choices.get(module.name), source.quantized.get(module.name)
        if q is None:
            continue
        parts = {
            part: source.tensors[f"{module.name}.{part}"]
            for part in ("weight", "scales", "biases")
            if f"{module.name}.{part}" in source.tensors
        }
        exact = (parts["weight"] if was is None else dequantize(parts, was)).astype(source.dtype)
        rounded = (tuned or {}).get(module.name) or quantize(exact, q)
        lost = mx.linalg.norm(dequantize(rounded, q) - exact.astype(mx.float32))
        norm = mx.linalg.norm(exact.astype(mx.float32))
        errors[module.name] = float(lost / mx.maximum(norm, 1e-30))
    return errors
