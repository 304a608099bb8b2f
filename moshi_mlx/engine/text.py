"""From text tokens to readable text and timed words.

Moshi's text stream holds one token per frame: the pieces of a word, then padding until the next word. This module has
three parts, which depend on no model, audio or terminal:

- :class:`TextTokenizer` wraps a SentencePiece model: ids <-> pieces.
- :class:`Detokenizer` turns streamed ids into text. Ids 0 to 3 are special and print nothing; runs of byte pieces
  (``<0xF0>``...) are collected until they form a character; ``▁`` becomes a space.
- :class:`WordTracker` turns (frame, id) into words with a start and an end.

A stream's state is a few bytes and a few letters: it does not grow with time.
"""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import BOS_ID as BOS
from ..config import END_PAD_ID as EPAD
from ..config import EOS_ID as EOS
from ..config import PAD_ID as PAD
from ..errors import CheckpointError, StateError, TokenError
from ..state import State

__all__ = ["BOS", "EOS", "EPAD", "PAD", "SILENT_IDS", "Detokenizer", "TextTokenizer", "Word", "WordTracker"]

SILENT_IDS = frozenset({EPAD, BOS, EOS, PAD})
"""Ids that carry no text in any model of the family."""

FRAME_SECONDS = 0.08
SPACE = "▁"
_UTF8_PENDING = 3  # bytes of a character that is not whole yet


class TextTokenizer:
    """A SentencePiece model, read from a file or from bytes.

    Parameters
    ----------
    source : str, path or bytes
        The ``.model`` file's path, or its contents.

    Raises
    ------
    CheckpointError
        The file is missing, unreadable or not a SentencePiece model.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes) -> None:
        # Imported here so that `import moshi_mlx` stays light.
        from sentencepiece import SentencePieceProcessor

        if isinstance(source, bytes):
            name, contents = "the given bytes", source
        else:
            name = os.fspath(source)
            try:
                contents = Path(source).read_bytes()
            except OSError as error:
                raise CheckpointError(f"cannot read the text tokenizer {name}: {error.strerror}") from error
        self._model: Any = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(contents)
            size = int(self._model.GetPieceSize())
            # Cached, so that a token costs two list look-ups while a conversation runs.
            self._pieces: list[str] = [self._model.IdToPiece(i) for i in range(size)]
        except (RuntimeError, UnicodeDecodeError) as error:  # the second: a piece whose bytes were changed
            raise CheckpointError(
                f"{name} ({len(contents)} bytes) is not a SentencePiece model; download or copy it again"
            ) from error
        self._bytes: list[int | None] = [
            int(piece[3:5], 16) if self._model.IsByte(i) else None for i, piece in enumerate(self._pieces)
        ]
        self._silent = SILENT_IDS | {i for i in range(size) if self._model.IsControl(i)}

    @property
    def vocab_size(self) -> int:
        """Number of pieces; valid ids are 0 to ``vocab_size - 1``."""
        return len(self._pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without begin or end marks."""
        ids: list[int] = self._model.EncodeAsIds(text)
        return ids

    def decode(self, ids: Iterable[int], *, strip_leading_space: bool = True) -> str:
        """Text of a whole sequence of ids, as a :class:`Detokenizer` gives it, in one string."""
        stream = self.detokenizer(strip_leading_space=strip_leading_space)
        return "".join([*map(stream.step, ids), stream.flush()])

    def detokenizer(self, *, strip_leading_space: bool = True) -> Detokenizer:
        """A new stream over this tokenizer."""
        return Detokenizer(self, strip_leading_space=strip_leading_space)

    def piece(self, token: int) -> str:
        """The piece as the model writes it: ``▁hello``, ``<0x0A>``, ``<unk>``.

        Raises
        ------
        TokenError
            There is no such id.
        """
        return self._pieces[self._checked(token)]

    def byte(self, token: int) -> int | None:
        """The value of a byte piece, None for every other piece."""
        return self._bytes[self._checked(token)]

    def is_silent(self, token: int) -> bool:
        """True for ids that print nothing: 0 to 3 and the model's control symbols."""
        return self._checked(token) in self._silent

    def _checked(self, token: int) -> int:
        token = int(token)
        if not 0 <= token < len(self._pieces):
            raise TokenError(
                f"text token {token} is outside this tokenizer's {len(self._pieces)} pieces; "
                "the tokenizer and the model do not belong together, or an input-only id was passed"
            )
        return token


