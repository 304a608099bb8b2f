"""Sampling: the reference's distributions, and draws that follow them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moshi_mlx.errors import ConfigError
from moshi_mlx.models.sampling import (
    AUDIO_SAMPLING,
    GREEDY,
    TEXT_SAMPLING,
    RowSampling,
    Sampling,
    filter_logits,
    gumbel_noise,
    sample,
    sample_rows,
)

GOLDEN: dict[str, Any] = dict(mx.load(str(Path(__file__).parent / "golden" / "lm" / "sampling.safetensors")))
SETTINGS = list(zip(*(GOLDEN[key].tolist() for key in ("temp", "top_k", "top_p"))))


def distribution(logits: mx.array, sampling: Sampling) -> np.ndarray:
    return np.array(mx.softmax(filter_logits(logits, sampling), axis=-1))


@pytest.mark.parametrize("index", range(len(SETTINGS)), ids=lambda i: "-".join(f"{v:g}" for v in SETTINGS[i]))
def test_golden_distributions(index: int) -> None:
    """Tokens are drawn from another distribution than the reference's for the same settings.

    Where both top-p and top-k are set the reference ignores top-k; here both apply.
    """
    temperature, top_k, top_p = SETTINGS[index]
    expected = np.array(GOLDEN["probs"])[index]
    if temperature == 0:
        tokens = sample(GOLDEN["logits"], Sampling(0.0, top_k), None)
        assert tokens.tolist() == expected.argmax(axis=-1).tolist() and tokens.dtype == mx.int32
        return
    made = distribution(GOLDEN["logits"], Sampling(temperature, 0 if 0 < top_p else top_k, top_p))
    assert np.abs(made - expected).max() < 1e-5
    assert ((made > 0) == (expected > 0)).all()
    if top_k and top_p:
        both = distribution(GOLDEN["logits"], Sampling(temperature, top_k, top_p))
        assert ((both > 0).sum(axis=-1) <= top_k).all() and ((both > 0) <= (expected > 0)).all()


def test_goldens_hold_every_setting() -> None:
    """The comparison above has lost its cases."""
    assert len(SETTINGS) == 15
    assert any(k and not p for _, k, p in SETTINGS) and any(p and not k for _, k, p in SETTINGS)


def test_top_k_edges() -> None:
    """k of all or more drops tokens; k of one is not greedy; ties at the border are dropped at random."""
    logits = mx.array([[1.0, 3.0, 2.0, 2.0, 0.0]])
    for k in (0, 5, 99):
        assert (distribution(logits, Sampling(1.0, k)) > 0).all()
    assert (distribution(logits, Sampling(1.0, 1)) > 0).tolist() == [[False, True, False, False, False]]
    assert (distribution(logits, Sampling(1.0, 2)) > 0).tolist() == [[False, True, True, True, False]]


def test_top_p_edges() -> None:
    """The likeliest token is dropped, the token that crosses p is dropped, or 0 and 1 do not mean all."""
    logits = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))
    for p, kept in ((0.0, 4), (1.0, 4), (1e-6, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.949, 3), (0.951, 4)):
        assert (distribution(logits, Sampling(1.0, top_p=p)) > 0).tolist() == [[i < kept for i in range(4)]], p
    shuffled = logits[:, mx.array([2, 0, 3, 1])]
    assert (distribution(shuffled, Sampling(1.0, top_p=0.6)) > 0).tolist() == [[False, True, False, True]]


def test_min_p() -> None:
    """Tokens less likely than a fraction of the likeliest stay, on the tempered distribution, or others go."""
    probabilities = np.array([[0.5, 0.26, 0.2, 0.04]])
    logits = mx.log(mx.array(probabilities))
    for temperature in (0.5, 1.0, 2.0):
        tempered = probabilities ** (1 / temperature)
        for floor in (0.05, 0.3, 0.45, 0.99):
            made = distribution(logits, Sampling(temperature, min_p=floor))
            assert ((made > 0) == (tempered >= floor * tempered.max())).all()
    assert (distribution(logits, Sampling(1.0, min_p=1.0)) > 0).sum() == 1


def test_filters_combine() -> None:
    """Set together, a filter undoes another."""
    logits = mx.random.normal((50, 30), key=mx.random.key(2)) * 2
    parts = [Sampling(0.7, top_k=9), Sampling(0.7, top_p=0.8), Sampling(0.7, min_p=0.1)]
    kept = np.all([distribution(logits, part) > 0 for part in parts], axis=0)
    assert ((distribution(logits, Sampling(0.7, 9, 0.8, 0.1)) > 0) == kept).all()
    assert kept.any(axis=-1).all()


def test_float32() -> None:
    """Sampling works in the model's bfloat16: at 32,000 tokens its steps are far coarser than the probabilities."""
    logits = mx.random.normal((2, 50), key=mx.random.key(2)).astype(mx.bfloat16)
    assert filter_logits(logits, Sampling(0.7)).dtype == mx.float32
    exact = distribution(logits.astype(mx.float32), Sampling(0.7, 20))
    assert (distribution(logits, Sampling(0.7, 20)) == exact).all()


def draw(logits: mx.array, sampling: Sampling, seeds: range, positions: range) -> np.ndarray:
    """Tokens [positions, seeds] drawn from one row of logits."""
    rows = mx.broadcast_to(logits, (len(seeds), logits.shape[-1]))
    made = [sample(rows, sampling, gumbel_noise(seeds, p, logits.shape[-1:], 0)) for p in positions]
    return np.array(mx.stack(made))


