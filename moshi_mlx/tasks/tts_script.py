"""Text for a text-to-speech model: words and breaks, as the text comes.

Kyutai's rules (``script_to_entries`` in ``moshi/models/tts.py``): typographic apostrophes become plain ones, colons
spaces, brackets nothing; ``<break time="1.5s"/>`` is a pause; each word is encoded by itself; the first word of a turn
carries its speaker's token.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from ..engine.text import SILENT_IDS, TextTokenizer
from ..errors import TextError
from .tts_machine import SPEAKERS, Entry

__all__ = ["LONGEST_BREAK", "LONGEST_WORD", "Script", "without_markup"]

LONGEST_BREAK = 60.0
"""Seconds of a pause."""
LONGEST_WORD = 500
"""Characters of a word."""

_EVENT = re.compile(r"<break\s+time=\"([0-9]+(?:[.,][0-9]*)?)s\"\s*/?>|\s+")
_TAG, _LONGEST_TAG = "<break", 40
_REPLACED = str.maketrans({"’": "'", ":": " ", "(": None, ")": None})
_MARKUP = str.maketrans({"*": None, "_": None, "`": None, "“": '"', "”": '"', "„": '"', "‘": "'", "#": None})
_MUTE = frozenset({"So", "Sk", "Cn", "Co", "Cs", "Cf", "Mn"})


def without_markup(text: str) -> str:
    """Text of a language model without the marks of markdown, which would be read aloud; straight quotes."""
    return text.translate(_MARKUP)


class Script:
    """Turns text into entries, piece by piece.

    Parameters
    ----------
    tokenizer : TextTokenizer
    frame_rate : float
        Frames a second.
    speakers : bool
        Whether the model tells speakers apart.
    padding : int
        Positions to leave between words at least; 1 is clearer than 0.

    Attributes
    ----------
    skipped : int
        Words that had nothing to be spoken, such as emoji.
    """

    def __init__(self, tokenizer: TextTokenizer, frame_rate: float = 12.5, *, speakers: bool = True, padding: int = 1):
        self._tokenizer, self._frame_rate, self._speakers, self._padding = tokenizer, frame_rate, speakers, padding
        self._rest = ""
        self._turn, self._first, self._last_speaker = 0, True, -1
        self.skipped = 0

    def feed(self, text: str) -> list[Entry]:
        """Entries that are complete; a word is when white space follows it.

        Raises
        ------
        TextError
            If a word or a break is too long. This piece of text is dropped.
        """
        self._rest += text.translate(_REPLACED)
        return self._take(whole=False)

    def flush(self) -> list[Entry]:
        """The last word, which is over although nothing follows."""
        return self._take(whole=True)

    def turn(self, number: int | None = None) -> list[Entry]:
        """End the turn: the last word, and the next turn, the other speaker's, begins. ``number``: which one."""
        entries = self.flush()
        self._turn = self._turn + 1 if number is None else number
        self._first = True
        return entries

    def entries(self, turns: str | Sequence[str]) -> list[Entry]:
        """A whole text: turns that alternate between two speakers."""
        found: list[Entry] = []
        for number, turn in enumerate([turns] if isinstance(turns, str) else turns):
            found += [*self.turn(number), *self.feed(turn), *self.flush()]
        return found

    def _take(self, whole: bool) -> list[Entry]:
        entries: list[Entry] = []
        place, text, self._rest = 0, self._rest, ""  # dropped if it cannot be spoken
        tag = text.rfind(_TAG)
        unfinished = not whole and 0 <= tag and ">" not in text[tag:] and len(text) - tag < _LONGEST_TAG
        end = tag if unfinished else len(text)
        while (match := _EVENT.search(text, place, end)) is not None:
            entries += self._word(text[place : match.start()])
            if match[1]:
                entries.append(self._break(float(match[1].replace(",", "."))))
            place = match.end()
        self._rest = text[place:]
        if whole:
            entries += self._word(self._rest)
            self._rest = ""
        elif len(self._rest) > 2 * LONGEST_WORD:
            self._word(self._rest)
        return entries

    def _word(self, word: str) -> list[Entry]:
        if len(word) > LONGEST_WORD:
            raise TextError(
                f"a word of {len(word):,} characters ({word[:20]!r} ...) cannot be spoken: put spaces between words"
            )
        tokens = [] if _mute(word) else [token for token in self._tokenizer.encode(word) if token not in SILENT_IDS]
        if not tokens:
            self.skipped += bool(word)
            return []
        if self._first:
            speaker = self._turn % len(SPEAKERS)
            if self._speakers and speaker != self._last_speaker:
                self._last_speaker = speaker
                tokens.insert(0, SPEAKERS[speaker])
            self._first = False
        padding = max(0, self._padding + len(tokens) - 1) if self._padding > 0 else 0
        return [Entry(tuple(tokens), word, padding)]

    def _break(self, seconds: float) -> Entry:
        if seconds > LONGEST_BREAK:
            raise TextError(f"a break of {seconds:,.0f} s is longer than the {LONGEST_BREAK:.0f} s that are possible")
        return Entry((), "", round(seconds * self._frame_rate))


def _mute(word: Iterable[str]) -> bool:
    """Whether a word is symbols alone, for which there are no sounds."""
    return all(unicodedata.category(character) in _MUTE for character in word)
