"""Two Macs as one, calculated, not measured: ``python -m benchmarks sharded_on_paper``.

As mac_on_paper: bytes by published bandwidth with its reserve. The temporal transformer and its cache are halved, the
depth transformer and the heads are on the first Mac, and each sum takes a delay and its bytes by the link's rate. The
delay of a message between two Macs, MLX's hand-over between GPU and processor included, is the unknown: the table has
several. ``python -m benchmarks sharded -- --hosts A,B`` measures it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from moshi_mlx_quantize.plan.recipes import RECIPES, make_plan, modules_of

from moshi_mlx.config import ModelConfig
from moshi_mlx.models.lm import Lm
from moshi_mlx.models.mimi import Mimi, MimiConfig
from moshi_mlx.sharding import step_traffic

from .mac_on_paper import CHIPS, EFFICIENCY, LAUNCH, cache_bytes, codec_bytes, codec_kernels, step_kernels

CASES = {"two M1, q4": ("M1", "q4"), "two M4 Pro, bf16": ("M4 Pro", None)}
LINKS = {"10 Gbit/s": 10e9 / 8, "40 Gbit/s": 40e9 / 8}
DELAYS = (0.05, 0.1, 0.3, 0.5)


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m benchmarks sharded_on_paper", description=__doc__).parse_args(argv)
    config = ModelConfig.moshi_7b().lm
    lm = Lm(config)
    modules, cache = modules_of(lm), cache_bytes(lm)
    codec, launched = codec_bytes(Mimi(MimiConfig(), 8)), step_kernels(config) + codec_kernels()
    traffic = step_traffic(config)
    print("CALCULATED from configurations and published bandwidths; nothing here was run on a Mac.")
    print(f"a step of Moshi 7B: {traffic.sums} sums of {traffic.sum_bytes // traffic.sums:,} bytes, {launched} kernels")
    rows = []
    for title, (chip, recipe) in CASES.items():
        plan = None if recipe is None else make_plan(modules, RECIPES[recipe])
        held = {"temporal": 0, "tables": 0, "rest": 0}
        read = 0
        for module in modules:
            size = module.bytes(None if plan is None else plan.choices.get(module.name))
            depth = module.name.startswith("depformer")
            table = "emb" in module.part
            kind = "temporal" if module.name.startswith("transformer") else "tables" if table and not depth else "rest"
            held[kind] += size
            read += size if kind == "rest" and not table else 0
        rate = CHIPS[chip] * 1e9 * EFFICIENCY
        fixed = (read + codec) / rate + launched * LAUNCH
        one = (held["temporal"] + cache) / rate + fixed
        shared = (held["temporal"] + cache) / 2 / rate + fixed
        memory = {
            "one": sum(held.values()) + cache + codec,
            "first": held["temporal"] / 2 + held["tables"] + held["rest"] + cache / 2 + codec,
            "second": held["temporal"] / 2 + held["tables"] + cache / 2,
        }
        times = {
            link: [1e3 * (shared + traffic.sums * (delay / 1e3 + traffic.sum_bytes / traffic.sums / bytes_a_second))
                   for delay in DELAYS]
            for link, bytes_a_second in LINKS.items()
        }  # fmt: skip
        even = 1e3 * (one - shared) / traffic.sums
        print(f"\n{title}: GB at a full context: one {memory['one'] / 1e9:.1f}, first {memory['first'] / 1e9:.1f}, "
              f"second {memory['second'] / 1e9:.1f}; ms a frame in one: {1e3 * one:.1f}")  # fmt: skip
        print(f"{'delay of a message, ms':24}" + "".join(f"{delay:8.2f}" for delay in DELAYS))
        for link, values in times.items():
            print(f"{link + ': ms a frame':24}" + "".join(f"{value:8.1f}" for value in values))
        print(f"two are faster than one if a message takes less than {even:.2f} ms")
        rows.append({"case": title, "memory": memory, "one_ms": 1e3 * one, "ms": times, "even_ms": even})
    print(json.dumps({"benchmark": "sharded_on_paper", "calculated": True, "delays_ms": DELAYS, "rows": rows}))


if __name__ == "__main__":
    main()
