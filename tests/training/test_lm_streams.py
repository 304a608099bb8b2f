"""Speech with its text behind it or ahead of it: where the tokens stand, and that it is learnt."""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from moshi_mlx_training.lm import data as lm_data
from moshi_mlx_training.lm import train as lm_train
from moshi_mlx_training.lm.judge_speech import judge_heard, matched
from moshi_mlx_training.lm.model import LESSONS, SPEECH_FIGURES, borrow, embed
from moshi_mlx_training.lm.streams import Clips, heard, pieces_of, place, speech_batch, spoken
from moshi_mlx_training.lm.train import Trainer, read_task
from moshi_mlx_training.speech import vocabulary
from moshi_mlx_training.speech.recipe import Recipe
from moshi_mlx_training.speech.synthesis import SpeechUnavailable, say

from moshi_mlx.config import LmConfig
from moshi_mlx.engine.text import EPAD, PAD, TextTokenizer, Word, WordTracker
from moshi_mlx.models.lm import Lm
from moshi_mlx.tasks.tts_machine import NEW_WORD, Entry, Machine

MODELS = Path(__file__).parents[2] / "training" / "models"
HEARS = LmConfig(dim=64, text_card=1024, card=512, num_heads=2, num_layers=1, hidden_scale=3.0, context=40,
                 n_q=8, dep_q=0, delays=(0, 0, *(1,) * 7))  # fmt: skip
SPEAKS = LmConfig(dim=64, text_card=1024, card=512, num_heads=2, num_layers=1, hidden_scale=3.0, context=40, n_q=8,
                  dep_q=8, delays=(0, 0, *(1,) * 7), depformer_dim=64, depformer_dim_feedforward=96,
                  depformer_num_heads=2, depformer_num_layers=1)  # fmt: skip
DELAY = 6
TEXTS = ("The old dog, again.", "Where is it?", "Nobody saw the strawberry.")


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(MODELS / "small-stt" / "tokenizer.model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets as ``lm_data encode`` writes them: each word has codes of its own, four frames long."""
    path, rng = tmp_path_factory.mktemp("speech"), np.random.default_rng(0)
    around, after = lm_data.BEFORE - lm_data.DROPPED, lm_data.AFTER
    quiet = np.full((500, 8), 7, np.uint16)
    np.savez(path / "rooms.npz", data=np.tile(quiet, (lm_data.ROOMS, 1)), count=[500] * lm_data.ROOMS, codec="random")
    words = [text.split() for text in TEXTS]
    codes = [
        np.concatenate([quiet[:around], *(np.full((4, 8), 20 + 5 * n + i) for i in range(len(said))), quiet[:after]])
        for n, said in enumerate(words)
    ]
    ends = [around + 4 * len(said) for said in words]
    np.savez(
        path / "train-0000.npz",
        data=np.concatenate(codes).astype(np.uint16),
        count=[len(one) for one in codes],
        starts=np.concatenate([(around + 4 * np.arange(len(said))) / lm_data.RATE for said in words]).astype(
            np.float32
        ),
        word_count=[len(said) for said in words],
        phones=rng.integers(0, 3, (sum(len(one) for one in codes), 2)).astype(np.uint8),
        room=[0] * len(words),
        end=ends,
        voice=[0] * len(words),
        text=list(TEXTS),
        codec="random",
    )
    return path


def test_sentences_are_many_and_of_known_words() -> None:
    """If this fails, the models learn some sentences by heart, or words that nobody can spell."""
    rng, known = random.Random(0), set(vocabulary.words())
    said = [vocabulary.sentence(rng) for _ in range(800)]
    used = {word for text in said for word in re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())}
    strange = sorted(word for word in used - known if word.removesuffix("s") not in known)  # `sentences` has plurals
    assert len(known) > 3000 and not strange, strange[:5]
    assert len(used) > 1500 and len(set(said)) > 650
    assert all(text[0].isupper() and text[-1] in ".?!" for text in said)
    assert said == [vocabulary.sentence(again) for again in [random.Random(0)] for _ in range(800)]


def test_every_word_can_be_spelled(tokenizer: TextTokenizer) -> None:
    """If this fails, a word of training has a hole in its text, and capitals or marks are read as unknown."""
    for text in (*vocabulary.words(), "HELLO, You. What? Don't!"):
        assert EPAD not in tokenizer.encode(text), text
    assert tokenizer.decode(tokenizer.encode("What's THE dog?")) == "what's the dog?"


