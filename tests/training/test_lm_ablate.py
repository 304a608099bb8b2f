"""The ablations' data: one thing changes between the variants, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from moshi_mlx_training.lm import ablate as lm_ablate
from moshi_mlx_training.lm.dialogue import Pieces, Window, compose
from moshi_mlx_training.speech import dialogues

from moshi_mlx.checkpoint.resolve import BUILTIN
from moshi_mlx.config import ModelConfig
from moshi_mlx.engine.text import PAD, TextTokenizer
from moshi_mlx.models.lm import Lm
from tests.helpers.lm_data import write_data

SMALL = BUILTIN / "small"
SHIFT = lm_ablate.SHIFT


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(SMALL / "tokenizer.model")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory, tokenizer: TextTokenizer) -> Pieces:
    return Pieces(write_data(tmp_path_factory.mktemp("data"), size=200), tokenizer)


@pytest.fixture(scope="module")
def window(pieces: Pieces) -> Window:
    return compose(pieces, 300, np.random.default_rng(1))


def test_moshi_is_left_as_it_is_and_without_monologue_only_words_go(window: Window) -> None:
    """If this fails, the variant without inner monologue differs from Moshi in more than its words."""
    same = lm_ablate.shifted(window, "moshi")
    assert (same.tokens == window.tokens).all()
    silent = lm_ablate.shifted(window, "no-monologue")
    assert (silent.tokens[0] == PAD).all() and (window.tokens[0] != PAD).any()
    assert (silent.tokens[1:] == window.tokens[1:]).all()


@pytest.mark.parametrize(("variant", "late"), [("text-first", slice(1, 9)), ("sound-first", slice(0, 1))])
def test_one_side_comes_later_and_the_rest_stays(window: Window, variant: str, late: slice) -> None:
    """If this fails, a shifted variant is taught another conversation, or labels that do not lie on its tokens."""
    moved = lm_ablate.shifted(window, variant)
    assert moved.tokens.shape == window.tokens.shape
    assert (moved.tokens[late, SHIFT:] == window.tokens[late, :-SHIFT]).all()
    rest = [stream for stream in range(17) if stream not in range(*late.indices(17))]
    assert (moved.tokens[rest] == window.tokens[rest]).all()
    if variant == "sound-first":
        assert (moved.first[SHIFT:] == window.first[:-SHIFT]).all()
        assert (moved.tokens[0][moved.first] != PAD).all()
    else:
        assert (moved.speaking[SHIFT:] == window.speaking[:-SHIFT]).all()


def test_mixed_sentences_are_new_but_made_of_known_words(tokenizer: TextTokenizer) -> None:
    """If this fails, "never in training" is not true of the sentences on which reading and writing are judged."""
    sentences = lm_ablate.mixed()
    known = {word for answer in dialogues.answers() for word in dialogues.words(answer)}
    assert len(sentences) > 10
    assert not set(sentences) & set(dialogues.answers())
    assert {word for sentence in sentences for word in dialogues.words(sentence)} <= known


def test_forced_text_and_codes_come_back_in_their_own_frame(pieces: Pieces) -> None:
    """If this fails, given text is spoken, or given speech written, one or more frames away from where it was asked."""
    config = ModelConfig.from_dict(json.loads((SMALL / "config.json").read_text())).lm
    lm = Lm(replace(config, num_layers=1, depformer_num_layers=1))
    rng = np.random.default_rng(0)
    text, own = lm_ablate.timeline(pieces.answers[:2], "moshi", pieces.rooms[0])
    text, own = text[:, :20], rng.integers(0, config.card, own[:, :20].shape).astype(np.int32)
    user = rng.integers(0, config.card, own.shape)
    wrote, voice = lm_ablate.forced(lm, user, text=text, own=own)
    assert (wrote == text).all()
    assert (voice == own).all()
