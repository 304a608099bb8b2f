"""Many conversations on one thread: in order, alone in their faults, and none of them in the others' way."""

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


def test_each_hears_its_own_in_order():
    """If this fails, conversations that share a thread lose, swap or mix their frames."""
    taps = [Listener() for _ in range(12)]
    with Scheduler(Parrot()) as scheduler:
        conversations = [Conversation(scheduler, seed=index, tap=tap).start() for index, tap in enumerate(taps)]
        for number in range(20):
            for index, conversation in enumerate(conversations):
                conversation.feed(frame(20 * index + number))
            until(lambda: all(len(tap.heard) > number for tap in taps))  # noqa: B023
        assert [tap.heard for tap in taps] == [[20 * index + number for number in range(20)] for index in range(12)]
        assert scheduler.rows == 12 and scheduler.ticks.count <= 20 * 12 + 12
        for conversation in conversations:
            conversation.stop()
        assert scheduler.rows == 0


def test_a_tap_that_raises_ends_alone():
    """If this fails, a recording or a connection that breaks ends the conversations of all the others."""

    def broken(heard: np.ndarray, said: Any) -> None:
        raise OSError("broken on purpose")

    tap = Listener()
    with Scheduler(Parrot()) as scheduler, Conversation(scheduler, tap=tap) as good:
        bad = Conversation(scheduler, tap=broken).start()
        bad.feed(frame(1))
        until(lambda: bad.error is not None)
        with pytest.raises(ConversationError, match="broken on purpose"):
            bad.check()
        good.feed(frame(2))
        until(lambda: tap.heard == [2])
        assert scheduler.rows == 1 and scheduler.running


def test_frames_that_come_together_share_a_tick():
    """If this fails, many conversations cost as much for each as one, or one of them is kept waiting for nobody."""
    scheduler = Scheduler(Parrot())
    scheduler.ticks.add(0.05)
    batch: Any = SimpleNamespace(opening=lambda row: row == 9)

    def rest(*waiting: int, since: float = 0.0, joining: int = 0) -> float:
        conversations = [SimpleNamespace(_pcm_in=SimpleNamespace(available=count)) for count in waiting]
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


def test_a_stall_is_made_good():
    """If this fails, a model that stood still answers what was said long ago from then on, or throws somebody out."""
    parrot, taps = Parrot(), [Listener(), Listener()]
    with Scheduler(parrot) as scheduler:
        both = [Conversation(scheduler, tap=tap).start() for tap in taps]
        parrot.seconds = 2.0 / 6  # three stages of two conversations, one after the other
        for conversation in both:
            conversation.feed(frame(0))
        until(lambda: parrot.heard)
        parrot.seconds = 0.0
        for number in range(1, 26):  # what is said meanwhile
            for conversation in both:
                conversation.feed(frame(number))
        until(lambda: all(tap.heard[-1:] == [25] for tap in taps))
        for conversation, tap in zip(both, taps, strict=True):
            assert len(tap.heard) <= 6 and conversation.error is None
            assert conversation.meters.dropped_in == (26 - len(tap.heard)) * FRAME
            assert any(event.kind == "dropped" for event in conversation.events())
            began = time.monotonic()
            conversation.feed(frame(99))
            until(lambda: tap.heard[-1] == 99)  # noqa: B023
            assert time.monotonic() - began < 1.0
            conversation.stop()


def test_the_end_of_the_thread_is_told(monkeypatch):
    """If this fails, conversations wait for ever on a thread that has failed or was stopped."""
    scheduler, told = Scheduler(Parrot()).start(), threading.Event()
    inside = Conversation(scheduler).start()

    def broken(*_: Any) -> Any:
        raise MemoryError("broken on purpose")

    monkeypatch.setattr(scheduler, "_hear", broken)
    inside.feed(frame(1))
    until(lambda: not scheduler.alive)
    assert inside.error is not None and "broken on purpose" in str(inside.error)
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
                until(lambda: conversation.meters.frames)  # noqa: B023
                conversation.stop(wait=False)
                kept.append(weakref.ref(conversation))
                conversation = None  # type: ignore[assignment]
            until(lambda: all(each() is None for each in kept))
        finally:
            gc.enable()
