"""The conversations that the language model learns from, and what is made of them for a training step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from moshi_mlx_training.lm import data as lm_data
from moshi_mlx_training.lm import tokenizer as lm_tokenizer
from moshi_mlx_training.lm.batch import delayed, spoil, training_batch
from moshi_mlx_training.lm.dialogue import (
    GAP,
    LEAD,
    NONE,
    PHONES_AFTER,
    STOP,
    Pieces,
    Window,
    answer_tokens,
    compose,
    stretched,
)
from moshi_mlx_training.speech import dialogues
from moshi_mlx_training.speech.synthesis import HELD_OUT, TRAINING

from moshi_mlx.checkpoint.resolve import BUILTIN
from moshi_mlx.config import LmConfig, ModelConfig
from moshi_mlx.engine.text import EPAD, PAD, TextTokenizer
from moshi_mlx.tokens import delay_tokens
from tests.helpers.lm_data import QUIET, write_data

SMALL = BUILTIN / "small"


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(SMALL / "tokenizer.model")


@pytest.fixture(scope="module")
def config() -> LmConfig:
    return ModelConfig.from_dict(json.loads((SMALL / "config.json").read_text())).lm


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory, tokenizer: TextTokenizer) -> Pieces:
    return Pieces(write_data(tmp_path_factory.mktemp("data")), tokenizer)


def windows(pieces: Pieces, count: int, frames: int = 400) -> list[Window]:
    return [compose(pieces, frames, np.random.default_rng(seed)) for seed in range(count)]


def test_a_word_is_written_two_frames_before_it_sounds(tokenizer: TextTokenizer) -> None:
    """If this fails, the model learns to speak before it has decided what to say, or to write what it has said."""
    tokens = answer_tokens("My name is Moshi.", [0.0, 0.4, 0.8, 1.2], tokenizer).tolist()
    ids = tokenizer.encode("My name is Moshi.")
    assert tokens == [
        [-LEAD - 1, EPAD], [-LEAD, ids[0]],
        [5 - LEAD - 1, EPAD], [5 - LEAD, ids[1]],
        [10 - LEAD - 1, EPAD], [10 - LEAD, ids[2]],
        [15 - LEAD - 1, EPAD], [15 - LEAD, ids[3]], [15 - LEAD + 1, ids[4]],
    ]  # fmt: skip


def test_pieces_of_fast_words_do_not_overwrite_each_other(tokenizer: TextTokenizer) -> None:
    """If this fails, words of fast speech are lost from the text."""
    text = "Goodbye, it was nice talking to you."
    tokens = answer_tokens(text, [0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06], tokenizer)
    assert len(set(tokens[:, 0].tolist())) == len(tokens)
    assert tokenizer.decode(tokens[:, 1].tolist()) == text


def test_an_answer_follows_its_question(pieces: Pieces, tokenizer: TextTokenizer) -> None:
    """If this fails, the model is taught wrong answers, or to answer early or late, or aloud but not in writing."""
    seen = 0
    for window in windows(pieces, 20):
        text, own = window.tokens[0], window.tokens[1:9]
        for begin in np.flatnonzero(window.first):
            wanted = dialogues.answers()[window.answer[begin]]
            assert text[begin - 1] == EPAD
            sound = begin + LEAD
            asked = np.flatnonzero(window.answer[:begin] == NONE)[-1] + 1  # first frame after the question
            assert GAP[0] <= sound - asked < GAP[1]
            assert (own[:, sound - 1 : sound] == QUIET).all()
            answer = pieces.answers[window.answer[begin]]
            if sound + answer.frames < len(text) and not any(begin < onset for onset, _ in window.interruptions):
                written = text[begin - 1 : sound + answer.frames]
                assert tokenizer.decode(written.tolist()) == wanted
                np.testing.assert_array_equal(own[:, sound : sound + answer.frames].T, answer.codes[: answer.frames])
                seen += 1
    assert seen > 20


def test_an_interrupted_answer_stops(pieces: Pieces) -> None:
    """If this fails, nothing teaches the model to stop within four frames when the user speaks."""
    found, turns = 0, 0
    for window in windows(pieces, 120):
        turns += int(window.first.sum())
        for onset, stop in window.interruptions:
            assert STOP - 1 <= stop - onset <= STOP <= 4
            found += 1
            assert window.speaking[onset]
            until = np.flatnonzero(window.first[stop:])
            silent = slice(stop, stop + (int(until[0]) + LEAD if len(until) else 1000))
            assert (window.tokens[1:9, silent] == QUIET).all()
            written = window.tokens[0, stop - 1 : silent.stop - LEAD - 1]
            if not len(until) and written[-1] == EPAD:  # cut off between the sign of a word and the word
                written = written[:-1]
            assert (written == PAD).all()
            assert (window.tokens[9, onset : onset + 12] != QUIET).any()
    assert any(window.stopped.any() for window in windows(pieces, 20))
    assert 1 / 8 < found / turns < 1 / 3  # short answers cannot be interrupted


def test_silence_is_answered_with_silence(pieces: Pieces) -> None:
    """If this fails, the model is taught to speak although nobody asked."""
    for window in windows(pieces, 20):
        quiet = np.flatnonzero(window.first)[0] - 1
        assert (window.tokens[0, :quiet] == PAD).all()
        assert (window.tokens[1:9, :quiet] == QUIET).all()


def test_conversations_repeat_exactly(pieces: Pieces, config: LmConfig) -> None:
    """If this fails, a resumed run is not the run that was stopped."""
    one, two = (training_batch(pieces, config, 2, 96, 5, 17, worker=1).arrays() for _ in range(2))
    other = training_batch(pieces, config, 2, 96, 5, 18, worker=1).arrays()
    assert all(mx.array_equal(a, b).item() for a, b in zip(one, two))
    assert not mx.array_equal(one[0], other[0]).item()
    assert [a.shape for a in one] == [a.shape for a in other]


def test_delays_are_the_library_s(config: LmConfig) -> None:
    """If this fails, training and generation shift the streams differently."""
    tokens = np.random.default_rng(0).integers(0, 500, (17, 30)).astype(np.int32)
    starts = (config.text_start_id, *[config.audio_start_id] * 16)
    wanted = delay_tokens(mx.array(tokens[None]), config.delays, starts)
    np.testing.assert_array_equal(delayed(tokens, config), np.array(wanted)[0])


def test_only_inputs_are_spoiled(pieces: Pieces, config: LmConfig) -> None:
    """If this fails, noise is learnt as truth, or the model trusts its own past codes as no free run allows."""
    batch = training_batch(pieces, config, 8, 128, 0, 0)
    rng = np.random.default_rng([0, 0, 0])
    clean = np.stack([delayed(compose(pieces, 128, rng).tokens, config) for _ in range(8)])
    inputs = np.array(batch.inputs)
    assert 0.01 < (inputs != clean[:, :, :-1]).mean() < 0.2
    np.testing.assert_array_equal(np.array(batch.text), clean[:, 0, 1:].reshape(-1))
    targets = clean[:, :9, 1:].transpose(0, 2, 1).reshape(-1, 9)
    np.testing.assert_array_equal(np.array(batch.depth_tokens), targets[np.array(batch.depth_rows)])
    assert (np.array(batch.depth_tokens)[:, 1:] < config.card).all()
    starts = clean[0, :, :-1].copy()
    for _ in range(20):
        spoil(starts, config, rng)
    np.testing.assert_array_equal(starts[:, 0], clean[0, :, 0])


def test_first_words_weigh_most(pieces: Pieces, config: LmConfig) -> None:
    """If this fails, the choice of the answer, one frame in seventy, is drowned by padding."""
    batch = training_batch(pieces, config, 8, 128, 0, 0)
    text, weight, first = np.array(batch.text), np.array(batch.text_weight), np.array(batch.first_weight) > 0
    assert set(weight[first]) == {10.0}
    rng = np.random.default_rng([0, 0, 0])
    stopped = np.stack([compose(pieces, 128, rng).stopped for _ in range(8)])
    assert set(weight[(text == PAD) & ~first & ~stopped.reshape(-1)]) == {np.float32(w) for w in (0.3, 0.6, 1.0)}


def test_words_that_tell_answers_apart_weigh_more(pieces: Pieces, tokenizer: TextTokenizer) -> None:
    """If this fails, an answer's form is learnt and the word that was asked for is not: "The capital of Japan"."""

    def decides(answer: str) -> list[str]:
        piece = pieces.answers[dialogues.answers().index(answer)]
        words = piece.tokens[piece.deciding & (piece.tokens[:, 1] != EPAD), 1]
        return tokenizer.decode(words.tolist()).split()

    assert decides("The capital of France is Paris.") == ["The", "capital", "France"]
    assert decides("Two plus three is five.") == ["Two", "plus", "three", "five"]
    assert "is" not in decides("The opposite of poor is rich.")
    for window in windows(pieces, 10):
        assert (window.tokens[0, window.deciding] != PAD).all()
        assert window.deciding[window.first].all()


