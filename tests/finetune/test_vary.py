"""Pieces whose user is varied."""

from __future__ import annotations

import numpy as np
from moshi_mlx_finetune.data.pieces import Piece
from moshi_mlx_finetune.data.vary import AFTER, BEFORE, varied

from moshi_mlx.config import ModelConfig

from ..helpers.checkpoints import small_config

CONFIG = ModelConfig.from_dict(small_config()).lm
PAD = CONFIG.existing_text_padding_id


def piece(frames: int = 200, real: int = 180) -> Piece:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.card, (CONFIG.num_streams, frames)).astype(np.int32)
    tokens[0] = PAD
    tokens[0, 90:93] = (7, 8, 9)
    tokens[:, real:] = -1
    return Piece(tokens, "piece")


def test_what_is_learnt_stays() -> None:
    """If this fails, the model learns a torn voice, or words at other distances from their sound."""
    before = piece()
    for seed in range(20):
        after = varied(before, CONFIG, np.random.default_rng(seed)).tokens
        assert after.shape == before.tokens.shape
        (at,) = np.flatnonzero(after[0] == 7)
        own = slice(0, 1 + CONFIG.own_q)
        np.testing.assert_array_equal(
            after[own, at - BEFORE : at + 2 + AFTER], before.tokens[own, 90 - BEFORE : 92 + AFTER]
        )


def test_the_user_is_another_one() -> None:
    """If this fails, pieces are learnt as they are, or the user's words are lost."""
    before = piece()
    user = slice(1 + CONFIG.own_q, None)
    shares, moved = [], set()
    for seed in range(50):
        after = varied(before, CONFIG, np.random.default_rng(seed)).tokens
        assert (after[user].max() < CONFIG.card) and ((after == -1).all(axis=0) | (after[user] >= 0).all(axis=0)).all()
        (at,) = np.flatnonzero(after[0] == 7)
        moved.add(int(at))
        around = after[user, at - BEFORE : at + AFTER], before.tokens[user, 90 - BEFORE : 90 + AFTER]
        shares.append((around[0] == around[1]).mean(axis=1))
    semantic, acoustic = np.mean(shares, axis=0)[0], np.mean(shares, axis=0)[1:].mean()
    assert semantic > 0.93 > 0.85 > acoustic > 0.3
    assert len(moved) > 5


def test_it_depends_on_the_seed_alone() -> None:
    """If this fails, a training that goes on sees other pieces than one that was never stopped."""
    one, two = (varied(piece(), CONFIG, np.random.default_rng(3)).tokens for _ in range(2))
    np.testing.assert_array_equal(one, two)
