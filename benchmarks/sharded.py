"""A step on several processes beside one: ``python -m benchmarks sharded``.

One process has the whole model and leads a group that shares it: both take turns in one run, so that other work on the
machine meets both. Processes on one machine share its cores and its memory: they show what messages cost, not what
another machine gains. A step has two parts: the temporal transformer, whose sums all ranks wait for, and the depth
transformer, which rank 0 computes while the others are free.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

import moshi_mlx
from moshi_mlx.engine.choose import choose_text
from moshi_mlx.engine.generator import Generator
from moshi_mlx.sharding import launch, step_traffic

from .workers import machine, summary

PARTS = ("temporal", "depth", "step")


class _Timed:
    """A generator whose steps are taken apart."""

    def __init__(self, model: Any):
        self.config = model.lm.config
        self.generator = Generator(model.lm)
        self.series: dict[str, list[float]] = {name: [] for name in PARTS}
        backend: Any = self.generator._numpy_backend
        run = backend.run

        def timed(function: Callable[..., Any], kind: Any, *args: Any) -> Any:
            if function is not choose_text:
                return run(function, kind, *args)
            began = time.perf_counter()
            made = run(function, kind, *args)
            mx.eval(made["hidden"])
            self._ended = time.perf_counter()
            self.series["temporal"].append(1e3 * (self._ended - began))
            return made

        backend.run = timed

    def steps(self, count: int) -> None:
        codes = np.zeros((1, self.config.user_q), np.int32)
        for _ in range(count):
            began = time.perf_counter()
            self.generator.step(codes)
            ended = time.perf_counter()
            self.series["depth"].append(1e3 * (ended - self._ended))
            self.series["step"].append(1e3 * (ended - began))

    def clear(self) -> None:
        for values in self.series.values():
            values.clear()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks sharded", description=__doc__)
    parser.add_argument("--model", default="small")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hosts", default="", help="as of moshi-mlx-local talk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="steps of each in a round")
    args = parser.parse_args(argv)
    about = machine()
    print(about)
    plain = moshi_mlx.load(args.model, backend="mlx")
    hosts = [name for name in args.hosts.split(",") if name]
    leader = launch(hosts, args.ranks, silence=20, late=30)
    if leader is None:
        raise SystemExit("one process is nothing to compare: --ranks 2, or --hosts")
    with leader:
        shared = moshi_mlx.load(args.model, sharding=leader)
        one, several = _Timed(plain), leader.call(_Timed, shared)
        one.steps(3)
        leader.call(several.steps, 3)
        for each in (one, several):
            each.clear()
        orders, sent = leader.orders, leader.order_bytes
        for _ in range(args.rounds):
            one.steps(args.steps)
            leader.call(several.steps, args.steps)
        count = args.rounds * args.steps
        orders, sent = (leader.orders - orders) / count, (leader.order_bytes - sent) / count
    ranks, lm = leader.place.size, plain.lm
    traffic = step_traffic(lm.config, itemsize=lm.dtype.size)
    rows = {
        name: {part: summary(each.series[part]) for part in PARTS}
        for name, each in (("one", one), ("several", several))
    }
    print(f"{'ms, median':24}" + "".join(f"{part:>10}" for part in PARTS))
    for name, title in (("one", "1 process"), ("several", f"{ranks} processes")):
        print(f"{title:24}" + "".join(f"{rows[name][part]['p50']:10.2f}" for part in PARTS))
    ratio = float(np.median(np.array(several.series["step"]) / np.array(one.series["step"])))
    message = max(rows["several"]["temporal"]["p50"] - rows["one"]["temporal"]["p50"] / ranks, 0.0) / traffic.sums
    depth = rows["one"]["depth"]["p50"]
    more = 2 * lm.config.depformer_num_layers * lm.config.dep_q
    print(f"a step takes {ratio:.2f} times as long as in one process")
    print(
        f"messages a step: {traffic.sums} sums of {traffic.sum_bytes // traffic.sums:,} bytes that all wait for, about "
        f"{message:.2f} ms each; {orders:.0f} order of {sent / max(orders, 1):,.0f} bytes, signs of life included"
    )
    print(
        f"overlapped: the others receive an order and build their graph while rank 0 builds its own; they wait for "
        f"nothing during the {rows['several']['depth']['p50']:.2f} ms of rank 0's depth transformer"
    )
    print(
        f"a divided depth transformer would need {more} sums more: {more * message:.1f} ms, to save "
        f"{depth * (1 - 1 / ranks):.1f} of {depth:.1f} ms"
    )
    figures = {
        "benchmark": "sharded",
        "machine": about,
        "model": args.model,
        "ranks": ranks,
        "ratio": ratio,
        "rows": rows,
        "sums": traffic.sums,
        "sum_bytes": traffic.sum_bytes,
        "orders": orders,
        "order_bytes": sent,
        "ms_per_sum": message,
        "sums_of_a_divided_depth": more,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
