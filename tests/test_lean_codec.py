"""The codec in numpy computes what the codec in MLX computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moshi_mlx.cpu.mimi import Decoder, Encoder, _Conv
from moshi_mlx.models.mimi import Mimi
from moshi_mlx.state import describe_state
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


ALONE = slice(0, 1)


def encoding(mimi: Mimi) -> Callable[[np.ndarray], np.ndarray]:
    """Codes [codebooks, frames] of one new stream's next frames."""
    encoder = Encoder(mimi)
    state = encoder.init_state(1)
    return lambda pcm: encoder.step(pcm[None], state, ALONE)[0]


def decoding(mimi: Mimi) -> Callable[[np.ndarray], np.ndarray]:
    """Samples of one new stream's next columns [codebooks, frames]."""
    decoder = Decoder(mimi)
    state = decoder.init_state(1)
    return lambda codes: decoder.step(codes[None], state, ALONE)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_codes(kind: str) -> None:
    """On a CPU the model would hear something else than on a GPU."""
    mimi = tiny_mimi(**KINDS[kind])
    pcm = speechlike(FRAMES * mimi.frame_size, 24000, 3)
    expected = np.array(mimi.encode(mx.array(pcm)[None, None])[0])
    for cut in CUTS:
        encode, start, parts = encoding(mimi), 0, []
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
        decode, start, parts = decoding(mimi), 0, []
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
    np.testing.assert_allclose(decoding(mimi)(codes), expected, atol=3e-6)


def test_weights_are_not_copied_and_streams_share_nothing() -> None:
    """Each conversation would cost the codec's size again, or two of them would hear one another."""
    mimi = tiny_mimi()
    pcm = speechlike(6 * SIZE, 24000, 4)
    one, two = encoding(mimi), encoding(mimi)
    first = one(pcm)
    two(pcm[::-1].copy())
    np.testing.assert_array_equal(encoding(mimi)(pcm), first)
    conv = mimi.encoder.first
    assert np.shares_memory(_Conv(conv)._matrix, np.array(conv.weight, copy=False))


def test_a_state_has_the_names_and_shapes_of_the_other() -> None:
    """A conversation saved with one codec could not go on with the other."""
    for kind in KINDS.values():
        mimi = tiny_mimi(**kind)
        assert describe_state(Encoder(mimi).init_state(3)) == describe_state(mimi.init_encoder_state(3))
        assert describe_state(Decoder(mimi).init_state(3)) == describe_state(mimi.init_decoder_state(3))


def test_unwritten_keys_are_never_read_by_one_row_or_several() -> None:
    """The first seconds of a conversation would attend to whatever lay in memory."""
    mimi = tiny_mimi()
    encoder, pcm = Encoder(mimi), speechlike(12 * SIZE, 24000, 5)
    expected = encoding(mimi)(pcm)
    for batch in (1, 3):
        state = encoder.init_state(batch)
        for name in ("keys", "values"):
            for index in range(len(mimi.encoder_transformer.layers)):
                state["transformer"][str(index)][name][:] = np.nan
        codes = encoder.step(np.stack([pcm] * batch), state, slice(0, batch))
        assert all(unproven_differences(mimi, pcm, row, expected) == [] for row in codes)


def test_nothing_grows_with_time() -> None:
    """A long conversation would run out of memory."""
    mimi = tiny_mimi()
    encoder, decoder = Encoder(mimi), Decoder(mimi)
    states = encoder.init_state(2), decoder.init_state(2)
    schemas = [describe_state(state) for state in states]
    pcm = np.stack([speechlike(SIZE, 24000, seed) for seed in range(2)])
    for _ in range(200):
        samples = decoder.step(encoder.step(pcm, states[0], slice(0, 2)), states[1], slice(0, 2))
        assert np.isfinite(samples).all()
    assert [describe_state(state) for state in states] == schemas


def test_matrices_that_do_not_fit_the_cache_go_in_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of large codecs would miss a part of the matrix, or round otherwise in company."""
    monkeypatch.setattr("moshi_mlx.cpu.mimi._PANEL", 50)
    mimi = tiny_mimi()
    encoder, decoder = Encoder(mimi), Decoder(mimi)
    heard, said = encoder.init_state(3), decoder.init_state(3)
    pcm = np.stack([speechlike(FRAMES * SIZE, 24000, seed) for seed in range(3)])
    codes, sound = [], []
    for at in range(0, FRAMES * SIZE, SIZE):
        codes.append(encoder.step(pcm[:, at : at + SIZE], heard, slice(0, 3)))
        sound.append(decoder.step(codes[-1], said, slice(0, 3)))
    for row in range(3):
        ours = np.concatenate([part[row] for part in codes], axis=1)
        expected = np.array(mimi.encode(mx.array(pcm[row])[None, None])[0])
        assert unproven_differences(mimi, pcm[row], ours, expected) == []
        encode, decode = encoding(mimi), decoding(mimi)
        alone = [encode(pcm[row, at : at + SIZE]) for at in range(0, FRAMES * SIZE, SIZE)]
        np.testing.assert_array_equal(np.concatenate(alone, axis=1), ours)
        voice = np.concatenate([part[row] for part in sound])
        np.testing.assert_array_equal(np.concatenate([decode(ours[:, at : at + 1]) for at in range(FRAMES)]), voice)
        np.testing.assert_allclose(voice, np.array(mimi.decode(mx.array(ours)[None])[0, 0]), atol=3e-6)
