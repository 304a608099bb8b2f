"""What goes into training data: the first recipe is what it was, and every share of the others can be counted."""

from __future__ import annotations

import argparse
import random
import zlib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from moshi_mlx_training.codec import data as codec_data
from moshi_mlx_training.lm import data as lm_data
from moshi_mlx_training.speech import dialogues, recipe, wordings
from moshi_mlx_training.speech.recipe import FIRST, NO_SECOND, UNKNOWN, Asked, Recipe
from moshi_mlx_training.speech.synthesis import (
    ANSWERING_VOICE,
    FESTIVAL,
    HELD_OUT,
    SpeechUnavailable,
    Utterance,
    say,
    speakers,
    unheard,
)


def mute(text: str, voice: str = "", rng: np.random.Generator | None = None, *_: object) -> Utterance:
    """Stands for a synthesizer: a tenth of a second a word, without a sound made by one."""
    words = text.split()
    pcm = np.tile(np.float32([0.1, -0.1]), 1200 * len(words))
    starts = tuple((word.strip(".,?!:"), 0.1 * i) for i, word in enumerate(words))
    return Utterance(pcm, (("aa", 0.1 * len(words)),), starts)


def test_the_first_recipe_is_what_it_was() -> None:
    """If this fails, a stopped run that began with the package's recipe goes on with other data."""
    rng = random.Random(4)
    plans = [codec_data.utterance_plan("user", rng) for _ in range(200)]
    assert zlib.crc32(repr(plans).encode()) == 2634899784


@pytest.mark.parametrize("name, digest", [("train-0003", 45008352), ("known", 130918943), ("held", 1005448946)])
def test_the_first_recipe_s_sets_are_what_they_were(name: str, digest: int) -> None:
    """If this fails, question sets that are made now differ from those of the same name that are there."""
    try:
        say("Hello.")
        say("Hello.", "espeak/f1")
    except SpeechUnavailable as reason:
        pytest.skip(str(reason))
    seed = zlib.crc32(name.encode())
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    clips = [lm_data.question_clip(name.split("-")[0], rng, noise) for _ in range(8)]
    told = [(clip["exchange"], clip["voice"], clip["text"]) for clip in clips]
    assert zlib.crc32(repr(told).encode()) == digest


def test_one_synthesizer_is_left_out_wholly() -> None:
    """If this fails, figures for a synthesizer that was never heard are figures for one that was."""
    rng = random.Random(0)
    for left_out, count in (("festival", 80), ("espeak", 5)):
        chosen = {Recipe(voices="all", leave_out=left_out).speaker(rng) for _ in range(6000)}
        assert len(chosen) >= count and not any(voice.startswith(left_out) for voice in chosen)
        assert not chosen & {*HELD_OUT, ANSWERING_VOICE, *unheard(left_out)}
        assert chosen == set(speakers(left_out)) - {ANSWERING_VOICE}
    assert unheard() == FESTIVAL


def test_what_is_asked_has_the_shares_that_were_wanted() -> None:
    """If this fails, an ablation changes more than one thing, or nothing."""
    rng = random.Random(0)
    many = Recipe(wordings="many", pairs=0.1, unknown=0.2)
    asked = [many.asked(rng, 0.5) for _ in range(3000)]
    unknown = [one for one in asked if one.exchange == UNKNOWN]
    two = [one for one in asked if one.second != NO_SECOND]
    assert 0.17 < len(unknown) / 3000 < 0.23 and 0.06 < len(two) / 3000 < 0.1
    known = [one for one in asked if one.exchange != UNKNOWN and one.second == NO_SECOND]
    assert sum(one.text not in dialogues.questions() for one in known) > len(known) / 2
    assert not any(wordings.held_out(one.text) for one in asked)
    assert all(one.second == NO_SECOND for one in (FIRST.asked(rng, 0.5) for _ in range(300)))


def test_pauses_are_long_and_come_where_they_may() -> None:
    """If this fails, the model is taught to wait after a whole question, or never meets a pause."""
    rng = np.random.default_rng(0)
    question = Asked("What is the capital of France?", 5)
    assert FIRST.pause(question, rng) is None
    found = [Recipe(paused=0.5).pause(question, rng) for _ in range(400)]
    pauses = [pause for pause in found if pause is not None]
    assert 160 < len(pauses) < 240 and {word for word, _ in pauses} == {1, 2, 3, 4, 5}
    assert min(s for _, s in pauses) < 0.6 and max(s for _, s in pauses) > 1.8
    unknown = [Recipe(paused=1).pause(Asked("The red house is old.", UNKNOWN), rng) for _ in range(100)]
    assert max(pause[1] for pause in unknown if pause is not None) <= recipe.UNKNOWN_PAUSE[1]
    assert Recipe(paused=1).pause(Asked("Hello.", 0), rng) is None


