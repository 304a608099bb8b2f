"""A conversation in real time, for an app that handles its own audio.

The app's side (:meth:`Conversation.feed`, :meth:`Conversation.read` and the rest) copies and returns, and may be called
from audio callbacks. The computation is done by a driver: three threads per conversation (:mod:`.pipelined`), or one
thread for many conversations (:mod:`.scheduler`).

If the machine falls behind, the backlog is bounded: beyond ``backlog`` the oldest sound of the user is
dropped in whole frames, and counted. Nothing grows with time.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..audio import check_block
from ..engine.generator import GenerationConfig
from ..engine.pipeline import Engine, Opening, SessionFrame, Settings
from ..engine.session import load_conversation, save_conversation
from ..engine.text import Word
from ..errors import ConfigError, MoshiError, StateError
from ..state import State
from ..tasks.dialogue import Moshi
from .jitter_buffer import JitterBuffer
from .pipelined import Pipelined
from .ring import Ring, Signal
from .scheduler import Scheduler
from .stats import Stats
from .trace import Trace

__all__ = ["Conversation", "ConversationError", "Event"]

Kind = Literal["text", "word", "late", "dropped", "reset", "error"]

_SECONDS_IN_RINGS = 4.0
_EVENTS_KEPT = 1000


class ConversationError(MoshiError):
    """A stage of a conversation failed; its cause is attached."""


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes
    ----------
    kind : str
        ``text``: the model began to say ``text``. ``word``: it has said ``word``. ``late``: a frame's answer came
        late. ``dropped``: ``samples`` of the user's sound were dropped. ``reset``: the conversation was restarted.
        ``error``: a stage failed, and the conversation is over.
    frame : int
        Frame of the model at which it happened.
    """

    kind: Kind
    frame: int
    text: str = ""
    word: Word | None = None
    samples: int = 0
    seconds: float = 0.0
    error: BaseException | None = None


