"""When a text-to-speech model speaks which word: the state machine between its text and its voice.

The model does not choose words. At each position it says whether a word may start (token 0) or not; the machine
answers with the token that the model reads in its place: a piece of the next word, or padding. Models with a second
text stream also read a word further on, ``ahead`` words after the one that starts, muxed into the same token
(Kyutai's ``moshi/models/tts.py``, 0.2.13).

What the machine will answer is known before the model is asked, one token for each of the two cases
(:meth:`Machine.choices`), so the model can go on without waiting for it; :meth:`Machine.advance` follows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ..config import BOS_ID, END_PAD_ID, EOS_ID, PAD_ID, ZERO_TOKEN

__all__ = ["NEW_WORD", "PAD", "SPEAKERS", "Entry", "Machine"]

NEW_WORD, PAD = END_PAD_ID, PAD_ID
SPEAKERS = (BOS_ID, EOS_ID)
"""Tokens at the first word of a turn, of the main and of the other speaker."""


@dataclass(frozen=True)
class Entry:
    """A word, or a break.

    Attributes
    ----------
    tokens : tuple of int
        Empty for a break.
    text : str
    padding : int
        Positions for which no other word may start: after a word its own pieces and a little more, in a break its
        length.
    """

    tokens: tuple[int, ...]
    text: str = ""
    padding: int = 0


class Machine:
    """The state of one text.

    Parameters
    ----------
    card : int
        Text tokens including the start token, by which the second stream is muxed.
    ahead : int
        Words that the second stream is ahead; 0: there is none.
    max_padding : int
        Padding that the model may choose in a row; then a word starts.
    initial_padding : int
        Padding before the first word.

    Attributes
    ----------
    end : int or None
        The position at which the text was over.
    """

    def __init__(self, card: int, ahead: int = 0, *, max_padding: int = 8, initial_padding: int = 2):
        self._card, self._ahead, self._max_padding = card, ahead, max_padding
        self._remaining = self._forced = initial_padding
        self._entries: deque[Entry] = deque()
        self._words = 0
        self._queue: deque[int] = deque()
        self._second: deque[int] = deque()
        self._finished = False
        self.end: int | None = None

    def push(self, entries: Iterable[Entry]) -> None:
        """Add what is to be said next."""
        for entry in entries:
            self._entries.append(entry)
            self._words += bool(entry.tokens)

    def finish(self) -> None:
        """Nothing will be added any more."""
        self._finished = True

    @property
    def waiting(self) -> int:
        """Words that are still to be said."""
        return self._words

    @property
    def ready(self) -> bool:
        """Whether the next position would be the same if the rest of the text were known.

        If not, it must wait: a machine without a word takes the text for over, and says it to the model.
        """
        settled = self._queue or self._forced > 0 or self._words > self._ahead
        return bool(settled or self._finished or (self._entries and not self._entries[0].tokens))

    def choices(self) -> tuple[int, int]:
        """The tokens that the model reads if it asks for a word, and if it does not."""
        return self._token(self._decide(NEW_WORD)), self._token(self._decide(PAD))

    def advance(self, position: int, predicted: int) -> Entry | None:
        """Follow what the model has sampled at a position; returns the entry that starts there, if one does."""
        decision, entry = self._decide(predicted), None
        if decision in ("word", "break"):
            entry = self._entries.popleft()
            if decision == "word":
                self._words -= 1
                self._queue.extend(entry.tokens)
                if self._ahead:
                    self._second.extend(self._tokens_ahead(self._entries))
                self._remaining = self._max_padding
            self._forced = entry.padding
        elif decision == "end" and self.end is None:
            self.end = position
            decision = "last word" if self._ahead else decision
        if decision == "word":
            if self._ahead:
                self._queue.popleft()
            return entry
        if decision == "last word":
            return None
        self._remaining, self._forced = max(self._remaining - 1, 0), max(self._forced - 1, 0)
        if self._queue:
            self._queue.popleft()
        if self._second:
            self._second.popleft()
        return entry

    def _decide(self, predicted: int) -> str:
        """What happens: ``pad``, or the next ``word`` or ``break`` starts, or the text is at its ``end``."""
        if self._queue or self._forced > 0:
            return "pad"
        if predicted != NEW_WORD and self._remaining > 0:
            return "pad"
        if not self._entries:
            return "end"
        return "word" if self._entries[0].tokens else "break"

    def _token(self, decision: str) -> int:
        """The token that the model reads after a decision."""
        starts = decision == "word" or (decision == "end" and bool(self._ahead) and self.end is None)
        if not self._ahead:
            return NEW_WORD if starts else self._queue[0] if self._queue else PAD
        if starts:  # on the second stream, so that the word's pieces begin at once
            return self._mux(NEW_WORD, self._entries[0].tokens[0] if decision == "word" else PAD)
        return self._mux(self._second[0] if self._second else ZERO_TOKEN, self._queue[0] if self._queue else PAD)

    def _mux(self, second: int, first: int) -> int:
        return (second + 1) * self._card + first

    def _tokens_ahead(self, entries: Iterable[Entry]) -> tuple[int, ...]:
        """Tokens of the word that comes ``ahead`` words later; none if there is no such word."""
        left = self._ahead
        for entry in entries:
            left -= bool(entry.tokens)
            if not left:
                return entry.tokens
        return ()
