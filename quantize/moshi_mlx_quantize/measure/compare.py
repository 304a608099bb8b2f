"""Measuring recipes for a report, and finding the measured one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from moshi_mlx.checkpoint.resolve import CheckpointFiles
from moshi_mlx.errors import ConfigError, MoshiError
from moshi_mlx.printable import printable

from ..plan.recipes import DENSE_PARTS, Plan, Recipe, make_plan
from ..plan.sensitivity import CANDIDATES, as_rows, measured_plan, unit_of
from ..source import Source
from ..terminal import Bar
from ..write.convert import dequantize, quantize
from ..write.distill import Tuned, distill
from .evaluate import (
    Ints,
    Recording,
    calibrate,
    codes_of,
    cost_of,
    make_subject,
    same_text,
    spoken,
    what_it_says,
    words,
)
from .report import Entry, Report

__all__ = ["LESSONS", "measure_recipes", "target_bytes", "weight_errors"]

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
    recording: Recording,
    recipes: Sequence[Recipe],
    plan: Plan | None,
    bar: Bar,
) -> tuple[Report, Plan | None, Tuned]:
    """Measure a plan and other recipes on calibration tokens; the whole dense model is in memory meanwhile.

    A model that cannot hear the recorded questions is measured on what it samples by itself, and the report says so.

    Returns
    -------
    tuple
        The report; the plan if it was found or changed here; and what was distilled.
    """
    bar.stage("reading the model")
    target = target_bytes(args, source)
    subject = make_subject(source)
    config = source.config.lm
    heard: Ints | None = None
    try:
        heard = codes_of(recording, files, source.config)
        origin = f"{recording.origin}, answered by the model"
    except MoshiError as error:
        if args.calibration is not None:
            raise ConfigError(f"{files.source}: {error}: leave out --calibration") from error
        origin = f"the model's own samples ({error})"
    bar.stage("sampling calibration tokens")
    calibration = calibrate(subject, args.frames, heard)
    if not calibration.tokens.size:
        raise ConfigError("too few frames to measure on: ask for more --frames, or give a longer recording")
    frames = calibration.tokens.shape[-1]
    origin += f", {frames} frames ({frames * 0.08:.1f} s)"
    reference = subject.outputs(calibration)
    if config.n_q and not spoken(calibration.tokens[0, 0]):
        origin += ", on which it says nothing: what speech would cost was not measured"
    dense = sum(m.bytes(None, source.dtype.size) for m in source.modules)
    report = Report(printable(files.source), printable(origin), source.modules, source.size, dense)
    found: Plan | None = None
    if target is not None:
        kept = [m for m in source.modules if m.part in DENSE_PARTS]
        units = {unit_of(m) for m in source.modules} - {unit_of(m) for m in kept}
        bar.stage("measuring what each part is worth", len(units) * len(CANDIDATES))
        found, sensitivity = measured_plan(
            subject,
            source.modules,
            calibration,
            reference,
            target - sum(m.bytes(None) for m in kept),
            progress=bar.advance,
        )
        report.sensitivity = as_rows(sensitivity)
    tuned: Tuned = {}
    distilled: Plan | None = None
    chosen = found or plan
    if args.distill and chosen is not None:
        bar.stage("sampling conversations to learn from")
        lessons = [calibrate(subject, args.frames, lesson(heard, args.frames, i), seed=1 + i) for i in range(LESSONS)]
        bar.stage("distilling", args.distill)
        tuned = distill(subject, chosen, lessons, args.distill, progress=bar.advance)
        distilled = Plan(f"{chosen.name}, distilled", chosen.choices, chosen.skipped)
    plans = [p for p in (distilled, found, plan) if p is not None]
    plans += [make_plan(source.modules, recipe) for recipe in recipes]
    said: Ints | None = None
    if config.n_q and source.config.model_type != "tts":
        bar.stage("listening to the source")
        said = what_it_says(subject, None, calibration)
        report.listened, report.said = True, words(said.tolist(), files.tokenizer)
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
        if said is not None:
            says = what_it_says(subject, each, calibration, parts)
            entry.said = words(says.tolist(), files.tokenizer)
            entry.same_text = same_text(said, says)
        report.entries.append(entry)
    return report, distilled or found, tuned


def lesson(heard: Ints | None, frames: int, index: int) -> Ints | None:
    """What the user says in a conversation to learn from: not what is measured on, where the recording has more."""
    if heard is None:
        return None
    spare = heard[frames:] if len(heard) >= 2 * frames else heard
    return np.take(spare, range(index * frames, (index + 1) * frames), axis=0, mode="wrap")


def weight_errors(source: Source, plan: Plan, tuned: Tuned | None = None) -> dict[str, float]:
    """Relative error ``|w' - w| / |w|`` of every module."""
    import mlx.core as mx

    errors: dict[str, float] = {}
    for module in source.modules:
        q, was = plan.choices.get(module.name), source.quantized.get(module.name)
        if q is None:
            continue
        parts = source.parts(module.name)
        exact = (parts["weight"] if was is None else dequantize(parts, was)).astype(source.dtype)
        rounded = (tuned or {}).get(module.name) or quantize(exact, q)
        lost = mx.linalg.norm(dequantize(rounded, q) - exact.astype(mx.float32))
        norm = mx.linalg.norm(exact.astype(mx.float32))
        errors[module.name] = float(lost / mx.maximum(norm, 1e-30))
    return errors
