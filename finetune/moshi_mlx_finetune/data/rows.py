"""The text stream of a recording: one token a frame, as moshi-finetune's ``Interleaver`` writes it.

Every word is tokenized on its own and begins in the frame of its start; EPAD stands in the frame before it if nothing
is written there. A word that begins before the last one is written out cuts it off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.config import END_PAD_ID, PAD_ID, ZERO_TOKEN

__all__ = ["FRAME_RATE", "TimedWord", "cut_words", "frames_in", "masked_tail", "text_row"]

Ints = NDArray[np.int32]

FRAME_RATE = 12.5
"""Frames a second."""


@dataclass(frozen=True)
class TimedWord:
    """A word and when it is said, in seconds."""

    text: str
    start: float
    end: float


def frames_in(seconds: float) -> int:
    """Frames of a piece, the last one perhaps not full."""
    return math.ceil(seconds * FRAME_RATE)


def cut_words(words: Sequence[TimedWord], start: float, seconds: float, ahead: float = 0.0) -> list[TimedWord]:
    """The words that begin in a piece, by its own clock; those without a positive length are left out.

    Parameters
    ----------
    words : sequence of TimedWord
    start, seconds : float
        Begin and length of the piece.
    ahead : float
        Seconds by which the text comes before the sound (``audio_delay`` in moshi-finetune).
    """
    inside = [word for word in sorted(words, key=lambda word: word.start) if start <= word.start < start + seconds]
    moved = [TimedWord(word.text, word.start - start, word.end - start) for word in inside]
    timed = [word for word in moved if word.start < word.end]
    if ahead == 0:
        return timed
    return [TimedWord(word.text, word.start - ahead, word.end - ahead) for word in timed if word.end > ahead]


def text_row(
    words: Sequence[TimedWord],
    frames: int,
    encode: Callable[[str], list[int]],
    *,
    pad: int = PAD_ID,
    end_pad: int = END_PAD_ID,
) -> Ints:
    """Text tokens of a piece.

    Parameters
    ----------
    words : sequence of TimedWord
        From :func:`cut_words`.
    frames : int
    encode : callable
        A word's token ids, without begin and end marks.
    pad, end_pad : int
        Tokens PAD and EPAD.

    Returns
    -------
    array [frames], int32
    """
    row = np.full(frames, pad, np.int32)
    starts = [max(0, math.floor(word.start * FRAME_RATE)) for word in words]
    for place, (word, frame) in enumerate(zip(words, starts, strict=True)):
        until = starts[place + 1] if place + 1 < len(starts) else frames
        ids = encode(" ".join(word.text.split()))[: max(0, min(until, frames) - frame)]
        if not ids:
            continue
        if frame > 0 and row[frame - 1] == pad:
            row[frame - 1] = end_pad
        row[frame : frame + len(ids)] = ids
    return row


def masked_tail(tokens: Ints, frames: int) -> Ints:
    """Streams [streams, n] of a piece that ends early, with -1 up to ``frames``: nothing there is learnt.

    moshi-finetune gives the number of frames of a short piece to a function that takes seconds, so its text row has its
    full length, and the model learns to be silent where there is no recording.
    """
    missing = frames - tokens.shape[1]
    return np.pad(tokens, ((0, 0), (0, missing)), constant_values=ZERO_TOKEN).astype(np.int32)
