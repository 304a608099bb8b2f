"""A session and the threads around it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import moshi_mlx
from moshi_mlx.codec.base import MimiCodec
from moshi_mlx.cpu.lm import NumpyBackend
from moshi_mlx.errors import StateError

SILENCE = np.zeros(1920, np.float32)


@pytest.fixture(params=["this device's way", "mlx"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> moshi_mlx.Moshi:
    """The built-in model, as this machine runs it, and with MLX's own kernels."""
    model = moshi_mlx.load("small")
    if request.param == "mlx":
        monkeypatch.setattr(NumpyBackend, "suits", staticmethod(lambda lm: False))
        assert isinstance(model.codec, MimiCodec)
        model.codec.lean = False
    return model


def elsewhere(work: Callable[[], Any]) -> Any:
    """The result of ``work`` in a thread of its own."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    thread.join(60)
    assert result, "it raised, or hangs"
    return result[0]


def test_threads_may_take_turns(model: moshi_mlx.Moshi) -> None:
    """If this fails, a server that answers from a pool of threads cannot keep a session."""
    alone = model.session(seed=1)
    expected = [alone.step(SILENCE).pcm for _ in range(4)]
    session = elsewhere(lambda: model.session(seed=1))
    assert np.array_equal(session.step(SILENCE).pcm, expected[0])
    assert np.array_equal(elsewhere(lambda: session.step(SILENCE)).pcm, expected[1])
    elsewhere(lambda: session.reset() or True)
    for frame in expected:
        assert np.array_equal(session.step(SILENCE).pcm, frame)


def test_two_threads_at_once_are_refused(model: moshi_mlx.Moshi) -> None:
    """If this fails, two threads mix their frames in one session, or MLX ends the process."""
    session, inside, go_on = model.session(), threading.Event(), threading.Event()

    def stand(*_: object) -> None:
        inside.set()
        assert go_on.wait(60)

    session.on_stage = stand
    thread = threading.Thread(target=lambda: session.step(SILENCE))
    thread.start()
    assert inside.wait(60)
    for work in (lambda: session.step(SILENCE), session.reset, session.finish):
        with pytest.raises(StateError, match=r"belongs to one thread at a time.*its own session"):
            work()
    go_on.set()
    thread.join(60)
    session.on_stage = None
    assert session.step(SILENCE).index == 1, "the frame inside was finished, and nothing else happened"


def test_two_threads_in_a_hurry(model: moshi_mlx.Moshi) -> None:
    """If this fails, what is raised speaks of frames and streams, not of threads."""
    session = model.session()
    frames: list[int] = []
    refused: list[BaseException] = []

    def hurry() -> None:
        for _ in range(40):
            try:
                frames.append(session.step(SILENCE).index)
            except Exception as error:
                refused.append(error)

    threads = [threading.Thread(target=hurry) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(isinstance(error, StateError) for error in refused), refused
    assert sorted(frames) == list(range(len(frames))) and len(frames) + len(refused) == 80


def test_a_closed_session() -> None:
    """If this fails, a session that was closed continues, or cannot be restarted."""
    with moshi_mlx.load("small").session() as session:
        session.step(SILENCE)
    with pytest.raises(StateError, match="closed"):
        session.step(SILENCE)
    session.reset()
    assert session.step(SILENCE).index == 0
