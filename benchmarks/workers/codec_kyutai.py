"""Frames through the codec of Kyutai's moshi_mlx (0.3.0); run by an interpreter that has it, never by ours.

The same questions and answers as codec_ours.py, without ``pair``: its codec runs in one thread.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from importlib.metadata import version

ask = json.loads(sys.argv[1])
if ask["blas"]:  # its MLX looks for the function in what the process has loaded for everybody
    ctypes.CDLL(ask["blas"], ctypes.RTLD_GLOBAL).openblas_set_num_threads(1)

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

from moshi_mlx import models  # noqa: E402

codec = models.mimi.Mimi(models.mimi_202407(ask["codebooks"]))
codec.load_pytorch_weights(ask["path"], strict=True)
mx.eval(codec.parameters())
rng = np.random.default_rng(0)


def encode() -> None:
    pcm = (0.1 * rng.standard_normal(1920)).astype(np.float32)
    np.array(codec.encode_step(mx.array(pcm)[None, None]))


def decode() -> None:
    codes = rng.integers(0, 2048, (1, ask["codebooks"], 1)).astype(np.uint32)
    np.array(codec.decode_step(mx.array(codes)))


print(json.dumps({"mlx": mx.__version__, "moshi_mlx": version("moshi_mlx")}), flush=True)
for line in sys.stdin:
    answer: dict = {name: {"wall": [], "cpu": []} for name in ("encode", "decode")}
    for _ in range(json.loads(line)["frames"]):
        for name, call in (("encode", encode), ("decode", decode)):
            began, used = time.perf_counter(), time.process_time()
            call()
            answer[name]["wall"].append(1e3 * (time.perf_counter() - began))
            answer[name]["cpu"].append(1e3 * (time.process_time() - used))
    print(json.dumps(answer), flush=True)
