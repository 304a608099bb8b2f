"""The user's side of a piece as others might have said it: little data then teaches words rather than one recording.

What is learnt, the model's text and voice, stays as it was.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.config import LmConfig

from .pieces import Piece

__all__ = ["varied"]

Ints = NDArray[np.int32]
WARPED = 0.08  # share of the frames that are left out or doubled
SEMANTIC_SPOILED, ACOUSTIC_SPOILED = 0.06, 0.3  # at most, shares of codes that are another one
BEFORE, AFTER = 3, 12  # frames around a word's text in which its sound may be


def varied(piece: Piece, config: LmConfig, rng: np.random.Generator) -> Piece:
    """A piece with the user's speech a little faster here and slower there, and less of the speaker in it.

    Parameters
    ----------
    piece : Piece
    config : LmConfig
        Which streams are the user's.
    rng : numpy.random.Generator
    """
    tokens = _stretched(piece.tokens, config, rng)
    user = tokens[1 + config.own_q :]
    known = user >= 0
    chance = np.full((len(user), 1), ACOUSTIC_SPOILED * rng.random())
    chance[0] = SEMANTIC_SPOILED * rng.random()
    other = rng.random(user.shape) < chance
    if rng.random() < 0.5 and len(user) > 1:  # the first book has the words, the others the speaker
        first = 1 if rng.random() < 0.6 else int(rng.integers(1, len(user)))
        begin, end = (0, user.shape[1]) if rng.random() < 0.5 else np.sort(rng.integers(0, user.shape[1] + 1, 2))
        other[first:, begin:end] = True
    user[:] = np.where(other & known, rng.integers(0, config.card, user.shape), user)
    return replace(piece, tokens=tokens)


def _stretched(tokens: Ints, config: LmConfig, rng: np.random.Generator) -> Ints:
    """Frames in which the model is silent, left out or doubled; the length stays."""
    frames = tokens.shape[1]
    silent = (config.existing_text_padding_id, config.existing_text_end_padding_id, -1)
    free = np.ones(frames, bool)
    for at in np.flatnonzero(~np.isin(tokens[0], silent)):
        free[max(0, at - BEFORE) : at + AFTER] = False
    times = np.where(free, rng.choice(3, frames, p=(WARPED / 2, 1 - WARPED, WARPED / 2)), 1)
    out = np.full_like(tokens, -1)
    made = np.repeat(tokens, times, axis=1)[:, :frames]
    out[:, : made.shape[1]] = made
    return out
