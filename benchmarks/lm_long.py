"""Long sessions: a step at frame 45,000 (an hour) against frame 3,000, and memory on the way.

One conversation is run to each mark and waits there; then both go on in turns, so that what else the machine does
meets both alike. Moshi's context of 3,000 in a narrow model (64 x 2 layers, 64 x 1 layer x 8 steps), so that the hour
takes minutes; ``--wide`` takes the built-in model's widths.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import numpy as np

from .workers import Worker, machine, summary

NARROW = {
    "dim": 64, "layers": 2, "heads": 2, "context": 3000, "depth_dim": 64, "depth_layers": 1, "depth_heads": 2,
    "text_card": 100, "dtype": "float32", "bits": 0, "greedy": True, "most": 0,
}  # fmt: skip
WIDE = {**NARROW, "dim": 256, "layers": 4, "heads": 4, "depth_dim": 128, "depth_layers": 2, "depth_heads": 4}
EARLY, BLOCK = 3000, 500


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks lm_long", description=__doc__)
    parser.add_argument("--frames", type=int, default=45_000)
    parser.add_argument("--rounds", type=int, default=40, help="blocks of 25 steps of each at the end")
    parser.add_argument(
        "--skip", type=int, default=0, help="of them so many by setting the counters ahead once the cache is full"
    )
    parser.add_argument("--wide", action="store_true", help="the built-in model's widths")
    args = parser.parse_args(argv)
    sizes = WIDE if args.wide else NARROW
    about = machine()
    print(about)
    memory = {}
    with Worker("lm_ours.py", sizes) as early, Worker("lm_ours.py", sizes) as late:
        began = time.monotonic()
        for worker, frames in ((early, EARLY), (late, args.frames - args.skip)):
            done = 0
            while done < frames:
                step = min(BLOCK, frames - done)
                answer = worker.ask(steps=step)
                done += step
                if worker is late and (done % 5000 == 0 or done in (500, EARLY, frames)):
                    memory[done] = round(answer["resident_mb"] or 0, 1)
                    told = f"\rframe {done}, {answer['resident_mb']:.1f} MB, {time.monotonic() - began:.0f} s "
                    print(told, end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        if args.skip:
            late.ask(skip=args.skip)
        first: list[float] = []
        last: list[float] = []
        for _ in range(args.rounds):
            first += early.ask(steps=25)["cpu"]
            last += late.ask(steps=25)["cpu"]
    change = float(np.median(last) / np.median(first)) - 1
    print(f"{'frame':>8} {'cpu p50':>9} {'cpu min':>9} milliseconds")
    for frame, values in ((EARLY, first), (args.frames, last)):
        print(f"{frame:8d} {summary(values)['p50']:9.2f} {summary(values)['min']:9.2f}")
    print(f"later steps take {100 * change:+.1f} %; resident memory: {memory}")
    rows = {"early": summary(first), "late": summary(last), "change": round(change, 4), "resident_mb": memory}
    print(
        json.dumps(
            {
                "benchmark": "lm_long",
                "machine": about,
                "frames": args.frames,
                "skipped": args.skip,
                "settings": sizes,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