def test_a_paused_clip_keeps_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the end of a question, its words or its phones are taught where the pause is."""
    monkeypatch.setattr(recipe, "say", mute)
    asked = Asked("What is the capital of France?", 0)
    plain = lm_data.spoken_clip(asked, "flite/awb", np.random.default_rng(1))
    clip = lm_data.spoken_clip(asked, "flite/awb", np.random.default_rng(1), Recipe(paused=1))
    more = clip["end"] - plain["end"]
    assert more >= 4 and len(clip["pcm"]) == (clip["end"] + lm_data.AFTER) * lm_data.FRAME
    frames = [frame for frame, _ in clip["words"]]
    gaps = np.diff([lm_data.BEFORE, *frames])
    assert sum(gaps >= more) == 1 and frames == sorted(frames)  # one word begins late, none ends late
    quiet = (clip["phones"].reshape(-1, 2) == 0).all(1)[lm_data.BEFORE + 2 : clip["end"] - 2]
    assert more - 3 <= quiet.sum() <= more + 1


def test_options_and_folders_know_the_recipe(tmp_path: Path) -> None:
    """If this fails, data of two recipes is mixed in one folder, or an option is forgotten."""
    parser = argparse.ArgumentParser()
    recipe.add_options(parser)
    assert recipe.from_options(parser.parse_args([])) == FIRST
    line = "--wordings many --voices all --leave-out espeak --channel wide"
    line += " --morphed 0.5 --paused 0.1 --pairs 0.05 --unknown 0.2"
    wanted = Recipe("many", "all", "espeak", "wide", 0.5, 0.1, 0.05, 0.2)
    assert recipe.from_options(parser.parse_args(line.split())) == wanted
    assert all(getattr(wanted, field.name) != getattr(FIRST, field.name) for field in fields(Recipe))
    with pytest.raises(SystemExit):
        parser.parse_args(["--morphed", "2"])
    recipe.hold(tmp_path, wanted)
    recipe.hold(tmp_path, wanted)
    with pytest.raises(ValueError, match="--morphed 0.5"):
        recipe.hold(tmp_path, replace(wanted, morphed=0.2))
    old = tmp_path / "old"
    old.mkdir()
    (old / "known.pcm.npz").touch()
    recipe.hold(old, FIRST)
    with pytest.raises(ValueError, match="--voices first"):
        recipe.hold(old, Recipe(voices="all"))


def test_commands_refuse_another_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, the wrong options end in a traceback, or in a folder of two kinds."""
    recipe.hold(tmp_path, Recipe(wordings="many"))
    for main, before in ((lm_data.main, ["speak"]), (codec_data.main, [])):
        with pytest.raises(SystemExit):
            main([*before, str(tmp_path), "--wordings", "first"])
        assert "another recipe" in capsys.readouterr().err


def test_festival_speaks_where_it_is_installed() -> None:
    """If this fails, words and phones of the synthesizer that is kept for judging do not belong to its sound."""
    try:
        say("Hello.", FESTIVAL[0])
    except SpeechUnavailable as reason:
        pytest.skip(str(reason))
    with pytest.raises(SpeechUnavailable, match=r"nobody.*install"):
        say("Hello.", "festival/nobody")
    lengths = set()
    for voice in FESTIVAL:
        for seed in range(2):
            spoken = say("My name is Moshi, and I can't listen.", voice, np.random.default_rng(seed))
            seconds = len(spoken.pcm) / 24000
            assert [word for word, _ in spoken.words] == "My name is Moshi and I can't listen".split()
            starts, ends = [start for _, start in spoken.words], [end for _, end in spoken.phones]
            assert starts == sorted(starts) and ends == sorted(ends) and starts[-1] < ends[-1] < seconds + 0.1
            assert "sh" in [name for name, _ in spoken.phones]
            assert abs(10 * np.log10(np.mean(spoken.pcm**2)) + 23) < 1
            lengths.add(len(spoken.pcm))
    assert len(lengths) == 2 * len(FESTIVAL)  # every one speaks in its own time


def test_a_codec_s_corpus_follows_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the codec is trained on other voices and words than the recipe says, or hears them too clean."""
    said: list[tuple[str, str]] = []

    def listed(text: str, voice: str = "", *rest: object) -> Utterance:
        said.append((text, voice))
        return mute(text)

    monkeypatch.setattr(recipe, "say", listed)
    monkeypatch.setattr(codec_data, "say", mute)
    for kind in codec_data.KINDS:
        codec_data.make_shard(tmp_path, kind, 0, minutes=0.5, recipe=Recipe(wordings="many", voices="all"))
    assert len(said) > 20 and not {voice for _, voice in said} & {*HELD_OUT, *unheard(), ANSWERING_VOICE}
    assert any(voice not in speakers("none")[:59] for _, voice in said)  # one of those that came later
    narrow, wide = codec_data.Corpus(tmp_path), codec_data.Corpus(tmp_path, wide=True)
    plain = narrow.batch(40, 12, np.random.default_rng(0))
    heard, target, labels = wide.batch(40, 12, np.random.default_rng(0))
    again = wide.batch(40, 12, np.random.default_rng(0))
    assert all(np.array_equal(a, b) for a, b in zip((heard, target, labels), again))
    assert np.array_equal(plain[0][:15], heard[:15])  # the answering voice stays clean
    levels = 10 * np.log10(np.mean(target[20:] ** 2, axis=1) + 1e-9)
    before = 10 * np.log10(np.mean(plain[1][20:] ** 2, axis=1) + 1e-9)
    assert np.ptp(levels) > np.ptp(before) + 3
    assert 5 <= sum(not np.array_equal(h, t) for h, t in zip(heard[20:], target[20:])) < 20
