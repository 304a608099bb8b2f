"""Rows of the codec in other processes: the same codes and samples, and a process that ends takes only its own rows."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from mlx.utils import tree_flatten

from moshi_mlx.engine import Batch, Settings
from moshi_mlx.engine.codec_processes import CodecProcesses, Spread
from moshi_mlx.errors import CodecError, TokenError
from moshi_mlx.realtime import Conversation, Scheduler
from moshi_mlx.tasks.dialogue import Moshi
from tests.helpers.tiny import sound, tiny_model


@pytest.fixture(scope="module")
def model() -> Moshi:
    return tiny_model("numpy")


@pytest.fixture
def processes(model: Moshi) -> Iterator[CodecProcesses]:
    with CodecProcesses(model.engine, 1) as made:
        made.wait()
        yield made


def places(stage: Spread) -> tuple[int, int]:
    """Rows here and in the child."""
    there = sum(child is not None for child in stage._at.values())
    return len(stage._at) - there, there


def test_rows_come_and_go(model: Moshi, processes: CodecProcesses) -> None:
    """If this fails, an answer depends on the process that computed its sound, or rows do not share the cores."""
    batch, speech, rng = Batch(model.engine, processes=processes), sound(model, 50), np.random.default_rng(1)
    there: dict[int, tuple[int, int, list]] = {}
    gone: list[tuple[int, int, list]] = []
    for tick in range(120):
        if len(there) < (9 if tick % 40 < 25 else 2) and rng.random() < 0.7:
            row = batch.join(Settings(seed=tick))
            batch.open(row)
            there[row] = tick, int(rng.integers(50)), []
        elif there and rng.random() < 0.3:
            row = int(rng.choice(list(there)))
            gone.append(there.pop(row))
            batch.leave(row)
        for stage in (batch._encode, batch._decode):
            here, elsewhere = places(stage)
            assert abs(here - elsewhere) <= 1
        stepping = [row for row in there if rng.random() < 0.8]
        frames = {row: speech[(there[row][1] + len(there[row][2])) % 50] for row in stepping}
        for row, answer in batch.step(frames).items():
            there[row][2].append(answer)
    for seed, start, answers in [*gone, *there.values()]:
        with model.session(seed=seed) as session:
            for index, answer in enumerate(answers):
                expected = session.step(speech[(start + index) % 50])
                assert answer.text == expected.text and np.array_equal(answer.step.text, expected.step.text)
                assert np.array_equal(answer.pcm, expected.pcm)


def test_a_conversation_is_saved_from_anywhere(model: Moshi, processes: CodecProcesses) -> None:
    """If this fails, a conversation whose sound another process computes cannot be saved or continued."""
    batch, speech = Batch(model.engine, processes=processes), sound(model, 20)
    rows = [batch.join(Settings(seed=seed)) for seed in range(4)]
    for row in rows:
        batch.open(row)
    for pcm in speech:
        batch.step(dict.fromkeys(rows, pcm))
    alone = Batch(model.engine)
    for row in rows:
        its = alone.join(Settings(seed=row))
        alone.open(its)
        for pcm in speech:
            alone.step({its: pcm})
        mine, expected = (dict(tree_flatten(made.snapshot(which))) for made, which in ((batch, row), (alone, its)))
        assert mine.keys() == expected.keys()
        assert all(np.array_equal(np.array(mine[key]), np.array(expected[key])) for key in mine if "decoder" in key)
        again = batch.join(snapshot=batch.snapshot(row))
        assert np.array_equal(batch.step({again: speech[0]})[again].pcm, alone.step({its: speech[0]})[its].pcm)


def test_a_row_fails_alone(model: Moshi, processes: CodecProcesses) -> None:
    """If this fails, a bad value in one conversation ends others, or advances them twice."""
    decode = processes.spread(model.engine.decode())
    plain = model.engine.decode()
    for row in range(4):
        decode.join(row)
        plain.join(row)
    good = np.zeros(model.engine.own_q, np.int32)
    bad = good + 10_000
    for row in range(4):
        codes = [bad if other == row else good for other in range(4)]
        found = decode.step(range(4), codes)
        assert isinstance(found[row], TokenError)
        others = [other for other in range(4) if other != row]
        expected = plain.step(others, [good] * 3)
        assert all(np.array_equal(found[other], pcm) for other, pcm in zip(others, expected, strict=True))


def test_a_process_that_ends(model: Moshi, processes: CodecProcesses) -> None:
    """If this fails, a killed process ends more than its own conversations, hangs the rest, or is never replaced."""
    batch, speech = Batch(model.engine, processes=processes), sound(model, 4)
    rows = [batch.join(Settings(seed=seed)) for seed in range(4)]
    for row in rows:
        batch.open(row)
    batch.step(dict.fromkeys(rows, speech[0]))
    child = processes.children[0]
    lost = [row for row in rows if batch._encode._at[row] is child or batch._decode._at[row] is child]
    assert 0 < len(lost) < 4
    child._process.kill()
    began = time.monotonic()
    answers = batch.step(dict.fromkeys(rows, speech[1]))
    assert time.monotonic() - began < 5
    assert {row for row, answer in answers.items() if isinstance(answer, CodecError)} == set(lost)
    assert set(batch.rows) == set(rows) - set(lost)
    batch.join(Settings())
    processes.wait()
    assert processes.children[0] is not child
    for seed in range(5, 8):
        batch.open(batch.join(Settings(seed=seed)))
    assert places(batch._encode)[1] > 0
    assert not any(
        isinstance(answer, Exception) for answer in batch.step(dict.fromkeys(batch.rows, speech[2])).values()
    )


def test_a_scheduler_with_processes(model: Moshi) -> None:
    """If this fails, a server whose codec runs in processes gives no answers, or others."""
    heard: list[np.ndarray] = []
    with Scheduler(model, codec_processes=1) as scheduler:
        with Conversation(scheduler, seed=3, tap=lambda _, frame: heard.append(frame.pcm)) as conversation:
            for pcm in sound(model, 10):
                conversation.feed(pcm)
                time.sleep(0.02)
            until = time.monotonic() + 20
            while len(heard) < 10 and time.monotonic() < until:
                time.sleep(0.01)
    with model.session(seed=3) as session:
        assert all(
            np.array_equal(mine, session.step(pcm).pcm) for mine, pcm in zip(heard, sound(model, 10), strict=True)
        )


def test_only_numpy(model: Moshi) -> None:
    """If this fails, a codec that cannot be sent to another process fails later, without a reason."""
    with pytest.raises(CodecError, match="codec numpy"):
        CodecProcesses(tiny_model("mlx").engine, 1)
