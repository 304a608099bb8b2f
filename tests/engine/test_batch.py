"""Many conversations on one batch: each answers what it answers alone, comes and goes, and fails alone."""

from __future__ import annotations

import gc
import os
from typing import Any

import numpy as np
import pytest

from moshi_mlx.engine import Batch, Settings
from moshi_mlx.engine.generator import GenerationConfig
from moshi_mlx.errors import CodecError, ConfigError, StateError
from moshi_mlx.models.sampling import GREEDY, Sampling
from moshi_mlx.state import state_arrays
from tests.helpers.tiny import WAYS, sound, tiny_model, use

TICKS = int(os.environ.get("MOSHI_TEST_TICKS", "150"))
KINDS = (
    GenerationConfig(),
    GenerationConfig(GREEDY, GREEDY),
    GenerationConfig(Sampling(0.8, 10), Sampling(1.1), repetition_penalty=1.3, repetition_context=12),
)


def alone(model: Any, settings: Settings, frames: list[np.ndarray]) -> list[Any]:
    with model.session(seed=settings.seed, generation=settings.generation) as session:
        return [session.step(pcm) for pcm in frames]


def same(found: list[Any], expected: list[Any], exact: bool) -> None:
    """Tokens, text and words alike; samples too, up to rounding where MLX computes rows together."""
    assert [frame.index for frame in found] == [frame.index for frame in expected]
    for mine, its in zip(found, expected, strict=True):
        assert np.array_equal(mine.step.text, its.step.text) and mine.text == its.text and mine.words == its.words
        assert mine.voiced == its.voiced
        if its.step.codes is not None:
            assert np.array_equal(mine.step.codes, its.step.codes)
        assert np.array_equal(mine.pcm, its.pcm) if exact else np.allclose(mine.pcm, its.pcm, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_rows_come_and_go(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, other conversations change an answer, or a batch keeps the memory of those that left."""
    use(way, monkeypatch)
    model, rng = tiny_model(way), np.random.default_rng(0)
    ticks, most = (TICKS, 64) if way == "numpy" else (TICKS // 3, 16)
    batch = Batch(model.engine)
    speech = sound(model, 60)
    there: dict[int, tuple[Settings, int, list[np.ndarray], list[Any]]] = {}
    gone: list[tuple[Settings, list[np.ndarray], list[Any]]] = []
    seed = biggest = 0
    for tick in range(ticks):
        crowd = most if tick % 50 < 30 else 2  # a crowd comes, and leaves again
        while len(there) < crowd and rng.random() < 0.7:
            seed += 1
            settings = Settings(seed, KINDS[seed % len(KINDS)])
            there[batch.join(settings)] = settings, int(rng.integers(60)), [], []
        for row in list(there):
            if rng.random() < (0.02 if len(there) <= crowd else 0.3):
                settings, _, heard, said = there.pop(row)
                batch.leave(row)
                gone.append((settings, heard, said))
        biggest = max(biggest, len(there))
        frames = {}
        for row, (_, first, heard, _) in there.items():
            if not batch.opening(row) and rng.random() < 0.8:  # the others have no frame now
                frames[row] = speech[(first + len(heard)) % 60]
                heard.append(frames[row])
        answers = batch.step(frames)
        assert set(answers) == set(frames)
        for row, answer in answers.items():
            there[row][3].append(answer)
        assert set(batch.rows) == set(there)
    for row in list(there):
        settings, _, heard, said = there.pop(row)
        batch.leave(row)
        gone.append((settings, heard, said))
    assert biggest >= most // 2 and len(gone) > 20
    chosen = rng.permutation(len(gone))[:25]
    for index in chosen:
        settings, heard, said = gone[index]
        same(said, alone(model, settings, heard), exact=way == "numpy")
    for stage in (batch._encode, batch._decode):
        assert not state_arrays(stage._state) and not stage._total
    assert batch._predict._generator.capacity == 0


def test_memory_returns() -> None:
    """If this fails, a server holds for ever what its busiest hour needed."""
    model = tiny_model()
    batch = Batch(model.engine)
    pcm = sound(model, 1)[0]

    def held() -> int:
        gc.collect()
        streams = sum(array.nbytes for stage in (batch._encode, batch._decode) for array in state_arrays(stage._state))
        return streams + 10**6 * batch._predict._generator.capacity

    one = batch.join()
    batch.open(one)
    batch.step({one: pcm})
    before = held()
    crowd = [batch.join() for _ in range(40)]
    assert held() > 30 * before
    for row in crowd:
        batch.leave(row)
    assert held() <= 2 * before, "it shrinks when three quarters are free"
    assert set(batch.step({one: pcm})) == {one}


@pytest.mark.parametrize("stage", ["_encode", "_predict", "_decode"])
def test_one_fails_alone(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, one broken conversation ends, or changes, all the others."""
    model = tiny_model()
    batch, speech = Batch(model.engine), sound(model, 20)
    rows = [batch.join(Settings(seed)) for seed in range(4)]
    for row in rows:
        batch.open(row)
    said: dict[int, list[Any]] = {row: [] for row in rows}
    part = getattr(batch, stage)
    step = part.step

    def broken(who: Any, values: Any) -> Any:
        if rows[2] in who and len(said[rows[2]]) == 5:
            raise CodecError("broken on purpose")
        return step(who, values)

    monkeypatch.setattr(part, "step", broken)
    for pcm in speech:
        for row, answer in batch.step(dict.fromkeys(batch.rows, pcm)).items():
            said[row].append(answer)
    failed = said.pop(rows[2])
    assert len(failed) == 6 and isinstance(failed[-1], CodecError)
    for seed, row in enumerate(rows):
        if row != rows[2]:
            same(said[row], alone(model, Settings(seed), speech), exact=True)
    assert rows[2] not in batch.rows


def test_a_codec_that_computes_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a failing stream of the Rust codec makes its neighbours hear a frame twice."""
    model = tiny_model()
    monkeypatch.setattr(type(model.codec), "batched", False)
    batch, speech = Batch(model.engine), sound(model, 10)
    rows = [batch.join(Settings(seed)) for seed in range(3)]
    for row in rows:
        batch.open(row)
    steps: list[int] = []
    encode = batch._encode.step
    monkeypatch.setattr(batch._encode, "step", lambda who, values: steps.append(len(who)) or encode(who, values))
    said: dict[int, list[Any]] = {row: [] for row in rows}
    for pcm in speech:
        for row, answer in batch.step(dict.fromkeys(rows, pcm)).items():
            said[row].append(answer)
    assert set(steps) == {1}
    for seed, row in enumerate(rows):
        same(said[row], alone(model, Settings(seed), speech), exact=True)
    batch.leave(rows[0])
    assert batch._encode._total == 2, "no stream is kept for nobody: one in Rust takes half a gigabyte"


def test_who_cannot_join() -> None:
    """If this fails, settings that make no sense leave half a row behind."""
    model = tiny_model()
    batch = Batch(model.engine)
    row = batch.join()
    with pytest.raises(ConfigError, match="guidance"):
        batch.join(Settings(generation=GenerationConfig(cfg_coef=2.0)))
    with pytest.raises(StateError, match="no part 'encoder'"):
        batch.join(snapshot={})
    assert batch.rows == (row,) and list(batch._encode._places) == [row]
    with pytest.raises(StateError, match="has not begun"):
        batch.snapshot(row)
    batch.leave(row)
    batch.leave(row)
    assert batch.step({}) == {}


def test_a_row_moves_between_batches() -> None:
    """If this fails, a conversation cannot be kept by a server and taken up again beside others."""
    model = tiny_model()
    speech = sound(model, 30)
    first, second = Batch(model.engine), Batch(model.engine)
    others = [second.join(Settings(seed)) for seed in (8, 9)]
    row = first.join(Settings(5, KINDS[2]))
    first.open(row)
    said = [first.step({row: pcm})[row] for pcm in speech[:12]]
    moved = second.join(snapshot=first.snapshot(row))
    assert second.frames(moved) == 12
    for pcm in speech[12:]:
        frames = {each: pcm for each in (*others, moved) if not second.opening(each)}
        said.append(second.step(frames)[moved])
    same(said, alone(model, Settings(5, KINDS[2]), speech), exact=True)
