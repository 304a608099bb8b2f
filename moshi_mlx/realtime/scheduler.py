"""Many conversations on one thread: whoever has a frame goes through the model with the others that have one.

::

    with Scheduler(model) as scheduler:
        with Conversation(scheduler, seed=1) as conversation:    # as many as there are clients
            conversation.feed(...)

A tick takes one frame of each conversation that has a whole one. It begins when all have one, or when the last is as
long ago as it took, a quarter of a frame after its beginning at most: frames that come one by one share a tick, which
costs little more for many than for one. Where somebody is behind, nobody is waited for. A conversation without a frame
costs nothing, one that fails ends alone, and what waits for one that falls behind is bounded by its ``backlog``. Those
who come get a part of the time, so that a crowd at the door is not heard by those inside.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..engine.batch import Batch
from ..engine.codec_processes import CodecProcesses
from ..engine.pipeline import Engine, SessionFrame
from ..errors import StateError
from .ring import Signal
from .stats import Stopwatch
from .trace import Trace
from .workers import Work, run

if TYPE_CHECKING:
    from ..tasks.dialogue import Moshi
    from .conversation import Conversation

__all__ = ["Scheduler"]

_POLL = 0.1
_STOP_WITHIN = 1.0
_GATHER = 0.25  # frames from the beginning of a tick to that of the next, where somebody may still come
_TO_JOIN = 0.05  # frames of time between two ticks for those who come; one may always
_Heard = dict[int, tuple[NDArray[np.float32], float]]


class Scheduler:
    """One thread that drives any number of conversations. Use it with ``with``.

    Parameters
    ----------
    model : Moshi or Engine
    kv_bits : {None, 8}
        Precision of the cache, for all.
    trace : Trace, optional
        Gets what the thread does, tick by tick.
    codec_processes : int
        Child processes that share the codec's work; :func:`~moshi_mlx.engine.codec_processes.codec_processes_for` says
        how many are of use.

    Attributes
    ----------
    ticks : Stopwatch
        Time that the last ticks took.
    """

    def __init__(
        self,
        model: Moshi | Engine,
        *,
        kv_bits: int | None = None,
        trace: Trace | None = None,
        codec_processes: int = 0,
    ):
        self.engine = model.engine
        self.kv_bits = kv_bits
        self.codec_processes = codec_processes
        self.ticks = Stopwatch()
        self._trace = trace
        self._bell = Signal()
        self._waiting: deque[_Seat] = deque()  # seats that come or go
        self._joining: deque[_Seat] = deque()  # those of them that come
        self._seats: dict[int, _Seat] = {}
        self._ending: set[int] = set()  # rows whose user's sound ends with this tick
        self._took = {"encode": 0.0, "model": 0.0, "decode": 0.0}
        self._stopping = False
        self._work: Work | None = None

    def __enter__(self) -> Scheduler:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Scheduler:
        """Start the thread.

        Raises
        ------
        StateError
            If it was started before.
        """
        if self._work is not None:
            raise StateError("a scheduler can be started once; make another")
        self._work = run("moshi scheduler", self._guard)
        return self

    def stop(self) -> bool:
        """End the thread, and the conversations that are still there. Returns within a second.

        Returns
        -------
        bool
            False if the thread is still inside one long computation: it ends after that.
        """
        self._stopping = True
        self._bell.ring()
        if self._work is None:
            return True
        self._work.join(_STOP_WITHIN)
        return not self._work.alive

    @property
    def running(self) -> bool:
        """Whether conversations can join."""
        return self.alive and not self._stopping

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._work is not None and self._work.alive

    @property
    def rows(self) -> int:
        """Conversations that are there."""
        return len(self._seats)

    def _driver(self) -> _Seat:
        return _Seat(self)

    def _post(self, seat: _Seat) -> None:
        self._waiting.append(seat)
        self._bell.ring()

    # The thread

    def _guard(self) -> None:
        failure: BaseException = StateError("the scheduler was stopped")
        try:
            self._run()
        except BaseException as error:  # whatever it is, everybody has to know
            failure = error
        finally:
            self._stopping = True
            seats, self._seats = list(self._seats.values()), {}
            for queue in (self._joining, self._waiting):
                while queue:
                    seats.append(queue.popleft())
            for seat in seats:
                seat.end(failure)

    def _run(self) -> None:
        if not self.codec_processes:
            self._tick(Batch(self.engine, kv_bits=self.kv_bits))
            return
        with CodecProcesses(self.engine, self.codec_processes) as processes:
            self._tick(Batch(self.engine, kv_bits=self.kv_bits, processes=processes))

    def _tick(self, batch: Batch) -> None:
        batch.on_stage = self._timed
        began = 0.0
        while not self._stopping:
            self._come_and_go(batch)
            rest = self._rest(batch, began)
            if rest:
                self._bell.wait(rest)
                continue
            heard = self._hear(batch)
            began = time.monotonic()
            prompted = [row for row, seat in self._seats.items() if seat.conversation._settings.opening is not None]
            opening = [row for row in prompted if batch.opening(row)]
            answers = batch.step({row: None if row in self._ending else pcm for row, (pcm, _) in heard.items()})
            for row, answer in answers.items():
                self._answer(batch, row, answer, heard.get(row))
            self._open(batch, opening)
            self.ticks.add(time.monotonic() - began)
            if self._trace is not None:
                self._trace.span("tick", began, time.monotonic(), {"rows": len(answers)})

    def _rest(self, batch: Batch, began: float) -> float:
        """Seconds until the next tick may begin, if nobody rings before; ``began``: when the last one did."""
        size, ready, behind = self.engine.frame_size, 0, False
        for row, seat in self._seats.items():
            conversation = seat.conversation
            waiting = size if batch.opening(row) or conversation._end_due else conversation._pcm_in.available
            ready += waiting >= size
            behind |= waiting >= 2 * size
        if not ready:
            return 0.0 if self._joining else _POLL
        if behind or ready == len(self._seats):
            return 0.0
        gathering = min(_GATHER / self.engine.frame_rate, 2 * self.ticks.last)
        return max(0.0, began + gathering - time.monotonic())

    def _come_and_go(self, batch: Batch) -> None:
        """Who joins, leaves, begins anew or is to be kept."""
        while self._waiting:
            seat = self._waiting.popleft()
            if seat.leaving:
                self._drop(batch, seat, None)
            else:
                self._joining.append(seat)
        now = time.monotonic()
        until, frame = now + _TO_JOIN / self.engine.frame_rate, 1 / self.engine.frame_rate
        while self._joining:
            seat = self._joining.popleft()
            if not seat.leaving:
                self._join(batch, seat, seat.conversation._resumed)
                if time.monotonic() >= until:
                    break
        for seat in list(self._seats.values()):
            conversation = seat.conversation
            if seat.resets != conversation._resets and now - seat.began >= frame:
                seat.resets = conversation._resets
                self._leave(batch, seat)
                conversation._forget()
                conversation._jitter_buffer.clear()
                self._join(batch, seat, None)
                conversation._tell("reset")
            if conversation._wanted is not None and not batch.opening(seat.row):
                wanted, conversation._wanted = conversation._wanted, None
                wanted.add(partial(batch.snapshot, seat.row))
                wanted.ended.set()

    def _hear(self, batch: Batch) -> _Heard:
        """The next frame of everybody who has one, and when it came."""
        heard: _Heard = {}
        self._ending.clear()
        for row, seat in self._seats.items():
            if batch.opening(row):
                continue
            if seat.conversation._ends():
                self._ending.add(row)
                heard[row] = np.zeros(self.engine.frame_size, np.float32), seat.conversation._clock()
                continue
            frame = np.empty(self.engine.frame_size, np.float32)
            came = seat.conversation._hear(frame)
            if came is not None:
                heard[row] = frame, came
        return heard

    def _answer(
        self,
        batch: Batch,
        row: int,
        answer: SessionFrame | Exception,
        heard: tuple[NDArray[np.float32], float] | None,
    ) -> None:
        seat = self._seats[row]
        if isinstance(answer, Exception):
            self._drop(batch, seat, answer)
            return
        assert heard is not None
        conversation, stats = seat.conversation, seat.conversation.stats
        stats.encode.add(self._took["encode"])
        stats.step.add(self._took["model"])
        if answer.voiced:
            stats.decode.add(self._took["decode"])
        try:
            conversation._say(answer.text, answer.words)
            conversation._speak(*heard, answer, conversation._clock())
            conversation._counters({})
        except Exception as error:  # its tap's
            self._drop(batch, seat, error)

    def _join(self, batch: Batch, seat: _Seat, snapshot: Any) -> None:
        try:
            seat.row = batch.join(seat.conversation._settings, snapshot)
        except Exception as error:
            self._drop(batch, seat, error)
            return
        self._seats[seat.row] = seat
        seat.began = time.monotonic()
        if snapshot is not None or seat.conversation._settings.opening is None:
            seat.tell()  # the few steps before its first frame take no longer than a frame

    def _open(self, batch: Batch, rows: list[int]) -> None:
        """Tell those whose prompts go on, or have ended."""
        for row in rows:
            seat = self._seats.get(row)
            if seat is None:
                continue
            try:
                seat.conversation._on_opening(*batch.opened(row))
            except Exception as error:
                self._drop(batch, seat, error)
                continue
            if not batch.opening(row):
                seat.tell()

    def _leave(self, batch: Batch, seat: _Seat) -> None:
        batch.leave(seat.row)
        self._seats.pop(seat.row, None)

    def _drop(self, batch: Batch, seat: _Seat, error: BaseException | None) -> None:
        self._leave(batch, seat)
        seat.end(error)

    def _timed(self, name: str, began: float, ended: float) -> None:
        self._took[name] = ended - began
        if self._trace is not None:
            self._trace.span(name, began, ended)


class _Seat:
    """What drives one conversation: its place at the scheduler's table.

    Attributes
    ----------
    conversation : Conversation
        While it is there.
    """

    conversation: Conversation

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self.row = -1
        self.began = 0.0
        self.resets = 0
        self.leaving = False
        self._told: Callable[[], object] | None = None
        self._left = threading.Event()

    def start(self, conversation: Conversation, ready: Callable[[], object] | None) -> None:
        """Join; wait until it is done or has failed, or have ``ready`` called then."""
        self.conversation = conversation
        if not self._scheduler.running:
            raise StateError("the scheduler does not run: start it first, or use it with 'with'")
        joined = threading.Event()
        self._told = joined.set if ready is None else ready
        self._scheduler._post(self)
        if self._scheduler._stopping:  # or it would come to it
            self.end(StateError("the scheduler was stopped"))
        if ready is None:
            joined.wait()

    def stop(self, wait: bool) -> bool:
        """Leave; False if the scheduler has not come to it, within a second where it is waited for."""
        if self._left.is_set() or not self._scheduler.alive:
            return True
        self.leaving = True
        self._scheduler._post(self)
        return self._left.wait(_STOP_WITHIN if wait else 0) or not self._scheduler.running

    def wake(self) -> None:
        """There may be a frame."""
        self._scheduler._bell.ring()

    def tell(self) -> None:
        """It has joined, or failed to."""
        told, self._told = self._told, None
        if told is not None:
            told()

    def end(self, error: BaseException | None) -> None:
        """It has left, for this reason if there is one."""
        conversation = self.__dict__.pop("conversation", None)
        if conversation is None:
            return
        if error is not None and not self.leaving:
            conversation._fail(f"the conversation failed: {error}", error)
        self._left.set()
        self.tell()
