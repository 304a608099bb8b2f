"""An hour through the built-in codec, to show that neither time nor memory grows: ``python -m benchmarks.codec_hour``.

45,000 frames are an hour. After them a second stream is run to frame 3,000, and both continue in turns, so that
variations of the machine's speed affect both. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

import moshi_mlx
from benchmarks.workers import clocks, machine, resident
from moshi_mlx.codec.base import Codec

EARLY, WINDOW = 3000, 2000


class Stream:
    """A frame in and a frame out, again and again."""

    def __init__(self, codec: Codec):
        self.encoder, self.decoder, self.frame = codec.encoder(), codec.decoder(), 0
        rng = np.random.default_rng(0)
        self.sound = (0.1 * rng.standard_normal((50, codec.frame_size))).astype(np.float32)

    def step(self) -> NDArray[np.float64]:
        """Seconds [encode or decode, processor or wall]."""
        began = clocks()
        codes = self.encoder.encode(self.sound[self.frame % len(self.sound)])
        middle = clocks()
        self.decoder.decode(codes)
        self.frame += 1
        return np.stack([middle - began, clocks() - middle])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codec_hour", description="An hour of frames.")
    parser.add_argument("--frames", type=int, default=45_000)
    parser.add_argument(
        "--minutes", type=float, default=60, help="stop where it has got by then (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.frames < 2 * EARLY:
        parser.error(f"--frames: at least {2 * EARLY}")
    codec = moshi_mlx.load("small").codec
    assert codec is not None
    old, young = Stream(codec), Stream(codec)
    memory: dict[int, int] = {}
    until = time.monotonic() + 60 * args.minutes
    while old.frame < args.frames and (old.frame < 2 * EARLY or time.monotonic() < until):
        old.step()
        if old.frame == EARLY:
            memory[EARLY] = resident()
        if old.frame % 1000 == 0:
            print(f"{old.frame} frames", flush=True)
    frames = old.frame
    memory[frames] = resident()
    while young.frame < EARLY:
        young.step()
    late, early = (
        np.median(each, axis=0) for each in zip(*[(old.step(), young.step()) for _ in range(WINDOW)], strict=True)
    )
    rows = {
        f"{stage}, {clock}": {
            "early_ms": round(1e3 * float(early[column, kind]), 3),
            "late_ms": round(1e3 * float(late[column, kind]), 3),
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
        print(f"resident after {index:,} frames: {held / 1e6:.1f} MB")
    print(json.dumps({"benchmark": "codec_hour", "machine": here, "frames": frames, "ms": rows, "resident": memory}))


if __name__ == "__main__":
    main()
