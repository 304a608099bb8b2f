"""The streaming contract, and what a state is.

A streaming module has two ways through the same weights::

    y = module(x)                    # whole: a full sequence at once, differentiable
    state = module.init_state(batch) # stepwise: any number of new positions at a time
    y = module.step(x, state)        # reads and advances `state` in place

Fed the same input, both give the same output (up to rounding), however the input is cut. Weights live in the
module and never change while it streams; everything that does change is in the state, so one module serves any
number of sessions.

A state is a tree of dicts whose leaves are ``mx.array`` (batch first) or ``int`` (counters). Its size is fixed when
it is made: nothing grows with time. Modules replace leaves, they never write into an array that somebody else may
hold, so :func:`copy_state` costs nothing until one of the two copies advances.

This module knows no layer and no model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .errors import StateError

__all__ = [
    "State",
    "StateEntry",
    "copy_state",
    "describe_state",
    "load_state",
    "save_state",
    "state_arrays",
    "state_bytes",
    "update_state",
]

State = dict[str, Any]
"""A tree of dicts; leaves are ``mx.array`` or ``int``."""

_FORMAT = "moshi-mlx-local state 1"


@dataclass(frozen=True)
class StateEntry:
    """One leaf of a state.

    Attributes
    ----------
    name : str
        Dotted path from the root.
    dtype : str
        MLX dtype name, or ``"int"`` for a counter.
    shape : tuple of int
        Axes, batch first; empty for a counter.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


def _leaves(state: State, prefix: str = "") -> Iterator[tuple[str, mx.array | int]]:
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, name + ".")
        elif isinstance(value, (mx.array, int)):
            yield name, value
        else:
            raise StateError(f"state entry {name!r} is a {type(value).__name__}; only arrays and ints are allowed")


def state_arrays(state: State) -> list[mx.array]:
    """All arrays of a state, for ``mx.eval``."""
    return [value for _, value in _leaves(state) if isinstance(value, mx.array)]


def state_bytes(state: State) -> int:
    """Memory held by the arrays of a state, in bytes."""
    return sum(array.nbytes for array in state_arrays(state))


def describe_state(state: State) -> list[StateEntry]:
    """The written schema of a state: one entry per leaf, in order."""
    return [
        StateEntry(name, str(value.dtype).removeprefix("mlx.core."), tuple(value.shape))
        if isinstance(value, mx.array)
        else StateEntry(name, "int", ())
        for name, value in _leaves(state)
    ]


def copy_state(state: State) -> State:
    """A snapshot that later steps on ``state`` leave untouched.

    Buffers are shared until one side advances; item assignment replaces what an array object refers to, so the
    snapshot needs array objects of its own, not buffers of its own.
    """
    copy: State = {}
    for key, value in state.items():
        if isinstance(value, dict):
            copy[key] = copy_state(value)
        elif isinstance(value, mx.array):
            copy[key] = mx.reshape(value, value.shape)
        else:
            copy[key] = value
    return copy


def update_state(state: State, other: State) -> None:
    """Make ``state`` equal to ``other`` in place, after checking that both have the same schema.

    Raises
    ------
    StateError
        If a leaf is missing, left over, or has another dtype or shape; the first difference is named.
    """
    mine = {entry.name: entry for entry in describe_state(state)}
    theirs = {entry.name: entry for entry in describe_state(other)}
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise StateError(
                f"the state does not fit this model or batch size: {name!r} should be "
                f"{mine.get(name, 'absent')}, found {theirs.get(name, 'nothing')}"
            )
    _assign(state, copy_state(other))


def _assign(state: State, other: State) -> None:
    for key, value in other.items():
        if isinstance(value, dict):
            _assign(state[key], value)
        else:
            state[key] = value


def save_state(path: str | os.PathLike[str], state: State, metadata: dict[str, str] | None = None) -> None:
    """Write a state to a safetensors file; counters travel in its metadata.

    The file is written beside its final name and moved into place, so that an interruption leaves the old one whole.
    """
    target = Path(path)
    arrays: dict[str, mx.array] = {}
    counters: dict[str, int] = {}
    for name, value in _leaves(state):
        if isinstance(value, mx.array):
            arrays[name] = value
        else:
            counters[name] = value
    partial = target.with_name(f".{target.stem}.{os.getpid()}.safetensors")
    header = {"format": _FORMAT, "counters": json.dumps(counters), **(metadata or {})}
    try:
        mx.save_safetensors(str(partial), arrays, header)
        os.replace(partial, target)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise StateError(f"cannot write the state to {target}: {error}") from error


def load_state(path: str | os.PathLike[str], like: State) -> State:
    """Read a state written by :func:`save_state`.

    Parameters
    ----------
    path : path
        The file.
    like : State
        A state of the same model and batch size, for instance a fresh one: its schema must match.

    Raises
    ------
    StateError
        If the file is not a state, or belongs to another model or batch size.
    """
    source = Path(path)
    if not source.is_file():
        raise StateError(f"{source}: no such state file")
    try:
        loaded: Any = mx.load(str(source), format="safetensors", return_metadata=True)
        arrays, header = loaded
        mx.eval(arrays)
    except (RuntimeError, ValueError) as error:
        raise StateError(f"{source} is not a readable state file: {error}") from error
    if header.get("format") != _FORMAT:
        raise StateError(f"{source} is not a state written by this package")
    try:
        counters = json.loads(header.get("counters", ""))
    except ValueError:
        counters = None
    if not isinstance(counters, dict):
        raise StateError(f"{source} is damaged: its counters cannot be read")
    state: State = {}
    leaves: dict[str, Any] = {**arrays, **counters}
    for name, _ in _leaves(like):
        if name not in leaves:
            raise StateError(f"{source} does not fit this model: {name!r} is missing")
        node = state
        *parents, leaf = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = leaves.pop(name)
    if leaves:
        raise StateError(f"{source} does not fit this model: {sorted(leaves)[0]!r} is not part of its state")
    fresh = copy_state(like)
    update_state(fresh, state)
    return fresh
