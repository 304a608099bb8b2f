"""One conversation on three threads, so that each frame is answered as soon as possible.

::

    pcm_in > [encoder] > codes_in > [model] > codes_out > [decoder] > pcm_out
    ring     thread      ring       thread    ring        thread      ring

While the model works on frame n, the codec encodes frame n + 1 and decodes frame n - 1. Only numpy arrays pass between
the threads, and each thread creates the MLX arrays that it uses. A new conversation or a snapshot is a marker
that passes along with the frames, so that it happens between the same two frames in every stage.
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

from ..engine.pipeline import Answer, Predict
from .ring import Ring, Signal
from .workers import Work, run

if TYPE_CHECKING:
    from .conversation import Conversation, Kept

__all__ = ["Pipelined"]

_FRAMES_BETWEEN = 2
_POLL = 0.1
_STOP_WITHIN = 1.0
_ROW = 0
_FRAME, _RESET, _KEEP = range(3)


class Pipelined:
    """The driver of a single conversation.

    Parameters
    ----------
    conversation : Conversation
    """

    def __init__(self, conversation: Conversation):
        engine = conversation.engine
        self._answers: deque[Answer] = deque()  # one for each frame in codes_out
        self._keeping: dict[str, deque[Kept]] = {"model": deque(), "decoder": deque()}  # one for each snapshot marker
        tapped = engine.frame_size if conversation._tap is not None else 0
        self.codes_in = Ring(_FRAMES_BETWEEN, dtype=_record(engine.user_q, tapped))
        self.codes_out = Ring(_FRAMES_BETWEEN, dtype=_record(0, tapped))
        self.rings = {"codes_in": self.codes_in, "codes_out": self.codes_out}
        names = ("pcm_in", "codes_in", "codes_in_space", "codes_out", "codes_out_space")
        self._bells = {name: Signal() for name in names}
        self._threads: list[Work] = []
        self._ready = threading.Semaphore(0)
        self._stopping = False
        self._answering = self._speaking = False  # whether the model and the decoder are still running

    def start(self, conversation: Conversation, ready: Callable[[], object] | None) -> None:
        """Start the threads and wait until they are ready, or have failed; then call ``ready``."""
        stages = [("encoder", self._encode), ("model", self._model), ("decoder", self._decode)]
        self._answering = self._speaking = True
        for name, stage in stages:
            self._threads.append(run(f"moshi {name}", partial(self._guard, conversation, name, stage)))
        for _ in self._threads:
            self._ready.acquire()
        if ready is not None:
            ready()

    def stop(self, wait: bool) -> bool:
        """Stop the threads; False if one is still in a long computation after a second."""
        self._end()
        until = time.monotonic() + (_STOP_WITHIN if wait else 0.0)
        for work in self._threads:
            if work.thread is not threading.current_thread():
                work.join(max(0.0, until - time.monotonic()))
        return not any(work.alive for work in self._threads)

    def wake(self) -> None:
        """Wake the encoder."""
        self._bells["pcm_in"].ring()

    def _end(self) -> None:
        self._stopping = True
        for bell in self._bells.values():
            bell.ring()

    # The threads

    def _guard(self, conversation: Conversation, name: str, stage: Callable[[Conversation], None]) -> None:
        try:
            stage(conversation)
        except BaseException as error:  # any failure is reported to the owner
            conversation._fail(f"the {name} of the conversation failed: {error}", error)
            self._end()
        finally:
            if name == "model":
                self._answering = False
                self._bells["codes_out"].ring()
            elif name == "decoder":
                self._speaking = False
                self._bells["codes_out_space"].ring()
            self._ready.release()

    def _encode(self, conversation: Conversation) -> None:
        stage = conversation.engine.encode()
        stage.join(_ROW, conversation._resumed)
        frame = np.zeros(conversation.engine.frame_size, np.float32)
        record = np.zeros(1, self.codes_in.dtype)
        resets = 0
        self._ready.release()
        while not self._stopping:
            if resets != conversation._resets:
                resets = conversation._resets
                conversation._forget()
                stage.leave(_ROW)
                stage.join(_ROW)
                self._pass_on(record, "codes_in", _RESET)
            if conversation._wanted is not None:
                wanted, conversation._wanted = conversation._wanted, None
                wanted.add(partial(stage.snapshot, _ROW))
                for keeping in self._keeping.values():
                    keeping.append(wanted)
                self._pass_on(record, "codes_in", _KEEP)
            ends = conversation._ends()
            if ends:
                frame[:] = 0
            came = conversation._clock() if ends else conversation._hear(frame)
            if came is None:
                self._bells["pcm_in"].wait(_POLL)
                continue
            began = conversation._clock()
            record["came"] = came
            record["codes"][0] = stage.step([_ROW], [None if ends else frame])[0]
            if conversation._tap is not None:
                record["heard"][0] = frame
            ended = conversation._clock()
            conversation.stats.encode.add(ended - began)
            self._pass_on(record, "codes_in")
            conversation._span("encode", began, ended)
            conversation._span("heard a frame", began)
            conversation._counters({name: ring.available for name, ring in self.rings.items()})

    def _model(self, conversation: Conversation) -> None:
        stage = conversation.engine.predict(conversation._kv_bits)
        stage.join(_ROW, conversation._settings, conversation._resumed)
        self._open(conversation, stage)
        self._ready.release()
        record = np.zeros(1, self.codes_in.dtype)
        spoken = np.zeros(1, self.codes_out.dtype)
        while not self._stopping and self._take(record, "codes_in"):
            if record["mark"][0] == _KEEP:
                self._keeping["model"].popleft().add(partial(stage.snapshot, _ROW))
            elif record["mark"][0] == _RESET:
                stage.leave(_ROW)
                stage.join(_ROW, conversation._settings)
                self._open(conversation, stage)
                conversation._tell("reset")
            if record["mark"][0] != _FRAME:
                self._pass_on(spoken, "codes_out", int(record["mark"][0]))
                continue
            began = conversation._clock()
            (answer,) = stage.step([_ROW], [record["codes"][0]])
            assert answer is not None
            ended = conversation._clock()
            conversation.stats.step.add(ended - began)
            conversation._span("model", began, ended, {"frame": conversation.stats.frames})
            conversation._say(answer.text, answer.words)
            if answer.codes is not None or conversation._tap is not None:
                spoken["came"] = record["came"]
                spoken["heard"] = record["heard"]
                self._answers.append(answer)
                self._pass_on(spoken, "codes_out")

    def _open(self, conversation: Conversation, stage: Predict) -> None:
        """Run all that comes before the first frame, unless the conversation ends before."""
        if conversation._settings.opening is None:
            stage.open(_ROW)
        while stage.opening(_ROW) and not self._stopping:
            stage.step([_ROW], [None])
            conversation._on_opening(*stage.opened(_ROW))

    def _decode(self, conversation: Conversation) -> None:
        stage = conversation.engine.decode()
        stage.join(_ROW, conversation._resumed)
        self._ready.release()
        record = np.zeros(1, self.codes_out.dtype)
        while self._take(record, "codes_out"):
            if record["mark"][0] == _KEEP:
                kept = self._keeping["decoder"].popleft()
                kept.add(partial(stage.snapshot, _ROW))
                kept.ended.set()
            elif record["mark"][0] == _RESET:
                stage.leave(_ROW)
                stage.join(_ROW)
                conversation._jitter_buffer.clear()
            if record["mark"][0] != _FRAME:
                continue
            answer = self._answers.popleft()
            began = conversation._clock()
            frame = answer.frame(stage.step([_ROW], [answer.codes])[0])
            ended = conversation._clock()
            if frame.voiced:
                conversation.stats.decode.add(ended - began)
                conversation._span("decode", began, ended)
            conversation._speak(record["heard"][0], float(record["came"][0]), frame, began)
            if frame.voiced:
                conversation._counters({name: ring.available for name, ring in self.rings.items()})

    def _pass_on(self, record: NDArray[Any], name: str, mark: int = _FRAME) -> None:
        record["mark"] = mark
        ring = self.rings[name]
        while not ring.write(record):
            if self._stopping and (ring is self.codes_in or not self._speaking):
                return
            self._bells[f"{name}_space"].wait(_POLL)
        self._bells[name].ring()

    def _take(self, record: NDArray[Any], name: str) -> bool:
        """Read the next record of a ring; False when the conversation is over and all answers are spoken."""
        ring = self.rings[name]
        while True:
            over = self._stopping and (ring is self.codes_in or not self._answering)  # read this before the ring
            if ring.read_into(record):
                self._bells[f"{name}_space"].ring()
                return True
            if over:
                return False
            self._bells[name].wait(_POLL)


def _record(codebooks: int, samples: int) -> np.dtype[Any]:
    """A frame between threads: its codes, the time of its last sample, and the sound for a tap; or a marker."""
    return np.dtype(
        [
            ("mark", np.int8),
            ("came", np.float64),
            ("codes", np.int32, (codebooks,)),
            ("heard", np.float32, (samples,)),
        ]
    )
