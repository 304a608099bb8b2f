"""Frames through our codec, in numpy or in MLX, or through rustymimi with the same interface, on one file of weights.

Question ``{"frames": n}``; answer: milliseconds of each frame, as wall time and as processor time of all threads, of
``encode``, of ``decode``, and of ``pair``: both at once on two threads, as a conversation has them.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
from typing import Any

import numpy as np

ask = json.loads(sys.argv[1])
if ask["blas"]:  # MLX looks for the function in what the process has loaded for everybody
    ctypes.CDLL(ask["blas"], ctypes.RTLD_GLOBAL).openblas_set_num_threads(1)

from moshi_mlx.codec.base import make_codec  # noqa: E402

codec = make_codec(ask["path"], num_codebooks=ask["codebooks"], kind=ask["kind"])
encoder, decoder = codec.encoder(), codec.decoder()
rng = np.random.default_rng(0)


def timed(call: Any) -> tuple[float, float]:
    began, used = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.perf_counter() - began), 1e3 * (time.process_time() - used)


def encode() -> None:
    encoder.encode((0.1 * rng.standard_normal(codec.frame_size)).astype(np.float32))


def decode() -> None:
    decoder.decode(rng.integers(0, codec.card, codec.num_codebooks).astype(np.int32))


def pair() -> None:
    other = threading.Thread(target=decode)
    other.start()
    encode()
    other.join()


print(json.dumps({"numpy": np.__version__, "card": codec.card}), flush=True)
for line in sys.stdin:
    answer: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in ("encode", "decode", "pair")}
    for _ in range(json.loads(line)["frames"]):
        for name, call in (("encode", encode), ("decode", decode), ("pair", pair)):
            wall, cpu = timed(call)
            answer[name]["wall"].append(wall)
            answer[name]["cpu"].append(cpu)
    print(json.dumps(answer), flush=True)
