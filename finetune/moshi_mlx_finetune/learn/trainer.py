"""One step after the other: AdamW on the trained parameters, in float32, of a model that is frozen otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from moshi_mlx.checkpoint.readers import read_safetensors, write_safetensors
from moshi_mlx.errors import CheckpointError, ConfigError
from moshi_mlx.models.lm import Lm
from moshi_mlx.sharding.training import DataParallel

from ..data.pieces import Piece
from .adapters import Adapter, add_adapter, flat
from .loss import Weights, losses
from .schedule import one_cycle

__all__ = ["Figures", "Plan", "Trainer", "batches_of"]

BETA2, EPSILON = 0.95, 1e-8


@dataclass(frozen=True)
class Plan:
    """How a model is trained; defaults are moshi-finetune's but for the rank.

    Attributes
    ----------
    steps : int
        Updates of the parameters.
    rate : float
        Largest learning rate.
    rising : float
        Share of the steps in which it rises.
    decay : float
        AdamW's weight decay.
    clip : float
        Largest norm of a gradient.
    batch, accumulate : int
        Pieces at once, and how often before an update.
    weights : Weights
    adapter : Adapter
    recompute : bool
        Whether layers compute their insides again in the backward pass.
    seed : int
        Of the update's initial values and of the pieces' order.
    """

    steps: int = 100
    rate: float = 1e-4
    rising: float = 0.05
    decay: float = 0.1
    clip: float = 1.0
    batch: int = 1
    accumulate: int = 1
    weights: Weights = field(default_factory=Weights)
    adapter: Adapter = field(default_factory=Adapter)
    recompute: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Figures:
    """What a step, or a validation, gave.

    Attributes
    ----------
    text, audio : float
        Losses; their sum is what is minimised.
    norm : float
        Of the gradient before it was clipped.
    rate : float
        Learning rate.
    """

    text: float
    audio: float
    norm: float = 0.0
    rate: float = 0.0

    @property
    def loss(self) -> float:
        return self.text + self.audio


def batches_of(pieces: Sequence[Piece], plan: Plan, step: int, rank: int = 0, processes: int = 1) -> list[list[Piece]]:
    """The pieces of a step: ``accumulate`` batches, depending on the arguments alone.

    Every pass over the pieces has an order of its own. Of several processes each takes its part of a step.
    """
    size = plan.batch * plan.accumulate
    first = (step * processes + rank) * size
    chosen = [
        pieces[_order(len(pieces), at // len(pieces), plan.seed)[at % len(pieces)]] for at in range(first, first + size)
    ]
    return [chosen[at : at + plan.batch] for at in range(0, size, plan.batch)]


def _order(count: int, turn: int, seed: int) -> Sequence[int]:
    order: list[int] = np.random.default_rng([seed, turn]).permutation(count).tolist()
    return order


class Trainer:
    """A model, what of it is trained, and the optimizer.

    Parameters
    ----------
    lm : Lm
        Changed in place: its linear layers get their updates.
    plan : Plan
    ranks : DataParallel, optional
        Processes that take a step together, each on its own batches.
    """

    def __init__(self, lm: Lm, plan: Plan, ranks: DataParallel | None = None):
        add_adapter(lm, plan.adapter, plan.seed)
        self.lm, self.plan = lm, plan
        self.ranks = ranks or DataParallel()
        self.step_count = 0
        lm.transformer.recompute = plan.recompute
        if lm.config.dep_q:
            lm.depformer.recompute = plan.recompute
        self.optimizer = optim.AdamW(
            plan.rate, betas=[0.9, BETA2], eps=EPSILON, weight_decay=plan.decay, bias_correction=True
        )
        self._masters: Any = lm.trainable_parameters()
        self.optimizer.init(self._masters)
        mx.eval(self._masters, self.optimizer.state)
        dtype = lm.dtype

        def loss(parameters: Any, tokens: mx.array, condition: Any) -> tuple[mx.array, mx.array]:
            lm.update(tree_map(lambda value: value.astype(dtype), parameters))
            text, audio = losses(lm, tokens, plan.weights, condition)
            return text + audio, mx.stack([text, audio])

        self._gradient = mx.value_and_grad(loss)
        self._loss = loss

    @property
    def parameters(self) -> dict[str, mx.array]:
        """What is trained, by name, in float32."""
        return flat(self._masters)

    @property
    def nbytes(self) -> int:
        """Bytes of the model, of what is trained and of the optimizer's means."""
        arrays = [*flat(self.lm.parameters()).values(), *self.parameters.values(), *flat(self.optimizer.state).values()]
        return sum({id(array): array.nbytes for array in arrays}.values())

    def step(self, batches: Sequence[Sequence[Piece]]) -> Figures:
        """One update from the mean gradient of some batches.

        Raises
        ------
        ConfigError
            If the loss is not finite.
        """
        plan, total, seen = self.plan, None, np.zeros(2)
        for batch in batches:
            (_, both), gradient = self._gradient(self._masters, *self._arrays(batch))
            total = gradient if total is None else tree_map(mx.add, total, gradient)
            mx.eval(total, both)
            seen += np.array(both)
        self.lm.update(self._masters)
        gradient = tree_map(lambda value: value / len(batches), total)
        _, gradient = self.ranks.average(mx.array(0.0), gradient)
        gradient, norm = optim.clip_grad_norm(gradient, plan.clip)
        mx.eval(norm)
        if not np.isfinite(norm.item()):
            raise ConfigError(
                f"step {self.step_count + 1}: the gradient is not finite: train with a smaller rate (--rate), and "
                "look at the recordings with 'moshi-mlx-finetune prepare'"
            )
        rate, beta = one_cycle(self.step_count, plan.steps, plan.rate, plan.rising)
        self.optimizer.learning_rate = rate
        self.optimizer.betas = [beta, BETA2]
        self._masters = self.optimizer.apply_gradients(gradient, self._masters)
        mx.eval(self._masters, self.optimizer.state)
        self.lm.update(self._masters)
        self.step_count += 1
        text, audio = self.ranks.mean(seen / len(batches))
        return Figures(text, audio, float(norm.item()), rate)

    def trial(self, frames: int) -> None:
        """Compute a gradient of random tokens, and throw it away."""
        config, rng = self.lm.config, np.random.default_rng(0)
        audio = rng.integers(0, config.card, (self.plan.batch, config.n_q, frames))
        text = rng.integers(0, config.text_out, (self.plan.batch, 1, frames))
        pieces = [Piece(tokens.astype(np.int32), "") for tokens in np.concatenate([text, audio], axis=1)]
        _, gradient = self._gradient(self._masters, *self._arrays(pieces))
        mx.eval(gradient)
        self.lm.update(self._masters)

    def evaluate(self, pieces: Sequence[Piece]) -> Figures:
        """Mean losses of pieces, one after the other."""
        seen = np.zeros(2)
        for piece in pieces:
            _, both = self._loss(self._masters, *self._arrays([piece]))
            mx.eval(both)
            seen += np.array(both)
        self.lm.update(self._masters)
        text, audio = seen / max(1, len(pieces))
        return Figures(float(text), float(audio))

    def _arrays(self, batch: Sequence[Piece]) -> tuple[mx.array, Any]:
        tokens = np.stack([piece.tokens for piece in batch])
        # What no piece reaches is left out, but for the delays, in which the last codes are predicted.
        used = max(piece.frames for piece in batch) + max(self.lm.config.delays)
        conditions = [piece.conditions or {} for piece in batch]
        condition = self.lm.condition(conditions) if any(conditions) or self.lm.config.conditioners else None
        return mx.array(tokens[:, :, :used]), condition

    def follow(self) -> None:
        """Take rank 0's parameters, optimizer and step."""
        self._masters = self.ranks.from_leader(self._masters)
        self.optimizer.state = self.ranks.from_leader(self.optimizer.state)
        self.step_count = int(self.ranks.from_leader(mx.array(self.step_count)).item())
        self.lm.update(self._masters)

    def save(self, path: Path, **extra: Any) -> None:
        """Write parameters, optimizer and counters: whole or not at all."""
        arrays = {f"model.{name}": value for name, value in self.parameters.items()}
        arrays |= {f"optimizer.{name}": value for name, value in flat(self.optimizer.state).items()}
        about = {"step": str(self.step_count), "plan": plan_text(self.plan), "extra": json.dumps(extra)}
        write_safetensors(path, arrays, about)

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from what :meth:`save` wrote; returns its ``extra``.

        Raises
        ------
        CheckpointError, ConfigError
            If it is damaged, or of another plan or model.
        """
        arrays, about = read_safetensors(path)
        if "plan" not in about:
            raise CheckpointError(f"{path} is no state of a training: remove it")
        wrong = [key for key, value in _differences(json.loads(about["plan"]), json.loads(plan_text(self.plan)))]
        if wrong:
            raise ConfigError(f"{path} is of a training with other settings ({', '.join(wrong)}): give the same ones")
        mine = {name.removeprefix("model."): value for name, value in arrays.items() if name.startswith("model.")}
        expected = {name: value.shape for name, value in self.parameters.items()}
        if {name: value.shape for name, value in mine.items()} != expected:
            raise CheckpointError(f"{path} is of another model: name another folder")
        state = [(name.removeprefix("optimizer."), v) for name, v in arrays.items() if name.startswith("optimizer.")]
        self._masters = tree_unflatten(list(mine.items()))
        self.optimizer.state = tree_unflatten(state)
        mx.eval(self._masters, self.optimizer.state)
        self.lm.update(self._masters)
        self.step_count = int(about["step"])
        extra: dict[str, Any] = json.loads(about["extra"])
        return extra


def plan_text(plan: Plan) -> str:
    """A plan as JSON."""
    return json.dumps(asdict(plan), sort_keys=True)


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in sorted(one.keys() | other.keys()):
        if isinstance(one.get(key), dict) and isinstance(other.get(key), dict):
            yield from _differences(one[key], other[key])
        elif one.get(key) != other.get(key):
            yield key, other.get(key)