def test_a_stretched_question_keeps_its_labels(pieces: Pieces) -> None:
    """If this fails, words and phones lie beside the sounds that they name, or an answer beside its question's end."""
    rng, lengths = np.random.default_rng(0), set()
    for question in pieces.questions[:30]:
        own = replace(question, codes=np.arange(len(question.codes), dtype=np.uint16)[:, None].repeat(8, 1))
        own = replace(own, phones=np.array(own.codes[:, :2], np.uint8))
        other = stretched(own, rng)
        lengths.add(len(other.codes) - len(question.codes))
        assert (other.codes[:, 0] == other.phones[:, 0]).all() and (np.diff(other.codes[:, 0].astype(int)) >= 0).all()
        assert other.codes[other.end - 1, 0] == question.end - 1 and other.codes[other.onset, 0] == question.onset
        for (frame, word), (moved, same) in zip(question.words, other.words, strict=True):
            assert word == same and other.codes[moved - 1, 0] <= frame - 1 < other.codes[moved, 0]
    assert len(lengths) > 2


def test_phones_follow_the_user_s_sound(pieces: Pieces) -> None:
    """If this fails, the head that teaches hearing is told sounds that are not in the codes it has seen."""
    for window in windows(pieces, 10):
        spoken = np.flatnonzero(window.phones[:, 0] > 0)
        assert (window.tokens[9, spoken - PHONES_AFTER] != QUIET).all() and len(spoken) > 12
        quiet = np.setdiff1d(np.arange(PHONES_AFTER, window.tokens.shape[1]), spoken)
        assert (window.tokens[9, quiet - PHONES_AFTER] == QUIET).mean() > 0.9


