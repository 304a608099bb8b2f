"""Other words for the same questions, and which of them are never taught: pure Python, needs no synthesizer."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from moshi_mlx_training.lm.data import taught
from moshi_mlx_training.speech import dialogues, wordings

FOLDER = Path(__file__).resolve().parents[2] / "training"


def exchange(answer: str) -> dialogues.Exchange:
    return next(e for e in dialogues.exchanges() if e.answer == answer)


def test_wordings_repeat_exactly() -> None:
    """If this fails, a data set cannot be made again, or its two halves made by two processes differ."""
    code = (
        "import hashlib, random; from moshi_mlx_training.speech import dialogues as d, wordings as w;"
        "r = random.Random(1);"
        "made = [w.wordings(e) for e in d.exchanges()], [w.ask(d.pick(r), r, r.random() < .5) for _ in range(300)],"
        "[w.unknown(r, r.random() < .5) for _ in range(300)], [w.ask_two(r) for _ in range(50)], w.all_words();"
        "print(hashlib.sha256(repr(made).encode()).hexdigest())"
    )
    command = [sys.executable, "-c", code]
    first, second = (
        subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    )
    assert first.stdout == second.stdout and len(first.stdout.strip()) == 64


def test_every_question_has_many_wordings() -> None:
    """If this fails, some question is known in too few words, or nothing is left to judge it by."""
    taught_counts = [len(wordings.wordings(e)) for e in dialogues.exchanges()]
    held_counts = [len(wordings.held_out_wordings(e)) for e in dialogues.exchanges()]
    assert min(taught_counts) >= 22 and sum(taught_counts) > 17_000
    assert min(held_counts) >= 13 and sum(held_counts) > 10_000
    for one in dialogues.exchanges():
        for text in (*wordings.wordings(one), *wordings.held_out_wordings(one)):
            assert re.fullmatch(r"[A-Z][A-Za-z',:. ]*[a-z][.?]", text), text


def test_one_wording_has_one_answer() -> None:
    """If this fails, the model is taught two answers to the same words."""
    answers: dict[str, str] = {}
    for one in dialogues.exchanges():
        for text in (*wordings.wordings(one), *wordings.held_out_wordings(one)):
            assert answers.setdefault(wordings.normal(text), one.answer) == one.answer, text


def test_what_was_taught_before_still_is() -> None:
    """If this fails, the second edition forgets wordings of the first, or data made for the first cannot be read."""
    assert taught() == 1483077282
    for one in dialogues.exchanges():
        known = {wordings.normal(text) for text in wordings.wordings(one)}
        assert {q for q in one.questions if wordings.normal(q) not in known} <= {"Name the seasons."}


def test_nothing_of_a_held_out_pattern_is_taught() -> None:
    """If this fails, figures for wordings that were never taught are figures for taught ones."""
    rng, made = random.Random(0), []
    for _ in range(6000):
        made.append(wordings.ask(dialogues.pick(rng), rng))
        made.append(wordings.unknown(rng))
        made.append(wordings.ask_two(rng)[0])
    assert not [text for text in made if wordings.held_out(text)]
    patterns = {wordings.pattern(wordings.ask(dialogues.pick(rng), rng, held=True)) for _ in range(3000)}
    assert None not in patterns and len(patterns) >= 12
    assert patterns | {r"^listen\b", r"\band also\b"} == set(wordings.HELD_OUT)  # these two are never a wording's own
    assert all(wordings.held_out(wordings.ask_two(rng, held=True)[0]) for _ in range(50))
    # Patterns are read without punctuation and with short forms.
    for text in ("Name the capital of Italy.", "What noise does a dog make?", "I'd like to know your name."):
        assert wordings.held_out(text)
    assert not wordings.held_out("What is your name?")


def test_people_s_short_forms_are_taught() -> None:
    """If this fails, "What's the capital of Japan?" is a wording that the model never heard."""
    japan, name = exchange("The capital of Japan is Tokyo."), exchange("My name is Moshi.")
    assert {"What's the capital of Japan?", "Tell me what the capital of Japan is."} <= set(wordings.wordings(japan))
    assert "What's your name?" in wordings.wordings(name) and "Who are you?" in wordings.wordings(name)
    assert "Name the capital of Japan." in wordings.held_out_wordings(japan)
    assert "I'm sad." in wordings.wordings(exchange("I am sorry to hear that."))
    assert wordings.contracted("Tell me what the color of snow is.") == "Tell me what the color of snow is."
    assert wordings.contracted("Could you tell me who you are?") == "Could you tell me who you are?"
    rng = random.Random(0)
    made = [wordings.ask(dialogues.pick(rng), rng) for _ in range(2000)]
    assert sum("'s " in text or "I'm " in text for text in made) > 280
    for sign in ("um,", "please?", "Hey Moshi, ", "Excuse me, "):
        assert sum(sign in text for text in made) > 10, sign
    assert sum(bool(re.match(r"([a-z' ]+), \1 ", text.lower())) for text in made) > 10  # begun twice


def test_asking_keeps_the_question() -> None:
    """If this fails, a filler, a lead-in or a false start changes what is asked."""
    rng = random.Random(5)
    for one in dialogues.exchanges():
        known = [dialogues.words(text) for text in wordings.wordings(one)]
        for _ in range(8):
            text = wordings.ask(one, rng)
            rest = [word for word in dialogues.words(text) if word not in ("um", "uh", "er")]
            if rest[-1] == "please" and rest not in known:
                rest = rest[:-1]
            assert any(rest[-len(asked) :] == asked for asked in known), text


def test_two_questions_keep_their_order() -> None:
    """If this fails, the second question is answered first."""
    rng = random.Random(1)
    for _ in range(300):
        text, first, second = wordings.ask_two(rng, held=rng.random() < 0.5)
        spoken, (one, other) = wordings.normal(text), (dialogues.exchanges()[i] for i in (first, second))
        assert one != other and text.endswith("?")
        assert any(spoken.startswith(wordings.normal(asked) + " ") for asked in wordings.wordings(one))
        assert any(spoken.endswith(" " + wordings.normal(asked)) for asked in wordings.wordings(other))


def test_what_is_none_of_the_questions() -> None:
    """If this fails, the model is taught not to understand its own questions, or judged by what it was taught."""
    rng = random.Random(2)
    known = {
        wordings.normal(t)
        for e in dialogues.exchanges()
        for t in (*wordings.wordings(e), *wordings.held_out_wordings(e))
    }
    taught_ones, held = ([wordings.unknown(rng, held) for _ in range(4000)] for held in (False, True))
    assert not {wordings.normal(text) for text in (*taught_ones, *held)} & known
    assert len(set(taught_ones)) > 2500
    for name in ("Finland", "wolf say", "moon is", "Why did you buy", "Somebody left"):
        assert any(name in text for text in held) and not any(name in text for text in taught_ones), name
    for near in ("the capital of Brazil", "a horse say", "seventy", "Say the word"):
        assert any(near in text for text in taught_ones), near


@pytest.mark.parametrize(
    "text, allowed",
    [
        ("What is the capital of France?", [1, 2, 3, 4, 5]),
        ("Hello there Moshi.", []),
        ("Hello, um, Moshi.", []),
        ("What is water made of?", [1, 2, 4]),  # "What is water?" is a question
        ("Okay, what is water made of?", [1, 2, 3, 5]),
        ("I am not well.", [1, 2, 3]),
    ],
)
def test_pauses_come_where_nothing_has_been_asked(text: str, allowed: list[int]) -> None:
    """If this fails, the model is taught not to answer what was asked, because more might come."""
    assert list(wordings.pauses(text)) == allowed


def test_heard_words_are_few() -> None:
    """If this fails, the head that teaches listening has outgrown the model."""
    assert 250 < len(wordings.all_words()) < 400
    assert {"what's", "um", "please"} <= set(wordings.all_words()) and "noise" not in wordings.all_words()
