"""Long sessions: a step at frame 45,000 (an hour) against frame 3,000, and memory on the way.

One conversation is run to each mark and waits there; then both continue in turns, so that other load affects both
equally. Moshi's context of 3,000 in a narrow model (64 x 2 layers, 64 x 1 layer x 8 steps), so that the hour
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
CLOCKS = ("cpu", "wall")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks lm_long", description=__doc__)
    parser.add_argument("--frames", type=int, default=45_000)
    parser.add_argument("--rounds", type=int, default=40, help="blocks of 25 steps of each at the end")
    parser.add_argument(
        "--skip", type=int, default=0, help="skip so many frames by advancing the counters once the cache is full"
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
        times: dict[str, dict[str, list[float]]] = {name: {clock: [] for clock in CLOCKS} for name in ("early", "late")}
        for _ in range(args.rounds):
            for name, worker in (("early", early), ("late", late)):
                answer = worker.ask(steps=25)
                for clock, values in times[name].items():
                    values += answer[clock]
    changes = {clock: float(np.median(times["late"][clock]) / np.median(times["early"][clock])) - 1 for clock in CLOCKS}
    print(f"{'frame':>8} {'cpu p50':>9} {'cpu min':>9} {'wall p50':>9} {'wall min':>9} milliseconds")
    for frame, name in ((EARLY, "early"), (args.frames, "late")):
        cells = [summary(times[name][clock])[key] for clock in CLOCKS for key in ("p50", "min")]
        print(f"{frame:8d} " + " ".join(f"{cell:9.2f}" for cell in cells))
    told = ", ".join(f"{100 * change:+.1f} % ({clock})" for clock, change in changes.items())
    print(f"later steps take {told}; resident memory: {memory}")
    rows = {
        **{name: {clock: summary(values) for clock, values in both.items()} for name, both in times.items()},
        "change": {clock: round(change, 4) for clock, change in changes.items()},
        "resident_mb": memory,
    }
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
