"""One conversation, frame by frame, and its file.

The state of a conversation is a value: :meth:`Session.snapshot` returns it, and
:meth:`Session.restore` continues from it, in this or another process, with the same samples and tokens.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..audio import check_frame
from ..errors import StateError
from ..state import State, read_state, save_state
from .batch import Batch, OnStage
from .pipeline import Engine, SessionFrame, Settings

__all__ = ["Session", "describe_conversation", "load_conversation", "play", "save_conversation"]

Pcm = NDArray[np.float32]


class Session:
    """One conversation, frame by frame. Made by :meth:`Moshi.session`.

    Belongs to one thread at a time: threads that take turns are fine, two at once are refused. Use it with ``with``, or
    call :meth:`close`.

    Parameters
    ----------
    engine : Engine
    settings : Settings, optional
    kv_bits : {None, 8}
        Precision of the cache.
    on_opening : callable, optional
        Told, after each of the steps before the first frame, how many there were, and how many there are.

    Attributes
    ----------
    on_stage : callable or None
        Called for every frame at the end of "encode", "model" and "decode", with the start and end times
        (:func:`time.monotonic`); for traces.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings | None = None,
        *,
        kv_bits: int | None = None,
        on_opening: Callable[[int, int], object] | None = None,
    ):
        self._on_opening = on_opening
        self._engine, self._settings, self._kv_bits = engine, settings or Settings(), kv_bits
        self._busy = threading.Lock()
        self._end = ""
        self.on_stage: OnStage | None = None
        self._begin()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def frames(self) -> int:
        """Frames taken so far."""
        return self._frames

    def step(self, pcm: ArrayLike) -> SessionFrame:
        """Process one frame of the user's sound, and return the answer's.

        Parameters
        ----------
        pcm : array [frame_size]
            The user's sound: floats from -1 to 1, or integers (:mod:`moshi_mlx.audio`).

        Returns
        -------
        SessionFrame

        Raises
        ------
        AudioError
            If the frame has another size, or samples that cannot be used.
        StateError
            After :meth:`close` or an error, or while another thread is in this session.
        """
        return self._step(check_frame(pcm, self._engine.frame_size))

    def end(self) -> SessionFrame:
        """Tell a translation model that the user's sound is over, in place of a frame; silence follows.

        Returns
        -------
        SessionFrame

        Raises
        ------
        StateError
            As :meth:`step`.
        """
        return self._step(None)

    def _step(self, samples: Pcm | None) -> SessionFrame:
        with self._alone():
            if self._end:
                raise StateError(f"this session {self._end}; begin another with model.session()")
            self._batch.on_stage = self.on_stage
            answer = self._batch.step({self._row: samples})[self._row]
            if isinstance(answer, Exception):
                self._end = f"has failed ({answer})"
                raise answer
            self._frames += 1
            return answer

    def finish(self) -> SessionFrame:
        """The last text and words, which are complete only at the end; its ``pcm`` is empty."""
        with self._alone():
            text, words = self._batch.flush(self._row)
        return SessionFrame(self._frames, np.zeros(0, np.float32), text, words)

    def reset(self) -> None:
        """Start a new conversation, as after :meth:`Moshi.session`."""
        with self._alone():
            self._begin()

    def close(self) -> None:
        """End the conversation; its memory is freed with the last reference to it."""
        self._end = "is closed"

    def snapshot(self) -> State:
        """The state from which the conversation can be continued: a tree of arrays that later frames do not change.

        It fits every session on this model with this precision of the cache, in numpy and in MLX.

        Raises
        ------
        CodecError
            If the codec cannot give its state (Rust).
        """
        with self._alone():
            return self._batch.snapshot(self._row)

    def restore(self, snapshot: State) -> None:
        """Continue from a :meth:`snapshot`, with its seed, settings and conditions.

        :meth:`reset` starts over with those of this session.

        Raises
        ------
        StateError
            If it is not a snapshot of this model, or is damaged; the session is as it was then.
        CodecError
            If the codec cannot take a state (Rust).
        """
        with self._alone():
            self._begin(snapshot)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation to a file.

        Raises
        ------
        StateError
            If it cannot be written.
        CodecError
            If the codec cannot give its state (Rust).
        """
        save_conversation(path, self._engine, self.snapshot(), self._kv_bits)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue a conversation from a file; see :meth:`restore`.

        Raises
        ------
        StateError
            If the file is missing, damaged, of another model or no conversation; the session is as it was then.
        CodecError
            If the codec cannot take a state (Rust).
        """
        self.restore(load_conversation(path, self._engine, self._kv_bits))

    def _begin(self, snapshot: State | None = None) -> None:
        batch = Batch(self._engine, kv_bits=self._kv_bits)
        row = batch.join(self._settings, snapshot)
        batch.open(row, self._on_opening)
        self._batch, self._row, self._frames, self._end = batch, row, batch.frames(row), ""

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse a second thread: two at once would mix their frames, or crash MLX."""
        if not self._busy.acquire(blocking=False):
            raise StateError(
                "another thread is in this session: a session belongs to one thread at a time. Give each thread "
                "its own session, or let them take turns with a lock"
            )
        try:
            yield
        finally:
            self._busy.release()


def play(session: Session, frames: Iterable[Pcm]) -> Iterator[tuple[Pcm, SessionFrame]]:
    """Play sound to a session: yields each frame with its answer, and finally the result of :meth:`finish`."""
    for pcm in frames:
        yield pcm, session.step(pcm)
    last = session.finish()
    yield last.pcm, last


def save_conversation(
    path: str | os.PathLike[str], engine: Engine, snapshot: State, kv_bits: int | None = None
) -> None:
    """Write a conversation's snapshot to a file, with the identity of its model.

    Raises
    ------
    StateError
        If it cannot be written.
    """
    about = {"content": "conversation", "model": engine.name, "fingerprint": engine.fingerprint()}
    save_state(path, snapshot, {**about, "kv_bits": str(kv_bits)})


def load_conversation(path: str | os.PathLike[str], engine: Engine, kv_bits: int | None = None) -> State:
    """Read what :func:`save_conversation` wrote.

    Raises
    ------
    StateError
        If the file is missing, damaged, no conversation, or one with another model or precision of the cache.
    """
    snapshot, about = _read(path)
    if about["fingerprint"] != engine.fingerprint():
        model = about["model"]
        which = f"the model {model}" if model != engine.name else f"another version of the model {model}"
        raise StateError(f"{path} is a conversation with {which}, and this is {engine.name}: load that model for it")
    if about["kv_bits"] != str(kv_bits):
        raise StateError(f"{path} was saved with kv_bits={about['kv_bits']}, and this session has {kv_bits}")
    return snapshot


def describe_conversation(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata from :func:`save_conversation`: ``model``, the model's name, ``fingerprint`` and ``kv_bits``.

    Raises
    ------
    StateError
        If the file is missing, damaged or no conversation.
    """
    return _read(path)[1]


def _read(path: str | os.PathLike[str]) -> tuple[State, dict[str, str]]:
    snapshot, about = read_state(path)
    if about.get("content") != "conversation" or not {"model", "fingerprint", "kv_bits"} <= about.keys():
        raise StateError(f"{path} is a state, but not that of a conversation")
    return snapshot, about
