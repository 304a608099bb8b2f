"""What the command does, once its arguments are in order."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx

from moshi_mlx.checkpoint.resolve import CheckpointFiles, resolve
from moshi_mlx.errors import CheckpointError, ConfigError
from moshi_mlx.printable import printable

from .measure.compare import LESSONS, measure_recipes
from .measure.evaluate import Recording, read_recording
from .measure.report import Report
from .plan.recipes import RECIPES, Module, Plan, Recipe, Rule, describe, make_plan, uniform
from .source import Source, open_source, scratch_bytes
from .terminal import Bar, say, warn
from .write.card import model_card, parts_table, upload
from .write.convert import Result, check, check_space, planned_entries, write_checkpoint
from .write.distill import Tuned
from .write.staging import Staging
from .write.targets import as_path, check_apart, check_report, check_target, files_of
from .write.writer import entry_bytes

__all__ = ["choose_plan", "find_recipe", "run"]

MOST_LINES = 10


def run(args: argparse.Namespace) -> int:
    """Measure, quantize, check, and move into place; returns the exit status."""
    recipes = [find_recipe(name) for name in args.compare]
    rules = [Rule.parse(text) for text in args.rule]
    staging: Staging | None = None
    if args.dest is not None:
        dest = as_path(args.dest)
        check_apart(dest, [as_path(text) for text in (args.source, args.lora, args.calibration) if text is not None])
        check_target(dest, args.force)
        staging = Staging(dest, force=args.force)
    if args.report is not None:
        args.report = as_path(args.report)
        check_report(args.report, args.force, [] if staging is None else [staging.target, staging.room])
    recording: Recording | None = None
    if args.measures:
        seconds = args.frames * 0.08 * (1 + (LESSONS if args.distill else 0))
        recording = read_recording(None if args.calibration is None else as_path(args.calibration), seconds)
    try:
        if staging is not None:
            return _convert(args, staging, recording, recipes, rules)
        assert recording is not None  # without DEST there is something to compare
        with Bar(shown=not args.quiet) as bar, TemporaryDirectory() as place:
            bar.stage(f"looking for {args.source}")
            files = resolve(args.source, weights=args.weights)
            report, _, _ = _measure(args, files, Path(place), recording, recipes, None, bar)
        _show(args, report)
        return 0
    except KeyboardInterrupt:
        if staging is None or not staging.done:
            raise
        warn(f"{staging.target} is complete", "stopped")
        return 130


def _convert(
    args: argparse.Namespace,
    staging: Staging,
    recording: Recording | None,
    recipes: Sequence[Recipe],
    rules: Sequence[Rule],
) -> int:
    """Write DEST, and measure if there is a recording for it."""
    began = time.perf_counter()
    target = args.target_bpw is not None or args.target_size is not None
    recipe = None if target else _recipe(args)
    report: Report | None = None
    found: Plan | None = None
    tuned: Tuned = {}
    with Bar(shown=not args.quiet) as bar, staging:
        bar.stage(f"looking for {args.source}")
        files = resolve(args.source, weights=args.weights)
        check_apart(staging.target, files_of(files))
        check_space(staging.folder, scratch_bytes(files))
        if recording is not None:
            choose = None if target else partial(choose_plan, recipe=recipe, rules=rules)
            report, found, tuned = _measure(args, files, staging.scratch, recording, recipes, choose, bar)
        source = _open(args, files, staging.scratch)
        plan = choose_plan(source.modules, recipe, rules) if found is None else found
        requantized = bool(source.quantized) and plan.name != "dense"
        result = write_and_check(source, plan, files, staging.folder, args, bar, tuned)
        card = model_card(files, plan, result, source, report)
        (staging.folder / "README.md").write_text(card, encoding="utf-8")
        staging.commit()
    try:
        _show(args, report)
    except CheckpointError as error:
        raise CheckpointError(f"{staging.target} is complete, but {error}") from error
    if args.upload_repo is not None:
        with Bar(shown=not args.quiet) as bar:
            bar.stage(f"uploading to {args.upload_repo}")
            upload(staging.target, args.upload_repo)
    if not args.quiet:
        _summary(staging.target, plan, result, source.modules, time.perf_counter() - began)
    if requantized:
        warn(f"{args.source} is quantized already: its errors stay in the result. A bf16 source gives a better one")
    return 0


def _measure(
    args: argparse.Namespace,
    files: CheckpointFiles,
    scratch: Path,
    recording: Recording,
    recipes: Sequence[Recipe],
    choose: Callable[[Sequence[Module]], Plan] | None,
    bar: Bar,
) -> tuple[Report, Plan | None, Tuned]:
    source = _open(args, files, scratch)
    plan = None if choose is None else choose(source.modules)
    if plan is not None and not args.rule:  # what is written is measured anyway
        recipes = [recipe for recipe in recipes if recipe.name != plan.name]
    return measure_recipes(args, files, source, recording, recipes, plan, bar)


def _show(args: argparse.Namespace, report: Report | None) -> None:
    if report is None:
        return
    if not args.quiet:
        say(f"measured on {report.calibration}")
        say(report.table() + "\n")
    if args.report is not None:
        report.write(args.report)


def write_and_check(
    source: Source,
    plan: Plan,
    files: CheckpointFiles,
    folder: Path,
    args: argparse.Namespace,
    bar: Bar,
    tuned: Tuned,
) -> Result:
    """The result in ``folder``, loaded strictly and run for one frame."""
    made = {"source": printable(files.source), "revision": files.revision or ""}
    bar.stage("quantizing" if plan.name != "dense" else "writing", entry_bytes(planned_entries(source, plan).values()))
    result = write_checkpoint(
        source, plan, files, folder, reference=args.reference_files, made=made, tuned=tuned, progress=bar.advance
    )
    bar.stage("checking")
    check(folder, result.weights)
    return result


def _open(args: argparse.Namespace, files: CheckpointFiles, scratch: Path) -> Source:
    dtype = None if args.dtype is None else getattr(mx, args.dtype)
    return open_source(files, scratch, lora=args.lora, lora_scaling=args.lora_scaling, dtype=dtype)


def _recipe(args: argparse.Namespace) -> Recipe | None:
    """None: everything dense."""
    if args.dequantize:
        return None
    if args.recipe is not None:
        return find_recipe(args.recipe)
    q = uniform(args.q_bits, args.q_group_size, args.q_mode or "affine")
    return Recipe(describe(q).replace(":", "-bit-g") if q.mode == "affine" else q.mode, "uniform", q)


def find_recipe(name: str) -> Recipe:
    """A named recipe, or ``BITS:GROUP`` or a mode as one.

    Raises
    ------
    ConfigError
        If there is none of that name.
    """
    if name in RECIPES:
        return RECIPES[name]
    try:
        q = Rule.parse(f"*={name}").q
    except ConfigError:
        q = None
    if q is None:
        raise ConfigError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}, and BITS:GROUP, as in 4:64")
    return Recipe(name, "uniform", q)


def choose_plan(modules: Sequence[Module], recipe: Recipe | None, rules: Sequence[Rule]) -> Plan:
    """The recipe with its exceptions; without a recipe everything is dense."""
    if recipe is None:
        return Plan("dense", {module.name: None for module in modules})
    return make_plan(modules, recipe, rules, recipe.name + (" with rules" if rules else ""))


def _summary(dest: Path, plan: Plan, result: Result, modules: Sequence[Module], seconds: float) -> None:
    say(parts_table(plan, result, modules))
    before, after = result.bytes_before / 1e6, result.bytes_after / 1e6
    say(
        f"{dest / result.weights}: {after:,.2f} MB instead of {before:,.2f} MB, "
        f"{result.bits_per_weight:.2f} bits per weight, {seconds:.0f} s"
    )
    skipped = sorted(plan.skipped.items())
    for name, reason in skipped[:MOST_LINES]:
        say(f"dense: {name} ({reason})")
    if len(skipped) > MOST_LINES:
        say(f"dense: {len(skipped) - MOST_LINES} more, which README.md lists")
