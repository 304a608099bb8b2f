"""The built-in codec for many conversations at once: ``python -m benchmarks.codec_batch``.

Encodes and decodes a frame for 1 to 16 rows of one state, on one thread, in turns; in processor time, which other
programs do not affect. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import moshi_mlx
from benchmarks.workers import machine
from moshi_mlx.codec.base import Codec

BATCHES = (1, 2, 4, 8, 12, 16)


def measure(codec: Codec, batches: Sequence[int], frames: int) -> list[dict[str, Any]]:
    """Milliseconds (medians) of a step of ``batch`` rows, to encode and to decode."""
    rng = np.random.default_rng(0)
    states = {batch: (codec.init_encoder_state(batch), codec.init_decoder_state(batch)) for batch in batches}
    took: dict[int, list[list[float]]] = {batch: [] for batch in batches}
    for index in range(-5, frames):  # the first few allocate
        for batch, (encoder, decoder) in states.items():
            pcm = (0.1 * rng.standard_normal((batch, codec.frame_size))).astype(np.float32)
            marks = [time.process_time()]
            codes = codec.encode_step(pcm, encoder)
            marks.append(time.process_time())
            codec.decode_step(codes, decoder)
            marks.append(time.process_time())
            if index >= 0:
                took[batch].append(np.diff(marks).tolist())
    rows = []
    for batch, values in took.items():
        encode, decode = 1e3 * np.median(values, axis=0)
        rows.append({"batch": batch, "encode_ms": round(encode, 2), "decode_ms": round(decode, 2)})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codec_batch", description="Many streams at once.")
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--model", default="small")
    parser.add_argument("--codec", default="auto", help="auto, rust, mlx or numpy (default: %(default)s)")
    args = parser.parse_args(argv)
    codec = moshi_mlx.load(args.model, codec=args.codec).codec
    assert codec is not None
    rows = measure(codec, BATCHES, args.frames)
    here = machine()
    print(f"{here['processor']}, load {here['load']}; {here['system']}, MLX {here['mlx']}, numpy {here['numpy']}")
    print(f"codec in {codec.kind}, milliseconds of processor time, medians of {args.frames}")
    print(f"{'rows':>5} {'encode':>8} {'decode':>8} {'both':>8} {'per row':>8}")
    for row in rows:
        both = row["encode_ms"] + row["decode_ms"]
        print(
            f"{row['batch']:5d} {row['encode_ms']:8.2f} {row['decode_ms']:8.2f} {both:8.2f} {both / row['batch']:8.2f}"
        )
    print(json.dumps({"benchmark": "codec_batch", "machine": here, "codec": codec.kind, "rows": rows}))


if __name__ == "__main__":
    main()
