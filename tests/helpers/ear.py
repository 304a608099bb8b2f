"""An ear for the built-in model's voice: which of its answers was said, by pocketsphinx with a grammar of all of them.

The judge of the training, without what only the training installs: no synthesizer, another resampler.
"""

from __future__ import annotations

import numpy as np
import soxr
from moshi_mlx_training.speech.dialogues import answers
from moshi_mlx_training.speech.recogniser import RATE, Recogniser
from moshi_mlx_training.speech.recogniser import normal as same
from numpy.typing import NDArray

__all__ = ["Ear", "phrases", "same", "unavailable", "without_gaps"]

_OWN = {"moshi": "M OW SH IY"}  # what its dictionary does not have


def unavailable() -> str:
    """Why nothing can be recognised; empty if it can."""
    try:
        import pocketsphinx  # noqa: F401
    except ImportError:
        return "the package pocketsphinx is not installed"
    return ""


class Ear:
    """Hears which answer was said, or none."""

    def __init__(self) -> None:
        self._judge = Recogniser(answers(), _OWN)

    def hear(self, pcm: NDArray[np.float32], rate: int) -> str:
        """The answer in pcm [samples], as :func:`same` writes it; an empty string if there is none."""
        return self._judge.hear_resampled(soxr.resample(pcm, rate, RATE))


def without_gaps(pcm: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """The sound without what a player puts in where nothing has come: samples that are exactly 0, for 10 ms or more."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], pcm == 0, [0]]).astype(np.int8)))
    keep = np.ones(len(pcm), bool)
    for start, end in edges.reshape(-1, 2):
        if end - start >= rate // 100:
            keep[start:end] = False
    return pcm[keep]


def phrases(pcm: NDArray[np.float32], rate: int, pause: float = 0.5) -> list[NDArray[np.float32]]:
    """What is said between pauses, each with a tenth of a second around it."""
    block = rate // 50
    loud = np.abs(pcm[: len(pcm) // block * block]).reshape(-1, block).max(1) > 0.02
    found: list[list[int]] = []
    for index in np.flatnonzero(loud):
        if found and (index - found[-1][1]) * block < pause * rate:
            found[-1][1] = index
        else:
            found.append([index, index])
    return [pcm[max(0, (start - 5) * block) : (end + 6) * block] for start, end in found if end - start >= 10]
