"""Memory of a training step: calculated for Moshi 7B in 4 and 8 bits, and measured on stand-ins of the same shape.

The calculation (`moshi_mlx_finetune.learn.memory`) reads shapes only: the 7B model is never evaluated. The stand-ins
are Moshi's architecture with fewer and narrower layers, on which it is compared with what MLX allocated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

MACS = (16, 24, 32)
GRANTED = 0.67  # of a Mac's memory that Metal grants a program, as a rule; 0.75 above 32 GB
LENGTHS = (250, 500, 1250)  # frames: 20, 40 and 100 s


def packed(config: Any, bits: int, group: int = 32, dtype: mx.Dtype = mx.bfloat16) -> Any:
    """A model of these sizes with packed weights, unevaluated."""
    from moshi_mlx.models.lm import Lm

    lm = Lm(config)
    lm.update(tree_map_with_path(lambda _, value: value.astype(dtype), lm.parameters()))
    if bits < 16:
        nn.quantize(lm, group, bits)
    return lm


def seven_billion(rank: int) -> list[dict[str, Any]]:
    """What a step takes, and the longest piece that fits into each Mac."""
    from moshi_mlx_finetune.learn.adapters import Adapter
    from moshi_mlx_finetune.learn.memory import SHORTEST, calculate
    from moshi_mlx_finetune.learn.trainer import Plan

    from moshi_mlx.config import ModelConfig

    rows = []
    plan = Plan(adapter=Adapter(rank=rank))
    for name, bits in (("4 bits", 4), ("8 bits", 8), ("bfloat16", 16)):
        lm = packed(ModelConfig.moshi_7b().lm, bits)
        row: dict[str, Any] = {"weights": name, "rank": rank}
        for frames in LENGTHS:
            row[f"{frames / 12.5:.0f} s"] = round(calculate(lm, plan, frames).total / 1e9, 2)
        for memory in MACS:
            limit, fits = GRANTED * memory * 2**30, 0
            for frames in range(SHORTEST, 1251, 25):
                fits = frames if calculate(lm, plan, frames).total <= limit else fits
            row[f"{memory} GB"] = fits / 12.5
        rows.append(row)
    return rows


def stand_ins(frames: Sequence[int]) -> list[dict[str, Any]]:
    """Calculated and measured bytes of steps on small models."""
    from moshi_mlx_finetune.learn.adapters import Adapter
    from moshi_mlx_finetune.learn.memory import calculate, measured
    from moshi_mlx_finetune.learn.trainer import Plan, Trainer

    from moshi_mlx.config import ModelConfig

    base = ModelConfig.moshi_7b().lm
    sizes = {
        "512 x 4": replace(base, dim=512, num_heads=4, num_layers=4, text_card=4000, depformer_dim=128,
                           depformer_dim_feedforward=528, depformer_num_heads=2, depformer_num_layers=2, card=512),
        "1024 x 3": replace(base, dim=1024, num_heads=8, num_layers=3, text_card=8000, depformer_dim=256,
                            depformer_dim_feedforward=1056, depformer_num_heads=4, depformer_num_layers=1),
    }  # fmt: skip
    rows = []
    for name, config in sizes.items():
        for recompute in (True, False):
            plan = Plan(adapter=Adapter(rank=8), recompute=recompute)
            lm = packed(config, 4, dtype=mx.float32)
            mx.eval(lm.parameters())
            trainer = Trainer(lm, plan)
            for count in frames:
                need, found = calculate(lm, plan, count), measured(trainer, count)
                rows.append({
                    "model": name, "frames": count, "recompute": recompute, "calculated": need.total,
                    "measured": found, "ratio": round(found / need.total, 2),
                })  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks finetune_memory", description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--frames", type=int, nargs="+", default=[50, 125], help="of the stand-ins' pieces (50 125)")
    options = parser.parse_args(argv)
    print("Moshi 7B, calculated: GB of a step on one piece of so many seconds; longest piece (s) that fits into a Mac")
    calculated = seven_billion(options.rank)
    for row in calculated:
        print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    print("stand-ins in 4 bits, MB")
    measured = stand_ins(options.frames)
    for row in measured:
        print(
            f"  {row['model']:9} {row['frames']:4} frames, {'recomputed' if row['recompute'] else 'all kept':10}: "
            f"calculated {row['calculated'] / 1e6:7.1f}, measured {row['measured'] / 1e6:7.1f}, ratio {row['ratio']}",
            flush=True,
        )
    print(json.dumps({"benchmark": "finetune_memory", "moshi_7b": calculated, "stand_ins": measured}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
