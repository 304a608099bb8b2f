"""Causal self-attention over a fixed ring of past keys, and attention to a conditioning sequence.

A full ring has exactly ``context`` slots: position p is kept in slot ``p % context``, rotated by its absolute position,
and overwritten ``context`` positions later. The order of keys does not matter to a softmax, so a full ring is read
as it is; nothing is trimmed or moved. While all conversations are short the ring may have fewer slots, and
position p takes slot p: :func:`resize_rings` changes their number.

Pinned positions stay when the ring wraps ("attention sinks", Xiao et al. 2023, https://arxiv.org/abs/2309.17453): the
first ``pinned`` slots are never written again, and the rest is the ring. As in that paper their distance stops growing:
a query that is further from position 0 than the context reaches sees them as one at position ``context - 1`` would.
Until a row has more positions than the context, nothing of this makes a difference.

Every row of a batch has a position of its own. What is computed has the same shape for all of them: a mask hides the
slots that a row has not written, or may no longer see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ConfigError, StateError
from ..state import State

__all__ = [
    "Attention",
    "CrossAttention",
    "Rope",
    "Window",
    "resize_rings",
    "resize_sources",
    "trim_rings",
    "window_mask",
]


class Rope:
    """Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), computed in float32.

    Parameters
    ----------
    interleaved : bool
        Pairs are (2i, 2i+1) if true (``rope``), (i, i + d/2) otherwise (``rope_concat``).
    max_period : float
        Base of the geometric progression of wavelengths.
    """

    def __init__(self, interleaved: bool = True, max_period: float = 10000.0):
        self.interleaved = interleaved
        self.max_period = float(max_period)

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """Rotate ``x`` [batch, heads, time, head_dim], whose first position is ``offset``, one or one a row."""
        return mx.fast.rope(
            x, x.shape[-1], traditional=self.interleaved, base=self.max_period, scale=1.0, offset=offset
        )


def window_mask(query_positions: np.ndarray, key_positions: np.ndarray, context: int | None) -> mx.array:
    """Which key each query may see: not later than itself, and fewer than ``context`` positions back.

    Returns
    -------
    mx.array [queries, keys], bool
    """
    delta = query_positions[:, None] - key_positions[None, :]
    mask = (delta >= 0) & (key_positions >= 0)[None, :]
    if context is not None:
        mask &= delta < context
    return mx.array(mask)


@dataclass(frozen=True)
class Window:
    """Where the new positions of each row are kept, and what they see: the same for all layers of a stack.

    Attributes
    ----------
    offset : mx.array [batch], int32
        The first new position of each row.
    slots : mx.array [batch, kv_heads, kept, width], int32
        Slots of the last ``kept`` new positions, the same along heads and width: as keys are written.
    mask : mx.array [batch, 1, time, keys], bool
        Keys that each new position sees: the ring's, after it is written if ``time`` is 1; the ring's before that and
        the new ones otherwise, since earlier queries of a chunk still need keys that later ones overwrite.
    active : mx.array [batch, 1, 1, 1], bool, or None
        Rows whose chunk counts. None: all, or a single position, for which nothing needs to be kept out.
    pinned : mx.array [batch, 1, 1, sinks], bool, or None
        Which of the first slots hold pinned positions, where a row with such positions has wrapped.
    shift : mx.array [batch], int32, or None
        What the position of a query that sees them differs by from ``offset``.
    """

    offset: mx.array
    slots: mx.array
    mask: mx.array
    active: mx.array | None = None
    pinned: mx.array | None = None
    shift: mx.array | None = None

    @classmethod
    def make(
        cls,
        offset: mx.array,
        time: int,
        keys: mx.array,
        context: int,
        active: mx.array | None = None,
        pinned: mx.array | None = None,
        sinks: int = 0,
    ) -> Window:
        """For ``time`` new positions and rings as that of ``keys``.

        Parameters
        ----------
        offset : mx.array [batch], int32
        time, context : int
        keys : mx.array [batch, kv_heads, size, width]
            A ring with fewer slots than ``context`` must hold all positions so far and the new ones.
        active : mx.array [batch], bool, or None
            Rows that advance. The result of another row is not read. Of a single position it also writes
            that, into the slot of its next position, which no query sees before it is written again: the slot holds
            nothing yet, or the position ``context`` before, which is out of the window. A chunk would write over
            slots that are still seen, so there the rows that wait keep theirs.
        pinned : mx.array [batch], int32, or None
            Positions that stay, for each row.
        sinks : int
            At least the largest of ``pinned`` once one of these rows has wrapped; 0 before that.
        """
        batch, heads, size, width = keys.shape
        if size < context and time > size:
            raise StateError(f"a ring of {size} slots cannot take {time} positions at once")
        index = mx.arange(size, dtype=mx.int32)
        if time == 1:
            mask = index <= offset[:, None]  # true everywhere once the ring is full
            if sinks and pinned is not None:
                slot = mx.where(offset < size, offset, pinned + (offset - pinned) % (size - pinned))
                slots = mx.broadcast_to(slot[:, None, None, None], (batch, heads, 1, width))
                held = (index[:sinks] < pinned[:, None])[:, None, None]
                shift = mx.minimum(offset, context - 1) - offset
                return cls(offset, slots, mask[:, None, None], pinned=held, shift=shift)
            slots = mx.broadcast_to((offset % size)[:, None, None, None], (batch, heads, 1, width))
            return cls(offset, slots, mask[:, None, None])
        if sinks:
            raise StateError("behind the context, a state with pinned positions takes one position at a time")
        kept = min(time, size)
        new = offset[:, None] + mx.arange(time, dtype=mx.int32)
        # Slot s holds the last position before `offset` that is congruent to it, or a negative one: nothing.
        last = offset[:, None] - 1
        positions = mx.concatenate([last - (last - index) % size, new], axis=1)[:, None]
        delta = new[:, :, None] - positions
        mask = (delta >= 0) & (delta < context) & (positions >= 0)
        slots = (new[:, time - kept :] % size)[:, None, :, None]
        slots = mx.broadcast_to(slots, (batch, heads, kept, width))
        return cls(offset, slots, mask[:, None], None if active is None else active[:, None, None, None])


class Attention(nn.Module):
    """Multi-head causal self-attention with a limited context.

    Parameters
    ----------
    dim : int
        Model width.
    num_heads : int
        Query heads; ``dim`` must be a multiple.
    context : int or None
        How many positions a query sees, itself included. None: all (whole sequences only).
    rope : Rope or None
        Position embedding of queries and keys.
    kv_repeat : int
        Query heads per key head (grouped-query attention, Ainslie et al. 2023).
    """

    def __init__(self, dim: int, num_heads: int, *, context: int | None, rope: Rope | None = None, kv_repeat: int = 1):
        super().__init__()
        if dim % num_heads or num_heads % kv_repeat:
            raise ConfigError(
                f"width {dim} must be a multiple of num_heads {num_heads}, and that of kv_repeat {kv_repeat}"
            )
        self.num_heads = num_heads
        self.kv_heads = num_heads // kv_repeat
        self.head_dim = dim // num_heads
        self.context = context
        self.scale = self.head_dim**-0.5
        self.rope = rope
        self.in_proj = nn.Linear(dim, dim + 2 * self.kv_heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def init_state(
        self, batch: int, dtype: mx.Dtype = mx.float32, kv_bits: int | None = None, slots: int | None = None
    ) -> State:
        """An empty ring, and the position that comes next.

        Parameters
        ----------
        batch, dtype, kv_bits, slots
            As for :meth:`init_ring`.
        """
        return {**self.init_ring(batch, dtype, kv_bits, slots), "offset": mx.zeros((batch,), mx.int32)}

    def init_ring(
        self, batch: int, dtype: mx.Dtype = mx.float32, kv_bits: int | None = None, slots: int | None = None
    ) -> State:
        """An empty ring.

        Parameters
        ----------
        batch : int
            Sequences that advance together.
        dtype : mx.Dtype
            Type of the stored keys and values (of their scales if quantized).
        kv_bits : {None, 8}
            8: keep keys and values in 8 bits (affine, groups along the head dimension).
        slots : int, optional
            Fewer than ``context`` (the default) as long as no row has more positions: see :func:`resize_rings`.
        """
        if self.context is None:
            raise ConfigError("streaming needs a limited context: set `context` in the configuration")
        shape = (batch, self.kv_heads, min(slots or self.context, self.context), self.head_dim)
        if kv_bits is None:
            return {"keys": mx.zeros(shape, dtype), "values": mx.zeros(shape, dtype)}
        if kv_bits != 8:
            raise ConfigError(f"kv_bits is None or 8, not {kv_bits}")
        group = _kv_group(self.head_dim)
        state: State = {}
        for name in ("keys", "values"):
            state[name] = mx.zeros((*shape[:3], self.head_dim // 4), mx.uint32)
            for part in ("scales", "biases"):
                state[f"{name}_{part}"] = mx.zeros((*shape[:3], self.head_dim // group), dtype)
        return state

    def __call__(self, x: mx.array) -> mx.array:
        """Attend over a whole sequence ``x`` [batch, time, dim] that starts at position 0."""
        queries, keys, values = self._project(x, 0)
        time = x.shape[1]
        mask: str | mx.array | None = "causal"
        if self.context is not None and time > self.context:
            positions = np.arange(time)
            mask = window_mask(positions, positions, self.context)
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=mask)
        return self._merge(out)

    def step(self, x: mx.array, state: State, window: Window | None = None) -> mx.array:
        """Attend from new positions ``x`` [batch, time, dim] to the ring and to themselves.

        Parameters
        ----------
        x : mx.array [batch, time, dim]
        state : State
            Its ring is written; its position advances if there is no ``window``.
        window : Window, optional
            From a caller that keeps the positions of several layers.
        """
        held = state["keys"].shape[0]
        if held != x.shape[0]:
            raise StateError(f"state holds {held} sequences, the input {x.shape[0]}")
        if window is None:
            assert self.context is not None
            offset = mx.array(state["offset"])
            window = Window.make(offset, x.shape[1], state["keys"], self.context)
            state["offset"] = offset + x.shape[1]
        queries, keys, values = self._project(x, window.offset)
        if "keys_scales" in state:
            return self._merge(self._attend_quantized(queries * self.scale, keys, values, state, window))
        all_keys = self.update_and_fetch(state, "keys", keys, window)
        all_values = self.update_and_fetch(state, "values", values, window)
        if window.pinned is not None:
            return self._merge(self._attend_pinned(queries * self.scale, all_keys, all_values, window))
        out = mx.fast.scaled_dot_product_attention(queries, all_keys, all_values, scale=self.scale, mask=window.mask)
        return self._merge(out)

    def extend(self, x: mx.array, cache: Any, mask: Any) -> mx.array:
        """Attend from new positions ``x`` [batch, time, dim] to a cache of mlx-lm's and to themselves.

        Parameters
        ----------
        x : mx.array [batch, time, dim]
        cache : mlx_lm.models.cache.KVCache or BatchKVCache
            Written.
        mask : mx.array, str or None
            From the cache, for ``time`` positions.
        """
        queries, keys, values = self._project(x, cache.offset)
        keys, values = cache.update_and_fetch(keys, values)
        return self._merge(mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=mask))

    def update_and_fetch(self, state: State, name: str, new: mx.array, window: Window) -> mx.array:
        """Put ``new`` [batch, kv_heads, time, ...] into the ring ``state[name]``; all that ``window.mask`` is about."""
        ring = state[name]
        new = new.astype(ring.dtype)
        kept = new[:, :, new.shape[2] - window.slots.shape[2] :]
        slots = window.slots
        if slots.shape[3] != kept.shape[3]:
            slots = mx.broadcast_to(slots[..., :1], kept.shape)
        if window.active is not None:
            kept = mx.where(window.active, kept, mx.take_along_axis(ring, slots, axis=2))
        state[name] = mx.put_along_axis(ring, slots, kept, axis=2)
        return state[name] if new.shape[2] == 1 else mx.concatenate([ring, new], axis=2)

    def _turned(self, queries: mx.array, window: Window) -> mx.array:
        """Queries as they see pinned positions."""
        assert window.shift is not None
        return queries if self.rope is None else self.rope(queries, window.shift)

    def _attend_pinned(self, queries: mx.array, keys: mx.array, values: mx.array, window: Window) -> mx.array:
        """From one new position (queries scaled) to a ring with pinned positions."""
        assert window.pinned is not None
        batch, sinks = queries.shape[0], window.pinned.shape[3]
        shape = (batch, self.kv_heads, self.num_heads // self.kv_heads, self.head_dim)
        scores = queries.reshape(shape) @ keys.swapaxes(2, 3)
        far = self._turned(queries, window).reshape(shape) @ keys[:, :, :sinks].swapaxes(2, 3)
        weights = _softmax_pinned(scores, far, window)
        return (weights @ values).reshape(batch, self.num_heads, 1, self.head_dim)

    def _project(self, x: mx.array, offset: int | mx.array) -> tuple[mx.array, mx.array, mx.array]:
        batch, time, _ = x.shape
        heads, kv_heads = self.num_heads, self.kv_heads
        projected, all_heads = self.in_proj(x), heads + 2 * kv_heads
        if time == 1:  # the same memory, by one operation less
            projected = projected.reshape(batch, all_heads, 1, self.head_dim)
        else:
            projected = projected.reshape(batch, time, all_heads, self.head_dim).transpose(0, 2, 1, 3)
        rotated, values = mx.split(projected, [heads + kv_heads], axis=1)
        if self.rope is not None:
            rotated = self.rope(rotated, offset)
        queries, keys = mx.split(rotated, [heads], axis=1)
        return queries, keys, values

    def _merge(self, out: mx.array) -> mx.array:
        batch, _, time, _ = out.shape
        if time > 1:
            out = out.transpose(0, 2, 1, 3)
        merged: mx.array = self.out_proj(out.reshape(batch, time, -1))
        return merged

    def _attend_quantized(
        self, queries: mx.array, keys: mx.array, values: mx.array, state: State, window: Window
    ) -> mx.array:
        """From new positions (queries scaled) to a ring in 8 bits and to themselves.

        New positions are quantized first, so that every cut gives one result.
        """
        time, group = queries.shape[2], _kv_group(self.head_dim)
        (kw, ks, kb), (vw, vs, vb) = (
            [
                self.update_and_fetch(state, key, part, window)
                for key, part in zip(
                    (name, f"{name}_scales", f"{name}_biases"), mx.quantize(new, group_size=group, bits=8), strict=True
                )
            ]
            for name, new in (("keys", keys), ("values", values))
        )
        batch, repeat = queries.shape[0], self.num_heads // self.kv_heads
        grouped = queries.reshape(batch, self.kv_heads, repeat * time, self.head_dim)
        scores = mx.quantized_matmul(grouped, kw, ks, kb, transpose=True, group_size=group, bits=8)
        if window.pinned is not None:
            sinks = window.pinned.shape[3]
            turned = self._turned(queries, window).reshape(grouped.shape)
            far = mx.quantized_matmul(
                turned,
                kw[:, :, :sinks],
                ks[:, :, :sinks],
                kb[:, :, :sinks],
                transpose=True,
                group_size=group,
                bits=8,
            )
            weights = _softmax_pinned(scores, far, window)
            out = mx.quantized_matmul(weights, vw, vs, vb, transpose=False, group_size=group, bits=8)
            return out.reshape(batch, self.num_heads, time, self.head_dim)
        mask = window.mask if time == 1 else mx.tile(window.mask, (1, 1, repeat, 1))
        scores = mx.where(mask, scores, mx.array(-mx.inf, scores.dtype))
        weights = mx.softmax(scores, axis=-1, precise=True)
        out = mx.quantized_matmul(weights, vw, vs, vb, transpose=False, group_size=group, bits=8)
        return out.reshape(batch, self.num_heads, time, self.head_dim)


def _softmax_pinned(scores: mx.array, far: mx.array, window: Window) -> mx.array:
    """Weights from scores [batch, kv_heads, queries, slots], and those of the first slots as pinned positions."""
    assert window.pinned is not None
    sinks = far.shape[3]
    first = mx.where(window.pinned, far, scores[..., :sinks])
    scores = mx.concatenate([first, scores[..., sinks:]], axis=-1)
    scores = mx.where(window.mask, scores, mx.array(-mx.inf, scores.dtype))
    return mx.softmax(scores, axis=-1, precise=True)


class CrossAttention(nn.Module):
    """Attention from every position to one fixed conditioning sequence: no causal mask, no position embedding.

    Keys and values of the source are computed once, by :meth:`project_source`.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def project_source(self, source: mx.array) -> State:
        """Keys and values [batch, heads, slots, head_dim] of ``source`` [batch, slots, dim]."""
        width = self.num_heads * self.head_dim
        projected = self._linear(source, width, 3 * width)
        keys, values = mx.split(projected, 2, axis=-1)
        return {"cross_keys": self._heads(keys), "cross_values": self._heads(values)}

    def __call__(self, x: mx.array, source: State, mask: mx.array | None = None) -> mx.array:
        """Attend from ``x`` [batch, time, dim] to a projected source.

        ``mask`` [batch, 1, 1, slots], bool, tells the slots of each row from padding. None: all are real.
        """
        queries = self._heads(self._linear(x, 0, self.num_heads * self.head_dim))
        out = mx.fast.scaled_dot_product_attention(
            queries, source["cross_keys"], source["cross_values"], scale=self.scale, mask=mask
        )
        batch, _, time, _ = out.shape
        merged: mx.array = self.out_proj(out.transpose(0, 2, 1, 3).reshape(batch, time, -1))
        return merged

    def _heads(self, x: mx.array) -> mx.array:
        batch, time, _ = x.shape
        return x.reshape(batch, time, self.num_heads, self.head_dim).transpose(0, 2, 1, 3)

    def _linear(self, x: mx.array, start: int, stop: int) -> mx.array:
        """``x`` times rows start..stop of the fused projection, dense or quantized."""
        layer: Any = self.in_proj
        if isinstance(layer, nn.QuantizedLinear):
            biases = layer.get("biases")
            return mx.quantized_matmul(
                x,
                layer.weight[start:stop],
                scales=layer.scales[start:stop],
                biases=None if biases is None else biases[start:stop],
                transpose=True,
                group_size=layer.group_size,
                bits=layer.bits,
                mode=layer.mode,
            )
        out: mx.array = x @ layer.weight[start:stop].T
        return out


