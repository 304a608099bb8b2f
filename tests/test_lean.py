"""The step in numpy: the same numbers as the modules, for every kind of model."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from moshi_mlx.cpu import blas as threads
from moshi_mlx.cpu import lm as lean
from moshi_mlx.cpu.lm import Backend, NumpyBackend, make_backend
from moshi_mlx.engine.generator import GenerationConfig, Generator
from moshi_mlx.models.lm import Lm
from moshi_mlx.models.sampling import AUDIO_SAMPLING, GREEDY, Sampling, gumbel_noise, sample

from .helpers import golden_lm
from .helpers.golden_lm import relative_error, small_model

TOLERANCE = 1e-4  # what is promised; 3e-6 was measured


def columns(lm: Lm, batch: int, count: int) -> np.ndarray:
    """Random tokens [count, batch, streams], some of them -1."""
    rng, config = np.random.default_rng(0), lm.config
    tokens = rng.integers(-1, config.card + 1, (count, batch, config.num_streams))
    tokens[:, :, 0] = rng.integers(-1, config.text_card, (count, batch))
    return tokens.astype(np.int32)


def logits(backend: Backend, lm: Lm, tokens: np.ndarray, condition: Any = None) -> list[np.ndarray]:
    """Text and code logits of every position, the codes of a frame given by its own tokens."""
    batch = tokens.shape[1]
    state = backend.open(lm.init_state(batch, condition=condition))
    out = []
    for column in tokens:
        hidden = backend.temporal(column, state)
        out.append(np.array(backend.text_logits(hidden)))
        cache: list[Any] = []
        for k in range(lm.config.own_q):
            out.append(np.array(backend.depth(k, hidden, backend.xp.array(column[:, k]), cache)))
    return out


def both(lm: Lm, batch: int, count: int, condition: Any = None) -> float:
    """Largest relative difference between the two backends."""
    tokens = columns(lm, batch, count)
    ours, theirs = logits(NumpyBackend(lm), lm, tokens, condition), logits(Backend(lm), lm, tokens, condition)
    return max(relative_error(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("name", golden_lm.MOSHI)
def test_every_model_gives_the_modules_numbers(name: str) -> None:
    """On the CPU some kind of layer computes something else than on a GPU."""
    lm, _ = golden_lm.model(name)
    condition = golden_lm.condition(name)
    batch = len(golden_lm.arrays(name)["tokens"])
    assert both(lm, batch, 16, condition) < TOLERANCE


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_models(bits: int, batch: int) -> None:
    """Unpacked weights or tables are not the packed ones."""
    lm = small_model()
    nn.quantize(lm, bits=bits, group_size=32)
    assert both(lm, batch, 15) < TOLERANCE


def test_ring_goes_round() -> None:
    """Once the context is full, the oldest key is not the one that goes."""
    assert both(small_model(context=5), 1, 13) < TOLERANCE


@pytest.mark.parametrize("name", ["moshi", "schedule"])
def test_a_conversation_goes_on_with_the_other_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator says other words on a GPU, or a saved conversation cannot move between machines."""
    lm, _ = golden_lm.model(name)
    frames = golden_lm.run(name, "greedy").frames[:40]
    config, seeds = GenerationConfig(GREEDY, Sampling(0.8, top_k=5)), range(frames.shape[1])
    numpy_one = Generator(lm, config, seeds=seeds)
    monkeypatch.setattr("moshi_mlx.engine.generator.make_backend", lambda lm, kv_bits=None: Backend(lm))
    module_one = Generator(lm, config, seeds=seeds)
    assert isinstance(numpy_one._numpy_backend, NumpyBackend) and not isinstance(
        module_one._numpy_backend, NumpyBackend
    )
    for frame in frames[:20]:
        one, other = numpy_one.step(frame), module_one.step(frame)
        assert np.array_equal(one.text, other.text) and (one.codes is None or np.array_equal(one.codes, other.codes))
    between = numpy_one.snapshot()
    numpy_one.restore(module_one.snapshot())
    module_one.restore(between)
    for frame in frames[20:]:
        one, other = numpy_one.step(frame), module_one.step(frame)
        assert np.array_equal(one.text, other.text) and np.array_equal(one.codes, other.codes)


@pytest.mark.parametrize(
    "sampling", [GREEDY, AUDIO_SAMPLING, Sampling(0.7, top_k=3), Sampling(1.3), Sampling(0.9, top_p=0.8, min_p=0.05)]
)
def test_draws_are_the_same(sampling: Sampling) -> None:
    """The same seed says one thing on the CPU and another on a GPU."""
    backend = NumpyBackend(small_model())
    given = np.random.default_rng(1).normal(0, 2, (50, 300)).astype(np.float32)
    noise = None if sampling is GREEDY else gumbel_noise(range(50), 7, (300,), 0)
    drawn = backend.sample(given.copy(), sampling, None if noise is None else np.array(noise))
    assert drawn.dtype == np.int32
    assert np.array_equal(drawn, np.array(sample(mx.array(given), sampling, noise)))


def test_weights_are_not_held_twice() -> None:
    """A model in memory costs twice its size on the CPU."""
    lm = small_model()
    weight = lm.transformer.layers[0].gating.linear_in.weight
    backend = make_backend(lm)
    assert isinstance(backend, NumpyBackend)
    seen = backend._layers[0]._gating._in.weight
    assert seen.__array_interface__["data"][0] == np.array(weight, copy=False).__array_interface__["data"][0]


@pytest.mark.parametrize("laid_out", [True, False])
def test_products_of_any_number_of_rows(laid_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the blocks of a weight, or what is padded to fill the last one, are put together wrongly."""
    monkeypatch.setattr(lean, "_BLOCKED_BYTES", 200 * 130 * 4)
    rng = np.random.default_rng(0)
    for inputs, outputs in ((200, 130), (64, 64), (300, 10), (201, 130)):
        weight = rng.normal(size=(outputs, inputs)).astype(np.float32).T
        matrix = lean._Matrix(np.ascontiguousarray(weight) if laid_out else weight)
        for rows in (1, 2, 5, 16, 60, 70):
            x = rng.normal(size=(rows, inputs)).astype(np.float32)
            made = matrix(x)
            assert made.shape == (rows, outputs)
            assert np.abs(made - x.astype(np.float64) @ weight).max() < 1e-4
        assert (matrix._blocks is None) == (inputs == 201)


def test_new_weights_are_noticed() -> None:
    """After a training step, or in a copy of the model, the old weights speak."""
    lm = small_model()
    backend = make_backend(lm)
    assert make_backend(lm) is backend
    other = copy.deepcopy(lm)
    assert make_backend(other) is not backend
    lm.text_linear.weight = lm.text_linear.weight * 2
    newer = make_backend(lm)
    hidden = np.ones((1, lm.config.dim), np.float32)
    assert np.allclose(newer.text_logits(hidden), 2 * backend.text_logits(hidden))


def test_what_stays_with_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numpy is asked for a type it does not have, for a cache it cannot read, or for more memory than there is."""
    assert type(make_backend(small_model(), kv_bits=8)) is Backend
    half = small_model()
    half.set_dtype(mx.bfloat16)
    assert type(make_backend(half)) is Backend
    packed = small_model()
    nn.quantize(packed, bits=4, group_size=32)
    assert isinstance(make_backend(packed), NumpyBackend)
    monkeypatch.setattr(lean, "_UNPACKED_BYTES", 1000)
    assert type(make_backend(packed)) is Backend


def test_threads_are_the_users_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user set in the environment is overridden."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    assert not threads.one_blas_thread()
