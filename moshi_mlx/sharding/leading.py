"""A generator's backend and rows on rank 0: the usual ones, which have the other ranks do the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..cpu.lm import Backend
from ..engine.choose import GenerationConfig, Team, choose_text, settings_of
from ..engine.rows import Rows
from ..layers.conditioning import TensorCondition
from ..models.lm import Lm
from ..state import State

if TYPE_CHECKING:
    from .leader import Leader

__all__ = ["FIRST", "LeadingBackend", "LeadingRows", "plain_condition"]

FIRST = 120.0
"""Seconds that an order may take which loads, compiles or moves much."""
_HEADS = ("keys", "values", "cross_keys", "cross_values")


class LeadingBackend(Backend):
    """A backend that has the other ranks step too.

    Attributes
    ----------
    rows : int
        The name of the generator's rows.
    names : tuple of int
        The conversations that step.
    """

    def __init__(self, lm: Lm, leader: Leader):
        super().__init__(lm, compiled=mx.default_device() != mx.cpu)
        self._leader = leader
        self.rows = 0
        self.names: tuple[int, ...] = ()
        self._began = 0.0
        self._seen: set[Any] = set()

    def run(self, function: Callable[..., Any], kind: Any, *args: Any) -> Any:
        if function is not choose_text:
            return super().run(function, kind, *args)
        self._began = time.monotonic()
        column, slots = np.array(args[0]["column"]), args[1]["transformer"]["0"]["keys"].shape[2]
        shape = (kind, column.shape, slots)
        first = shape not in self._seen  # it compiles
        self._seen.add(shape)
        what = {"rows": self.rows, "names": list(self.names), "column": column}
        self._leader.order("step", what, within=FIRST if first and self._compiled is not None else None)
        made = super().run(function, kind, *args)
        mx.async_eval(made["hidden"])  # all sums, even where nothing reads the last ones
        return made

    def fetch(self, state: State, *arrays: Any) -> list[Any]:
        found = super().fetch(state, *arrays)
        if self._began:
            self._leader.took(time.monotonic() - self._began)
            self._began = 0.0
        return found


class LeadingRows(Rows):
    """Rows that have the other ranks do the same with theirs.

    What may be refused is done here first. Snapshots have the heads of all ranks: they are the same with any number of
    machines.
    """

    def __init__(self, leader: Leader, lm: Lm, backend: LeadingBackend, config: GenerationConfig, kv_bits: int | None):
        super().__init__(lm, backend, config, kv_bits)
        self._leader, self._leading = leader, backend
        self._name = backend.rows = leader.new_name(self)
        default = settings_of(config).tolist()
        leader.order("new", {"rows": self._name, "kv_bits": kv_bits, "config": default})

    def team(self, names: tuple[int, ...]) -> Team:
        self._leading.names = names
        return super().team(names)

    def join(self, joining: Sequence[tuple[int, GenerationConfig, Any, Any]], pinned: int = 0) -> list[int]:
        names = super().join(joining, pinned)
        told = [
            [settings_of(config).tolist(), plain_condition(condition), plain_condition(null)]
            for _, config, condition, null in joining
        ]
        self._order("join", joining=told)
        return names

    def leave(self, name: int) -> None:
        super().leave(name)
        self._order("leave", name=name)

    def fill(self, name: int) -> None:
        super().fill(name)
        self._order("fill", name=name)

    def clear(self) -> None:
        super().clear()
        self._order("clear")

    def snapshot(self, names: Sequence[int]) -> State:
        snapshot = super().snapshot(names)
        what = {"rows": self._name, "names": list(names)}
        others = self._leader.ask("snapshot", what, within=FIRST)
        for part in ("lm", "null"):
            if part in snapshot:
                _gather_heads(snapshot[part]["transformer"], [other[part]["transformer"] for other in others])
        return snapshot

    def restore(self, snapshot: State, names: Sequence[int]) -> None:
        parts = self._parts(snapshot)
        super().restore(parts[0], names)
        self._order_parts("restore", parts, names=list(names))

    def adopt(self, snapshot: State) -> list[int]:
        parts = self._parts(snapshot)
        names = super().adopt(parts[0])
        self._order_parts("adopt", parts)
        return names

    def _order(self, kind: str, **what: Any) -> None:
        self._leader.order(kind, {"rows": self._name, **what}, within=FIRST)

    def _order_parts(self, kind: str, parts: list[State], **what: Any) -> None:
        bodies = [{"rows": self._name, "snapshot": part, **what} for part in parts[1:]]
        self._leader.order_each(kind, bodies, within=FIRST)

    def _parts(self, snapshot: State) -> list[State]:
        """Each rank's part of a snapshot; what does not fit is refused by who reads it."""
        size = self._leader.place.size
        heads: int = self._lm.transformer.layers[0].self_attn.kv_heads * size
        return [_take_heads(snapshot, rank, size, heads) for rank in range(size)]


def plain_condition(values: Mapping[str, Any] | None) -> Any:
    """Conditions as they are sent."""
    if values is None:
        return None
    return {
        name: {"tensor": value.tensor, "mask": value.mask} if isinstance(value, TensorCondition) else value
        for name, value in values.items()
    }


def _is_heads(name: str) -> bool:
    return name.startswith(_HEADS)


def _gather_heads(mine: State, others: Sequence[State]) -> None:
    """Put the heads of all ranks together, in place."""
    for number, layer in mine.items():
        for name in list(layer) if isinstance(layer, dict) else ():
            if _is_heads(name):
                parts = [layer[name], *(mx.array(other[number][name]) for other in others)]
                layer[name] = mx.concatenate(parts, axis=1)
                mx.eval(layer[name])


def _take_heads(tree: State, rank: int, size: int, heads: int) -> State:
    """A snapshot with the heads of one rank."""
    made: State = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            made[name] = _take_heads(value, rank, size, heads)
        elif _is_heads(name) and value.ndim == 4 and value.shape[1] % size == 0 and value.shape[1] >= heads:
            share = value.shape[1] // size
            made[name] = value[:, rank * share : (rank + 1) * share]
        else:
            made[name] = value
    return made
