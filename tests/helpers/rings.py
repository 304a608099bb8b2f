"""Rings full of what must not be read."""

from __future__ import annotations

import mlx.core as mx

from moshi_mlx.state import State

LOUD = 1e30
"""A value that only a weight of exactly zero hides."""


def fill_rings(state: State) -> State:
    """Put NaN into every key of a transformer's state, and :data:`LOUD` into every value; the same state."""
    for layer in state.values():
        for name, leaf in layer.items() if isinstance(layer, dict) else ():
            full = 0xFFFFFFFF if leaf.dtype == mx.uint32 else mx.nan if name.startswith("keys") else LOUD
            layer[name] = mx.full(leaf.shape, full, leaf.dtype)
    return state
