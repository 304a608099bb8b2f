"""Estimates for Macs, calculated, not measured: ``python -m benchmarks.mac_on_paper``.

One step reads every weight that it multiplies with once, and the keys and values of a full context. Those bytes by
a chip's published memory bandwidth are a floor under the time of a step. Bytes come from the published configurations
and our quantizer's recipes; no weights are made or read. Kernels are counted in the graph of one step of a model of the
same depth and a small width: norm, rotation and attention as one each, as MLX has them on a GPU, and views left out.

The verdict keeps a reserve: a kernel gets 75 % of the published bandwidth, each kernel takes 3 microseconds to launch,
and a tenth of the 80 ms stays free. These three are assumptions. On a Mac, measure with
``moshi-mlx-local bench --json`` instead. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from moshi_mlx_quantize.plan.recipes import RECIPES, Plan, make_plan, modules_of

from benchmarks.workers import graph
from moshi_mlx.config import LmConfig, ModelConfig
from moshi_mlx.cpu.lm import NumpyBackend
from moshi_mlx.engine.generator import GenerationConfig, Generator
from moshi_mlx.models.lm import Lm
from moshi_mlx.models.mimi import Mimi, MimiConfig
from moshi_mlx.state import state_arrays

CONFIGS = Path(__file__).resolve().parents[1] / "tests" / "data" / "configs"
MODELS = {"Moshi 7B": "moshi_7b", "Hibiki 2B": "hibiki_2b", "Hibiki 1B": "hibiki_1b"}
PLANS: dict[str, tuple[str | None, int]] = {  # recipe, and bits of the cache; 0: empty, as a conversation begins
    "bf16": (None, 16), "q8": ("q8", 16), "protect-8": ("protect-8", 16), "q4": ("q4", 16),
    "q4, 8-bit cache": ("q4", 8), "q4, at the start": ("q4", 0),
}  # fmt: skip
CHIPS = {  # GB/s, as Apple's specifications give them
    "M1": 68, "M2, M3": 100, "M4": 120, "M3 Pro": 150, "M5": 153, "M1 Pro, M2 Pro": 200, "M4 Pro": 273,
    "M3 Max (14 cores)": 300, "M1, M2, M3 Max": 400, "M4 Max (14 cores)": 410, "M4 Max": 546, "M1, M2 Ultra": 800,
    "M3 Ultra": 819,
}  # fmt: skip
EFFICIENCY, LAUNCH, FREE = 0.75, 3e-6, 0.1
FRAME = 0.08


def step_bytes(lm: Lm, plan: Plan | None) -> int:
    """Bytes of weights that one step reads in bfloat16 or as ``plan`` says: tables give a row, the rest all of it.

    A set of the depth transformer's weights that several of its steps share is read as often as they are.
    """
    config, total = lm.config, 0
    uses = {index: config.schedule.count(index) for index in set(config.schedule)} if config.dep_q else {}
    for module in modules_of(lm):
        q = None if plan is None else plan.choices.get(module.name)
        size = module.bytes(q)
        if "emb" in module.part:
            total += size // module.rows
            continue
        shared = re.match(r"depformer\.(?:linear_in|layers\.\d+\.(?:in_proj|out_proj|gating))\.(\d+)", module.name)
        total += size * (uses.get(int(shared[1]), 1) if shared else 1)
    return total


def cache_bytes(lm: Lm, kv_bits: int | None = None) -> int:
    """Bytes of keys and values of a full context."""
    lm.set_dtype(mx.bfloat16)
    return sum(array.nbytes for array in state_arrays(lm.init_state(1, kv_bits=kv_bits)) if array.ndim == 4)


def codec_bytes(mimi: Mimi) -> int:
    """Bytes that the codec in float32 reads for a frame in and a frame out; of codebooks, decoding reads rows."""
    return sum(value.nbytes for _, value in tree_flatten(mimi.parameters()))


def narrow(config: LmConfig) -> LmConfig:
    """The same depth, a few channels a head, small vocabularies."""
    return replace(
        config,
        dim=8 * config.num_heads,
        depformer_dim=8 * config.depformer_num_heads,
        depformer_dim_feedforward=16,
        text_card=32,
        card=32,
        context=16,
        conditioners={},
        fuser=None,
    )


def step_kernels(config: LmConfig) -> int:
    """Kernels of one step of a conversation, counted as its parts are handed to MLX."""
    lm = Lm(narrow(config))
    mx.eval(lm.parameters())
    suits, NumpyBackend.suits = NumpyBackend.suits, staticmethod(lambda lm: False)  # type: ignore[method-assign]
    try:
        generator = Generator(lm, GenerationConfig(), seeds=[0])
    finally:
        NumpyBackend.suits = suits  # type: ignore[method-assign]
    codes = np.zeros((1, lm.config.user_q), np.int64) if lm.config.user_q else None
    for _ in range(3):
        generator.step(codes)
    counted = 0
    waited, launched = mx.eval, mx.async_eval

    def count(*parts: Any) -> None:
        nonlocal counted
        counted += graph.count(*[value for _, value in tree_flatten(list(parts)) if isinstance(value, mx.array)])[1]
        waited(*parts)

    mx.eval = mx.async_eval = count
    try:
        with graph.fused():
            generator.step(codes)
    finally:
        mx.eval, mx.async_eval = waited, launched
    return counted


def codec_kernels() -> int:
    """Kernels of a frame in and a frame out, of Mimi at its depth."""
    mimi = Mimi(MimiConfig(), 8)
    mx.eval(mimi.parameters())
    total = 0
    with graph.fused():
        for _ in range(2):  # the second frame: what happens once only is left out
            states = mimi.init_encoder_state(), mimi.init_decoder_state()
            codes = mimi.encode_step(mx.zeros((1, 1, mimi.frame_size)), states[0])
            total = graph.count(codes, *state_arrays(states[0]))[1]
            mx.eval(codes)
            pcm = mimi.decode_step(codes, states[1])
            total += graph.count(pcm, *state_arrays(states[1]))[1]
            mx.eval(pcm)
    return total


def verdict(read: float, launched: int, bandwidth: float) -> dict[str, Any]:
    """Floor and expected milliseconds of a frame at ``bandwidth`` [GB/s], and whether a frame's time holds them."""
    floor = read / (bandwidth * 1e9)
    expected = floor / EFFICIENCY + launched * LAUNCH
    word = "yes" if expected <= (1 - FREE) * FRAME else "just" if expected <= FRAME else "no"
    return {"floor_ms": round(1e3 * floor, 1), "expected_ms": round(1e3 * expected, 1), "holds": word}


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.mac_on_paper", description="Bytes by bandwidth.").parse_args(
        argv
    )
    codec, codec_launched = codec_bytes(Mimi(MimiConfig(), 8)), codec_kernels()
    print("CALCULATED from configurations and published bandwidths; nothing here was run on a Mac.")
    print(
        f"codec: {codec / 1e6:.0f} MB and {codec_launched} kernels a frame, in and out; counted into every figure below"
    )
    print("milliseconds a frame at a full context: floor (with the reserve), and whether 80 ms hold it\n")
    rows = []
    for title, file in MODELS.items():
        config = ModelConfig.from_dict(json.loads((CONFIGS / f"{file}.json").read_text())).lm
        lm = Lm(config)
        modules = modules_of(lm)
        launched = step_kernels(config) + codec_launched
        caches = {16: cache_bytes(lm), 8: cache_bytes(lm, 8), 0: 0}
        row: dict[str, Any] = {
            "model": title, "kernels": launched, "cache_bytes": caches[16], "cache_8_bit_bytes": caches[8],
            "recipes": {},
        }  # fmt: skip
        for name, (recipe, kv_bits) in PLANS.items():
            plan = None if recipe is None else make_plan(modules, RECIPES[recipe])
            read = step_bytes(lm, plan)
            held = sum(module.bytes(None if plan is None else plan.choices.get(module.name)) for module in modules)
            chips = {chip: verdict(read + caches[kv_bits] + codec, launched, speed) for chip, speed in CHIPS.items()}
            row["recipes"][name] = {"file_bytes": held, "read_bytes": read, "chips": chips}
        rows.append(row)
        held_keys = f"keys and values {caches[16] / 1e6:.0f} MB (in 8 bits {caches[8] / 1e6:.0f})"
        print(f"{title}: {launched} kernels; {held_keys}")
        print(f"{'':22}" + "".join(f"{name:>22}" for name in PLANS))
        for text, key in (("file, GB", "file_bytes"), ("read a step, GB", "read_bytes")):
            print(f"{text:22}" + "".join(f"{row['recipes'][name][key] / 1e9:22.2f}" for name in PLANS))
        for chip, speed in CHIPS.items():
            cells = [row["recipes"][name]["chips"][chip] for name in PLANS]
            line = "".join(f"{c['floor_ms']:7.1f} ({c['expected_ms']:6.1f}) {c['holds']:>5}" for c in cells)
            print(f"{chip + f', {speed}':22}{line}")
        print()
    print("a measurement instead, on a Mac: moshi-mlx-local bench --model kyutai/moshiko-mlx-q4 --json")
    print(json.dumps({"benchmark": "mac_on_paper", "calculated": True, "gb_per_s": CHIPS, "codec_bytes": codec,
        "assumed": {"efficiency": EFFICIENCY, "launch_s": LAUNCH, "free": FREE}, "models": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
