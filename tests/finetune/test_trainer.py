"""The step: recomputed layers, batches, memory by calculation, and two processes as one."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from moshi_mlx_finetune.data.pieces import Piece
from moshi_mlx_finetune.learn.adapters import Adapter, flat
from moshi_mlx_finetune.learn.memory import calculate, measured
from moshi_mlx_finetune.learn.trainer import Plan, Trainer, batches_of

from moshi_mlx.config import LmConfig, ModelConfig
from moshi_mlx.models.lm import Lm

from ..helpers.checkpoints import small_config


def trainer(**changes: Any) -> Trainer:
    mx.random.seed(0)
    plan = Plan(**{"steps": 10, "rate": 0.01, "adapter": Adapter(rank=2), **changes})
    return Trainer(Lm(ModelConfig.from_dict(small_config()).lm), plan)


def pieces(count: int, config: LmConfig, frames: int = 12, real: int = 12) -> list[Piece]:
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        tokens = rng.integers(0, 60, (config.num_streams, frames)).astype(np.int32)
        tokens[:, real:] = -1
        made.append(Piece(tokens, f"piece {number}"))
    return made


def test_recomputed_layers_give_the_same_update() -> None:
    """If this fails, memory is saved at the price of other gradients."""
    reached = []
    for recompute in (True, False):
        made = trainer(recompute=recompute, batch=2)
        learnt = pieces(4, made.lm.config)
        for step in range(3):
            made.step(batches_of(learnt, made.plan, step))
        reached.append(made.parameters)
    for name, value in reached[0].items():
        np.testing.assert_allclose(np.array(value), np.array(reached[1][name]), atol=1e-5, err_msg=name)


def test_only_the_update_is_trained() -> None:
    """If this fails, weights of the base move, which the file does not hold."""
    made = trainer()
    before = {name: mx.array(value) for name, value in flat(made.lm.parameters()).items()}
    made.step([pieces(1, made.lm.config)])
    for name, value in flat(made.lm.parameters()).items():
        same = mx.array_equal(value, before[name]).item()
        assert same != name.endswith(("lora_a", "lora_b")), name


def test_what_is_masked_is_left_out() -> None:
    """If this fails, a short piece costs a whole one, or the last codes of delayed streams are not learnt."""
    made = trainer()
    config = made.lm.config
    (short,) = pieces(1, config, frames=40, real=10)
    tokens, _ = made._arrays([short])
    assert tokens.shape[2] == 10 + max(config.delays)
    padded = made._loss(made._masters, mx.array(short.tokens[None]), None)[1]
    trimmed = made._loss(made._masters, tokens, None)[1]
    np.testing.assert_allclose(np.array(padded), np.array(trimmed), rtol=1e-5)


def test_batches_depend_on_the_step_alone() -> None:
    """If this fails, a training that goes on sees other pieces, or a pass leaves some out."""
    plan = Plan(batch=2, accumulate=2)
    made = pieces(6, ModelConfig.from_dict(small_config()).lm, frames=3, real=3)
    seen = [piece.name for step in range(3) for batch in batches_of(made, plan, step) for piece in batch]
    assert sorted(seen[:6]) == sorted(piece.name for piece in made) == sorted(seen[6:])
    assert seen[:6] != seen[6:]
    # Two processes take together what one takes that accumulates twice as much.
    both = [batch for rank in (0, 1) for batch in batches_of(made, Plan(batch=2, accumulate=1), 1, rank, 2)]
    assert [[p.name for p in batch] for batch in both] == [
        [p.name for p in batch] for batch in batches_of(made, plan, 1)
    ]


@pytest.mark.parametrize("recompute", [True, False])
def test_calculated_memory_is_near_what_is_measured(recompute: bool) -> None:
    """If this fails, pieces are made shorter without need, or a step takes much more than was asked for."""
    mx.random.seed(0)
    config = small_config(dim=256, num_layers=4, text_card=2000, depformer_dim=128, depformer_dim_feedforward=384)
    lm = Lm(ModelConfig.from_dict(config).lm)
    plan = Plan(recompute=recompute, adapter=Adapter(rank=4))
    made = Trainer(lm, plan)
    for frames in (25, 100):
        found, need = measured(made, frames), calculate(lm, plan, frames).total
        assert 0.5 < found / need < 1.6, (frames, found, need)


def test_other_memory_is_not_counted() -> None:
    """If this fails, a program that holds another model beside the training gets shorter pieces, or none."""
    made = trainer()
    alone = measured(made, 25)
    beside = mx.zeros((4_000_000,))
    mx.eval(beside)
    assert measured(made, 25) == pytest.approx(alone, rel=0.1)
    del beside
