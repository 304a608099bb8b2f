"""Steps of Kyutai's moshi_mlx (0.3.0) on a random model; run by an interpreter that has it, never by ours.

Question ``{"steps": n}``; answer: milliseconds of every step, as wall time (``wall``), as processor time of all
threads (``cpu``), and until the generator's ``step`` returned (``build``).
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

import graph
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from moshi_mlx import models, utils

ask = json.loads(sys.argv[1])
mx.random.seed(0)
config = models.config_v0_1()
temporal, depth = config.transformer, config.depformer.transformer
temporal.d_model, temporal.num_layers, temporal.num_heads = ask["dim"], ask["layers"], ask["heads"]
temporal.dim_feedforward, temporal.context = 4 * ask["dim"], ask["context"]
depth.d_model, depth.num_layers, depth.num_heads = ask["depth_dim"], ask["depth_layers"], ask["depth_heads"]
depth.dim_feedforward = 4 * ask["depth_dim"]
config.text_in_vocab_size, config.text_out_vocab_size = ask["text_card"] + 1, ask["text_card"]
model = models.Lm(config)
model.set_dtype(getattr(mx, ask["dtype"]))
parameters = sum(value.size for _, value in tree_flatten(model.parameters()))
if ask["bits"]:
    nn.quantize(model, bits=ask["bits"], group_size=32 if ask["bits"] == 4 else 64)
mx.eval(model.parameters())
generator = models.LmGen(
    model,
    max_steps=ask["most"] + 5,
    text_sampler=utils.Sampler(top_k=25, temp=0.7),
    audio_sampler=utils.Sampler(top_k=250, temp=0.8),
    check=False,
)
rng = np.random.default_rng(0)

about = {"parameters": parameters, "mlx": mx.__version__, "moshi_mlx": version("moshi_mlx")}
print(json.dumps(about), flush=True)
for line in sys.stdin:
    question = json.loads(line)
    answer: dict = {"wall": [], "build": [], "cpu": []}
    for _ in range(question.get("steps", 0)):
        codes = mx.array(rng.integers(0, 2048, size=(1, 8)).astype(np.int32))
        began, used = time.perf_counter(), time.process_time()
        text = generator.step(codes)[0]
        built = time.perf_counter()
        text[0].item()
        audio = generator.last_audio_tokens()
        if audio is not None:
            np.array(audio)
        ended = time.perf_counter()
        answer["wall"].append((ended - began) * 1e3)
        answer["build"].append((built - began) * 1e3)
        answer["cpu"].append((time.process_time() - used) * 1e3)
    if question.get("count"):
        counted = [0]
        plain = mx.array.__bool__

        def told(self: mx.array, plain=plain, counted=counted) -> bool:
            counted[0] += 1
            return plain(self)

        mx.array.__bool__ = told
        text = generator.step(mx.array(rng.integers(0, 2048, size=(1, 8)).astype(np.int32)))[0]
        mx.array.__bool__ = plain
        answer["primitives"] = graph.count(text, generator.gen_sequence)[0]
        answer["reads"] = counted[0] + 2
        mx.eval(text, generator.gen_sequence)
        with graph.fused():
            text = generator.step(mx.array(rng.integers(0, 2048, size=(1, 8)).astype(np.int32)))[0]
            answer["kernels"] = graph.count(text, generator.gen_sequence)[1]
    print(json.dumps(answer), flush=True)
