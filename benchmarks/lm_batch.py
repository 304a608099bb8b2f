"""Many conversations on one machine: frames a second at batch 1 to 32, and where it stops being real time.

The built-in model advances a batch of conversations together on one thread, and so does its codec. Measured in
processor time, which other programs do not affect. Real time is 12.5 frames a second.

Then 16 conversations compared with one, in numpy and in MLX (with float32 weights): started together, started one after
the other, and with four of them waiting. MLX's wheel for Linux multiplies without vector instructions, so that 16 rows
cost it 16 times one row; OpenBLAS in front of it (LD_PRELOAD) shows the cost apart from its matrix product.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

import moshi_mlx
from moshi_mlx.config import UNGENERATED
from moshi_mlx.cpu.lm import Backend
from moshi_mlx.engine import generator as generate
from moshi_mlx.engine.generator import GenerationConfig, Generator
from moshi_mlx.models.lm import Lm
from moshi_mlx.tasks.dialogue import generation_defaults

from . import codec_batch
from .workers import machine

BATCHES = (1, 2, 4, 8, 16, 32)
MANY = 16


def many_beside_one(lm: Lm, config: GenerationConfig, steps: int) -> dict[str, float]:
    """Milliseconds of processor time a step (medians), of one conversation and of many."""
    one, together, staggered = (Generator(lm, config, seeds=None) for _ in range(3))
    rng, users = np.random.default_rng(0), lm.config.user_q

    def step(generator: Generator, names: Sequence[int]) -> float:
        codes = rng.integers(0, lm.config.card, (len(names), users))
        codes[[generator.position_of(name) == 0 for name in names]] = UNGENERATED
        used = time.process_time()
        generator.step_rows(names, codes)
        return 1e3 * (time.process_time() - used)

    one.join()
    for number in range(MANY):
        together.join(seed=number)
        staggered.join(seed=number)
        for _ in range(3):
            step(one, one.rows)
            step(staggered, staggered.rows)
    for _ in range(3 * MANY // 2):  # as many keys to read as the staggered ones have on average
        step(together, together.rows)
    took: dict[str, list[float]] = {"one": [], "together": [], "staggered": [], "a quarter waits": []}
    for _ in range(steps + 3):
        took["one"].append(step(one, one.rows))
        took["together"].append(step(together, together.rows))
        took["staggered"].append(step(staggered, staggered.rows))
        some = rng.permutation(staggered.rows)[: MANY * 3 // 4].tolist()
        took["a quarter waits"].append(step(staggered, some))
    return {name: float(np.median(times[3:])) for name, times in took.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks lm_batch", description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--model", default="small")
    args = parser.parse_args(argv)
    about = machine()
    print(about)
    model = moshi_mlx.load(args.model)
    config = model.lm.config
    generators = {
        batch: Generator(model.lm, generation_defaults(model.config), seeds=range(batch)) for batch in BATCHES
    }
    rng = np.random.default_rng(0)
    took: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    wall: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for number in range(args.steps + 3):
        for batch, generator in generators.items():
            codes = rng.integers(0, config.card, (batch, config.user_q))
            began, used = time.perf_counter(), time.process_time()
            generator.step(codes)
            if number >= 3:
                took[batch].append(time.process_time() - used)
                wall[batch].append(time.perf_counter() - began)
    assert model.codec is not None
    codec = {row["batch"]: row for row in codec_batch.measure(model.codec, BATCHES, args.steps)}
    rate = model.frame_rate
    heads = ("conversations", "ms a step", "(wall)", "ms codec", "frames/s", "times real time", "with codec")
    print(" ".join(f"{head:>{max(10, len(head))}}" for head in heads))
    rows = []
    for batch in BATCHES:
        step = float(np.median(took[batch]))
        sound = (codec[batch]["encode_ms"] + codec[batch]["decode_ms"]) / 1e3
        both = step + sound
        rows.append(
            {
                "batch": batch,
                "step_ms": round(1e3 * step, 2),
                "step_wall_ms": round(1e3 * float(np.median(wall[batch])), 2),
                "codec_ms": round(1e3 * sound, 2),
                "frames_per_second": round(batch / step, 1),
                "times_real_time": round(1 / step / rate, 2),
                "times_real_time_with_codec": round(1 / both / rate, 2),
            }
        )
        row = rows[-1]
        print(
            f"{batch:13d} {row['step_ms']:10.1f} {row['step_wall_ms']:10.1f} {row['codec_ms']:10.1f} "
            f"{row['frames_per_second']:10.0f} {row['times_real_time']:15.1f} {row['times_real_time_with_codec']:10.2f}"
        )
    alone = [row["batch"] for row in rows if row["times_real_time"] >= 1]
    together = [row["batch"] for row in rows if row["times_real_time_with_codec"] >= 1]
    print(
        f"in real time on one core: {max(alone, default=0)} conversations or more (model alone), "
        f"{max(together, default=0)} or more with the codec"
    )
    crowds = {"numpy": many_beside_one(model.lm, generation_defaults(model.config), args.steps)}
    dense, made = Lm(config), generate.make_backend
    mx.eval(dense.parameters())
    generate.make_backend = lambda lm, kv_bits=None: Backend(lm)
    try:
        crowds["MLX"] = many_beside_one(dense, generation_defaults(model.config), args.steps)
    finally:
        generate.make_backend = made
    print(f"{MANY} conversations beside one, ms a step")
    for name, times in crowds.items():
        cells = [f"{kind} {took:.1f} (x {took / times['one']:.2f})" for kind, took in times.items()]
        print(f"{name:6} " + ", ".join(cells))
    result = {
        "rows": rows,
        "real_time_model": alone,
        "real_time_both": together,
        "crowds": crowds,
    }
    print(json.dumps({"benchmark": "lm_batch", "machine": about, "model": args.model, **result}))


if __name__ == "__main__":
    main()