class Detokenizer:
    """Turns the ids of one stream, one at a time, into text.

    A character that a byte piece starts is held back until it is complete; a byte sequence that is not UTF-8 prints as
    U+FFFD. The joined text is the same however the stream is split, and :meth:`flush` gives the rest.

    Parameters
    ----------
    tokenizer : TextTokenizer
    strip_leading_space : bool
        Drop the space that the stream's first word brings with it.
    """

    def __init__(self, tokenizer: TextTokenizer, *, strip_leading_space: bool = True) -> None:
        self.tokenizer = tokenizer
        self.strip_leading_space = strip_leading_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = strip_leading_space

    def step(self, token: int) -> str:
        """The text that this token completes, often ``""``.

        Raises
        ------
        TokenError
            There is no such id.
        """
        if self.tokenizer.is_silent(token):
            return ""
        byte = self.tokenizer.byte(token)
        if byte is not None:
            return self._emit(self._utf8.decode(bytes([byte])))
        # A piece of letters ends a byte sequence, whole or not.
        return self._emit(self._utf8.decode(b"", final=True) + self.tokenizer.piece(token).replace(SPACE, " "))

    def flush(self) -> str:
        """End the stream: U+FFFD where a character was left unfinished. The next token starts a new stream."""
        text = self._emit(self._utf8.decode(b"", final=True))
        self.reset()
        return text

    def reset(self) -> None:
        """Forget everything: the next token starts a new stream."""
        self._utf8.reset()
        self._at_start = self.strip_leading_space

    @property
    def pending(self) -> bool:
        """True while a character made of byte pieces is incomplete."""
        return bool(self._utf8.getstate()[0])

    def snapshot(self) -> State:
        """The stream's state, one row; :meth:`restore` takes it back."""
        return {"pending": _padded(self._utf8.getstate()[0], _UTF8_PENDING), "at_start": _number(self._at_start)}

    def restore(self, snapshot: State) -> None:
        """Continue where :meth:`snapshot` was called, in this stream or another one over the same tokenizer.

        Raises
        ------
        StateError
            If it is no snapshot of a stream; the stream is unchanged then.
        """
        pending, at_start = _values(snapshot["pending"], 0, 255), _boolean(snapshot["at_start"])
        try:
            self._utf8.setstate((bytes(pending), 0))
        except (TypeError, ValueError) as error:
            raise StateError(f"the snapshot of a text is damaged: {error}") from error
        self._at_start = at_start

    def _emit(self, text: str) -> str:
        if text and self._at_start:
            self._at_start = False
            text = text.removeprefix(" ")
        return text


@dataclass(frozen=True)
class Word:
    """A word and when it was said: ``start`` and ``end`` in seconds from the stream's first frame."""

    text: str
    start: float
    end: float