@pytest.mark.parametrize(
    ("seeds", "positions"), [(range(1), range(3000)), (range(3000), range(1)), (range(60), range(10**10, 10**10 + 50))]
)
def test_draws_follow_the_distribution(seeds: range, positions: range) -> None:
    """Draws of one conversation over time, or of many at one time, do not have the frequencies they should.

    Pearson's chi-square with 11 degrees of freedom; 31.3 is exceeded with probability 0.001 (the seeds are fixed).
    """
    logits = mx.random.normal((12,), key=mx.random.key(5)) * 1.5
    sampling = Sampling(0.9)
    counts = np.bincount(draw(logits, sampling, seeds, positions).ravel(), minlength=12)
    expected = distribution(logits, sampling) * counts.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 31.3


def test_draws_respect_the_filters() -> None:
    """A token that a filter drops is drawn."""
    logits = mx.random.normal((12,), key=mx.random.key(5))
    for sampling in (Sampling(2.0, top_k=4), Sampling(2.0, top_p=0.6), Sampling(2.0, min_p=0.4)):
        kept = set(np.flatnonzero(distribution(logits, sampling)).tolist())
        assert set(draw(logits, sampling, range(400), range(2)).ravel().tolist()) == kept
        assert 1 < len(kept) < 12


def test_noise_depends_on_seed_position_and_stream_alone() -> None:
    """Two conversations, frames, or text and audio share their noise; or a batch changes that of a row."""
    shape = (3, 20)
    together = gumbel_noise((7, 8, 2**63, -1), 5, shape, 1)
    assert together.shape == (4, *shape)
    for row, seed in enumerate((7, 8, 2**63, -1)):
        assert mx.array_equal(gumbel_noise((seed,), 5, shape, 1)[0], together[row]).item()
    others = [((7,), 6, 1), ((7,), 5 + 2**32, 1), ((7,), 5, 0), ((8,), 5, 1), ((2**63,), 5, 1), ((-1,), 5, 1)]
    noises = [np.array(together[0])] + [np.array(gumbel_noise(s, p, shape, k))[0] for s, p, k in others]
    for index, one in enumerate(noises):
        for other in noises[:index]:
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.5
            assert not (one == other).any()


def test_noise_is_independent_over_time() -> None:
    """Noise of neighbouring frames is correlated: the model would repeat its choices."""
    noise = np.array([np.array(gumbel_noise((3,), p, (40,), 1))[0] for p in range(500)]).reshape(500, 40)
    assert abs(noise.mean() - 0.5772) < 0.03 and abs(noise.std() - np.pi / 6**0.5) < 0.03
    for lag in (1, 2, 3, 8):
        assert abs(np.corrcoef(noise[lag:].ravel(), noise[:-lag].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]) < 0.03


def test_temperature_zero() -> None:
    """Greedy needs noise or a filter, or divides by zero."""
    logits = mx.array([[0.1, 5.0, 4.9], [7.0, -1.0, 6.99]]).astype(mx.bfloat16)
    assert sample(logits, GREEDY, None).tolist() == [1, 0]
    assert sample(logits, Sampling(0.0, 2, 0.9, 0.1), None).tolist() == [1, 0]


def test_shapes() -> None:
    """Rows of several dimensions are mixed up."""
    logits = mx.random.normal((2, 3, 7), key=mx.random.key(0)) * 30
    tokens = sample(logits, Sampling(0.1, 5), mx.zeros((2, 3, 7)))
    assert tokens.shape == (2, 3) and mx.array_equal(tokens, mx.argmax(logits, axis=-1)).item()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e-40}, "too small"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": -0.1}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
    ],
)
def test_refused_settings(settings: dict[str, Any], said: str) -> None:
    """A setting that means nothing is taken, and fails at the first frame."""
    with pytest.raises(ConfigError, match=said):
        Sampling(**settings)


MANY = [GREEDY, TEXT_SAMPLING, AUDIO_SAMPLING, Sampling(1.3), Sampling(0.9, top_p=0.8), Sampling(0.7, 9, 0.9, 0.05)]


@pytest.mark.parametrize(
    "rows",
    [
        MANY * 8,
        [GREEDY] * 5,
        [GREEDY, Sampling(1.0)] * 9,
        [AUDIO_SAMPLING] * 9,
        [Sampling(1.1, 0, 0.7), Sampling(0.9)] * 9,
    ],
    ids=["many", "greedy", "some greedy", "alike", "top-p"],
)
def test_rows_draw_as_they_draw_alone(rows: list[Sampling]) -> None:
    """If this fails, a conversation's temperature or filter is another's in the batch."""
    logits = mx.random.normal((len(rows), 300), key=mx.random.key(0)) * 3
    how = RowSampling(rows)
    arrays = {name: mx.array(values) for name, values in how.arrays.items()}
    for position in range(20):
        noise = None if how.kind.greedy else gumbel_noise(range(len(rows)), position, (300,), 0)
        drawn = sample_rows(logits, how.kind, arrays, noise)
        for row, sampling in enumerate(rows):
            own = None if noise is None else noise[row : row + 1]
            assert drawn[row].item() == sample(logits[row : row + 1], sampling, own).item()


def test_what_all_rows_have_in_common() -> None:
    """If this fails, a step has operations that no row needs, or lacks one."""
    assert RowSampling([GREEDY] * 3).kind == (True, 0, False, False)
    assert RowSampling([GREEDY, Sampling(1.0, 5)]).kind == (None, 5, False, False)
    assert RowSampling([Sampling(1.0, 4, 1.0), Sampling(1.0, 5, min_p=0.1)]).kind == (False, None, False, True)
    groups = RowSampling([GREEDY, Sampling(1.0), GREEDY]).groups
    assert [(kind, rows is not None and rows.tolist()) for kind, rows in groups] == [
        (GREEDY, [0, 2]),
        (Sampling(1.0), [1]),
    ]
    assert RowSampling([GREEDY] * 3).groups == [(GREEDY, None)]
