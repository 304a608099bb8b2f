"""``moshi-mlx-local bench``: the time of each stage, at full speed and at the pace of a conversation."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from moshi_mlx_app.options import (
    add_generation_options,
    add_machine_options,
    add_model_options,
    bounded,
    generation_from,
)
from moshi_mlx_app.recording.outputs import Output, partial_name, replace_text, reserved
from moshi_mlx_app.screen.terminal import Loading, say, warn
from moshi_mlx_app.version import program

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

HELP = "measure the speed of codec and model, stage by stage"
EXAMPLES = """\
examples:
  moshi-mlx-local bench
  moshi-mlx-local bench --model kyutai/moshiko-mlx-q4
  moshi-mlx-local bench --json                       one JSON object
  moshi-mlx-local bench --picture bench.svg          every frame, stage by stage

Unpaced: one frame after the other, stage by stage. Paced: a frame every 80 ms
through the threads of a conversation, where late and dropped frames show.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options and the shared ones."""
    parser.add_argument(
        "--frames",
        type=bounded(int, 4, 1_000_000),
        default=100,
        metavar="N",
        help="frames in each of the two runs (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    parser.add_argument("--picture", metavar="FILE.svg", help="draw the times of every frame as SVG")
    parser.add_argument("--force", action="store_true", help="replace an existing picture")
    add_model_options(parser)
    add_generation_options(parser)
    add_machine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure; print a table and one line of JSON. Returns the exit status."""
    outputs = []
    if args.picture is not None:
        path = Path(args.picture)
        if path.suffix.lower() != ".svg":
            args.parser.error(f"--picture {path}: the picture is SVG; give it a name that ends in .svg")
        outputs.append(Output("the picture", "--picture", path, partial_name(path)))
    with reserved(args.parser, outputs, others={}, force=args.force):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from moshi_mlx.tasks.dialogue import generation_defaults
    from moshi_mlx_app.models.fetch import load_model, refuse_deaf
    from moshi_mlx_app.models.measure import machine, memory_used, paced, unpaced

    model = load_model(args, accept=refuse_deaf)  # text models have nothing to measure here
    fast_series: dict[str, list[float]] = {}
    slow_series: dict[str, list[float]] = {}
    with Loading() as loading:
        generation = generation_from(args, generation_defaults(model.config))
        loading("measuring at full speed")
        fast = unpaced(model, args.frames, generation, series=fast_series)
        loading("measuring at the pace of a conversation")
        slow = paced(model, args.frames, generation, series=slow_series)
    here = machine()
    about = (
        f"{here['system']} {here['machine']}, {here['cores']} cores, MLX {here['packages']['mlx']} on {here['device']}"
    )
    if args.picture is not None:
        from moshi_mlx_app.screen.picture import draw

        title = f"{program()}: {model.description}"
        picture = draw(title, about, fast_series, slow_series, 1e3 / model.frame_rate)
        replace_text(Path(args.picture), picture)
        warn(args.picture, "picture")
    if not args.json:
        say(f"{program()}: {model.description}", about)
        _table(fast, slow)
    figures = {
        "benchmark": "bench",
        "program": program(),
        "model": model.name,
        "machine": here,
        "unpaced": fast,
        "paced": slow,
        "memory_used": memory_used(),
    }
    say(json.dumps(figures))
    return 0


def _table(fast: dict[str, Any], slow: dict[str, Any]) -> None:
    from moshi_mlx_app.models.measure import memory_used

    say(f"{'ms':10} {'p50':>8} {'p95':>8} {'max':>8}    paced: {'p50':>8} {'p95':>8} {'max':>8}")
    for name in ("encode", "step", "decode", "frame", "latency"):
        say(f"{name:10} {_row(fast.get(name))}           {_row(slow.get(name))}".rstrip())
    say(
        f"real-time factor {fast['rtf']}; paced: {slow['late']} of {slow['frames']} frames late, "
        f"{slow['dropped_seconds']} s dropped; {memory_used() / 1e9:.2f} GB"
    )


def _row(times: dict[str, Any] | None) -> str:
    return " " * 26 if times is None else " ".join(f"{times[name]:8.1f}" for name in ("p50", "p95", "max"))