def _kv_group(head_dim: int) -> int:
    for group in (64, 32):
        if head_dim % group == 0:
            return group
    raise ConfigError(f"an 8-bit cache needs a head dimension that is a multiple of 32, not {head_dim}")


def resize_rings(state: State, slots: int) -> None:
    """Change the number of slots of the rings of a transformer's state, in place.

    Slots that are added hold zeros. Those taken away must hold nothing: no row has as many positions as ``slots``, or
    the rings keep all of their context. Leaves may be of either kind of array.
    """
    _change(state, ("keys", "values"), lambda leaf: _fit(leaf, slots))


def resize_sources(state: State, slots: int) -> None:
    """The same for conditioning sequences, whose slots beyond each row's own are padding."""
    _change(state, ("cross_keys", "cross_values"), lambda leaf: _fit(leaf, slots))


def trim_rings(state: State, positions: np.ndarray) -> None:
    """Set a transformer's state, in place, to ``positions`` [batch]; slots that hold nothing then are set to zero.

    What is masked is multiplied by zero, which hides all but infinity and NaN.
    """

    def trim(leaf: Any) -> Any:
        written = (np.arange(leaf.shape[2]) < positions[:, None])[:, None, :, None]
        if isinstance(leaf, mx.array):
            return mx.where(mx.array(written), leaf, mx.array(0, leaf.dtype))
        return np.where(written, leaf, np.zeros((), leaf.dtype))

    _change(state, ("keys", "values"), trim)
    offset = positions.astype(np.int32)
    state["offset"] = mx.array(offset) if isinstance(state["offset"], mx.array) else offset


def _change(state: State, names: tuple[str, str], change: Callable[[Any], Any]) -> None:
    """Replace the leaves of each layer whose names begin so."""
    for layer in state.values():
        for name in [name for name in layer if name.startswith(names)] if isinstance(layer, dict) else ():
            layer[name] = change(layer[name])


def _fit(leaf: Any, slots: int) -> Any:
    """``leaf`` [batch, heads, n, ...] with ``slots`` instead of n entries: cut, or filled with zeros."""
    more = slots - leaf.shape[2]
    if not more:
        return leaf
    if isinstance(leaf, mx.array):  # a slice would keep all of the memory
        index = mx.arange(slots)
        return mx.take(leaf, index, axis=2) if more < 0 else mx.pad(leaf, [(0, 0), (0, 0), (0, more), (0, 0)])
    return leaf[:, :, :slots].copy() if more < 0 else np.pad(leaf, ((0, 0), (0, 0), (0, more), (0, 0)))
