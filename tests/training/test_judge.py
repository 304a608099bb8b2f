"""The evaluation by what was never taught: its groups are what they are called, and it runs without PyTorch."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from moshi_mlx_training.lm import data as lm_data
from moshi_mlx_training.lm import judge
from moshi_mlx_training.lm.dialogue import Question
from moshi_mlx_training.speech import dialogues, recipe, wordings
from moshi_mlx_training.speech.recipe import NO_SECOND, UNKNOWN
from moshi_mlx_training.speech.synthesis import EVERYONE, Utterance, unheard

from moshi_mlx.checkpoint.resolve import BUILTIN
from moshi_mlx.engine.text import PAD


def test_groups_ask_what_they_are_called() -> None:
    """If this fails, a figure in the documents is of other questions than it says."""
    rng = random.Random(0)
    asked = {name: [ask(rng) for _ in range(150)] for name, ask in judge.GROUPS.items()}
    for one in (*asked["taught"], *asked["more"], *asked["paused"]):
        assert not wordings.held_out(one.text) or one.text == "Name the seasons."
    assert all(wordings.held_out(one.text) for one in asked["held out"])
    assert all(one.exchange == UNKNOWN for one in asked["none"])
    assert all(one.second not in (NO_SECOND, one.exchange) for one in asked["pairs"])
    assert all(wordings.pauses(one.text) for one in asked["paused"])
    for one in asked["taught"]:
        text = dialogues.exchanges()[one.exchange].questions
        assert any(one.text.lower().endswith(question.lower()) for question in text)


def question(text: str, exchange: int = 0, second: int = NO_SECOND) -> Question:
    none = np.zeros((0, 2), np.int32)
    return Question(np.zeros((4, 8), np.uint16), exchange, 0, 0, 4, none, none.astype(np.uint8), text, second)


def test_figures_are_counted_by_pattern() -> None:
    """If this fails, a pattern that is never understood hides behind the others."""
    asked = [
        question(t) for t in ("Name your age.", "Name your age.", "I wonder who you are.", "Any idea what time it is?")
    ]
    wrong = [("Name your age.", "", ""), ("Any idea what time it is?", "", "")]
    assert judge.by_pattern(asked, wrong) == {r"\bi wonder\b": [1, 1], "^any idea\\b": [0, 1], "^name ": [1, 2]}
    both = question("How are you, and who are you?", 3, 4)
    one, other = (dialogues.exchanges()[i].answer for i in (3, 4))
    assert both.wanted == f"{one} {other}" and question("", 3).wanted == one
    assert question("", UNKNOWN).wanted == dialogues.NOT_UNDERSTOOD


def test_the_table_says_how_far_chance_goes() -> None:
    """If this fails, three of six and a hundred of two hundred look alike."""
    found = {"right": 0.5, "too_early": 0.25, "spoke": 0.9}
    text = judge.table(
        {"held out, known": {**found, "count": 100}, "silence": {"silent": 1.0, "trials": 32},
         "interruption": {"stopped": 0.95, "trials": 60}}
    )  # fmt: skip
    assert "50.0 ± 9.8 %" in text and "25.0 %" in text and "10.0 %" in text
    assert "100.0 %" in text and "95.0 %" in text and len(text.splitlines()) == 4


def mute(text: str, voice: str = "", *_: object) -> Utterance:
    """Stands for a synthesizer."""
    words = text.split()
    pcm = np.tile(np.float32([0.1, -0.1]), 1200 * len(words))
    starts = tuple((word.strip(".,?!:"), 0.1 * i) for i, word in enumerate(words))
    return Utterance(pcm, (("aa", 0.1 * len(words)),), starts)


def test_the_command_runs_and_keeps_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, nobody can say how well a model hears what it was never taught, or every model costs the same."""
    encoded = []

    def encode(clips: list[np.ndarray]) -> list[np.ndarray]:
        encoded.append(len(clips))
        return [np.zeros((len(clip) // lm_data.FRAME, 8), np.uint16) for clip in clips]

    def quiet(lm: object, user: np.ndarray, settings: object, size: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full(user.shape[:2], PAD, np.int32), np.zeros((*user.shape[:2], 8), np.int32)

    monkeypatch.setattr(lm_data, "say", mute)
    monkeypatch.setattr(recipe, "say", mute)
    monkeypatch.setattr(judge, "library_codec", lambda folder: (encode, "test"))
    monkeypatch.setattr(judge, "preload_blas", lambda: None)
    monkeypatch.setattr(judge.evaluate, "load_weights", lambda path, config: None)
    monkeypatch.setattr(judge.evaluate, "in_batches", quiet)
    line = [str(BUILTIN / "small"), str(tmp_path), "--count", "5", "--json", str(tmp_path / "figures.jsonl")]
    judge.main(line)
    output = capsys.readouterr().out
    told = json.loads(output.splitlines()[-1])
    assert json.loads((tmp_path / "figures.jsonl").read_text()) == told
    assert len(told["figures"]) == 2 * len(judge.GROUPS) + 2 and told["figures"]["silence"]["silent"] == 1
    for name, figures in told["figures"].items():
        if "right" in figures:
            assert figures["right"] == figures["spoke"] == 0 and figures["count"] == 5, name
            assert name in output
    assert sum(n for _, n in told["figures"]["held out, known"]["by_pattern"].values()) == 5
    before = len(encoded)
    judge.main([*line, "--groups", "none"])
    assert len(encoded) == before  # all was there
    with np.load(tmp_path / "none-unheard_festival.npz") as stored:
        assert {EVERYONE[voice] for voice in stored["voice"]} <= set(unheard())
        assert (stored["exchange"] == UNKNOWN).all()


def test_the_library_s_codec_encodes_without_pytorch() -> None:
    """If this fails, evaluation needs PyTorch, or hears other codes than the program does."""
    encode, digest = lm_data.library_codec(BUILTIN / "small")
    rng = np.random.default_rng(0)
    clips = [(3000 * rng.standard_normal(lm_data.FRAME * n)).astype(np.int16) for n in (9, 4)]
    codes = encode(clips)
    assert [one.shape for one in codes] == [(9, 8), (4, 8)] and all(one.dtype == np.uint16 for one in codes)
    assert max(one.max() for one in codes) < 512 and len(np.unique(codes[0])) > 20
    np.testing.assert_array_equal(encode([clips[0][: 4 * lm_data.FRAME]])[0], codes[0][:4])
    assert digest == lm_data.library_codec(BUILTIN / "small")[1] and len(digest) == 16
