"""Choosing a token from logits: in float32, from an explicit seed.

A token is ``argmax(filtered logits / temperature + Gumbel noise)``, which draws from the softmax exactly. The noise of
a frame depends on the row's seed and the position alone, so a conversation in a batch says what it would say alone,
and a restored one goes on as it would have.

mlx-lm has samplers of the same filters; they draw from MLX's global generator and importing them loads transformers,
so these few lines are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from .errors import ConfigError

__all__ = ["AUDIO_SAMPLING", "GREEDY", "TEXT_SAMPLING", "Sampling", "filter_logits", "gumbel_noise", "sample"]


@dataclass(frozen=True)
class Sampling:
    """How to draw from a distribution. Filters apply to the tempered distribution, all that are set.

    Attributes
    ----------
    temperature : float
        0: always the likeliest token.
    top_k : int
        Keep the k likeliest tokens; 0: all.
    top_p : float
        Keep tokens while the mass before them is at most p; 0 or 1: all.
    min_p : float
        Keep tokens at least ``min_p`` times as likely as the likeliest; 0: all.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 or more, found {self.temperature}")
        if 0 < self.temperature < 1e-6:
            raise ConfigError(f"temperature {self.temperature} is too small to divide by; 0 takes the likeliest token")
        if self.top_k < 0 or self.top_k % 1 != 0:
            raise ConfigError(f"top_k must be a whole number, 0 or more, found {self.top_k}")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be between 0 and 1, found {getattr(self, name)}")


TEXT_SAMPLING = Sampling(0.7, top_k=25)
"""Default for text (PyTorch ``LMGen``)."""
AUDIO_SAMPLING = Sampling(0.8, top_k=250)
"""Default for audio codes (PyTorch ``LMGen``)."""
GREEDY = Sampling(0.0)


def filter_logits(logits: mx.array, sampling: Sampling) -> mx.array:
    """Tempered float32 logits [..., n] with every token that the filters drop at -inf."""
    logits = logits.astype(mx.float32) / sampling.temperature
    count = logits.shape[-1]
    drop = mx.array(-mx.inf, mx.float32)
    if 0 < sampling.top_k < count:
        rank = count - sampling.top_k
        filtered = _at_least(logits, mx.partition(logits, rank, axis=-1)[..., rank, None])
    else:
        filtered = logits
    if 0 < sampling.top_p < 1:
        order = mx.argsort(-logits, axis=-1)
        probabilities = mx.softmax(mx.take_along_axis(logits, order, axis=-1), axis=-1)
        before = mx.cumsum(probabilities, axis=-1) - probabilities
        keep = mx.put_along_axis(mx.zeros(logits.shape, mx.bool_), order, before <= sampling.top_p, axis=-1)
        filtered = mx.where(keep, filtered, drop)
    if sampling.min_p > 0:
        floor = logits.max(axis=-1, keepdims=True) + mx.log(mx.array(sampling.min_p, mx.float32))
        filtered = mx.where(logits >= floor, filtered, drop)
    return filtered


@partial(mx.compile, shapeless=True)
def _at_least(logits: mx.array, kth: mx.array) -> mx.array:
    """One kernel instead of two."""
    return mx.where(logits >= kth, logits, mx.array(-mx.inf, mx.float32))


def gumbel_noise(seeds: Sequence[int], position: int, shape: tuple[int, ...], stream: int) -> mx.array:
    """Noise [len(seeds), *shape] that depends on each row's seed, the position and the stream alone."""
    rows = []
    for seed in seeds:
        key = mx.random.split(mx.random.key((seed << 1 | stream) & 0xFFFFFFFFFFFFFFFF), 2)[0]
        rows.append(mx.random.gumbel(shape, key=key + mx.array([position & 0xFFFFFFFF, position >> 32], mx.uint32)))
    return rows[0][None] if len(rows) == 1 else mx.stack(rows)


def sample(logits: mx.array, sampling: Sampling, noise: mx.array | None) -> mx.array:
    """Draw one token per row.

    Parameters
    ----------
    logits : mx.array [..., n]
    sampling : Sampling
    noise : mx.array [..., n] or None
        From :func:`gumbel_noise`; not needed at temperature 0.

    Returns
    -------
    mx.array [...], int32
    """
    if sampling.temperature == 0:
        return mx.argmax(logits.astype(mx.float32), axis=-1).astype(mx.int32)
    assert noise is not None
    return mx.argmax(filter_logits(logits, sampling) + noise, axis=-1).astype(mx.int32)
