"""The acoustic delays (Copet et al. 2023, "Simple and Controllable Music Generation"): integers only.

Every stream k is shifted by ``delays[k]`` frames before the model reads it. At position p the model

* reads token ``p - 1 - delays[k]`` of each stream (its start token while that is negative), and
* predicts token ``p - delays[k]`` of each stream that it generates (discarded while that is negative).
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

__all__ = ["delay_tokens", "undelay"]


def delay_tokens(tokens: mx.array, delays: Sequence[int], starts: Sequence[int]) -> mx.array:
    """Shift every stream to the right by its delay, after one start token.

    Parameters
    ----------
    tokens : mx.array [batch, streams, time], int
    delays, starts : sequence of int
        Delay and start token of each stream.

    Returns
    -------
    mx.array [batch, streams, time + 1], int
        Column p is what the model reads at position p; column p + 1 holds what it should predict there.
    """
    batch, _, time = tokens.shape
    rows = []
    for stream, (delay, start) in enumerate(zip(delays, starts, strict=True)):
        lead = min(delay + 1, time + 1)
        padding = mx.full((batch, lead), start, tokens.dtype)
        rows.append(mx.concatenate([padding, tokens[:, stream, : time + 1 - lead]], axis=1))
    return mx.stack(rows, axis=1)


def undelay(values: mx.array, delays: Sequence[int]) -> tuple[mx.array, mx.array]:
    """Shift predictions back, so that entry t belongs to token t.

    Parameters
    ----------
    values : mx.array [batch, streams, time, ...]
        Predictions by position.
    delays : sequence of int
        Delay of each stream.

    Returns
    -------
    values : mx.array [batch, streams, time, ...]
        Zero where no position predicts the token.
    mask : mx.array [batch, streams, time], bool
        Where one does.
    """
    batch, _, time, *rest = values.shape
    rows, masks = [], []
    for stream, delay in enumerate(delays):
        lag = min(delay, time)
        padding = mx.zeros((batch, lag, *rest), values.dtype)
        rows.append(mx.concatenate([values[:, stream, lag:], padding], axis=1))
        masks.append(mx.broadcast_to(mx.arange(time) < time - lag, (batch, time)))
    if not rows:
        return values, mx.zeros((batch, 0, time), mx.bool_)
    return mx.stack(rows, axis=1), mx.stack(masks, axis=1)
