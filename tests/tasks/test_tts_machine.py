"""The state machine of text-to-speech against traces of Kyutai's own, and texts into words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moshi_mlx.errors import TextError
from moshi_mlx.tasks.tts_machine import Entry, Machine
from moshi_mlx.tasks.tts_script import LONGEST_BREAK, LONGEST_WORD, Script, without_markup

GOLDEN = Path(__file__).parents[1] / "golden" / "tts"


class Counted:
    """Three letters for a token, with ids from 10 upward in the order in which they are asked for."""

    def __init__(self) -> None:
        self.next = 10

    def encode(self, word: str) -> list[int]:
        count = -(-len(word) // 3)
        self.next += count
        return list(range(self.next - count, self.next))


class Letters:
    """As in tests/golden/make_tts.py."""

    def encode(self, word: str) -> list[int]:
        return [4 + sum(map(ord, word[at : at + 3])) % 36 for at in range(0, len(word), 3)]


def make_script(tokenizer: Any, **options: Any) -> Script:
    return Script(tokenizer, 12.5, **options)


def trace(turns: str | list[str], predicted: int, steps: int, ahead: int = 2) -> tuple[list[int], Machine, list[Any]]:
    """The tokens of a text where the model always says ``predicted``; each is also checked against both choices."""
    machine = Machine(100, ahead)
    machine.push(make_script(Counted()).entries(turns))
    machine.finish()
    tokens, popped = [], []
    for position in range(steps):
        word, other = machine.choices()
        tokens.append(word if predicted == 0 else other)
        entry = machine.advance(position, predicted)
        if entry is not None:
            popped.append((entry.text, position))
    return tokens, machine, popped


def muxed(pairs: str) -> list[int]:
    found = [pair.split(",") for pair in pairs.replace("(", "").replace(" ", "").strip(")").split(")")]
    return [(int(second) + 1) * 100 + int(first) for first, second in found]


def test_trace_a() -> None:
    """Where the model always asks for words, they come at other positions, or the second stream looks elsewhere."""
    tokens, machine, popped = trace("Hello wonderful world now", 0, 18)
    expected = [3, 3, 101, 1610, 1711, 3, 112, 1813, 14, 3, 115, 16, 3, 117, 3, 103, 3, 3]
    assert tokens == expected and machine.end == 15
    assert popped == [("Hello", 2), ("wonderful", 6), ("world", 10), ("now", 13)]
    assert make_script(Counted()).entries("Hello wonderful world now") == [
        Entry((1, 10, 11), "Hello", 3), Entry((12, 13, 14), "wonderful", 3), Entry((15, 16), "world", 2),
        Entry((17,), "now", 1),
    ]  # fmt: skip


def test_trace_b() -> None:
    """Where the model never asks, words do not come after the longest padding, or a word's pieces do not count."""
    tokens, machine, popped = trace("Hi you", 3, 22)
    pad = "(3,-1)"
    expected = muxed(pad * 2 + "(1,0)(10,-1)" + pad * 7 + "(11,0)" + pad * 8 + "(3,0)" + pad)
    assert tokens == expected and machine.end == 20 and popped == [("Hi", 2), ("you", 11)]


def test_trace_c() -> None:
    """A break has another length, or is told to the model as a word."""
    tokens, machine, popped = trace('One <break time="0.5s"/> two', 0, 14)
    pad = "(3,-1)"
    expected = muxed(pad * 2 + "(1,0)(10,-1)" + pad * 7 + "(11,0)" + pad + "(3,0)")
    assert tokens == expected and machine.end == 13
    assert [position for _, position in popped] == [2, 5, 11] and popped[1][0] == ""


def test_trace_d() -> None:
    """Without a second stream, words or turns come elsewhere."""
    tokens, machine, popped = trace(["Hi: (you)", "Yes"], 0, 12, ahead=0)
    assert tokens == [3, 3, 0, 1, 10, 0, 11, 0, 2, 12, 3, 3] and machine.end == 10
    assert popped == [("Hi", 2), ("you", 5), ("Yes", 7)]


def test_trace_e() -> None:
    """A token that is neither a word's start nor padding counts as something else than padding."""
    tokens, machine, popped = trace("Hi", 57, 13)
    assert popped == [("Hi", 2)] and machine.end == 11
    assert tokens == trace("Hi", 3, 13)[0]


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("asks", ["always", "never", "sometimes"])
def test_text_that_comes_slowly(ahead: int, asks: str) -> None:
    """A text that comes word by word gives other tokens than one that is there, or the machine steps without words."""
    text = 'One two <break time="0.5s"/> three wonderful things happened'
    predicted = {"always": [0], "never": [3], "sometimes": [3, 0, 3, 3, 5]}[asks]

    def run(pieces: list[list[Entry]]) -> list[int]:
        machine, tokens, waiting = Machine(100, ahead), [], list(pieces)
        while machine.end is None or len(tokens) < machine.end + 5:
            while not machine.ready:
                machine.push(waiting.pop(0)) if waiting else machine.finish()
            said = predicted[len(tokens) % len(predicted)]
            tokens.append(machine.choices()[said != 0])
            machine.advance(len(tokens) - 1, said)
        assert not waiting
        return tokens

    entries = make_script(Counted()).entries(text)
    assert run([[entry] for entry in entries]) == run([entries])


# ------------------------------------------------------------------------------------------------- script


@pytest.mark.parametrize("case", json.loads((GOLDEN / "script.json").read_text()), ids=lambda case: str(case["script"]))
def test_script(case: dict[str, Any]) -> None:
    """A script gives other words, tags or padding than Kyutai's `script_to_entries`, whole or letter by letter."""
    expected = [Entry(tuple(tokens), text, padding) for tokens, text, padding in case["entries"]]
    options = {"speakers": case["speakers"], "padding": case["padding"]}
    assert make_script(Letters(), **options).entries(case["script"]) == expected
    script, found = make_script(Letters(), **options), []
    for number, turn in enumerate(case["script"]):
        found += script.turn(number)
        for letter in turn:
            found += script.feed(letter)
    assert found + script.flush() == expected


def test_script_refuses() -> None:
    """What cannot be spoken is read in silence, stops the program with a traceback, or takes its memory."""
    script = make_script(Letters())
    assert script.entries("\U0001f600 \U0001f44d\U0001f3fd \u2764\ufe0f") == [] and script.skipped == 3
    with pytest.raises(TextError, match="break of 3,600 s"):
        script.entries('Wait <break time="3600s"/> there')
    with pytest.raises(TextError, match="word of"):
        make_script(Letters()).feed("a" * 1_000_000)
    assert LONGEST_BREAK < 3600 and LONGEST_WORD < 1_000_000
    assert len(make_script(Letters()).entries("word " * 200_000)) == 200_000
    assert make_script(Letters()).entries(" \n ") == []
    assert [e.text for e in make_script(Letters()).entries("see <break the law")] == ["see", "<break", "the", "law"]


def test_markup() -> None:
    """The marks of a language model's text are read aloud."""
    assert without_markup("**Well** _then_, `code` and \u201cquotes\u201d") == 'Well then, code and "quotes"'