def test_written_words_stand_behind_their_sound(tokenizer: TextTokenizer) -> None:
    """If this fails, the times of words that are written down are wrong by as much."""
    text, starts = "The strawberry is here.", (2.2, 5.6, 17.0, 18.4)
    groups = pieces_of(text, "stt", tokenizer)
    assert [tokenizer.decode(group) for group in groups] == ["the", "strawberry", "is", "here"]
    placed = place(groups, starts, "stt", DELAY)
    row = dict(placed.tolist())
    assert len(row) == len(placed)  # no two in one frame
    tracker = WordTracker(tokenizer)
    found = [w for f in range(60) for w in tracker.step(f, row.get(f, PAD))] + tracker.flush()
    assert [word.text for word in found] == ["the", "strawberry", "is", "here"]
    expected = [2, 6, 17, 18 if len(groups[2]) == 1 else 19]
    assert [round(word.start / 0.08) - DELAY for word in found] == expected
    assert row[2 + DELAY - 1] == EPAD and row[17 + DELAY - 1] == EPAD


def test_words_to_be_spoken_come_as_the_machine_gives_them(tokenizer: TextTokenizer) -> None:
    """If this fails, the model is trained on a text stream that it never reads when it speaks."""
    text, starts = "The strawberry is here.", (2.2, 5.6, 17.0, 18.4)
    groups = pieces_of(text, "tts", tokenizer)
    assert tokenizer.decode(groups[-1]) == "here."
    row = dict(place(groups, starts, "tts").tolist())
    machine = Machine(1025, max_padding=30)
    machine.push([Entry(group, word, len(group)) for group, word in zip(groups, text.split(), strict=True)])
    for position in range(max(row) + 1):
        wanted = row.get(position, PAD)
        predicted = NEW_WORD if wanted == EPAD else PAD
        assert machine.choices()[predicted == PAD] == wanted, position
        machine.advance(position, predicted)
    assert machine.waiting == 0


def test_windows_hold_sound_and_text_apart_by_the_delay(folder: Path, tokenizer: TextTokenizer) -> None:
    """If this fails, text and sound of a window do not belong together."""
    hears, speaks = Clips(folder, tokenizer, "stt"), Clips(folder, tokenizer, "tts")
    for seed in range(5):
        tokens, phones = heard(hears, 150, np.random.default_rng(seed), DELAY)
        assert tokens.shape == (9, 150) and phones.shape == (150, 2)
        assert 10 < (tokens[0] != PAD).sum() < 150
        begins = [f for f in range(150) if tokenizer.piece(int(tokens[0, f])).startswith("▁")]
        sounds = [f for f in range(1, 150) if tokens[1, f] >= 20 and tokens[1, f] != tokens[1, f - 1]]
        off = [min(abs(f - DELAY - sound) for sound in sounds) for f in begins]
        assert np.mean(np.array(off) <= 1) > 0.9, off  # a stretched word may move by one
        tokens = spoken(speaks, 150, np.random.default_rng(seed), DELAY)
        assert (tokens[1:, :DELAY] == -1).all() and (tokens[1:, DELAY:] >= 0).all()
        marks = np.flatnonzero(tokens[0] == EPAD)
        marks = marks[marks < 150 - DELAY - 4]
        begun = [tokens[1, f + DELAY] >= 20 or tokens[1, f + DELAY + 1] >= 20 for f in marks]
        assert len(marks) > 8 and all(begun)


def test_nothing_is_embedded_as_zeros() -> None:
    """If this fails, what a text-to-speech model learns before its voice begins is not what the program gives it."""
    mx.random.seed(0)
    lm, rng = Lm(SPEAKS), np.random.default_rng(0)
    tokens = mx.array(rng.integers(-1, 500, (2, 9, 12)).astype(np.int32))
    np.testing.assert_allclose(np.array(embed(lm, tokens)), np.array(lm.embed(tokens)), atol=1e-5)


@pytest.mark.parametrize("config, task", [(HEARS, "stt"), (SPEAKS, "tts")])
def test_the_loss_falls(config: LmConfig, task: str, folder: Path, tokenizer: TextTokenizer) -> None:
    """If this fails, a model for speech to text or text to speech is not trained."""
    clips = Clips(folder, tokenizer, "stt" if task == "stt" else "tts")
    trainer = Trainer(config, compiled=False, lesson=LESSONS[task])
    figures = np.array(
        [trainer.step(speech_batch(clips, config, DELAY, 2, 80, 0, n).arrays(), 2e-2)[0] for n in range(25)]
    )
    early, late = figures[:4].mean(0), figures[-4:].mean(0)
    change = dict(zip(SPEECH_FIGURES, late - early, strict=True))
    learnt = ("loss", "text", "phone") if task == "stt" else ("loss", "text", "semantic", "acoustic")
    assert all(change[name] < -0.2 for name in learnt), change


