"""A conversation in real time: the only file that wires the stages.

::

    feed > pcm_in > [encoder] > codes_in > [model] > codes_out > [decoder] > pcm_out > read
           ring     thread      ring       thread    ring        thread      ring

While the model works on frame n, the codec encodes frame n + 1 and decodes frame n - 1. :meth:`Conversation.feed` and
:meth:`Conversation.read` copy and return; they may be called from audio callbacks. Between the threads go numpy arrays
only, and each thread makes the MLX arrays that it uses.

If the machine falls behind, what waits to be heard is bounded: beyond ``backlog`` the oldest sound of the user is
dropped, whole frames of it, and counted. Nothing is of a size that grows with time.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..audio import check_block
from ..errors import MoshiError, StateError
from ..generate import GenerationConfig
from ..model import Moshi, SessionFrame, TextReader, make_generator
from ..text import Word
from .meters import Meters
from .player import Player
from .ring import Bell, Ring
from .trace import Trace
from .workers import Work, run

__all__ = ["Conversation", "ConversationError", "Event"]

_SECONDS_IN_RINGS = 4.0
_FRAMES_BETWEEN = 2
_EVENTS_KEPT = 1000
_POLL = 0.1
_STOP_WITHIN = 1.0


class ConversationError(MoshiError):
    """A stage of a conversation failed; its cause is attached."""


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes
    ----------
    kind : str
        ``text``: the model began to say ``text``. ``word``: it has said ``word``. ``late``: a frame's answer came
        late. ``dropped``: ``samples`` of the user's sound were dropped. ``reset``: the conversation began anew.
        ``error``: a stage failed, and the conversation is over.
    frame : int
        Frame of the model at which it happened.
    """

    kind: Literal["text", "word", "late", "dropped", "reset", "error"]
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
    model : Moshi
        Shared: several conversations may run on it.
    seed, generation, conditions, kv_bits
        As for :meth:`Moshi.session`.
    backlog : float
        Seconds of the user's sound that may wait for the codec before the oldest is dropped.
    margin : float
        Seconds of the model's sound that are kept ready at first; underruns widen it.
    tap : callable, optional
        Called in a worker thread with every frame: what the model heard, array [frame_size], valid during the call
        only, and the :class:`SessionFrame` that it answered. Index 0 comes again after :meth:`reset`. For recordings;
        it must be quick, and what it raises ends the conversation.
    trace : Trace, optional
        Gets what each thread does, what waits in the rings, and everything that is late or dropped.
    clock : callable
        Seconds, monotonic; for tests.

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
        model: Moshi,
        *,
        seed: int = 0,
        generation: GenerationConfig | None = None,
        conditions: Mapping[str, Any] | None = None,
        kv_bits: int | None = None,
        backlog: float = 0.32,
        margin: float = 0.02,
        tap: Callable[[NDArray[np.float32], SessionFrame], object] | None = None,
        trace: Trace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.model = model
        self.meters = Meters()
        self._clock = clock
        self._trace = trace
        self._settings: dict[str, Any] = {
            "seed": seed,
            "generation": generation,
            "conditions": conditions,
            "kv_bits": kv_bits,
        }
        self._size = model.frame_size
        self._rate = model.sample_rate
        self._backlog = max(round(backlog * self._rate) // self._size, 1) * self._size
        room = max(round(_SECONDS_IN_RINGS * self._rate), 2 * self._backlog)
        self._pcm_in = Ring(room)
        self._pcm_out = Ring(room)
        lm = model.lm.config
        # Frames of silence that the model is to hear first, as some that write down speech were trained.
        prefix = float(model.config.stt_config.get("audio_silence_prefix_seconds", 0.0))
        self._lead = math.ceil(round(prefix * self._rate) / self._size)
        self._tap = tap
        self._said: deque[tuple[str, tuple[Word, ...]]] = deque()  # for the tap, one for each record of codes_out
        tapped = self._size if tap is not None else 0
        self._codes_in = Ring(_FRAMES_BETWEEN, dtype=_record(model.codec.num_codebooks if model.codec else 0, tapped))
        self._codes_out = Ring(_FRAMES_BETWEEN, dtype=_record(lm.own_q, tapped))
        self._rings = {"codes_in": self._codes_in, "codes_out": self._codes_out}
        self._player = Player(self._pcm_out, self._rate, margin)
        self._bells = {
            name: Bell() for name in ("pcm_in", "codes_in", "codes_in_space", "codes_out", "codes_out_space")
        }
        self._events: deque[Event] = deque(maxlen=_EVENTS_KEPT)
        self._news = Bell()
        self._threads: list[Work] = []
        self._ready = threading.Semaphore(0)
        self._stopping = False
        self._answering = self._speaking = False  # whether the model, the decoder have not come to their end
        self._paused = False
        self._muted = False
        self._resets = 0
        self._error: ConversationError | None = None

    # ------------------------------------------------------------------------------------------ the owner's side

    def __enter__(self) -> Conversation:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        if kind is None:
            self.check()

    def start(self) -> Conversation:
        """Start the threads and wait until they can take sound.

        Raises
        ------
        ConversationError
            If a stage cannot be made.
        StateError
            If it was started before.
        """
        if self._threads:
            raise StateError("a conversation can be started once; make another")
        stages = [("encoder", self._encode), ("model", self._model), ("decoder", self._decode)]
        if not self.model.lm.config.own_q:
            stages.pop()
        self._answering = self._speaking = True
        try:
            for name, stage in stages:
                self._threads.append(run(f"moshi {name}", partial(self._guard, name, stage)))
            for _ in self._threads:
                self._ready.acquire()
            self.check()
        except BaseException:  # Ctrl-C, too: nobody else would end the threads
            self.stop()
            raise
        return self

    def stop(self) -> bool:
        """End the conversation. Returns within a second, whatever the threads do.

        Frames that the model has answered still become sound, and go to the tap. The threads are kept for the next
        conversation (see :mod:`.workers`).

        Returns
        -------
        bool
            False if a thread is still inside one long computation: it ends after that, and touches nothing more.
        """
        self._stopping = True
        for bell in self._bells.values():
            bell.ring()
        until = time.monotonic() + _STOP_WITHIN
        for work in self._threads:
            if work.thread is not threading.current_thread():
                work.join(max(0.0, until - time.monotonic()))
        return not any(work.alive for work in self._threads)

    @property
    def running(self) -> bool:
        """Whether sound goes through."""
        return bool(self._threads) and not self._stopping

    @property
    def error(self) -> ConversationError | None:
        """Why it ended by itself, if it did."""
        return self._error

    def check(self) -> None:
        """Raise what ended the conversation, if anything did."""
        if self._error is not None:
            raise self._error

    def feed(self, pcm: ArrayLike) -> int:
        """Hand over the user's sound: any number of samples, from one thread at a time; never waits.

        Parameters
        ----------
        pcm : array [samples]
            At the model's sample rate: floats from -1 to 1, or integers (:mod:`moshi_mlx.audio`). NaN, which a driver
            may give, is heard as silence.

        Returns
        -------
        int
            Samples taken; fewer than given only if the threads have stood still for seconds.

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
        if taken < len(samples):
            self.meters.dropped_in += len(samples) - taken
        if self._pcm_in.available >= self._size:
            self._bells["pcm_in"].ring()
        if self._trace is not None:
            self._trace.span("feed", began, self._clock())
        return taken

    def read(self, count: int) -> NDArray[np.float32]:
        """The next ``count`` samples of the model's voice; never waits, silence where there is none."""
        out = np.empty(count, np.float32)
        self.read_into(out)
        return out

    def read_into(self, out: NDArray[np.float32]) -> None:
        """Like :meth:`read`, into ``out`` [samples]: what an audio callback calls. From one thread at a time."""
        if self._paused:
            out[:] = 0
            return
        began = 0.0 if self._trace is None else self._clock()
        self._player.read_into(out)
        self.meters.underruns = self._player.underruns
        if self._trace is not None:
            self._trace.span("read", began, self._clock())

    def events(self) -> list[Event]:
        """What happened since the last call, oldest first; the last thousand at most."""
        news: list[Event] = []
        while self._events:
            news.append(self._events.popleft())
        return news

    def wait(self, timeout: float) -> bool:
        """Wait for the next event, at most ``timeout`` seconds; False if none came."""
        return bool(self._events) or self._news.wait(timeout)

    @property
    def backlog(self) -> float:
        """Seconds of the user's sound that wait to be heard."""
        return self._pcm_in.available / self._rate

    @property
    def delay(self) -> float:
        """Seconds of sound that wait inside: to be heard, and to be played."""
        return (self._pcm_in.available + self._pcm_out.available) / self._rate

    @property
    def margin(self) -> float:
        """Seconds of the model's sound that are kept ready."""
        return self._player.margin

    def pause(self) -> None:
        """Hear and say nothing; what is fed meanwhile is thrown away."""
        self._paused = True

    def resume(self) -> None:
        """Go on where :meth:`pause` stopped."""
        self._paused = False

    def mute(self, muted: bool = True) -> None:
        """Let the model hear silence in place of what is fed."""
        self._muted = muted

    def reset(self) -> None:
        """Begin anew: the model forgets everything; what waits to be heard or played is thrown away."""
        self._resets += 1
        self._bells["pcm_in"].ring()

    # ---------------------------------------------------------------------------------------------- the threads

    def _guard(self, name: str, stage: Callable[[], None]) -> None:
        try:
            stage()
        except BaseException as error:  # whatever it is, the owner has to know
            failure = ConversationError(f"the {name} of the conversation failed: {error}")
            failure.__cause__ = error
            if self._error is None:
                self._error = failure
            self._stopping = True
            self._tell(Event("error", self.meters.frames, error=error))
            for bell in self._bells.values():
                bell.ring()
        finally:
            if name == "model":
                self._answering = False
                self._bells["codes_out"].ring()
            elif name == "decoder":
                self._speaking = False
                self._bells["codes_out_space"].ring()
            self._ready.release()

    def _encode(self) -> None:
        encoder = self.model.codec.encoder() if self.model.codec and self.model.lm.config.user_q else None
        frame = np.zeros(self._size, np.float32)
        record = np.zeros(1, self._codes_in.dtype)
        resets = 0

        def lead() -> None:
            frame[:] = 0
            record["lead"] = True
            for _ in range(self._lead):
                if encoder is not None:
                    record["codes"][0] = encoder.encode(frame)
                self._pass_on(record, "codes_in")
            record["lead"] = False

        lead()  # before anybody can speak: it takes longer than what may wait
        self._ready.release()
        while not self._stopping:
            if resets != self._resets:
                resets = self._resets
                self._pcm_in.skip(self._pcm_in.available)
                if encoder is not None:
                    encoder.reset()
                record["reset"] = True
                self._pass_on(record, "codes_in")
                record["reset"] = False
                lead()
            waiting = self._pcm_in.available
            if waiting < self._size:
                self._bells["pcm_in"].wait(_POLL)
                continue
            excess = waiting - self._backlog
            if excess > 0:
                excess = -(-excess // self._size) * self._size
                self.meters.dropped_in += self._pcm_in.skip(excess)
                self._tell(Event("dropped", self.meters.frames, samples=excess))
                waiting -= excess
            began = self._clock()
            record["came"] = began - (waiting - self._size) / self._rate
            self._pcm_in.read_into(frame)
            np.nan_to_num(frame, copy=False, posinf=1.0, neginf=-1.0)
            if self._muted:
                frame[:] = 0
            self.meters.level_in = _level(frame)
            if encoder is not None:
                record["codes"][0] = encoder.encode(frame)
            if self._tap is not None:
                record["heard"][0] = frame
            ended = self._clock()
            self.meters.encode.add(ended - began)
            self._pass_on(record, "codes_in")
            if self._trace is not None:
                self._trace.span("encode", began, ended)
                self._trace.span("heard a frame", began, self._clock())
                self._counters(self._trace)

    def _model(self) -> None:
        generator = make_generator(self.model, **self._settings)
        reader = TextReader(self.model, lead=self._lead * self._size / self._rate)
        lm = self.model.lm.config
        early = reader.step(generator.first)
        self._say(*early)
        self._ready.release()
        record = np.zeros(1, self._codes_in.dtype)
        spoken = np.zeros(1, self._codes_out.dtype)
        index = 0
        while not self._stopping and self._take(record, "codes_in"):
            spoken["reset"] = record["reset"]
            if record["reset"][0]:
                index = 0
                first = generator.reset()
                reader.reset()
                self._tell(Event("reset", self.meters.frames))
                early = reader.step(first)
                self._say(*early)
                self._pass_on(spoken, "codes_out")
                continue
            began = self._clock()
            step = generator.step(record["codes"][0][: lm.user_q] if lm.user_q else None)
            if record["lead"][0]:
                text, words = reader.step(step)
                self._say(text, words)
                early = early[0] + text, early[1] + words
                continue
            ended = self._clock()
            self.meters.step.add(ended - began)
            if self._trace is not None:
                self._trace.span("model", began, ended, {"frame": self.meters.frames})
            self.meters.frames += 1
            text, words = reader.step(step)
            self._say(text, words)
            codes = step.codes if step.codes is not None and step.codes.min() >= 0 else None
            if self._tap is not None:
                # Position 0 runs before any sound: what it says belongs to the first frame.
                said, early = (early[0] + text, early[1] + words), ("", ())
                if not lm.own_q:
                    self._tap(record["heard"][0], SessionFrame(index, np.zeros(self._size, np.float32), *said))
                    index += 1
                    continue
                self._said.append(said)
                spoken["heard"] = record["heard"]
            if codes is not None or self._tap is not None:
                spoken["came"] = record["came"]
                spoken["silent"] = codes is None
                if codes is not None:
                    spoken["codes"][0] = codes[0]
                self._pass_on(spoken, "codes_out")

    def _decode(self) -> None:
        assert self.model.codec is not None
        decoder = self.model.codec.decoder()
        self._ready.release()
        record = np.zeros(1, self._codes_out.dtype)
        late_after = 2 * self._size / self._rate
        index = 0
        while self._take(record, "codes_out"):
            if record["reset"][0]:
                index = 0
                decoder.reset()
                self._player.clear()
                continue
            if record["silent"][0]:
                self._show(record, index, np.zeros(self._size, np.float32))
                index += 1
                continue
            began = self._clock()
            frame = decoder.decode(record["codes"][0])
            ended = self._clock()
            self.meters.decode.add(ended - began)
            self.meters.level_out = _level(frame)
            self.meters.dropped_out += len(frame) - self._pcm_out.write(frame)
            lag = self._clock() - float(record["came"][0])
            self.meters.lag.add(lag)
            if lag > late_after:
                self.meters.late += 1
                self._tell(Event("late", self.meters.frames, seconds=lag))
            self._show(record, index, frame)
            index += 1
            if self._trace is not None:
                self._trace.span("decode", began, ended)
                self._trace.span("spoke a frame", began, self._clock(), {"lag_ms": round(lag * 1e3, 1)})
                self._counters(self._trace)

    def _counters(self, trace: Trace) -> None:
        meters, rate = self.meters, self._rate / 1e3
        waiting = {"to be heard": self._pcm_in.available / rate, "to be played": self._pcm_out.available / rate}
        trace.counter("waiting, ms", waiting)
        trace.counter("frames between threads", {name: ring.available for name, ring in self._rings.items()})
        dropped = {"in": meters.dropped_in / rate, "out": meters.dropped_out / rate}
        trace.counter("dropped, ms", dropped)
        trace.counter("frames late", {"late": meters.late})
        trace.counter("gaps", {"gaps": meters.underruns})

    def _show(self, record: NDArray[Any], index: int, frame: NDArray[np.float32]) -> None:
        """The decoder's frame, and what belongs to it, to the tap."""
        if self._tap is not None:
            self._tap(record["heard"][0], SessionFrame(index, frame, *self._said.popleft()))

    def _pass_on(self, record: NDArray[Any], name: str) -> None:
        ring = self._rings[name]
        if ring is self._codes_out and not self.model.lm.config.own_q:
            return
        while not ring.write(record):
            if self._stopping and (ring is self._codes_in or not self._speaking):
                return
            self._bells[f"{name}_space"].wait(_POLL)
        self._bells[name].ring()

    def _take(self, record: NDArray[Any], name: str) -> bool:
        """The next record of a ring; False when the conversation is over, and no answer is left to be spoken."""
        ring = self._rings[name]
        while True:
            over = self._stopping and (ring is self._codes_in or not self._answering)  # before the ring is looked at
            if ring.read_into(record):
                self._bells[f"{name}_space"].ring()
                return True
            if over:
                return False
            self._bells[name].wait(_POLL)

    def _say(self, text: str, words: tuple[Word, ...]) -> None:
        for word in words:
            self._tell(Event("word", self.meters.frames, word=word))
        if text:
            self._tell(Event("text", self.meters.frames, text=text))

    def _tell(self, event: Event) -> None:
        if self._trace is not None and event.kind not in ("text", "word"):
            self._trace.instant(event.kind, {"frame": event.frame, "samples": event.samples})
        self._events.append(event)
        self._news.ring()


def _record(codebooks: int, samples: int) -> np.dtype[Any]:
    """One frame on its way: its codes, when its last sample came, and whether it says "begin anew" instead.

    For a tap also the sound that was heard, and whether there is no voice to decode. The lead is silence before it.
    """
    return np.dtype(
        [
            ("reset", np.bool_),
            ("silent", np.bool_),
            ("lead", np.bool_),
            ("came", np.float64),
            ("codes", np.int32, (codebooks,)),
            ("heard", np.float32, (samples,)),
        ]
    )


def _level(frame: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(frame))))