def test_held_out_speakers_are_not_in_training() -> None:
    """If this fails, the figures for unseen speakers are worth nothing."""
    assert not set(lm_data.VOICES["train"]) & set(HELD_OUT)
    assert not set(lm_data.VOICES["known"]) & set(HELD_OUT)
    assert set(lm_data.VOICES["held"]) == set(HELD_OUT)
    held = {voice.split("/")[1] for voice in HELD_OUT}
    assert not held & {voice.split("/")[1] for voice in TRAINING}


def test_sets_from_another_codec_are_not_mixed_in(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """If this fails, one model learns two meanings for the same codes."""
    folder = write_data(tmp_path, ("train-0000", "train-0001"), size=5)
    with np.load(folder / "train-0001.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    np.savez(folder / "train-0001.npz", **{**arrays, "codec": "another"})
    pieces = Pieces(folder, tokenizer)
    assert len(pieces.questions) == 5
    np.savez(folder / "train-0001.npz", **arrays)
    assert pieces.refresh() == 10


def test_missing_data_names_the_command(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """If this fails, a missing step shows as a traceback from the depths."""
    with pytest.raises(FileNotFoundError, match=r"lm.data encode"):
        Pieces(tmp_path, tokenizer)


def test_the_tokenizer_in_the_package_is_the_recipe_s(tokenizer: TextTokenizer, config: LmConfig) -> None:
    """If this fails, the answers changed and the built-in tokenizer was not made again."""
    pytest.importorskip("sentencepiece")
    fresh = TextTokenizer(lm_tokenizer.tokenizer_bytes())
    assert fresh.vocab_size == tokenizer.vocab_size == config.text_card
    assert [fresh.piece(i) for i in range(fresh.vocab_size)] == [
        tokenizer.piece(i) for i in range(tokenizer.vocab_size)
    ]
    for answer in dialogues.answers():
        assert tokenizer.decode(tokenizer.encode(answer)) == answer
        assert len(tokenizer.encode(answer)) < 2.5 * len(answer.split())