def test_what_is_given_is_not_learnt(folder: Path, tokenizer: TextTokenizer) -> None:
    """If this fails, text to speech spends itself on guessing the text that it will be given."""
    batch = speech_batch(Clips(folder, tokenizer, "tts"), SPEAKS, DELAY, 2, 80, 0, 0)
    text, weight = np.array(batch.text), np.array(batch.text_weight)
    given = (text != PAD) & (text != EPAD)
    assert given.any() and not weight[given].any() and weight[~given].all()
    again = speech_batch(Clips(folder, tokenizer, "tts"), SPEAKS, DELAY, 2, 80, 0, 0)
    assert all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(batch.arrays(), again.arrays(), strict=True))


def test_a_listener_begins_with_another_model_s_ears() -> None:
    """If this fails, training starts from nothing, or from the codes of the wrong speaker."""
    conversation = LmConfig(dim=64, text_card=624, card=512, num_heads=2, num_layers=1, hidden_scale=3.0, context=40,
                            depformer_dim=64, depformer_dim_feedforward=96, depformer_num_heads=2,
                            depformer_num_layers=1)  # fmt: skip
    other, deep = Lm(conversation), LmConfig(**{**vars(HEARS), "num_layers": 2})
    hears, speaks = Lm(deep), Lm(SPEAKS)
    assert "text_emb.weight" in borrow(hears, other) and "depformer.linear_in.0.weight" in borrow(speaks, other)
    same = np.testing.assert_array_equal
    same(np.array(hears.audio_embs[0].weight), np.array(other.audio_embs[8].weight))
    same(np.array(speaks.audio_embs[0].weight), np.array(other.audio_embs[0].weight))
    same(np.array(hears.text_emb.weight[PAD]), np.array(other.text_emb.weight[PAD]))
    x = mx.random.normal((1, 5, 64))  # the second layer does nothing yet
    np.testing.assert_allclose(np.array(hears.transformer(x)), np.array(other.transformer(x)), atol=1e-5)


def test_folders_say_what_they_are_for(tmp_path: Path) -> None:
    """If this fails, the trainer teaches a model of these folders something else, or with another delay."""
    assert read_task(MODELS / "small-stt") == ("stt", 10) and read_task(MODELS / "small-tts") == ("tts", 8)
    assert read_task(lm_train.Path("moshi_mlx/builtin/small").resolve()) == ("moshi", 0)
    (tmp_path / "config.json").write_text('{"model_type": "hibiki"}')
    with pytest.raises(ValueError, match="hibiki cannot be trained"):
        read_task(tmp_path)


def test_words_are_counted_as_people_count_them() -> None:
    """If this fails, the word error rate or the times of the card are wrong."""
    assert matched("a b c".split(), "a b c".split()) == (0, [(0, 0), (1, 1), (2, 2)])
    assert matched("a b c".split(), "a x b c".split()) == (1, [(0, 0), (1, 2), (2, 3)])
    assert matched("a b".split(), []) == (2, []) and matched([], ["a"]) == (1, [])
    words = (Word("the", 0.30, 0.4), Word("cat,", 0.66, 0.8))
    model = SimpleNamespace(transcribe_all=lambda recordings: [SimpleNamespace(words=words) for _ in recordings])
    found = judge_heard(model, [("The cat sat.", np.zeros(1920, np.float32), np.float32([0.2, 0.7, 0.9]))])  # type: ignore[arg-type]
    assert found["words"] == 3 and found["word_error_rate"] == round(1 / 3, 4)
    assert found["start_ms"] == {"p50": 70, "p95": 97}


def test_clips_of_sentences_know_when_words_start() -> None:
    """If this fails, models learn word times that are not those of the sound."""
    try:
        utterance = say("Hello there.")
    except SpeechUnavailable as reason:
        pytest.skip(str(reason))
    recipe = Recipe(wordings="words", voices="answering", channel="none")
    clip = lm_data.question_clip("train", random.Random(3), np.random.default_rng(3), recipe)
    assert len(clip["starts"]) == len(clip["text"].split()) and clip["room"] == 0
    loud = np.flatnonzero(np.abs(clip["pcm"]) > 2000)
    assert abs(clip["starts"][0] - loud[0] / 24000) < 0.12
    assert clip["starts"] == sorted(clip["starts"]) and clip["starts"][-1] * 12.5 < clip["end"]
    assert utterance.words[0][0] == "Hello"
