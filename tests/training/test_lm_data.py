"""Spoken questions and answers as they are laid out before they are encoded. Needs the synthesizers."""

from __future__ import annotations

import random

import numpy as np
import pytest
from moshi_mlx_training.lm import data as lm_data
from moshi_mlx_training.lm.data import AFTER, BEFORE, FRAME, answer_clip, question_clip, split_flat, through_room
from moshi_mlx_training.speech import dialogues
from moshi_mlx_training.speech.recipe import UNKNOWN
from moshi_mlx_training.speech.synthesis import HELD_OUT, TRAINING, SpeechUnavailable, say


@pytest.fixture(scope="module", autouse=True)
def synthesizers() -> None:
    try:
        say("Hello.")
        say("Hello.", "espeak/f1")
    except SpeechUnavailable as reason:
        pytest.skip(str(reason))


def loud_frames(pcm: np.ndarray) -> np.ndarray:
    frames = np.abs(pcm.astype(np.float32) / 32768).reshape(-1, FRAME).max(axis=1)
    return np.flatnonzero(frames > 0.3 * frames.max())


def test_a_question_lies_where_its_label_says() -> None:
    """If this fails, the model is taught to answer before or long after the end of a question."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    for _ in range(12):
        clip = question_clip("train", rng, noise)
        loud = loud_frames(clip["pcm"])
        assert BEFORE <= loud[0] and loud[-1] < clip["end"]
        assert len(clip["pcm"]) == (clip["end"] + AFTER) * FRAME
        assert all(BEFORE <= frame <= clip["end"] for frame, _ in clip["words"])
        spoken = np.flatnonzero(clip["phones"].reshape(-1, 2).any(1))
        assert len(clip["phones"]) == 2 * len(clip["pcm"]) // FRAME
        assert BEFORE - 1 <= spoken[0] <= loud[0] + 1 and loud[-1] - 1 <= spoken[-1] <= clip["end"]
        if clip["exchange"] != UNKNOWN:
            known = lm_data.heard_words()
            wanted = [known.get(word, lm_data.OTHER_WORD) for word in dialogues.words(clip["text"])]
            assert [word for _, word in clip["words"]] == wanted


def test_speakers_stay_in_their_sets() -> None:
    """If this fails, held-out speakers are heard in training, or known ones pass for held-out."""
    voices = (*TRAINING, *HELD_OUT)
    rng, noise = random.Random(1), np.random.default_rng(1)
    heard = {
        split: {voices[question_clip(split, rng, noise)["voice"]] for _ in range(25)} for split in ("train", "held")
    }
    assert not heard["train"] & set(HELD_OUT)
    assert heard["held"] <= set(HELD_OUT) and len(heard["held"]) > 1


def test_an_answer_begins_with_sound() -> None:
    """If this fails, the pause before an answer, as codes, tells the answer before it is said."""
    for text in ("The capital of France is Paris.", "Meow."):
        pcm, frames, starts = answer_clip(text)
        loud = np.abs(pcm[lm_data.ANSWER_BEFORE * FRAME :].astype(np.float32) / 32768) > 0.01
        assert np.flatnonzero(loud)[0] == 240
        assert not pcm[: lm_data.ANSWER_BEFORE * FRAME].any()
        assert not loud[frames * FRAME :].any()
        assert len(starts) == len(text.split()) and starts[0] < 0.02
        assert starts == sorted(starts) and starts[-1] < frames * FRAME / 24000


def test_rooms_differ_and_some_are_digital_silence() -> None:
    """If this fails, the model has only heard one kind of silence and speaks into the others."""
    silence = np.zeros(FRAME * 10, np.float32)
    levels = [
        float(np.abs(through_room(silence, room, np.random.default_rng(0))).max()) for room in range(lm_data.ROOMS)
    ]
    assert levels[: lm_data.DEAD_ROOMS] == [0] * lm_data.DEAD_ROOMS
    assert len(set(levels)) == lm_data.ROOMS - lm_data.DEAD_ROOMS + 1
    assert max(levels) < 0.2


def test_a_set_repeats_exactly(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """If this fails, a run that was stopped while speaking is another data set."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        assert lm_data.speak_set(tmp_path / folder, "train-0003", 3)
        assert not lm_data.speak_set(tmp_path / folder, "train-0003", 3)
    one, two = (np.load(tmp_path / folder / "train-0003.pcm.npz") for folder in ("a", "b"))
    assert set(one.files) == set(two.files)
    # espeak-ng's flutter goes on from where the last sentence left it: the same words, a slightly other throat, and
    # times a few samples apart.
    for name in set(one.files) - {"data", "words", "phones", "starts"}:
        np.testing.assert_array_equal(one[name], two[name], name)
    np.testing.assert_array_equal(one["words"][:, 1], two["words"][:, 1])
    np.testing.assert_allclose(one["words"][:, 0], two["words"][:, 0], atol=1)
    np.testing.assert_allclose(one["starts"], two["starts"], atol=0.01)
    assert np.mean(one["phones"] == two["phones"]) > 0.8
    loud = [np.square(set_["data"].reshape(-1, FRAME // 2).astype(float)).mean(1) ** 0.5 for set_ in (one, two)]
    assert np.corrcoef(loud)[0, 1] > 0.9  # waves a few samples apart have nothing in common, but how loud they are
    assert [len(clip) % FRAME for clip in split_flat(one["data"], one["count"])] == [0, 0, 0]
