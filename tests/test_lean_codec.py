"""The codec in numpy computes what the codec in MLX computes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moshi_mlx.lean_codec import LeanDecoder, LeanEncoder
from tests.helpers.mimi import TINY, tiny_mimi, unproven_differences
from tests.helpers.signal import speechlike

FRAMES, SIZE = 24, 160
KINDS: dict[str, dict[str, Any]] = {
    "published": {},
    "deeper, dilated": {"seanet": {**TINY["seanet"], "n_residual_layers": 2, "compress": 1, "residual_kernel_size": 5}},
    "odd kernels": {"seanet": {**TINY["seanet"], "kernel_size": 5, "last_kernel_size": 5, "ratios": [4, 5, 4]}},
    "no scale": {"transformer": {**TINY["transformer"], "layer_scale": None}},
    "one latent a frame": {"frame_rate": 300.0},
    "two semantic books": {"quantizer": {**TINY["quantizer"], "n_q_semantic": 2}},
}
CUTS = [[1] * FRAMES, [FRAMES], [3, 1, 1, 7, 2, 10]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_codes(kind: str) -> None:
    """On a CPU the model would hear something else than on a GPU."""
    mimi = tiny_mimi(**KINDS[kind])
    pcm = speechlike(FRAMES * mimi.frame_size, 24000, 3)
    expected = np.array(mimi.encode(mx.array(pcm)[None, None])[0])
    for cut in CUTS:
        encode, start, parts = LeanEncoder(mimi), 0, []
        for count in cut:
            parts.append(encode(pcm[start : start + count * mimi.frame_size]))
            start += count * mimi.frame_size
        ours = np.concatenate(parts, axis=1)
        assert ours.dtype == np.int32
        assert unproven_differences(mimi, pcm, ours, expected) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_sound(kind: str) -> None:
    """On a CPU the voice would sound otherwise than on a GPU; also past the context, and however the codes are cut."""
    mimi = tiny_mimi(**KINDS[kind])
    codes = np.random.default_rng(1).integers(0, mimi.card, (mimi.num_codebooks, FRAMES)).astype(np.int32)
    expected = np.array(mimi.decode(mx.array(codes)[None])[0, 0])
    for cut in CUTS:
        decode, start, parts = LeanDecoder(mimi), 0, []
        for count in cut:
            parts.append(decode(codes[:, start : start + count]))
            start += count
        ours = np.concatenate(parts)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected, atol=3e-6 * max(1.0, float(np.abs(expected).max())))


def test_fewer_codebooks_decode() -> None:
    """A model that speaks with fewer codebooks than the codec has could not be heard."""
    mimi = tiny_mimi()
    codes = np.random.default_rng(2).integers(0, mimi.card, (1, 5)).astype(np.int32)
    expected = np.array(mimi.decode(mx.array(codes)[None])[0, 0])
    np.testing.assert_allclose(LeanDecoder(mimi)(codes), expected, atol=3e-6)


def test_weights_are_not_copied_and_streams_share_nothing() -> None:
    """Each conversation would cost the codec's size again, or two of them would hear one another."""
    mimi = tiny_mimi()
    pcm = speechlike(6 * SIZE, 24000, 4)
    one, two = LeanEncoder(mimi), LeanEncoder(mimi)
    first = one(pcm)
    two(pcm[::-1].copy())
    np.testing.assert_array_equal(LeanEncoder(mimi)(pcm), first)
    matrix = two._stages[0]
    assert matrix is not one._stages[0]
    from moshi_mlx.lean_codec import _Conv

    conv = mimi.encoder.first
    assert np.shares_memory(_Conv(conv)._matrix, np.array(conv.weight, copy=False))
