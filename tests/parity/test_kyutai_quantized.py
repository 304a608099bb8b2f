"""Files of the two classic recipes in Kyutai's own `moshi_mlx` 0.3.0: loaded strictly, and run.

Both packages are imported as `moshi_mlx`, so Kyutai's lives in an environment of its own::

    python3.12 -m venv .venv-kyutai
    .venv-kyutai/bin/pip install moshi_mlx==0.3.0
    .venv-kyutai/bin/pip install 'mlx[cpu]>=0.26,<0.27'     # on Linux; on a Mac: 'mlx>=0.26,<0.27'
    KYUTAI_PYTHON=.venv-kyutai/bin/python python -m pytest -m parity tests/parity/test_kyutai_quantized.py

The model is Moshi's shapes scaled down, with random weights, from PyTorch's layout.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from moshi_mlx_quantize.cli import main

from moshi_mlx.checkpoint.fit import load_config, load_lm
from moshi_mlx.models.lm import DepthCache
from tests.helpers.checkpoints import small_config, write_checkpoint

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        "KYUTAI_PYTHON" not in os.environ, reason="KYUTAI_PYTHON names no Python with moshi_mlx 0.3.0 of Kyutai"
    ),
]

STEPS = 6

# What Kyutai's programs do: sizes from config.json, nn.quantize by the file's name, a strict load.
KYUTAI = """
import json, sys
import mlx.core as mx, mlx.nn as nn, numpy as np
from moshi_mlx import models, utils
folder, file, out = sys.argv[1:]
config = models.LmConfig.from_config_dict(json.load(open(folder + "/config.json")))
model = models.Lm(config)
model.set_dtype(mx.bfloat16)
if file.endswith(".q4.safetensors"):
    nn.quantize(model, bits=4, group_size=32)
elif file.endswith(".q8.safetensors"):
    nn.quantize(model, bits=8, group_size=64)
model.load_weights(folder + "/" + file, strict=True)
model.set_dtype(mx.float32)
text, depth = [], []
def sampler(logits):
    depth.append(np.array(logits).reshape(-1))
    return mx.argmax(logits, axis=-1), None
for step in range(%d):
    xs = model.text_emb(mx.array([[step]]))
    hidden = model.out_norm(model.transformer(xs, cache=model.transformer_cache))
    text.append(np.array(model.text_linear(hidden)).reshape(-1))
    model.depformer.sample(hidden, sampler, mx.array([[step + 7]]), model.depformer_cache)
np.savez(out, text=np.stack(text), depth=np.stack(depth))
# And its own generator, start to end.
gen = models.LmGen(model, max_steps=STEPS + 5, text_sampler=utils.Sampler(), audio_sampler=utils.Sampler(), check=True)
for step in range(STEPS):
    gen.step(mx.zeros((1, config.other_codebooks), mx.int32))
assert gen.last_audio_tokens() is not None
""".replace("%d", "STEPS").replace("STEPS", str(STEPS))


@pytest.mark.parametrize("recipe", ["q4", "q8"])
def test_kyutai_loads_and_runs_it(recipe: str, tmp_path: Path) -> None:
    """Broken: people with Kyutai's program cannot use a file of a classic recipe, or it is another model there."""
    config = small_config(
        dim=256,
        hidden_scale=4.125,
        num_heads=4,
        depformer_num_heads=4,
        card=128,
        n_q=16,
        dep_q=8,
        delays=[0, 0, *(1,) * 7, 0, *(1,) * 7],
        depformer_dim=256,
        depformer_dim_feedforward=1056,
        context=3000,
    )
    source = write_checkpoint(tmp_path / "source", config, "torch", tokenizer=False)
    assert main([str(source), str(tmp_path / "out"), "--quiet", "--recipe", recipe]) == 0
    file = f"model.{recipe}.safetensors"
    out = tmp_path / "logits.npz"
    python = str(Path(os.environ["KYUTAI_PYTHON"]).absolute())  # not resolved: the link is the environment
    command = [python, "-I", "-c", KYUTAI, str(tmp_path / "out"), file, str(out)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    theirs = np.load(out)

    lm = load_lm(load_config(tmp_path / "out" / "config.json"), tmp_path / "out" / file)
    state = lm.init_state()
    text, depth = [], []
    for step in range(STEPS):
        tokens = np.full((1, lm.config.num_streams, 1), -1)
        tokens[:, 0] = step
        hidden = lm.step(mx.array(tokens), state)[:, 0]
        text.append(np.array(lm.text_linear(hidden))[0])
        cache: DepthCache = []
        token = mx.array([step + 7])
        for index in range(lm.config.dep_q):
            logits = lm.depformer.step(index, hidden, token, cache)
            depth.append(np.array(logits)[0])
            token = mx.argmax(logits, axis=-1)
    for name, ours in (("text", np.stack(text)), ("depth", np.stack(depth))):
        error = np.abs(ours - theirs[name]).max() / np.abs(theirs[name]).max()
        print(f"{recipe} {name}: largest difference {error:.1e} of the largest value")
        assert error < 2e-5
