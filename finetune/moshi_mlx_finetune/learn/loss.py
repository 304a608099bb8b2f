"""The loss of moshi-finetune: text and own codes, each a weighted mean of cross entropies (its ``loss.py``)."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from moshi_mlx.layers.conditioning import Condition
from moshi_mlx.models.lm import Lm

__all__ = ["Weights", "losses", "weighted_mean"]


@dataclass(frozen=True)
class Weights:
    """How much targets count.

    Attributes
    ----------
    padding : float
        Of text tokens PAD and EPAD (``text_padding_weight``).
    first_codebook : float
        Of the first codebook of the own voice (``first_codebook_weight_multiplier``).
    """

    padding: float = 0.5
    first_codebook: float = 1.0


def weighted_mean(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Sum of weight times cross entropy over the sum of weights, in float32; 0 where all weights are.

    Parameters
    ----------
    logits : mx.array [..., card]
    targets : mx.array [...], int
        Any value where the weight is 0.
    weights : mx.array [...], float32
    """
    entropy = nn.losses.cross_entropy(logits.astype(mx.float32), mx.where(weights > 0, targets, 0))
    total = mx.where(weights > 0, entropy * weights, 0).sum()
    return total / mx.maximum(weights.sum(), 1e-9)


def losses(
    lm: Lm, tokens: mx.array, weights: Weights = Weights(), condition: Condition | None = None
) -> tuple[mx.array, mx.array]:
    """Losses of the text and of the own codes.

    Parameters
    ----------
    lm : Lm
    tokens : mx.array [batch, streams, time], int
        -1 where there is nothing to learn.
    weights : Weights
    condition : Condition or None
    """
    out, config = lm(tokens, condition), lm.config
    text = tokens[:, :1]
    padding = (text == config.existing_text_padding_id) | (text == config.existing_text_end_padding_id)
    counted = out.text_mask.astype(mx.float32) * mx.where(padding, weights.padding, 1.0)
    text_loss = weighted_mean(out.text_logits, text, counted)
    own = config.own_q
    by_book = mx.array([weights.first_codebook] + [1.0] * (own - 1))[None, :, None]
    counted = out.mask[:, :own].astype(mx.float32) * by_book
    return text_loss, weighted_mean(out.logits[:, :own], tokens[:, 1 : 1 + own], counted)
