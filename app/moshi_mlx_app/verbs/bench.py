"""``moshi-mlx-local bench``: how long each stage takes, as fast as it goes and at the pace of a conversation."""

from __future__ import annotations

import argparse
import json
from typing import Any

from moshi_mlx_app.options import add_generation_options, add_model_options, bounded, generation_from
from moshi_mlx_app.terminal import Loading, say
from moshi_mlx_app.version import program

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

HELP = "measure the speed of codec and model, stage by stage"
EXAMPLES = """\
examples:
  moshi-mlx-local bench
  moshi-mlx-local bench --model org/name --frames 500
  moshi-mlx-local bench | tail -1                    one JSON object

Unpaced: one frame after the other, stage by stage. Paced: a frame every 80 ms
through the threads of a conversation, where late and dropped frames show.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's own options and the shared ones."""
    parser.add_argument(
        "--frames", type=bounded(int, 4, 1_000_000), default=100, metavar="N", help="in each run (default: %(default)s)"
    )
    add_model_options(parser)
    add_generation_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure; print a table and one line of JSON. Returns the exit status."""
    import moshi_mlx
    from moshi_mlx.model import generation_defaults
    from moshi_mlx_app.measure import machine, memory_used, paced, unpaced

    with Loading() as loading:
        model = moshi_mlx.load(args.model, codec=args.codec, on_progress=loading)
        generation = generation_from(args, generation_defaults(model.config))
        loading("as fast as it goes")
        fast = unpaced(model, args.frames, generation)
        loading("at the pace of a conversation")
        slow = paced(model, args.frames, generation)
    here = machine()
    say(f"{program()}: {model.description}")
    say(f"{here['system']} {here['machine']}, {here['cores']} cores, MLX {here['packages']['mlx']} on {here['device']}")
    say(f"{'ms':10} {'p50':>8} {'p95':>8} {'max':>8}    paced: {'p50':>8} {'p95':>8} {'max':>8}")
    for name in ("encode", "step", "decode", "frame", "answer"):
        say(f"{name:10} {_row(fast.get(name))}           {_row(slow.get(name))}".rstrip())
    say(
        f"real-time factor {fast['rtf']}; paced: {slow['late']} of {slow['frames']} frames late, "
        f"{slow['dropped_seconds']} s dropped; {memory_used() / 1e9:.2f} GB"
    )
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


def _row(times: dict[str, Any] | None) -> str:
    return " " * 26 if times is None else " ".join(f"{times[name]:8.1f}" for name in ("p50", "p95", "max"))
