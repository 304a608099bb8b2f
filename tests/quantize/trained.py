"""A small model that has learnt something: sequences with rules, because random weights are equally bad everywhere.

``data/`` holds the result (bfloat16), made from the root of the repository in a minute or two by::

    python -m tests.quantize.trained tests/quantize/data

Each word follows from the one before it and from the user's last code, each code from the word or the code before it,
with noise. Training brings the loss well below that of guessing. This is no speech; it gives matrices that matter
unequally.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from moshi_mlx.checkpoint.layouts import from_internal
from moshi_mlx.checkpoint.readers import write_safetensors
from moshi_mlx.config import ModelConfig
from moshi_mlx.models.lm import Lm

from ..helpers.checkpoints import random_params, small_config, write_checkpoint


def config(**changes: Any) -> dict[str, Any]:
    """Widths that are multiples of 64; 230,000 weights."""
    sizes = {"dim": 64, "hidden_scale": 3.0, "num_layers": 3, "text_card": 96, "n_q": 4, "dep_q": 2}
    depth = {"depformer_num_layers": 1, "depformer_dim_feedforward": 96, "delays": [0, 0, 1, 0, 1]}
    return small_config(**sizes | depth | changes)


def sequences(rng: np.random.Generator, batch: int, time: int, card: int = 64) -> np.ndarray:
    """Tokens [batch, 1 + 2 + 2, time] of the made-up language; one token in ten breaks the rules."""
    rules = np.random.default_rng(7)
    next_word = 4 + rules.integers(0, 90, (2, 96))
    sound, overtone = rules.integers(0, card, 96), rules.integers(0, card, card)
    user = rng.integers(0, card, (batch, 2, time))
    text = np.zeros((batch, time), int)
    text[:, 0] = 4 + rng.integers(0, 90, batch)
    for t in range(1, time):
        turn = (user[:, 0, t - 1] >= card // 2).astype(int)
        text[:, t] = np.where(rng.random(batch) < 0.1, 4 + rng.zipf(1.6, batch) % 90, next_word[turn, text[:, t - 1]])
    first = np.where(rng.random((batch, time)) < 0.1, rng.integers(0, card, (batch, time)), sound[text])
    second = np.where(rng.random((batch, time)) < 0.1, rng.integers(0, card, (batch, time)), overtone[first])
    return np.concatenate([text[:, None], first[:, None], second[:, None], user], axis=1)


def train(steps: int = 400, seed: int = 0, **changes: Any) -> tuple[dict[str, Any], dict[str, mx.array], list[float]]:
    """config.json, float32 weights by the model's names, and the loss of every step."""
    data = config(**changes)
    parsed = ModelConfig.from_dict(data)
    lm = Lm(parsed.lm)
    lm.load_weights(list(random_params(parsed, seed, mx.float32).items()))
    rng = np.random.default_rng(seed)

    def loss(tokens: mx.array) -> mx.array:
        out = lm(tokens)
        total = mx.array(0.0)
        for logits, mask, target in (
            (out.text_logits, out.text_mask, tokens[:, :1]),
            (out.logits, out.mask, tokens[:, 1:3]),
        ):
            losses = nn.losses.cross_entropy(logits, mx.maximum(target, 0))
            total = total + (losses * mask).sum() / mask.sum()
        return total

    optimizer = optim.AdamW(learning_rate=optim.cosine_decay(3e-3, steps), weight_decay=0.01)
    value_and_grad = nn.value_and_grad(lm, loss)
    losses = []
    for _ in range(steps):
        value, gradient = value_and_grad(mx.array(sequences(rng, 8, 16)))
        optimizer.update(lm, gradient)
        mx.eval(lm.parameters(), optimizer.state)
        losses.append(float(value))
    return data, dict(tree_flatten(lm.parameters())), losses


def write_trained(folder: Path, steps: int = 400, **changes: Any) -> Path:
    """A checkpoint of the trained model in bfloat16, without codec and tokenizer."""
    data, params, losses = train(steps, **changes)
    parsed = ModelConfig.from_dict(data)
    write_checkpoint(folder, data, tokenizer=False)
    tensors = from_internal({name: value.astype(mx.bfloat16) for name, value in params.items()}, "mlx", parsed.lm)
    write_safetensors(folder / "model.safetensors", tensors, {"loss": f"{losses[0]:.2f} -> {losses[-1]:.2f}"})
    return folder


if __name__ == "__main__":
    write_trained(Path(sys.argv[1]))
