"""Choosing a token from logits: in float32, from an explicit seed.

A token is ``argmax(filtered logits / temperature + Gumbel noise)``, which draws from the softmax exactly. The noise of
a frame depends only on the row's seed and the position, so a conversation gives the same answer in a batch as alone,
and a restored one continues as it would have.

mlx-lm has samplers of the same filters; they draw from MLX's global generator and importing them loads transformers,
so these few lines are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError

__all__ = [
    "AUDIO_SAMPLING",
    "GREEDY",
    "TEXT_SAMPLING",
    "RowSampling",
    "Sampling",
    "SamplingKind",
    "filter_logits",
    "gumbel_noise",
    "keyed_noise",
    "keys_at",
    "noise_key",
    "sample",
    "sample_rows",
]

Keys = NDArray[np.uint32]


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
    if 0 < sampling.top_k < count:
        rank = count - sampling.top_k
        filtered = _at_least(logits, mx.partition(logits, rank, axis=-1)[..., rank, None])
    else:
        filtered = logits
    if 0 < sampling.top_p < 1:
        filtered = _within(logits, filtered, sampling.top_p)
    if sampling.min_p > 0:
        filtered = _likely(logits, filtered, mx.array(sampling.min_p, mx.float32))
    return filtered


def _within(logits: mx.array, filtered: mx.array, top_p: float | mx.array) -> mx.array:
    order = mx.argsort(-logits, axis=-1)
    probabilities = mx.softmax(mx.take_along_axis(logits, order, axis=-1), axis=-1)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    keep = mx.put_along_axis(mx.zeros(logits.shape, mx.bool_), order, before <= top_p, axis=-1)
    return mx.where(keep, filtered, mx.array(-mx.inf, mx.float32))


def _likely(logits: mx.array, filtered: mx.array, min_p: mx.array) -> mx.array:
    floor = logits.max(axis=-1, keepdims=True) + mx.log(min_p)
    return mx.where(logits >= floor, filtered, mx.array(-mx.inf, mx.float32))


@partial(mx.compile, shapeless=True)
def _at_least(logits: mx.array, kth: mx.array) -> mx.array:
    """One kernel instead of two."""
    return mx.where(logits >= kth, logits, mx.array(-mx.inf, mx.float32))


def noise_key(seed: int, stream: int) -> Keys:
    """The key [2] of a row's noise in one stream, for position 0."""
    key = mx.random.split(mx.random.key((seed << 1 | stream) & 0xFFFFFFFFFFFFFFFF), 2)[0]
    return np.array(key, np.uint32)


def keys_at(keys: Keys, positions: ArrayLike) -> Keys:
    """Keys [rows, 2] for other positions, one or one a row, from those for position 0."""
    position = np.asarray(positions, np.int64)
    words = np.stack([position & 0xFFFFFFFF, position >> 32], axis=-1).astype(np.uint32)
    return keys + words  # modulo 2**32


def keyed_noise(keys: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Gumbel noise [rows, *shape], each row from its own key."""
    if len(keys) == 1:
        return mx.random.gumbel(shape, key=keys[0])[None]
    noise: mx.array = mx.vmap(lambda key: mx.random.gumbel(shape, key=key))(keys)
    return noise


def gumbel_noise(seeds: Sequence[int], position: int, shape: tuple[int, ...], stream: int) -> mx.array:
    """Noise [len(seeds), *shape] that depends on each row's seed, the position and the stream alone."""
    keys = np.stack([noise_key(seed, stream) for seed in seeds])
    return keyed_noise(mx.array(keys_at(keys, position)), shape)


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


class SamplingKind(NamedTuple):
    """Properties of all rows: they determine the operations.

    Attributes
    ----------
    greedy : bool or None
        Whether rows take the likeliest token; None where some do.
    top_k : int or None
        That of all rows; None where they differ.
    top_p, min_p : bool
        Whether any row has it.
    """

    greedy: bool | None
    top_k: int | None
    top_p: bool
    min_p: bool


class RowSampling:
    """How to draw for several rows, each in its own way.

    Attributes
    ----------
    kind : SamplingKind
    arrays : dict of str to array [rows]
        What :func:`sample_rows` needs beside it.
    groups : list of (Sampling, array [n] or None)
        Rows that draw in one way; None: all of them.
    """

    def __init__(self, rows: Sequence[Sampling]):
        drawing = [row for row in rows if row.temperature]
        ranks = {row.top_k for row in drawing} or {0}
        greedy = None if 0 < len(drawing) < len(rows) else not drawing
        self.kind = SamplingKind(
            greedy,
            ranks.pop() if len(ranks) == 1 else None,
            any(0 < row.top_p < 1 for row in drawing),
            any(row.min_p > 0 for row in drawing),
        )
        self.arrays = {
            "temperature": np.array([row.temperature or 1.0 for row in rows], np.float32),
            "greedy": np.array([not row.temperature for row in rows]),
            "top_k": np.array([row.top_k for row in rows], np.int32),
            "top_p": np.array([row.top_p if 0 < row.top_p < 1 else 2.0 for row in rows], np.float32),
            "min_p": np.array([row.min_p for row in rows], np.float32),
        }
        kinds = list(dict.fromkeys(rows))
        self.groups: list[tuple[Sampling, NDArray[np.intp] | None]] = [(kinds[0], None)]
        if len(kinds) > 1:
            self.groups = [(kind, np.array([index for index, row in enumerate(rows) if row == kind])) for kind in kinds]


def sample_rows(logits: mx.array, kind: SamplingKind, rows: dict[str, mx.array], noise: mx.array | None) -> mx.array:
    """Draw one token per row, each row with its own settings: what :func:`sample` draws with them.

    Parameters
    ----------
    logits : mx.array [rows, n]
    kind : SamplingKind
    rows : dict of str to mx.array [rows]
        :attr:`RowSampling.arrays`.
    noise : mx.array [rows, n] or None

    Returns
    -------
    mx.array [rows], int32
    """
    logits = logits.astype(mx.float32)
    if kind.greedy:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    assert noise is not None
    count = logits.shape[-1]
    logits = logits / rows["temperature"][:, None]
    filtered = logits
    if kind.top_k is None:
        kept = mx.where((rows["top_k"] > 0) & (rows["top_k"] < count), rows["top_k"], count)
        filtered = _at_least(logits, mx.take_along_axis(mx.sort(logits, axis=-1), (count - kept)[:, None], axis=-1))
    elif 0 < kind.top_k < count:
        rank = count - kind.top_k
        filtered = _at_least(logits, mx.partition(logits, rank, axis=-1)[..., rank, None])
    if kind.top_p:
        filtered = _within(logits, filtered, rows["top_p"][:, None])
    if kind.min_p:
        filtered = _likely(logits, filtered, rows["min_p"][:, None])
    if kind.greedy is None:
        noise = mx.where(rows["greedy"][:, None], mx.array(0, mx.float32), noise)
    return mx.argmax(filtered + noise, axis=-1).astype(mx.int32)
