"""Delays: what each position reads and predicts, in integers."""

from __future__ import annotations

import random

import mlx.core as mx
import numpy as np

from moshi_mlx.tokens import delay_tokens, undelay


def test_delay_by_hand() -> None:
    """Streams are shifted by another number than their delay, or lack the start token in front."""
    tokens = mx.array([[[10, 11, 12], [20, 21, 22], [30, 31, 32]]])
    assert delay_tokens(tokens, (0, 1, 5), (7, 8, 9)).tolist() == [[[7, 10, 11, 12], [8, 8, 20, 21], [9, 9, 9, 9]]]


def test_undelay_by_hand() -> None:
    """Predictions are attributed to another token than the one they predict."""
    values = mx.array([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])
    moved, mask = undelay(values, (0, 1, 4))
    assert moved.tolist() == [[[1, 2, 3], [5, 6, 0], [0, 0, 0]]]
    assert mask.tolist() == [[[True] * 3, [True, True, False], [False] * 3]]


def test_definition_over_random_delays() -> None:
    """Position p reads token p - 1 - d and predicts token p - d of a stream of delay d; some delay breaks that."""
    rng = random.Random(3)
    for _ in range(50):
        streams, time, batch = rng.randint(1, 6), rng.randint(0, 9), rng.randint(1, 3)
        delays = [rng.randint(0, 11) for _ in range(streams)]
        starts = [1000 + k for k in range(streams)]
        tokens = np.arange(batch * streams * time, dtype=np.int32).reshape(batch, streams, time)
        delayed = np.array(delay_tokens(mx.array(tokens), delays, starts))
        assert delayed.shape == (batch, streams, time + 1)
        for stream, delay in enumerate(delays):
            for p in range(time + 1):
                read = tokens[:, stream, p - 1 - delay] if p > delay else starts[stream]
                assert (delayed[:, stream, p] == read).all()
        if not time:
            continue
        values = np.random.default_rng(0).normal(size=(batch, streams, time, 2)).astype(np.float32)
        moved, mask = (np.array(part) for part in undelay(mx.array(values), delays))
        for stream, delay in enumerate(delays):
            for t in range(time):
                assert (mask[:, stream, t] == (t + delay < time)).all()
                expected = values[:, stream, t + delay] if t + delay < time else 0
                assert (moved[:, stream, t] == expected).all()


def test_undelay_of_no_streams() -> None:
    """A model without generated streams (speech to text) fails on the way back."""
    moved, mask = undelay(mx.zeros((2, 0, 5, 3)), ())
    assert moved.shape == (2, 0, 5, 3) and mask.shape == (2, 0, 5)
