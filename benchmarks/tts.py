"""Texts spoken together, as a server does for its clients: ``python -m benchmarks.tts [MODEL] [--rows 1 8 32]``.

Without a model, one with random weights and the sizes of the built-in one, and its codec. All rows speak from
beginning to end at once. Milliseconds of a step in which every row gets a frame of 80 ms (wall and processor time,
median and p95), how much faster than real time that is, and how long after the first word the first sound comes. A
table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

import moshi_mlx
from benchmarks.workers import machine
from moshi_mlx.config import ModelConfig
from moshi_mlx.models.lm import Lm
from moshi_mlx.tasks.speak import TextToSpeech

TEXT = "What is the capital of France and what do people like to do there when the weather is good and they have time "


def untrained() -> TextToSpeech:
    """Random weights with the sizes of the built-in model."""
    small = moshi_mlx.load("small")
    own, lm = small.lm.config.own_q, small.lm.config
    sizes = replace(lm, n_q=own, dep_q=own, own_q=own, delays=lm.delays[: 1 + own])
    mx.random.seed(0)
    made = Lm(sizes)
    mx.eval(made.parameters())
    config = ModelConfig(lm=sizes, model_type="tts", tts_config={"audio_delay": 1.28})
    return TextToSpeech(config, made, small.codec, small.tokenizer, name="small-sized", trained=False)


def measure(model: TextToSpeech, count: int, frames: int) -> dict[str, float]:
    """Figures for ``count`` rows that speak for ``frames`` frames."""
    rows = model.rows()
    entries = model.script().entries(TEXT * (frames // 20 + 1))
    for seed in range(count):
        rows.push(rows.join(model.manner(seed=seed)), entries)
    wall: list[float] = []
    cpu: list[float] = []
    first, began = 0.0, time.perf_counter()
    while len(wall) < frames + 3:
        marks = time.perf_counter(), time.process_time()
        spoken = rows.step()
        if all(not isinstance(one, Exception) and one.pcm is not None for one in spoken.values()):
            first = first or time.perf_counter() - began
            wall.append(1e3 * (time.perf_counter() - marks[0]))
            cpu.append(1e3 * (time.process_time() - marks[1]))
    return {
        "rows": count,
        "wall_ms": round(float(np.median(wall[3:])), 2),
        "wall_p95_ms": round(float(np.percentile(wall[3:], 95)), 2),
        "cpu_ms": round(float(np.median(cpu[3:])), 2),
        "times_real_time": round(1e3 / model.frame_rate / float(np.median(wall[3:])), 2),
        "first_sound_ms": round(1e3 * first, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a text-to-speech model (default: random weights, built-in sizes)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--frames", type=int, default=60)
    args = parser.parse_args()
    model = untrained() if args.model is None else moshi_mlx.load(args.model)
    if not isinstance(model, TextToSpeech):
        parser.error(f"{args.model} is a model for {model.purpose}")
    found: list[dict[str, Any]] = []
    print("rows   step ms (p95)    processor ms   times real time   first sound ms")
    for count in args.rows:
        one = measure(model, count, args.frames)
        found.append(one)
        print(
            f"{one['rows']:4d} {one['wall_ms']:9.1f} ({one['wall_p95_ms']:.1f})".ljust(24)
            + f"{one['cpu_ms']:9.1f} {one['times_real_time']:17.2f} {one['first_sound_ms']:16.0f}",
            flush=True,
        )
    print(json.dumps({"model": model.name, "machine": machine(), "frames": args.frames, "rows": found}))


if __name__ == "__main__":
    main()
