"""How much memory a training step takes: calculated from shapes before it begins, and measured in one step.

With recomputed layers a step holds the weights, four numbers in float32 for every trained one (itself, its gradient and
Adam's two means), the inputs of all layers, and the insides of the one layer that is being differentiated; or the
logits, if they are larger.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from moshi_mlx.errors import ConfigError
from moshi_mlx.models.lm import Lm

from .adapters import adapted_sizes, flat, trained_tables
from .trainer import Plan

__all__ = ["Need", "calculate", "fit_frames", "memory_limit"]

SHORTEST = 25
"""Frames: two seconds. Shorter pieces teach nothing that lasts longer than a word."""
_FREE_SHARE = 0.75  # of the memory of a machine whose GPU does not say how much it grants


@dataclass(frozen=True)
class Need:
    """Bytes of a training step.

    Attributes
    ----------
    weights : int
        Of the frozen model.
    trained : int
        Parameters, gradient, optimizer.
    saved : int
        What layers keep for the backward pass.
    working : int
        The largest piece of work: a layer's insides, or the logits.
    """

    weights: int
    trained: int
    saved: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.saved + self.working


def memory_limit(gigabytes: float | None = None) -> int:
    """Bytes that training may take: what was asked for, what Metal grants, or three quarters of the machine's."""
    if gigabytes is not None:
        return int(gigabytes * 1e9)
    granted = int(mx.device_info().get("max_recommended_working_set_size", 0))
    return granted or int(_FREE_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def calculate(lm: Lm, plan: Plan, frames: int) -> Need:
    """Memory of a step on ``plan.batch`` pieces of so many frames; nothing is evaluated.

    Parameters
    ----------
    lm : Lm
        Before or after the update was added.
    plan : Plan
    frames : int
    """
    config, wide = lm.config, lm.dtype.size
    rows = plan.batch * frames
    parameters = flat(lm.parameters())
    weights = sum(value.nbytes for name, value in parameters.items() if not name.endswith((".lora_a", ".lora_b")))
    count = sum(plan.adapter.rank * (inputs + outputs) for inputs, outputs in adapted_sizes(lm, plan.adapter))
    if plan.adapter.embeddings:
        count += sum(rows_ * config.dim for rows_ in _table_rows(lm))
    trained = count * (16 + (wide if wide < 4 else 0))
    layer = rows * wide * _insides(config.dim, config.hidden, config.num_heads, frames)
    kept = config.num_layers * (rows * config.dim * wide if plan.recompute else layer)
    logits = rows * config.text_out * 4 * 4
    working = layer
    if config.dep_q:
        steps = rows * config.dep_q
        depth = steps * wide * _insides(
            config.depformer_dim, max(config.depth_hidden), config.depformer_num_heads, config.dep_q
        )  # fmt: skip
        kept += config.depformer_num_layers * (steps * config.depformer_dim * wide if plan.recompute else depth)
        logits += steps * config.card * 4 * 4
        working = max(working, depth)
    return Need(weights, trained, kept, max(working, logits))


def _insides(dim: int, hidden: int, heads: int, keys: int) -> int:
    """Numbers that a layer holds for one position while it is differentiated.

    Forward: two norms, queries, keys and values as projected and as rotated, attention, two sums (12 ``dim``) and the
    feed-forward layer (4 ``hidden``); every linear layer's output once more for its update (5 ``dim``, 2 ``hidden``);
    attention's weights. Backward: as many gradients, of which about half are alive at once.
    """
    return int(1.5 * (17 * dim + 6 * hidden + 2 * heads * keys))


def _table_rows(lm: Lm) -> list[int]:
    return [int(table.weight.shape[0]) for _, table in trained_tables(lm)]


def fit_frames(lm: Lm, plan: Plan, frames: int, limit: int) -> int:
    """The length of pieces, at most ``frames``, that fits into ``limit`` bytes by calculation.

    Raises
    ------
    ConfigError
        If two seconds do not fit.
    """
    length = frames
    while length > SHORTEST and calculate(lm, plan, length).total > limit:
        length = max(SHORTEST, int(length * 0.9))
    need = calculate(lm, plan, length)
    if need.total > limit:
        raise ConfigError(
            f"training needs {need.total / 1e9:.1f} GB even for pieces of two seconds ({need.weights / 1e9:.1f} GB "
            f"of them for the model), and {limit / 1e9:.1f} GB may be used: take the model in 4 bits "
            "(moshi-mlx-quantize), a smaller --batch or --rank, or give more with --memory"
        )
    return length


def measured(trainer: Any, frames: int) -> int:
    """Peak memory of one step's gradient on random tokens, in bytes; nothing is trained.

    What else the process holds, another model for instance, is not counted.
    """
    mx.clear_cache()
    beside = max(0, mx.get_active_memory() - int(trainer.nbytes))
    mx.reset_peak_memory()
    trainer.trial(frames)
    return int(mx.get_peak_memory()) - beside
