"""What the user of a conversation says, turn by turn, from a recogniser beside it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.realtime import Captions
from moshi_mlx.tasks.transcribe import PAUSE, PAUSE_HEAD, Heard

if TYPE_CHECKING:
    from moshi_mlx.realtime import Caption

__all__ = ["Transcripts"]


@dataclass
class _Turn:
    item_id: str
    until: float  # seconds of the conversation; infinite while the user speaks
    words: list[str] = field(default_factory=list)


class Transcripts:
    """The words of a user's turns, for the event loop.

    Parameters
    ----------
    captions : Captions
    on_word : callable
        Told a turn's item and what is added to its text.
    on_turn : callable
        Told a turn's item, its text and its seconds, once all of its words are there.
    on_pause : callable
        Told that the user pauses, by a recogniser that predicts it.
    """

    def __init__(
        self,
        captions: Captions,
        on_word: Callable[[str, str], None],
        on_turn: Callable[[str, str, float], None],
        on_pause: Callable[[], None],
    ):
        model, loop = captions.model, asyncio.get_running_loop()
        self.predicts = model.lm.config.extra_heads_num_heads > PAUSE_HEAD
        self.model = model.name
        self._on_word, self._on_turn, self._on_pause = on_word, on_turn, on_pause
        self._late = model.audio_delay + 0.5  # seconds after a turn until its last word is known
        self._turns: deque[_Turn] = deque()
        self._begun: float | None = None  # of the conversation, when the recogniser began to hear
        self._seconds = 0.0

        def tell(heard: Heard | Exception) -> None:
            try:
                loop.call_soon_threadsafe(self._take, heard)
            except RuntimeError:  # the loop has ended
                pass

        self._caption: Caption = captions.begin(tell)

    def hear(self, pcm: NDArray[np.float32], at: float) -> None:
        """A frame of the user's sound, ``at`` seconds of the conversation; from any thread."""
        if self._begun is None:
            self._begun = at
        self._caption.feed(pcm.copy())

    def begin(self, item_id: str) -> None:
        """The user begins to speak."""
        self._turns.append(_Turn(item_id, float("inf")))

    def end(self, item_id: str, until: float) -> None:
        """A turn is over, ``until`` seconds of the conversation."""
        for turn in self._turns:
            if turn.item_id == item_id:
                turn.until = until
                return
        self._turns.append(_Turn(item_id, until))

    def close(self) -> None:
        """Hear no more."""
        self._caption.end()

    def _take(self, heard: Heard | Exception) -> None:
        if isinstance(heard, Exception):
            while self._turns:
                self._finish(self._turns.popleft())
            return
        begun = self._begun or 0.0
        for word in heard.words:
            turn = next((turn for turn in self._turns if word.start + begun < turn.until), None)
            if turn is not None and (text := word.text.strip()):
                delta = f" {text}" if turn.words else text
                turn.words.append(text)
                self._on_word(turn.item_id, delta)
        self._seconds = heard.time + begun
        while self._turns and self._seconds >= self._turns[0].until + self._late:
            self._finish(self._turns.popleft())
        if self.predicts and heard.turn_ended and heard.pause > PAUSE:
            self._on_pause()

    def _finish(self, turn: _Turn) -> None:
        self._on_turn(turn.item_id, " ".join(turn.words), min(turn.until, self._seconds))
