"""An hour through the built-in codec: neither time nor memory grows: ``python -m benchmarks.codec_hour``.

45,000 frames are an hour. The last two thousand are compared with those around frame 3,000. A table, then one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import moshi_mlx
from benchmarks.workers import machine

WINDOW = 2000


def resident() -> int | None:
    """Bytes that this process holds now; None where the system does not say."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * 4096 if path.exists() else None


def clocks() -> np.ndarray:
    """Seconds of processor and of wall time."""
    return np.array([time.process_time(), time.perf_counter()])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codec_hour", description="An hour of frames.")
    parser.add_argument("--frames", type=int, default=45_000)
    parser.add_argument(
        "--minutes", type=float, default=60, help="stop where it has got by then (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.frames < 3 * WINDOW:
        parser.error(f"--frames: at least {3 * WINDOW}")
    codec = moshi_mlx.load("small").codec
    assert codec is not None
    encoder, decoder = codec.encoder(), codec.decoder()
    rng = np.random.default_rng(0)
    sound = (0.1 * rng.standard_normal((50, codec.frame_size))).astype(np.float32)
    times = np.zeros((args.frames, 2, 2))  # frame; encode, decode; processor, wall
    memory: dict[int, int | None] = {}
    until, frames = time.monotonic() + 60 * args.minutes, args.frames
    for index in range(args.frames):
        if index >= 3 * WINDOW and time.monotonic() > until:
            frames = index
            break
        began = clocks()
        codes = encoder.encode(sound[index % len(sound)])
        middle = clocks()
        decoder.decode(codes)
        times[index] = middle - began, clocks() - middle
        if index + 1 == 3000:
            memory[3000] = resident()
        if index % 1000 == 999:
            print(f"{index + 1} frames", flush=True)
    memory[frames] = resident()
    times = times[:frames]
    early, late = times[3000 - WINDOW // 2 : 3000 + WINDOW // 2], times[-WINDOW:]
    rows = {
        f"{stage}, {clock}": {
            "early_ms": round(1e3 * float(np.median(early[:, column, kind])), 3),
            "late_ms": round(1e3 * float(np.median(late[:, column, kind])), 3),
        }
        for column, stage in enumerate(("encode", "decode"))
        for kind, clock in enumerate(("processor", "wall"))
    }
    here = machine()
    print(f"{here['processor']}, load {here['load']}; {here['system']}, MLX {here['mlx']}, numpy {here['numpy']}")
    print(f"{'milliseconds':20} {'frame 3,000':>12} {f'frame {frames:,}':>14} {'ratio':>7}")
    for name, row in rows.items():
        print(f"{name:20} {row['early_ms']:12.2f} {row['late_ms']:14.2f} {row['late_ms'] / row['early_ms']:7.3f}")
    for index, held in memory.items():
        print(f"resident after {index:,} frames: " + ("not known" if held is None else f"{held / 1e6:.1f} MB"))
    print(json.dumps({"benchmark": "codec_hour", "machine": here, "frames": frames, "ms": rows, "resident": memory}))


if __name__ == "__main__":
    main()
