"""The synthesizers and the shards made with them; skipped where flite and espeak-ng are not installed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from moshi_mlx_training.codec import data
from moshi_mlx_training.speech import dialogues
from moshi_mlx_training.speech.synthesis import (
    ANSWERING_VOICE,
    HELD_OUT,
    LABEL_RATE,
    PHONE_INDEX,
    SpeechUnavailable,
    load_library,
    say,
    word_starts,
)

try:
    say("Hello.")
    say("Hello.", "espeak/f1")
    missing = ""
except SpeechUnavailable as error:
    missing = str(error)
speaks = pytest.mark.skipif(bool(missing), reason=missing or "synthesizers found")


def test_missing_library_is_explained() -> None:
    """If this fails, a machine without synthesizers gets a traceback instead of the way to install them."""
    with pytest.raises(SpeechUnavailable, match=r"nosuchspeech.*install"):
        load_library("nosuchspeech")


@speaks
def test_answering_voice_repeats() -> None:
    """If this fails, the same answer has different codes at every rendering, and the model must guess which."""
    first = say("It is nice to meet you.")
    say("Something else in between.", "flite/awb", np.random.default_rng(0))
    again = say("It is nice to meet you.")
    assert np.array_equal(first.pcm, again.pcm)
    assert first.phones == again.phones and first.words == again.words


@speaks
@pytest.mark.parametrize("voice", [ANSWERING_VOICE, "flite/kal16", "espeak/f2", *HELD_OUT])
def test_times_lie_inside_the_sound(voice: str) -> None:
    """If this fails, phone labels and word starts do not belong to the sound."""
    spoken = say("My name is Moshi, and I can listen.", voice, np.random.default_rng(1))
    seconds = len(spoken.pcm) / 24000
    ends = [end for _, end in spoken.phones]
    last = max(end for name, end in spoken.phones if name != "pau")  # one voice cuts its last pause short
    assert ends == sorted(ends) and seconds - 0.4 < last < seconds
    assert np.abs(spoken.pcm[int((last + 0.1) * 24000) :]).max(initial=0) < 0.02 < np.abs(spoken.pcm).max()
    starts = [start for _, start in spoken.words]
    assert len(starts) == 8 and starts == sorted(starts) and 0 <= starts[0] and starts[-1] < seconds
    level = 10 * np.log10(np.mean(spoken.pcm**2))
    assert -24 < level < -22
    names = [name for name, _ in spoken.phones]
    for sound in ("m", "n", "sh", "k", "l", "s"):
        assert sound in names, (voice, sound)
    shifted = spoken.labels(200, offset=1.0)
    assert not shifted[: LABEL_RATE - 1].any() and shifted.any()
    assert PHONE_INDEX["sh"] in shifted


def test_every_word_has_one_start() -> None:
    """If this fails, a word that espeak-ng says together with its neighbour is taught nowhere, or as another one."""
    text = "So, what's the color of an elephant?"
    # One event for "of an"; characters and seconds as espeak-ng gives them.
    events = [(0, 0.0), (4, 0.6), (11, 0.9), (15, 1.1), (21, 1.4), (27, 1.7)]
    assert word_starts(text, events, 2.4) == pytest.approx([0.0, 0.6, 0.9, 1.1, 1.4, 1.55, 1.7])
    # Two events in the first word of a pair, as for "it is" at the end of a sentence.
    assert word_starts("What time it is?", [(0, 0.1), (5, 0.3), (10, 0.6), (11, 0.8)], 1.0) == [0.1, 0.3, 0.6, 0.8]
    assert word_starts("One two three", [(0, 0.0)], 1.1) == pytest.approx([0.0, 0.3, 0.6])
    assert word_starts("Hello.", [], 0.5) == [0.0]


@speaks
@pytest.mark.parametrize("voice", [ANSWERING_VOICE, "espeak/m2"])
def test_words_are_those_of_the_text(voice: str) -> None:
    """If this fails, what was said before changes when words are said to start, or a word is taught nowhere."""
    rng = random.Random(0)
    texts = [
        "What's the color of an elephant?",
        "I'd like to know what time it is.",
        "In the garden, at the end of it.",
    ]
    texts += [dialogues.ask(dialogues.pick(rng), rng) for _ in range(40)]
    for text in texts:
        spoken = say(text, voice, np.random.default_rng(2))
        assert [word.lower() for word, _ in spoken.words] == dialogues.words(text)
        starts = [start for _, start in spoken.words]
        assert starts == sorted(starts) and starts[-1] < len(spoken.pcm) / 24000


@speaks
def test_unknown_voice_is_explained() -> None:
    """If this fails, a misspelt voice speaks in another one."""
    for voice in ("flite/nobody", "espeak/nobody", "other/slt"):
        with pytest.raises(SpeechUnavailable):
            say("Hello.", voice)


@speaks
def test_shards_depend_on_their_number_alone(tmp_path: Path) -> None:
    """If this fails, a corpus cannot be made again, or grows differently when made in two goes."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for kind in data.KINDS:
            data.make_shard(tmp_path / folder, kind, 1, minutes=0.1)
    for kind in data.KINDS:
        first, second = ((tmp_path / folder / f"{kind}-0001.pcm").read_bytes() for folder in ("a", "b"))
        if kind == "answer":
            assert first == second
        # espeak-ng carries a few samples from one sentence into the next: alike, not equal
        assert abs(len(first) - len(second)) < 0.01 * len(first) and len(first) > 2 * 24000 * 5
        labels = (tmp_path / "a" / f"{kind}-0001.lab").read_bytes()
        assert len(labels) * 960 * 2 == len(first)
        assert len(set(labels)) > 10


@speaks
def test_batches(tmp_path: Path) -> None:
    """If this fails, the codec hears something other than the labels and the target say."""
    for kind in data.KINDS:
        data.make_shard(tmp_path, kind, 0, minutes=0.2)
    corpus = data.Corpus(tmp_path)
    heard, target, labels = corpus.batch(8, 6, np.random.default_rng(0))
    again = corpus.batch(8, 6, np.random.default_rng(0))
    assert heard.shape == target.shape == (8, 6 * 1920) and labels.shape == (8, 6, 2)
    assert np.array_equal(heard, again[0]) and np.array_equal(labels, again[2])
    assert heard.dtype == np.float32 and np.isfinite(heard).all() and np.abs(heard).max() <= 1.0
    changed = [not np.array_equal(h, t) for h, t in zip(heard, target)]
    assert not any(changed[:3])  # the answering voice comes first, and clean
    loud = np.abs(target.reshape(8, 12, 960)).max(-1) > 0.02
    assert (labels.reshape(8, 12)[loud] > 0).mean() > 0.8  # sound where a phone is


def test_empty_corpus_names_the_command(tmp_path: Path) -> None:
    """If this fails, training without data ends in an index error."""
    with pytest.raises(FileNotFoundError, match=r"moshi_mlx_training\.codec\.data"):
        data.Corpus(tmp_path)


def test_no_held_out_speaker_is_planned() -> None:
    """If this fails, a held-out speaker is in the shards."""
    rng = random.Random(0)
    voices = {data.utterance_plan(kind, rng)[0] for kind in data.KINDS for _ in range(3000)}
    assert not voices & set(HELD_OUT)
    assert ANSWERING_VOICE in voices and len(voices) > 40
    assert all(data.utterance_plan("answer", rng)[0] == ANSWERING_VOICE for _ in range(50))
    assert dialogues.answers()
