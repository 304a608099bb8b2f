"""The long conversation that judges a model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from moshi_mlx_training.lm import unattended
from moshi_mlx_training.lm.data import FRAME
from moshi_mlx_training.speech.synthesis import SpeechUnavailable

import moshi_mlx


def spoken(count: int) -> list[tuple[str, str, np.ndarray]]:
    try:
        return list(itertools.islice(unattended.questions(0), count))
    except SpeechUnavailable as error:
        pytest.skip(str(error))


def test_questions_leave_time_for_the_answer() -> None:
    """If this fails, a right answer is counted for the next question, or a frame is lost at a seam."""
    for _, answer, pcm in spoken(3):
        assert answer and len(pcm) % FRAME == 0 and len(pcm) > unattended.ANSWERED * FRAME
        assert np.isfinite(pcm).all() and np.abs(pcm).max() <= 1


def test_answers_are_counted() -> None:
    """If this fails, half an hour of talk is judged by something else than the words of its answers."""
    spoken(1)
    with moshi_mlx.load("small").session(seed=0) as session:
        found = unattended.talk(session, 0.5, seed=0)
    assert sum(found["count"]) >= 3 and found["minutes"] >= 0.5
    # The model in the package is right nearly always; a judge that compares the wrong things never is.
    assert sum(share * count for share, count in zip(found["right"], found["count"], strict=True) if count) >= 2