class WordTracker:
    """Turns (frame, id) pairs of one stream into timed words.

    A word starts at the piece that brings a space (``▁``), or at the first piece after EPAD, which marks a word's start
    in languages without spaces. Its start is that piece's frame (for a character made of byte pieces: the first
    byte's frame). Punctuation and pieces without ``▁`` belong to the word before them.

    The end of a word is not in the stream: its pieces come one per frame, faster than they are spoken. So a word ends
    where the next one starts, and at most :attr:`TAIL_FRAMES` frames after its last piece; the last word before a pause
    therefore often ends a little late. A run without a space or a mark is cut after :attr:`MAX_LETTERS` letters, so
    that nothing grows with time.

    Parameters
    ----------
    tokenizer : TextTokenizer
    frame_seconds : float
        Length of a frame, 0.08 for every model of the family.
    """

    TAIL_FRAMES = 6
    MAX_LETTERS = 64

    def __init__(self, tokenizer: TextTokenizer, *, frame_seconds: float = FRAME_SECONDS) -> None:
        self.frame_seconds = frame_seconds
        self._stream = tokenizer.detokenizer(strip_leading_space=False)
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next pair starts a new stream."""
        self._stream.reset()
        self._text = ""  # the word so far; its first and last frame
        self._start = self._last = 0
        self._frame = -1  # the frame of the last pair
        self._hint: int | None = None  # where the word of the next letter began, if before the letter itself
        self._marked = False

    def snapshot(self) -> State:
        """The stream's state, one row; :meth:`restore` takes it back."""
        return {
            "stream": self._stream.snapshot(),
            "word": _padded(map(ord, self._text), self.MAX_LETTERS),
            "start": _number(self._start),
            "last": _number(self._last),
            "frame": _number(self._frame),
            "hint": _number(-1 if self._hint is None else self._hint),
            "marked": _number(self._marked),
        }

    def restore(self, snapshot: State) -> None:
        """Continue where :meth:`snapshot` was called, in this stream or another one over the same tokenizer.

        Raises
        ------
        StateError
            If it is no snapshot of a stream; the stream is unchanged then.
        """
        letters = _values(snapshot["word"], 0, sys.maxunicode)
        start, last, frame, hint = (_scalar(snapshot[name]) for name in ("start", "last", "frame", "hint"))
        if not (0 <= start and 0 <= last and -1 <= frame and -1 <= hint):
            raise StateError("the snapshot of a text is damaged: a frame is negative")
        marked = _boolean(snapshot["marked"])
        self._stream.restore(snapshot["stream"])
        self._text = "".join(map(chr, letters))
        self._start, self._last, self._frame = start, last, frame
        self._hint = None if hint < 0 else hint
        self._marked = marked

    def step(self, frame: int, token: int) -> list[Word]:
        """Words that this token ends: none or one, rarely more. Frames left out count as padding.

        Raises
        ------
        TokenError
            There is no such id, or ``frame`` does not come after the one before.
        """
        frame = int(frame)
        if frame <= self._frame:
            raise TokenError(f"frame {frame} comes after frame {self._frame}: frames must rise within a stream")
        silent = self._stream.tokenizer.is_silent(token)
        self._frame = frame
        words: list[Word] = []
        if self._text and frame > self._last + self.TAIL_FRAMES:
            self._close(frame, words)
        if silent:
            self._marked = self._marked or token == EPAD
            if not self._stream.pending:
                self._hint = None
            return words
        if self._marked:
            self._close(frame, words)
            self._marked = False
        text = self._stream.step(token)
        if self._hint is None:
            self._hint = frame
        self._take(text, words)
        return words

    def flush(self) -> list[Word]:
        """End the stream: the last word, if there is one. The next pair starts a new stream."""
        words: list[Word] = []
        self._take(self._stream.flush(), words)
        self._close(self._frame + 1 + self.TAIL_FRAMES, words)
        self.reset()
        return words

    def _take(self, text: str, words: list[Word]) -> None:
        """Add decoded letters to the current word; a space ends it."""
        for letter in text:
            if letter.isspace():
                self._close(self._frame, words)
                self._hint = self._frame
                continue
            if not self._text:
                self._start = self._frame if self._hint is None else self._hint
            self._text += letter
            self._last = self._frame
            if len(self._text) == self.MAX_LETTERS:
                self._close(self._frame + 1, words)
        if self._text and not self._stream.pending:
            self._hint = None

    def _close(self, frame: int, words: list[Word]) -> None:
        """End the current word, if there is one, at ``frame`` or at the end of its tail."""
        if self._text:
            end = min(frame, self._last + 1 + self.TAIL_FRAMES)
            words.append(Word(self._text, self._seconds(self._start), self._seconds(end)))
        self._text = ""
        self._hint = None

    def _seconds(self, frame: int) -> float:
        return round(frame * self.frame_seconds, 6)


def _padded(values: Iterable[int], length: int) -> NDArray[np.int32]:
    """``values`` as one row [1, length], -1 behind them."""
    row = np.full((1, length), -1, np.int32)
    given = list(values)
    row[0, : len(given)] = given
    return row


def _number(value: int) -> NDArray[np.int32]:
    return np.array([value], np.int32)


def _values(row: Any, lowest: int, highest: int) -> list[int]:
    """What :func:`_padded` was given."""
    values = np.asarray(row).reshape(-1)
    count = int((values >= 0).sum())
    if (values[count:] != -1).any() or ((values[:count] < lowest) | (values[:count] > highest)).any():
        raise StateError("the snapshot of a text is damaged: it holds invalid characters")
    return [int(value) for value in values[:count]]


def _scalar(leaf: Any) -> int:
    value = np.asarray(leaf)
    if value.shape != (1,):
        raise StateError(f"the snapshot of a text is one row, found shape {list(value.shape)}")
    return int(value[0])


def _boolean(leaf: Any) -> bool:
    value = _scalar(leaf)
    if value not in (0, 1):
        raise StateError(f"the snapshot of a text is damaged: {value} is neither true nor false")
    return bool(value)
