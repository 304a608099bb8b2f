"""What a frame costs where conversations share an interpreter: ``python -m benchmarks.threads`` in the root.

Conversations on the built-in model always have the next frame waiting. They have three threads each, or all of them
share a scheduler's; the interpreter's switch interval and OpenBLAS's threads vary. Each case runs in a process of its
own, one after the other, again and again, since other programs use the machine as well. For each: frames a second,
processor time of a frame, and how often a thread waited (voluntary switches) or was sent away (involuntary).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CASES: dict[str, dict[str, Any]] = {
    "1 on three threads": {"count": 1},
    "7 on three threads each": {"count": 7},
    "  switch interval 0.5 ms": {"count": 7, "interval": 0.0005},
    "  switch interval 50 ms": {"count": 7, "interval": 0.05},
    "  two threads of OpenBLAS": {"count": 7, "blas": 2},
    "1 on a scheduler": {"count": 1, "shared": True},
    "7 on a scheduler": {"count": 7, "shared": True},
    "12 on a scheduler": {"count": 12, "shared": True},
}


def measure(seconds: float, count: int, interval: float = 0.005, shared: bool = False, blas: int = 1) -> dict[str, Any]:
    """One case, in this process; ``blas`` is the environment's affair."""
    from moshi_mlx_app.models.measure import question

    import moshi_mlx
    from moshi_mlx.realtime import Conversation, Scheduler

    sys.setswitchinterval(interval)
    model = moshi_mlx.load("small")
    speech = list(islice(question(model), 64))
    scheduler = Scheduler(model).start() if shared else None
    crowd = [Conversation(scheduler or model, seed=seed, tap=lambda *_: None).start() for seed in range(count)]
    fed = 0

    def clocks() -> np.ndarray:
        used = resource.getrusage(resource.RUSAGE_SELF)
        frames = sum(conversation.stats.frames for conversation in crowd)
        return np.array([frames, time.monotonic(), used.ru_utime + used.ru_stime, used.ru_nvcsw, used.ru_nivcsw])

    before = clocks()
    while time.monotonic() - before[1] < seconds:
        for conversation in crowd:
            while conversation.backlog * model.frame_rate < 3:
                fed += 1
                conversation.feed(speech[fed % len(speech)])
        time.sleep(0.01)
    frames, wall, spent, waited, sent_away = clocks() - before
    for conversation in crowd:
        conversation.stop()
    if scheduler is not None:
        scheduler.stop()
    return {
        "frames_a_second": round(frames / wall, 1),
        "ms_a_frame": round(1e3 * spent / frames, 2),
        "cores": round(spent / wall, 2),
        "waited": round(waited / frames, 1),
        "sent_away": round(sent_away / frames, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.case:
        print(json.dumps(measure(args.seconds, **CASES[args.case])))
        return 0
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    for _ in range(args.rounds):
        for name, case in CASES.items():
            command = [sys.executable, "-m", "benchmarks.threads", "--seconds", str(args.seconds), "--case", name]
            threads = {"OMP_NUM_THREADS": str(case.get("blas", 1))}
            told = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **threads}, stdout=subprocess.PIPE, check=True, text=True
            )
            found[name].append(json.loads(told.stdout))
    print(f"{'':28} {'frames/s':>8} {'ms/frame':>8} {'cores':>6} {'waited':>7} {'sent away':>9}   medians; load "
          f"{os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")  # fmt: skip
    medians = {
        name: {key: round(float(np.median([one[key] for one in each])), 2) for key in each[0]}
        for name, each in found.items()
    }
    for name, row in medians.items():
        print(f"{name:28} {row['frames_a_second']:8} {row['ms_a_frame']:8} {row['cores']:6} {row['waited']:7} "
              f"{row['sent_away']:9}")  # fmt: skip
    print(json.dumps({"benchmark": "threads", "cases": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
