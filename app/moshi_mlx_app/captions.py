"""Captions: what the user says in a conversation, written down by a speech-to-text model beside it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moshi_mlx.engine.text import Word
    from moshi_mlx.realtime import Caption, Captions
    from moshi_mlx.tasks.dialogue import SessionFrame
    from moshi_mlx.tasks.transcribe import Heard

__all__ = ["TalkCaptions"]

_LAST = 2.0
"""Seconds to wait for the last words."""


class TalkCaptions:
    """Captions of one conversation after the other.

    Parameters
    ----------
    captions : Captions
        The recogniser.
    on_words : callable
        Told words as they are complete, with times of the conversation, in the recogniser's thread.
    """

    def __init__(self, captions: Captions, on_words: Callable[[tuple[Word, ...]], object]):
        self._captions, self._on_words = captions, on_words
        self._rate = captions.model.sample_rate
        self._caption: Caption | None = None
        self._next = -1
        self._line: list[str] = []
        self._lines: deque[str] = deque()
        self._failed = False

    def tap(self, heard: NDArray[np.float32], frame: SessionFrame) -> None:
        """Hear a frame of the user (see :class:`moshi_mlx.realtime.Conversation`); never blocks or raises."""
        if self._failed:
            return
        if frame.index != self._next or self._caption is None:
            if self._caption is not None:
                self._caption.end()
            begun = frame.index * len(heard) / self._rate
            self._caption = self._captions.begin(lambda found: self._take(found, begun))
        self._next = frame.index + 1
        self._caption.feed(heard.copy())

    def lines(self) -> list[str]:
        """What was said, a line a turn, since the last call."""
        found = []
        while self._lines:
            found.append(self._lines.popleft())
        return found

    def stop(self) -> None:
        """Write down the last words; takes two or three seconds at most."""
        caption = self._caption
        if caption is not None and not self._failed:
            caption.finish()
            until = time.monotonic() + _LAST
            while self._captions.speaking(caption) and time.monotonic() < until:
                time.sleep(0.01)
        self._end_line()

    def close(self) -> None:
        """Hear no more."""
        self._failed = True
        if self._caption is not None:
            self._caption.end()

    def _take(self, found: Heard | Exception, begun: float) -> None:
        if isinstance(found, Exception):
            self._failed = True
            self._lines.append(f"(captions have ended: {found})")
            return
        if found.words:
            self._on_words(tuple(replace(w, start=w.start + begun, end=w.end + begun) for w in found.words))
            self._line += [word.text.strip() for word in found.words]
        if found.turn_ended:
            self._end_line()

    def _end_line(self) -> None:
        if self._line:
            self._lines.append(" ".join(self._line))
            self._line = []