class Conversation:
    """One live conversation on a loaded model.

    Parameters
    ----------
    model : Moshi, Engine or Scheduler
        Several conversations may share it. On a :class:`Scheduler` they share its thread; otherwise each
        has three threads.
    seed, generation, conditions, kv_bits
        As for :meth:`Moshi.session`.
    resume : State or path, optional
        Continue from a :meth:`snapshot` or from a file that :meth:`save` wrote. The seed, settings and
        conditions are the saved ones; after :meth:`reset` they are those given here.
    backlog : float
        Seconds of the user's sound that may wait for the codec; beyond that the oldest is dropped.
    target_delay : float
        Initial target delay of the jitter buffer, in seconds; underruns increase it.
    tap : callable, optional
        Called in a worker thread with every frame: what the model heard, array [frame_size], valid during the call
        only, and the :class:`SessionFrame` that it answered. The index restarts at 0 after :meth:`reset`; a resumed
        conversation continues counting. For recordings; it must be fast, and an exception ends the conversation.
    trace : Trace, optional
        Records what each thread does, the fill of the rings, and everything that is late or dropped.
    clock : callable
        Seconds, monotonic; for tests.
    opening : Opening, optional
        Prompts, from :meth:`Moshi.opening`; they run before :meth:`start` comes back, and again after :meth:`reset`.
    on_opening : callable, optional
        Told, in a worker thread, how many of the steps before the first frame have run, and how many there are.

    Examples
    --------
    ::

        with Conversation(model) as conversation:
            conversation.feed(microphone_block)          # any number of float32 samples at model.sample_rate
            speaker_block = conversation.read(960)       # never waits
            for event in conversation.events():
                print(event.text, end="")
    """

    def __init__(
        self,
        model: Moshi | Engine | Scheduler,
        *,
        seed: int = 0,
        generation: GenerationConfig | None = None,
        conditions: Mapping[str, Any] | None = None,
        kv_bits: int | None = None,
        resume: State | str | os.PathLike[str] | None = None,
        backlog: float = 0.32,
        target_delay: float = 0.02,
        tap: Callable[[NDArray[np.float32], SessionFrame], object] | None = None,
        trace: Trace | None = None,
        clock: Callable[[], float] = time.monotonic,
        opening: Opening | None = None,
        on_opening: Callable[[int, int], object] | None = None,
    ):
        self.engine = model.engine
        self.stats = Stats()
        if isinstance(model, Scheduler):
            if kv_bits not in (None, model.kv_bits):
                raise ConfigError(
                    f"kv_bits {kv_bits}: the scheduler was made with {model.kv_bits}, which applies to all"
                )
            kv_bits = model.kv_bits
        self._kv_bits = kv_bits
        self._settings = Settings(seed, generation, conditions, opening=opening)
        self._on_opening = on_opening or (lambda done, total: None)
        self._resumed: State | None = (
            load_conversation(resume, self.engine, kv_bits) if isinstance(resume, (str, os.PathLike)) else resume
        )
        self._clock = clock
        self._trace = trace
        self._size = self.engine.frame_size
        self._rate = self.engine.sample_rate
        self._backlog = max(round(backlog * self._rate) // self._size, 1) * self._size
        room = max(round(_SECONDS_IN_RINGS * self._rate), 2 * self._backlog)
        self._pcm_in = Ring(room)
        self._pcm_out = Ring(room)
        self._tap = tap
        self._jitter_buffer = JitterBuffer(self._pcm_out, self._rate, target_delay)
        self._events: deque[Event] = deque(maxlen=_EVENTS_KEPT)
        self._news = Signal()
        self._started = self._stopping = False
        self._paused = False
        self._muted = False
        self._resets = 0
        self._fed = self._taken = 0  # samples, by the owner's side and the driver's
        self._end_at: int | None = None  # the sample before which the user's sound ends
        self._wanted: Kept | None = None
        self._keeping = threading.Lock()
        self._error: ConversationError | None = None
        self._driver = model._driver() if isinstance(model, Scheduler) else Pipelined(self)

    # ------------------------------------------------------------------------------------------ the owner's side

    def __enter__(self) -> Conversation:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        if kind is None:
            self.check()

    def start(self, ready: Callable[[], object] | None = None) -> Conversation:
        """Start the threads and wait until they can take sound.

        Parameters
        ----------
        ready : callable, optional
            On a scheduler, do not wait: it is called, in a worker thread, once sound can be taken, or once the
            conversation has failed (:attr:`error`).

        Raises
        ------
        ConversationError
            If a stage cannot be created.
        StateError
            If it was started before.
        """
        if self._started:
            raise StateError("a conversation can be started once; make another")
        self._started = True
        try:
            self._driver.start(self, ready)
            if ready is None:
                self.check()
                self._resumed = None
        except BaseException:  # also Ctrl-C: nothing else would end the threads
            self.stop()
            raise
        return self

    def stop(self, wait: bool = True) -> bool:
        """End the conversation. Returns within a second, whatever the threads do.

        Frames that the model has answered are still decoded, and go to the tap. The threads are kept for the next
        conversation (see :mod:`.workers`).

        Parameters
        ----------
        wait : bool
            False: on a scheduler, come back at once; the row is free before the next frame.

        Returns
        -------
        bool
            False if a thread is still in one long computation: it ends after that, without further effects.
        """
        self._stopping = True
        return not self._started or self._driver.stop(wait)

    @property
    def running(self) -> bool:
        """Whether the conversation is running."""
        return self._started and not self._stopping

    @property
    def error(self) -> ConversationError | None:
        """The error that ended the conversation, if any."""
        return self._error

    def check(self) -> None:
        """Raise the error that ended the conversation, if any."""
        if self._error is not None:
            raise self._error

    def feed(self, pcm: ArrayLike) -> int:
        """Add the user's sound: any number of samples, from one thread at a time; never blocks.

        Parameters
        ----------
        pcm : array [samples]
            At the model's sample rate: floats from -1 to 1, or integers (:mod:`moshi_mlx.audio`). NaN, which a driver
            may give, is taken as silence.

        Returns
        -------
        int
            Samples taken; fewer than given only if the threads have stalled for seconds.

        Raises
        ------
        AudioError
            If the samples cannot be used.
        """
        samples = check_block(pcm, finite=False)
        if self._paused or self._stopping:
            return len(samples)
        began = 0.0 if self._trace is None else self._clock()
        taken = self._pcm_in.write(samples)
        self._fed += taken
        if taken < len(samples):
            self.stats.dropped_in += len(samples) - taken
        if self._pcm_in.available >= self._size:
            self._driver.wake()
        self._span("feed", began)
        return taken

    def end(self) -> None:
        """Tell a translation model that the user's sound is over: after what was fed so far, padded to a whole frame.

        The model goes on until it has said all: keep feeding, silence best. Frames have ``ended`` set from then on.
        Call it from the thread that feeds.
        """
        self.feed(np.zeros(-self._fed % self._size, np.float32))
        self._end_at = self._fed
        self._driver.wake()

    def read(self, count: int) -> NDArray[np.float32]:
        """The next ``count`` samples of the model's voice; never blocks, silence where there is none."""
        out = np.empty(count, np.float32)
        self.read_into(out)
        return out

    def read_into(self, out: NDArray[np.float32]) -> None:
        """Like :meth:`read`, into ``out`` [samples]: what an audio callback calls. From one thread at a time."""
        if self._paused:
            out[:] = 0
            return
        began = 0.0 if self._trace is None else self._clock()
        self._jitter_buffer.read_into(out)
        self.stats.underruns = self._jitter_buffer.underruns
        self._span("read", began)

    def events(self) -> list[Event]:
        """Events since the last call, oldest first; at most the last thousand."""
        news: list[Event] = []
        while self._events:
            news.append(self._events.popleft())
        return news

    def wait(self, timeout: float) -> bool:
        """Wait for the next event, at most ``timeout`` seconds; False if none came."""
        return bool(self._events) or self._news.wait(timeout)

    @property
    def backlog(self) -> float:
        """Seconds of the user's sound that wait to be processed."""
        return self._pcm_in.available / self._rate

    @property
    def delay(self) -> float:
        """Seconds of sound that wait inside: to be processed, and to be played."""
        return (self._pcm_in.available + self._pcm_out.available) / self._rate

    @property
    def target_delay(self) -> float:
        """Target delay of the jitter buffer, in seconds."""
        return self._jitter_buffer.target_delay

    def pause(self) -> None:
        """Stop hearing and speaking; sound fed while paused is discarded."""
        self._paused = True

    def resume(self) -> None:
        """Continue after :meth:`pause`."""
        self._paused = False

    def mute(self, muted: bool = True) -> None:
        """Let the model hear silence instead of the user's sound."""
        self._muted = muted

    def reset(self) -> None:
        """Start a new conversation: the model forgets everything; queued sound is discarded."""
        self._resets += 1
        self._driver.wake()

    def snapshot(self, timeout: float = 5.0) -> State:
        """The state of the running conversation between two frames, from which it can be continued.

        Sound that waits to be processed or played is not part of it.

        Parameters
        ----------
        timeout : float
            Seconds to wait for the frame that is being computed.

        Returns
        -------
        State
            For ``resume``, in this or another process: the same tokens and samples follow.

        Raises
        ------
        StateError
            If the conversation is not running, ends before it is done, or does not respond in time.
        CodecError
            If the codec cannot export its state (Rust).
        """
        with self._keeping:
            kept = self._wanted = Kept()
            self._driver.wake()
            until = time.monotonic() + timeout
            while not kept.ended.wait(0.02):
                if not self.running or time.monotonic() > until:
                    self._wanted = None
                    raise StateError(
                        "the conversation was not kept: " + ("it stands still" if self.running else "it does not run")
                    )
            if kept.error is not None:
                raise kept.error
            return kept.state

    def save(self, path: str | os.PathLike[str], timeout: float = 5.0) -> None:
        """Write a :meth:`snapshot` to a file.

        Raises
        ------
        StateError, CodecError
            As :meth:`snapshot`, or if the file cannot be written.
        """
        save_conversation(path, self.engine, self.snapshot(timeout), self._kv_bits)

    # --------------------------------------------------------------------------------------- the driver's side

    def _hear(self, frame: NDArray[np.float32]) -> float | None:
        """The user's next frame, and when its last sample came; None if there is no whole one yet."""
        waiting = self._pcm_in.available
        if waiting < self._size:
            return None
        excess = waiting - self._backlog
        if excess > 0:
            excess = -(-excess // self._size) * self._size
            self._taken += excess
            self.stats.dropped_in += self._pcm_in.skip(excess)
            self._tell("dropped", samples=excess)
            waiting -= excess
        came = self._clock() - (waiting - self._size) / self._rate
        self._pcm_in.read_into(frame)
        self._taken += self._size
        np.nan_to_num(frame, copy=False, posinf=1.0, neginf=-1.0)
        if self._muted:
            frame[:] = 0
        self.stats.level_in = _level(frame)
        return came

    @property
    def _end_due(self) -> bool:
        """Whether the end of the user's sound comes next, in place of a frame."""
        return self._end_at is not None and self._taken >= self._end_at

    def _ends(self) -> bool:
        """The same, once."""
        due = self._end_due
        if due:
            self._end_at = None
        return due

    def _forget(self) -> None:
        """Discard what was fed before a new conversation."""
        self._end_at = None
        self._taken += self._pcm_in.skip(self._pcm_in.available)

    def _say(self, text: str, words: tuple[Word, ...]) -> None:
        """The model has answered a frame."""
        self.stats.frames += 1
        for word in words:
            self._tell("word", word=word)
        if text:
            self._tell("text", text=text)

    def _speak(self, heard: NDArray[np.float32], came: float, frame: SessionFrame, began: float) -> None:
        """A frame's sound is decoded; ``began`` is when its last stage started."""
        stats, lag = self.stats, 0.0
        if frame.voiced:
            stats.level_out = _level(frame.pcm)
            stats.dropped_out += len(frame.pcm) - self._pcm_out.write(frame.pcm)
            lag = self._clock() - came
            stats.latency.add(lag)
            if lag > 2 * self._size / self._rate:
                stats.late += 1
                self._tell("late", seconds=lag)
        if self._tap is not None:
            self._tap(heard, frame)
        if frame.voiced:
            self._span("spoke a frame", began, values={"lag_ms": round(lag * 1e3, 1)})

    def _fail(self, said: str, error: BaseException) -> None:
        """End the conversation with an error."""
        failure = ConversationError(said)
        failure.__cause__ = error
        if self._error is None:
            self._error = failure
        self._stopping = True
        self._tell("error", error=error)

    def _tell(self, kind: Kind, **about: Any) -> None:
        event = Event(kind, self.stats.frames, **about)
        if self._trace is not None and kind not in ("text", "word"):
            self._trace.instant(kind, {"frame": event.frame, "samples": event.samples})
        self._events.append(event)
        self._news.ring()

    def _span(
        self, name: str, began: float, ended: float | None = None, values: Mapping[str, Any] | None = None
    ) -> None:
        if self._trace is not None:
            self._trace.span(name, began, self._clock() if ended is None else ended, values)

    def _counters(self, between: Mapping[str, int]) -> None:
        if self._trace is None:
            return
        trace, stats, rate = self._trace, self.stats, self._rate / 1e3
        waiting = {"to be heard": self._pcm_in.available / rate, "to be played": self._pcm_out.available / rate}
        trace.counter("waiting, ms", waiting)
        trace.counter("frames between threads", between)
        dropped = {"in": stats.dropped_in / rate, "out": stats.dropped_out / rate}
        trace.counter("dropped, ms", dropped)
        trace.counter("frames late", {"late": stats.late})
        trace.counter("gaps", {"gaps": stats.underruns})


class Kept:
    """A snapshot that passes through the stages, each of which adds its part."""

    def __init__(self) -> None:
        self.state: State = {}
        self.error: MoshiError | None = None
        self.ended = threading.Event()

    def add(self, take: Callable[[], State]) -> None:
        """Add one stage's part, or the error."""
        try:
            self.state.update(take())
        except MoshiError as error:
            self.error = self.error or error


def _level(frame: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(frame))))
