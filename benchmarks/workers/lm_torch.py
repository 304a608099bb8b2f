"""Steps of Kyutai's PyTorch package (moshi 0.2.13) on a random model; run by an interpreter that has it.

The same questions and answers as lm_kyutai.py, wall times only. On a CUDA device ``LMGen`` records CUDA graphs in its
first steps, as in Kyutai's server.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version

import numpy as np
import torch

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    os.environ["NO_TORCH_COMPILE"] = "1"  # it would compile for minutes, and nothing is measured there
from moshi.models import LMGen, loaders  # noqa: E402

ask = json.loads(sys.argv[1])
sizes = {
    "dim": ask["dim"],
    "num_layers": ask["layers"],
    "num_heads": ask["heads"],
    "context": ask["context"],
    "depformer_dim": ask["depth_dim"],
    "depformer_dim_feedforward": 33 * ask["depth_dim"] // 8,
    "depformer_num_layers": ask["depth_layers"],
    "depformer_num_heads": ask["depth_heads"],
    "text_card": ask["text_card"],
}
dtype = getattr(torch, ask["dtype"])
torch.manual_seed(0)
with torch.no_grad():
    model = loaders.get_moshi_lm(None, lm_kwargs={**loaders._lm_kwargs, **sizes}, device=device, dtype=dtype)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
model.eval()
generator = LMGen(model)
generator.streaming_forever(1)
rng = np.random.default_rng(0)
parameters = sum(parameter.numel() for parameter in model.parameters())
about = {"parameters": parameters, "torch": torch.__version__, "moshi": version("moshi"), "device": device}
print(json.dumps(about), flush=True)
for line in sys.stdin:
    question = json.loads(line)
    answer: dict = {"wall": []}
    with torch.no_grad():
        for _ in range(question.get("steps", 0)):
            codes = torch.from_numpy(rng.integers(0, 2048, size=(1, 8, 1))).to(device)
            began = time.perf_counter()
            tokens = generator.step(codes)
            if tokens is not None:
                tokens.cpu()
            if device == "cuda":
                torch.cuda.synchronize()
            answer["wall"].append((time.perf_counter() - began) * 1e3)
    print(json.dumps(answer), flush=True)
