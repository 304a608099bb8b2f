"""``python -m tests.helpers.trains STEPS``: train a small model on this rank's part of each batch."""

from __future__ import annotations

import json
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from moshi_mlx.config import ModelConfig
from moshi_mlx.models.lm import Lm
from moshi_mlx.sharding.training import DataParallel
from tests.helpers.checkpoints import small_config


def loss_of(lm: Lm, tokens: mx.array) -> tuple[mx.array, mx.array]:
    """Mean cross entropy of text and codes where the mask has a token, and how many there are."""
    out = lm(tokens)
    own = lm.config.own_q
    text = nn.losses.cross_entropy(out.text_logits, mx.maximum(tokens[:, :1], 0)) * out.text_mask
    codes = nn.losses.cross_entropy(out.logits, mx.maximum(tokens[:, 1 : 1 + own], 0)) * out.mask
    count = out.text_mask.sum() + out.mask.sum()
    return (text.sum() + codes.sum()) / count, count


def main() -> None:
    ranks = DataParallel()
    mx.random.seed(0)
    lm = Lm(ModelConfig.from_dict(small_config()).lm)
    mx.eval(lm.parameters())
    optimizer = optim.AdamW(1e-3)
    value_and_grad = nn.value_and_grad(lm, loss_of)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(int(sys.argv[1])):
        batch = rng.integers(0, 60, (4, lm.config.num_streams, 12))
        for row in range(4):  # rows of unequal length: their means do not weigh the same
            batch[row, :, 12 - 2 * row :] = -1
        part = mx.array(np.stack(ranks.part(list(batch))))
        (loss, count), gradients = value_and_grad(lm, part)
        loss, gradients = ranks.average(loss, gradients, count)
        optimizer.update(lm, gradients)
        mx.eval(loss, lm.parameters(), optimizer.state)
        losses.append(loss.item())
    norm = sum(float(mx.square(value).sum()) for _, value in tree_flatten(lm.parameters()))
    given: Any = mx.array(float("nan") if ranks.rank else 2.0)
    empty, gradient = ranks.average(given, {"w": given}, 0.0 if ranks.rank else 3.0)
    mx.eval(empty, gradient)
    if not ranks.rank:
        found = {"size": ranks.size, "losses": losses, "norm": norm, "empty": [empty.item(), gradient["w"].item()]}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
