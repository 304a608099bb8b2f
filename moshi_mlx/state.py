"""The streaming contract, and the definition of a state.

A streaming module runs the same weights in two ways::

    y = module(x)                    # whole: a full sequence at once, differentiable
    state = module.init_state(batch) # stepwise: any number of new positions at a time
    y = module.step(x, state)        # reads and advances `state` in place

Given the same input, both give the same output (up to rounding), however the input is split. Weights live in the
module and never change while it streams; everything that does change is in the state, so one module serves any
number of sessions.

A state is a value: a tree of dicts whose leaves are arrays, ``mx.array`` or numpy, with the batch as their first axis;
positions and counters are leaves as well (int32 [batch]). So a row can be extracted, put into another state, joined
with others, saved to a file and read by another process (:func:`take_rows`, :func:`put_rows`,
:func:`concatenate_rows`, :func:`save_state`). The numpy and the MLX implementations share one schema, and
accept each other's states.

MLX modules replace leaves and never write into an array that may be shared; numpy modules write in place.
:func:`copy_state` is safe with both.

This module is independent of layers and models.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from .disk import replacing
from .errors import StateError

__all__ = [
    "State",
    "StateEntry",
    "as_mlx",
    "as_numpy",
    "concatenate_rows",
    "copy_state",
    "count_rows",
    "describe_state",
    "load_state",
    "put_rows",
    "read_state",
    "save_state",
    "state_arrays",
    "state_bytes",
    "take_rows",
    "update_state",
]

State = dict[str, Any]
"""A tree of dicts; leaves are ``mx.array`` or numpy arrays, batch first."""

Leaf: TypeAlias = "mx.array | np.ndarray[Any, Any]"

_FORMAT = "moshi-mlx-local state 2"
_FORMATS = "moshi-mlx-local state "


@dataclass(frozen=True)
class StateEntry:
    """One leaf of a state.

    Attributes
    ----------
    name : str
        Dotted path from the root.
    dtype : str
        MLX's or numpy's name for it, which are the same.
    shape : tuple of int
        Axes, batch first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def _leaves(state: State, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, name + ".")
        elif isinstance(value, (mx.array, np.ndarray)) and value.ndim:
            yield name, value
        else:
            raise StateError(f"state entry {name!r} is a {type(value).__name__}; only arrays, batch first, are allowed")


def _map(change: Callable[..., Any], state: State, *others: State) -> State:
    """Apply ``change`` to the leaves of a tree; ``others`` have the same structure."""
    made: State = {}
    for key, value in state.items():
        rest = [other[key] for other in others]
        made[key] = _map(change, value, *rest) if isinstance(value, dict) else change(value, *rest)
    return made


def state_arrays(state: State) -> list[Any]:
    """All leaves of a state, for ``mx.eval``."""
    return [value for _, value in _leaves(state)]


def state_bytes(state: State) -> int:
    """Memory held by the arrays of a state, in bytes."""
    return sum(array.nbytes for array in state_arrays(state))


def count_rows(state: State) -> int:
    """The length of the batch axis.

    Raises
    ------
    StateError
        If there are no leaves, or they differ in it.
    """
    found = {array.shape[0] for _, array in _leaves(state)}
    if len(found) != 1:
        raise StateError(f"the leaves of a state must have one batch axis in common, found lengths {sorted(found)}")
    return int(found.pop())


def describe_state(state: State) -> list[StateEntry]:
    """The schema of a state: one entry per leaf, in order."""
    return [
        StateEntry(name, str(value.dtype).removeprefix("mlx.core."), tuple(value.shape))
        for name, value in _leaves(state)
    ]


def copy_state(state: State) -> State:
    """A snapshot that later steps on ``state`` leave untouched.

    MLX's buffers are shared until one side advances: item assignment replaces the buffer of an array object, so the
    snapshot needs separate array objects, not separate buffers. Numpy arrays are copied.
    """

    def copy(leaf: Leaf) -> Leaf:
        return mx.reshape(leaf, leaf.shape) if isinstance(leaf, mx.array) else leaf.copy()

    return _map(copy, state)


def as_numpy(state: State) -> State:
    """A copy whose leaves are numpy arrays. numpy has no bfloat16: see :func:`as_mlx` for such states."""
    return _map(lambda leaf: np.array(leaf), state)


def as_mlx(state: State) -> State:
    """A copy whose leaves are MLX arrays."""
    return _map(lambda leaf: mx.array(leaf), state)


def take_rows(state: State, rows: Sequence[int]) -> State:
    """A new state with some rows, in the given order."""
    index = np.asarray(rows, np.int32)

    def take(leaf: Leaf) -> Leaf:
        return mx.take(leaf, mx.array(index), axis=0) if isinstance(leaf, mx.array) else leaf[index]

    return _map(take, state)


