"""The networks in bfloat16, as a Mac's GPU runs them, held to an error that follows from the format.

A product in bfloat16 is accumulated in float32 and rounded once, to eight significant bits. The tolerance is that
rounding: a float32 twin with the same weights rounds the output of every layer to bfloat16, and the error of its logits
against plain float32 is what the layers' outputs cost. The real thing also rounds both sums of a layer with its input,
the gate's product, rotated keys and attention: about twice as many places, two of them as large as the input itself.
Twice that error is measured and three times allowed; at least as much, or it did not compute in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from moshi_mlx.codec.base import MlxMimi
from moshi_mlx.engine.generator import GenerationConfig, Generator
from moshi_mlx.models.lm import Lm
from moshi_mlx.models.sampling import GREEDY
from tests.helpers.golden_lm import small_model
from tests.helpers.mimi import tiny_mimi
from tests.helpers.signal import speechlike

POSITIONS = 48


def rounded(x: mx.array) -> mx.array:
    return x.astype(mx.bfloat16).astype(mx.float32)


@contextmanager
def rounding() -> Iterator[None]:
    """Every layer of :mod:`mlx.nn` that is called rounds its output, as it does with bfloat16 weights."""
    kept: dict[type[nn.Module], Callable[..., Any]] = {
        kind: kind.__call__ for kind in (nn.Linear, nn.RMSNorm, nn.LayerNorm, nn.Embedding, nn.Conv1d)
    }
    for kind, call in kept.items():
        kind.__call__ = lambda self, *args, _call=call: rounded(_call(self, *args))  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, call in kept.items():
            kind.__call__ = call  # type: ignore[method-assign]


def twins(lm: Lm) -> tuple[Lm, Lm]:
    """The model in bfloat16, and in float32 with the same values."""
    weights = tree_map(lambda value: value.astype(mx.bfloat16), lm.parameters())
    half, full = Lm(lm.config), Lm(lm.config)
    half.update(weights)
    full.update(tree_map(lambda value: value.astype(mx.float32), weights))
    return half, full


def logits(lm: Lm, tokens: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Text logits [positions, text_out] and code logits [positions, dep_q, card], a position at a time."""
    state, rows = lm.init_state(1), []
    for position in range(tokens.shape[2]):
        hidden = lm.step(tokens[:, :, position : position + 1], state)[:, 0]
        given = tokens[:, : lm.config.dep_q, position]
        codes = lm.depformer(hidden, given)
        rows.append((lm.text_linear(hidden)[0].astype(mx.float32), codes[0].astype(mx.float32)))
    text, codes = (mx.stack(column) for column in zip(*rows, strict=True))
    return np.array(text), np.array(codes)


def rms(difference: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))


@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_repeat": 2, "depformer_kv_repeat": 1}, {"norm": "layer_norm"}],
    ids=["moshi", "grouped", "layer"],
)
def test_logits(changes: dict[str, Any]) -> None:
    """If this fails, a layer computes bfloat16 with more error than the format has, or not in bfloat16 at all."""
    lm = small_model(3, **changes)
    half, full = twins(lm)
    config = lm.config
    tokens = mx.random.randint(0, min(config.card, config.text_card), (1, config.num_streams, POSITIONS))
    exact, found = logits(full, tokens), logits(half, tokens)
    with rounding():
        expected = logits(full, tokens)
    for name, reference, real, simulated in zip(("text", "codes"), exact, found, expected, strict=True):
        tolerance = rms(simulated - reference)
        assert 0 < tolerance < 0.1 * rms(reference), name
        assert tolerance <= rms(real - reference) <= 3 * tolerance, name


def test_rows_in_bfloat16() -> None:
    """If this fails, a row of a batch in bfloat16 depends on its neighbours beyond the rounding of a product."""
    half, _ = twins(small_model(5))
    half.backend = "mlx"
    config = half.config
    rng = np.random.default_rng(0)
    frames = rng.integers(0, config.card, (POSITIONS, 3, config.user_q))
    settings = GenerationConfig(text=GREEDY, audio=GREEDY)
    forced = rng.integers(4, config.text_card, (POSITIONS, 3))
    codes = rng.integers(0, config.card, (POSITIONS, 3, config.own_q))
    together = Generator(half, settings, seeds=None)
    names = [together.join(seed) for seed in range(3)]
    nothing = np.full((3, config.user_q), -2)
    together.step_rows(names, nothing)
    for position in range(POSITIONS):
        together.step_rows(names, frames[position], text=forced[position], own_codes=codes[position])
    for row, name in enumerate(names):
        alone = Generator(half, settings, seeds=None)
        own = alone.join(row)
        alone.step_rows([own], nothing[:1])
        for position in range(POSITIONS):
            one = slice(row, row + 1)
            alone.step_rows([own], frames[position, one], text=forced[position, one], own_codes=codes[position, one])
        rings, ring = (dict(tree_flatten(made.snapshot([who])["lm"])) for made, who in ((together, name), (alone, own)))
        assert rings.keys() == ring.keys()
        for key, value in rings.items():
            a, b = (np.array(one.astype(mx.float32)) for one in (value, ring[key]))
            # Products of one row and of several differ before the rounding: by one step, 2**-8, a layer.
            assert rms(a - b) <= 2**-8 * config.num_layers * rms(b), key


def test_codec() -> None:
    """If this fails, the codec in bfloat16 decodes with more error than its layers round."""
    mimi = tiny_mimi(1)
    codec = MlxMimi(mimi)
    pcm = speechlike(20 * codec.frame_size, codec.sample_rate, 0).astype(np.float32)
    codes = mx.array(codec.encode(pcm))[None]
    plain = tree_map(lambda value: value.astype(mx.bfloat16).astype(mx.float32), mimi.parameters())
    mimi.update(plain)
    exact = np.array(mimi.decode(codes))
    with rounding():
        tolerance = rms(np.array(mimi.decode(codes)) - exact)
    mimi.update(tree_map(lambda value: value.astype(mx.bfloat16), plain))
    found = np.array(mimi.decode(codes).astype(mx.float32))
    assert 0 < tolerance < 0.2 * rms(exact)
    assert tolerance <= rms(found - exact) <= 3 * tolerance
