"""What people say, written down beside something else: a recogniser in one thread for any number of speakers.

Whoever feeds it never waits. Where it falls behind, the oldest sound is left out and words go on in their time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import MoshiError, StateError
from ..tasks.transcribe import Heard, Listener, advance
from . import workers
from .workers import Work

if TYPE_CHECKING:
    from ..tasks.transcribe import SpeechToText

__all__ = ["Caption", "Captions"]

Pcm = NDArray[np.float32]
_BACKLOG = 4.0
"""Seconds that the recogniser may be behind."""
_LOOK = 0.5


class Caption:
    """One speaker. Made by :meth:`Captions.begin`; its methods may be called from any thread and return at once.

    Attributes
    ----------
    lost : float
        Seconds of sound that the recogniser had no time for.
    """

    def __init__(self, captions: Captions, tell: Callable[[Heard | Exception], object]):
        self._captions, self._tell = captions, tell
        self._waiting: deque[Pcm] = deque()
        self._rest: Pcm = np.zeros(0, np.float32)
        self._listener: Listener | None = None
        self._finishing = False
        self.lost = 0.0

    def feed(self, pcm: Pcm) -> None:
        """Hear more sound, from one thread at a time.

        Parameters
        ----------
        pcm : array [samples], float32
            At the recogniser's rate; not copied.
        """
        if self._finishing:
            return
        size = self._captions.model.frame_size
        if len(self._rest) or len(pcm) != size:
            pcm = np.concatenate([self._rest, pcm])
        whole = len(pcm) // size * size
        self._rest = pcm[whole:]
        if whole:
            self._waiting.extend(pcm[:whole].reshape(-1, size))
            self._captions.wake()

    def finish(self) -> None:
        """No more comes: the last words are told, and it ends."""
        self._finishing = True
        self._captions.wake()

    def end(self) -> None:
        """Tell nothing more."""
        self._captions.leave(self)

    # In the thread

    def next(self, rate: float) -> Pcm | None:
        """The next frame; leaves out what is older than the backlog."""
        while len(self._waiting) > _BACKLOG * rate:
            self._waiting.popleft()
            self.lost += 1 / rate
        return self._waiting.popleft() if self._waiting else None

    def take(self, heard: Heard) -> None:
        """Tell what was heard, in seconds of all sound."""
        if self.lost:
            later = tuple(replace(word, start=word.start + self.lost, end=word.end + self.lost) for word in heard.words)
            heard = replace(heard, time=heard.time + self.lost, words=later)
        self._tell(heard)


class Captions:
    """A recogniser for any number of speakers; its thread runs while there is one.

    Parameters
    ----------
    model : SpeechToText
    kv_bits : {None, 8}
        Precision of its cache.
    """

    def __init__(self, model: SpeechToText, *, kv_bits: int | None = None):
        self.model, self._kv_bits = model, kv_bits
        self._bell = threading.Condition()
        self._speakers: set[Caption] = set()
        self._work: Work | None = None
        self._stopping = False

    def begin(self, tell: Callable[[Heard | Exception], object]) -> Caption:
        """A new speaker.

        Parameters
        ----------
        tell : callable
            Gets every frame's :class:`~moshi_mlx.tasks.transcribe.Heard`, or the error that ended it, in the
            recogniser's thread: it must not take time.

        Raises
        ------
        StateError
            If :meth:`stop` was called.
        """
        if self._stopping:
            raise StateError("these captions have been stopped: make others")
        caption = Caption(self, tell)
        with self._bell:
            self._speakers.add(caption)
            if self._work is None or not self._work.alive:
                self._work = workers.run("moshi captions", self._run)
            self._bell.notify()
        return caption

    def speaking(self, caption: Caption) -> bool:
        """Whether a speaker has not ended yet."""
        return caption in self._speakers

    def leave(self, caption: Caption) -> None:
        """End a speaker, if it has not ended."""
        with self._bell:
            self._speakers.discard(caption)
            self._bell.notify()

    def wake(self) -> None:
        """Let the thread look again."""
        with self._bell:
            self._bell.notify()

    def stop(self) -> None:
        """End all speakers and the thread; takes a second at most."""
        self._stopping = True
        self.wake()
        if self._work is not None:
            self._work.join(1.0)

    def _run(self) -> None:
        listeners: dict[Caption, Listener] = {}
        shared = self.model.rows(kv_bits=self._kv_bits)
        try:
            while not self._stopping:
                with self._bell:
                    speakers = set(self._speakers)
                    if not speakers:
                        self._work = None
                        return
                for caption in [caption for caption in listeners if caption not in speakers]:
                    listeners.pop(caption).close()
                if not self._step(speakers, listeners, shared):
                    with self._bell:
                        if speakers == self._speakers and not any(one._waiting for one in speakers):
                            self._bell.wait(_LOOK)
        finally:
            for listener in listeners.values():
                listener.close()

    def _step(self, speakers: set[Caption], listeners: dict[Caption, Listener], shared: Callable[[], Listener]) -> bool:
        """Hear a frame of everybody who has one; False if nobody had."""
        frames: dict[Listener, Pcm] = {}
        owners: dict[Listener, Caption] = {}
        for caption in speakers:
            finishing = caption._finishing  # read first: what was fed before it is in the queue then
            pcm = caption.next(self.model.frame_rate)
            try:
                listener = listeners.get(caption)
                if listener is None:
                    listener = listeners[caption] = shared()
                if pcm is not None:
                    frames[listener], owners[listener] = pcm, caption
                elif finishing:
                    for heard in listener.finish():
                        caption.take(heard)
                    self.leave(caption)
            except MoshiError as error:
                self._failed(caption, listeners, error)
        try:
            for listener, heard in advance(frames).items():
                owners[listener].take(heard)
        except MoshiError as error:
            for caption in owners.values():
                self._failed(caption, listeners, error)
        return bool(frames)

    def _failed(self, caption: Caption, listeners: dict[Caption, Listener], error: MoshiError) -> None:
        self.leave(caption)
        listener = listeners.pop(caption, None)
        if listener is not None:
            listener.close()
        caption._tell(error)