def put_rows(state: State, rows: Sequence[int], part: State) -> None:
    """Replace some rows of ``state``, in place, by those of ``part``, which may be of the other kind of array.

    Raises
    ------
    StateError
        If ``part`` has another schema or number of rows; ``state`` is unchanged then.
    """
    _check_schema(state, part, rows=len(rows))
    index = np.asarray(rows, np.int32)

    def put(leaf: Leaf, new: Leaf) -> Leaf:
        if isinstance(leaf, mx.array):
            leaf = mx.reshape(leaf, leaf.shape)
            leaf[mx.array(index)] = mx.array(new)
        else:
            leaf[index] = np.array(new)
        return leaf

    _assign(state, _map(put, state, part))


def concatenate_rows(states: Sequence[State]) -> State:
    """All rows of several states of one schema in one state, with the first one's kind of array.

    Raises
    ------
    StateError
        If the schemas differ, or ``states`` is empty.
    """
    if not states:
        raise StateError("there are no states to join")
    for other in states[1:]:
        _check_schema(states[0], other, rows=count_rows(other))

    def join(first: Leaf, *others: Leaf) -> Leaf:
        if isinstance(first, mx.array):
            return mx.concatenate([first, *(mx.array(other) for other in others)], axis=0)
        return np.concatenate([first, *(np.array(other) for other in others)], axis=0)

    return _map(join, *states)


def update_state(state: State, other: State) -> None:
    """Make ``state`` equal to ``other`` in place, after checking that both have the same schema.

    Raises
    ------
    StateError
        If a leaf is missing, left over, or has another dtype or shape; the first difference is named.
    """
    _check_schema(state, other)

    def like(mine: Leaf, its: Leaf) -> Leaf:
        return mx.array(its) if isinstance(mine, mx.array) else np.array(its)

    _assign(state, _map(like, state, other))


def _check_schema(state: State, other: State, rows: int | None = None) -> None:
    """Raise StateError if the schema of ``other`` is not that of ``state``, with ``rows`` rows if given."""
    mine, theirs = ({entry.name: entry for entry in describe_state(tree)} for tree in (state, other))
    if rows is not None:
        mine = {name: StateEntry(name, entry.dtype, (rows, *entry.shape[1:])) for name, entry in mine.items()}
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise StateError(
                f"the state does not fit this model or batch size: {name!r} should be "
                f"{mine.get(name, 'absent')}, found {theirs.get(name, 'nothing')}"
            )


def _assign(state: State, other: State) -> None:
    for key, value in other.items():
        if isinstance(value, dict):
            _assign(state[key], value)
        else:
            state[key] = value


def save_state(path: str | os.PathLike[str], state: State, metadata: dict[str, str] | None = None) -> None:
    """Write a state to a safetensors file, with a digest of its values.

    The file is written under a temporary name and moved into place, so that an interruption leaves the old one intact.
    """
    arrays = {name: mx.array(value) for name, value in _leaves(state)}
    header = {"format": _FORMAT, "digest": _digest(arrays), **(metadata or {})}
    try:
        with replacing(path, ".safetensors") as partial:
            mx.save_safetensors(str(partial), arrays, header)
    except (OSError, RuntimeError) as error:
        raise StateError(f"cannot write the state to {path}: {error}") from error


def load_state(path: str | os.PathLike[str], like: State | None = None) -> State:
    """Read a state written by :func:`save_state`.

    Parameters
    ----------
    path : path
        The file.
    like : State, optional
        A state of the same model and batch size, for instance a fresh one: its schema must match, and the result has
        its kind of array.

    Returns
    -------
    State
        Of MLX arrays if ``like`` is not given.

    Raises
    ------
    StateError
        If the file is missing, damaged or not a state, or belongs to another model or batch size.
    """
    state, _ = read_state(path)
    if like is None:
        return state
    expected, found = ({name for name, _ in _leaves(tree)} for tree in (like, state))
    for name in sorted(expected - found):
        raise StateError(f"{path} does not fit this model: {name!r} is missing")
    for name in sorted(found - expected):
        raise StateError(f"{path} does not fit this model: {name!r} is not part of its state")
    fresh = copy_state(like)
    update_state(fresh, state)
    return fresh


def read_state(path: str | os.PathLike[str]) -> tuple[State, dict[str, str]]:
    """A state written by :func:`save_state`, of MLX arrays, and its metadata.

    Raises
    ------
    StateError
        If the file is missing, damaged or not a state.
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
        if str(header.get("format")).startswith(_FORMATS):
            raise StateError(f"{source} was written by another version of this package, which this one cannot read")
        raise StateError(f"{source} is not a state written by this package")
    if header.get("digest") != _digest(arrays):
        raise StateError(f"{source} is damaged: its values are not those that were written")
    state: State = {}
    for name in sorted(arrays):
        node = state
        *parents, leaf = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise StateError(f"{source} is damaged: {name!r} is a part of an array")
        node[leaf] = arrays[name]
    return state, {str(key): str(value) for key, value in header.items()}


def _digest(arrays: dict[str, mx.array]) -> str:
    """SHA-256 of names, types, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        found.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        found.update(np.ascontiguousarray(np.array(mx.view(array, mx.uint8) if array.size else mx.zeros(0))).data)
    return found.hexdigest()
