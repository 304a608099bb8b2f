"""What the thread of many conversations does when: who comes and goes waits for nothing, and costs others little."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moshi_mlx import StateError
from moshi_mlx.realtime import Conversation, Scheduler
from moshi_mlx.realtime.conversation import ConversationError
from tests.helpers.parrot import FRAME, Parrot

SOON = 30.0


def until(true: Callable[[], Any]) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < SOON, "it does not happen"
        time.sleep(0.005)


def frame(number: int) -> np.ndarray:
    return np.full(FRAME, number / 1000, np.float32)


class Listener:
    """A tap that keeps the numbers of the frames that were answered."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def __call__(self, heard: np.ndarray, said: Any) -> None:
        assert (heard == said.pcm).all()
        self.heard.append(round(float(said.pcm[0]) * 1000))


def test_frames_that_come_together_share_a_tick():
    """If this fails, many conversations cost as much for each as one, or one of them is kept waiting for nobody."""
    scheduler = Scheduler(Parrot())
    scheduler.ticks.add(0.05)
    batch: Any = SimpleNamespace(opening=lambda row: row == 9)

    def rest(*waiting: int, since: float = 0.0, joining: int = 0) -> float:
        conversations = [SimpleNamespace(_pcm_in=SimpleNamespace(available=count), _end_due=False) for count in waiting]
        scheduler._seats = {row: SimpleNamespace(conversation=one) for row, one in enumerate(conversations)}  # type: ignore[misc]
        scheduler._joining.clear()
        scheduler._joining.extend([SimpleNamespace()] * joining)  # type: ignore[list-item]
        return scheduler._rest(batch, time.monotonic() - since)

    assert 0.01 < rest(FRAME, 0) <= 0.02  # one has a frame, and the other may have one soon
    assert rest(FRAME, 0, since=0.02) == 0
    assert rest(FRAME, FRAME + 10) == 0
    assert rest(FRAME) == 0
    assert rest(2 * FRAME, 0) == 0  # somebody is behind
    assert rest(0, 0) > 0.02 and rest() > 0.02 and rest(0, joining=1) == 0
    assert 0.01 < rest(*[0] * 10) <= 0.02  # one that is opening has something to do
    scheduler.ticks.add(0.001)
    assert rest(FRAME, 0) <= 0.002  # a tick that costs nothing is not worth waiting


def test_coming_and_going_waits_for_nothing():
    """If this fails, somebody who comes or goes makes a server's event loop wait for the frame that is computed."""
    parrot = Parrot()
    told = threading.Event()
    with Scheduler(parrot) as scheduler:
        slow = Conversation(scheduler).start()
        parrot.seconds = 0.3
        slow.feed(frame(1))
        time.sleep(0.05)
        began = time.monotonic()
        other = Conversation(scheduler).start(told.set)
        third = Conversation(scheduler).start(lambda: None)
        third.stop(wait=False)
        slow.stop(wait=False)
        assert time.monotonic() - began < 0.2 and not told.is_set()
        assert told.wait(SOON) and other.error is None
        parrot.seconds = 0.0
        until(lambda: scheduler.rows == 1)
        assert third.error is None and slow.error is None
        other.stop()


def test_a_crowd_at_the_door():
    """If this fails, those who talk wait until everybody who comes has been let in."""
    parrot, tap = Parrot(), Listener()
    mind = parrot._mind

    def slowly(**settings: Any) -> Any:
        time.sleep(0.02)
        return mind(**settings)

    with Scheduler(parrot) as scheduler, Conversation(scheduler, tap=tap) as inside:
        parrot.engine.generator = slowly
        crowd = [Conversation(scheduler).start(lambda: None) for _ in range(40)]
        inside.feed(frame(1))
        until(lambda: tap.heard)
        joined = scheduler.rows
        until(lambda: scheduler.rows == 41)
        assert joined < 20, f"{joined} of 40 were let in before a frame was answered"
        for conversation in crowd:
            conversation.stop(wait=False)
        until(lambda: scheduler.rows == 1)


def test_one_who_begins_anew_all_the_time():
    """If this fails, a client that sends nothing but resets takes the model from all others."""
    parrot = Parrot()
    with Scheduler(parrot) as scheduler, Conversation(scheduler) as restless:
        began = time.monotonic()
        while time.monotonic() - began < 0.5:
            restless.reset()
            time.sleep(0.001)
        assert sum(event.kind == "reset" for event in restless.events()) <= (time.monotonic() - began) / 0.08 + 1


def test_the_end_of_the_thread_is_told(monkeypatch):
    """If this fails, conversations wait for ever on a thread that has failed or was stopped."""
    scheduler, told = Scheduler(Parrot()).start(), threading.Event()
    inside = Conversation(scheduler).start()

    def broken(*_: Any) -> Any:
        raise MemoryError("broken on purpose")

    monkeypatch.setattr(scheduler, "_hear", broken)
    inside.feed(frame(1))
    until(lambda: not scheduler.alive)
    assert isinstance(inside.error, ConversationError) and "broken on purpose" in str(inside.error)
    late = Conversation(scheduler)
    began = time.monotonic()
    with pytest.raises(StateError, match="does not run"):
        late.start(told.set)
    assert time.monotonic() - began < 0.5 and late.stop()


def test_nothing_is_held_of_one_that_ended():
    """If this fails, each who comes by leaves the rings of a conversation behind."""
    with Scheduler(Parrot()) as scheduler:
        kept = []
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                conversation = Conversation(scheduler, tap=Listener()).start(lambda: None)
                conversation.feed(frame(1))
                until(lambda: conversation.stats.frames)  # noqa: B023
                conversation.stop(wait=False)
                kept.append(weakref.ref(conversation))
                conversation = None  # type: ignore[assignment]
            until(lambda: all(each() is None for each in kept))
        finally:
            gc.enable()
