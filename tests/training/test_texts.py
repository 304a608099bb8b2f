"""What is asked, answered and read aloud in training: pure Python, needs no synthesizer."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from moshi_mlx_training.codec import data
from moshi_mlx_training.speech import dialogues, sentences
from moshi_mlx_training.speech.synthesis import ANSWERING_VOICE, HELD_OUT, TRAINING, espeak_phone

FOLDER = Path(__file__).resolve().parents[2] / "training"


def test_exchanges_repeat_exactly() -> None:
    """If this fails, an index stored with encoded speech names another exchange in the next process."""
    code = (
        "import hashlib; from moshi_mlx_training.speech import dialogues as d;"
        "print(hashlib.sha256(repr(d.exchanges()).encode()).hexdigest())"
    )
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=FOLDER,
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    )
    assert first == second and len(first.strip()) == 64


def test_one_question_has_one_answer() -> None:
    """If this fails, the model is taught two answers to the same words."""
    answers: dict[tuple[str, ...], str] = {}
    for exchange in dialogues.exchanges():
        assert len(set(exchange.questions)) == len(exchange.questions) >= 2, exchange
        for question in exchange.questions:
            key = tuple(dialogues.words(question))
            assert answers.setdefault(key, exchange.answer) == exchange.answer, question


def test_size_of_the_answers_vocabulary() -> None:
    """If this fails, the built-in model's domain has outgrown what its size was chosen for."""
    vocabulary = {word for answer in dialogues.answers() for word in dialogues.words(answer)}
    assert 250 <= len(vocabulary) <= 330
    assert dialogues.NOT_UNDERSTOOD in dialogues.answers()


def test_sums_are_right() -> None:
    """If this fails, the model is taught wrong sums."""
    value = {name: index for index, name in enumerate(dialogues.NUMBERS)}
    sums = [e for e in dialogues.exchanges() if e.topic == "sums"]
    assert len(sums) > 150
    for exchange in sums:
        a, word, b, is_, c = dialogues.words(exchange.answer)
        assert is_ == "is"
        expected = {"plus": value[a] + value[b], "minus": value[a] - value[b], "times": value[a] * value[b]}[word]
        assert value[c] == expected


def test_every_topic_is_picked() -> None:
    """If this fails, some answers are never taught, or one topic drowns the others."""
    rng = random.Random(3)
    picked = [dialogues.pick(rng).topic for _ in range(4000)]
    topics = {e.topic for e in dialogues.exchanges()}
    assert set(picked) == topics
    assert max(picked.count(topic) for topic in topics) < 0.25 * len(picked)


def test_asking_keeps_the_question() -> None:
    """If this fails, a lead-in changes what is asked."""
    rng = random.Random(5)
    asked = set()
    for exchange in dialogues.exchanges():
        question = dialogues.ask(exchange, rng)
        asked.add(question)
        assert any(question.lower().endswith(q.lower()) for q in exchange.questions)
    assert any(question not in dialogues.questions() for question in asked)


def test_sentences_vary_and_repeat() -> None:
    """If this fails, the codec hears the same few sentences, or a corpus cannot be made again."""
    made = [sentences.sentence(random.Random(seed)) for seed in range(3000)]
    assert made == [sentences.sentence(random.Random(seed)) for seed in range(3000)]
    assert len(set(made)) > 2950
    assert all(text[0].isupper() and text[-1] in ".?" and text.isascii() for text in made)
    assert len({word for text in made for word in dialogues.words(text)}) > 1500


def test_held_out_speakers_are_held_out() -> None:
    """If this fails, figures for unseen speakers are figures for seen ones."""
    assert not set(HELD_OUT) & set(TRAINING)
    assert ANSWERING_VOICE in TRAINING
    assert len(set(TRAINING)) == len(TRAINING)
    assert "flite/awb_time" not in TRAINING  # says the time only


def test_espeak_phones() -> None:
    """If this fails, phone labels of espeak-ng's speech are wrong and the semantic codebook learns them."""
    assert [espeak_phone(name) for name in ("eI", "'i:", "tS", "r-", "aI@", "_:", "O@")] == [
        "ey", "iy", "ch", "r", "ay", "pau", "ao",
    ]  # fmt: skip


def test_users_speak_with_both_synthesizers() -> None:
    """If this fails, the codec hears hardly any of one synthesizer's voices, and people sound like neither."""
    rng = random.Random(0)
    voices = [data.utterance_plan("user", rng)[0] for _ in range(2_000)]
    assert 0.3 < sum(voice.startswith("flite/") for voice in voices) / len(voices) < 0.4
    assert len(set(voices)) > 40
