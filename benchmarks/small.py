"""The built-in model as a conversation runs it, codec and language model: ``python -m benchmarks.small``.

Frames of recorded questions go through encoder, model and decoder one after the other; then through a conversation's
threads, one every 80 ms. On Linux the process keeps to two cores. Nothing is preloaded. A table, then one JSON line.

Wall time holds what other programs take from this one. Processor time does not, and is what an idle machine needs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import Any

import numpy as np
from moshi_mlx_app.models.measure import memory_used, paced, question

import moshi_mlx
from benchmarks.workers import machine
from moshi_mlx.tasks.dialogue import Moshi

CORES = 2
STAGES = ("encode", "step", "decode", "frame")


def stages(model: Moshi, frames: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every frame, by stage, as ``wall`` and as ``cpu``: processor time of all threads."""
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in STAGES}
    with model.session() as session:
        for index, pcm in enumerate(islice(question(model), frames + 5), start=-5):  # the first few allocate
            marks = [_now()]
            session.on_stage = lambda *_, marks=marks: marks.append(_now())
            session.step(pcm)
            spans = zip(STAGES, [*pairwise(marks), (marks[0], _now())], strict=True)
            for name, (first, last) in spans:
                for clock, kind in enumerate(("wall", "cpu")):
                    if index >= 0:
                        found[name][kind].append(1e3 * (last[clock] - first[clock]))
    return found


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


@contextmanager
def two_cores() -> Iterator[None]:
    """Keep this process, and the threads that it starts, to two cores where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    given = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(given)[:CORES])
    try:
        yield
    finally:
        os.sched_setaffinity(0, given)


def percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{percent}": round(float(np.percentile(values, percent)), 2) for percent in (50, 95, 100)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small", description="The built-in model, live.")
    parser.add_argument("--frames", type=int, default=500, help="one after the other (default: %(default)s)")
    parser.add_argument("--paced", type=int, default=250, help="of a conversation, 80 ms each (default: %(default)s)")
    parser.add_argument("--model", default="small")
    args = parser.parse_args(argv)
    model = moshi_mlx.load(args.model)
    here = machine()
    with two_cores():
        times = stages(model, args.frames)
        live: dict[str, Any] | None = paced(model, args.paced) if args.paced else None
    rows = {name: {kind: percentiles(values) for kind, values in both.items()} for name, both in times.items()}
    print(f"{here['processor']}, load {here['load']}; {here['system']}, MLX {here['mlx']}, numpy {here['numpy']}")
    print(f"{model.name}, {args.frames} frames one after the other, milliseconds")
    print(f"{'':10} {'processor time':>24} {'wall time':>24}")
    print(f"{'':10}" + 2 * f" {'p50':>7} {'p95':>7} {'max':>7}")
    for name, row in rows.items():
        cells = [row[kind][percent] for kind in ("cpu", "wall") for percent in ("p50", "p95", "p100")]
        print(f"{name:10}" + "".join(f" {cell:7.1f}" for cell in cells))
    if live is not None:
        print(
            f"a frame every 80 ms: latency p50 {live['latency']['p50']}, p95 {live['latency']['p95']} ms; "
            f"{live['late']} of {live['frames']} frames late, {live['dropped_seconds']} s dropped"
        )
    print(f"memory: {memory_used() / 1e6:.0f} MB")
    figures = {"benchmark": "small", "model": model.name, "machine": here, "cores": CORES, "ms": rows, "paced": live}
    print(json.dumps({**figures, "memory_used": memory_used()}))


if __name__ == "__main__":
    main()
