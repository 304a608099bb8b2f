"""Causal self-attention over a fixed ring of past keys, and attention to a conditioning sequence.

The ring has exactly ``context`` slots: position p is kept in slot ``p % context``, rotated by its absolute position,
and overwritten ``context`` positions later. The order of keys does not matter to a softmax, so a full ring is read
as it lies; nothing is trimmed or moved.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ConfigError, StateError
from ..streaming import State

__all__ = ["Attention", "CrossAttention", "Rope", "window_mask"]


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

    def __call__(self, x: mx.array, offset: int) -> mx.array:
        """Rotate ``x`` [batch, heads, time, head_dim], whose first position is ``offset``."""
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

    def init_state(self, batch: int, dtype: mx.Dtype = mx.float32, kv_bits: int | None = None) -> State:
        """An empty ring.

        Parameters
        ----------
        batch : int
            Sequences that advance together.
        dtype : mx.Dtype
            Type of the stored keys and values (of their scales if quantized).
        kv_bits : {None, 8}
            8: keep keys and values in 8 bits (affine, groups along the head dimension).
        """
        if self.context is None:
            raise ConfigError("streaming needs a limited context: set `context` in the configuration")
        shape = (batch, self.kv_heads, self.context, self.head_dim)
        if kv_bits is None:
            return {
                "keys": mx.zeros(shape, dtype),
                "values": mx.zeros(shape, dtype),
                "offset": np.zeros(batch, np.int32),
            }
        if kv_bits != 8:
            raise ConfigError(f"kv_bits is None or 8, not {kv_bits}")
        group = _kv_group(self.head_dim)
        state: State = {}
        for name in ("keys", "values"):
            state[name] = mx.zeros((*shape[:3], self.head_dim // 4), mx.uint32)
            for part in ("scales", "biases"):
                state[f"{name}_{part}"] = mx.zeros((*shape[:3], self.head_dim // group), dtype)
        return {**state, "offset": np.zeros(batch, np.int32)}

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

    def step(self, x: mx.array, state: State) -> mx.array:
        """Attend from new positions ``x`` [batch, time, dim] to the ring and to themselves; advance ``state``."""
        offset = int(state["offset"][0])
        time = x.shape[1]
        assert self.context is not None
        if state["keys"].shape[0] != x.shape[0]:
            raise StateError(f"state holds {state['keys'].shape[0]} sequences, the input {x.shape[0]}")
        queries, keys, values = self._project(x, offset)
        if "keys_scales" in state:
            out = self.attend_quantized(queries * self.scale, keys, values, state)
        elif time == 1:
            ring_keys, ring_values = self.remember(keys, values, state)
            out = mx.fast.scaled_dot_product_attention(queries, ring_keys, ring_values, scale=self.scale)
        else:
            # Earlier queries of the chunk still need keys that later ones overwrite: read before writing.
            filled = min(offset, self.context)
            all_keys = mx.concatenate([state["keys"][:, :, :filled], keys], axis=2)
            all_values = mx.concatenate([state["values"][:, :, :filled], values], axis=2)
            mask = self._chunk_mask(offset, time)
            out = mx.fast.scaled_dot_product_attention(queries, all_keys, all_values, scale=self.scale, mask=mask)
            _write(state, "keys", keys, offset, self.context)
            _write(state, "values", values, offset, self.context)
        state["offset"] = state["offset"] + np.int32(time)
        return self._merge(out)

    def remember(self, keys: mx.array, values: mx.array, state: State) -> tuple[mx.array, mx.array]:
        """Put one position's keys and values [batch, kv_heads, 1, head_dim] into the ring; all that it now sees."""
        offset = int(state["offset"][0])
        assert self.context is not None
        slot = offset % self.context
        ring_keys, ring_values = state["keys"], state["values"]
        ring_keys[:, :, slot : slot + 1] = keys
        ring_values[:, :, slot : slot + 1] = values
        if offset + 1 >= self.context:
            return ring_keys, ring_values
        return ring_keys[:, :, : offset + 1], ring_values[:, :, : offset + 1]

    def _project(self, x: mx.array, offset: int) -> tuple[mx.array, mx.array, mx.array]:
        batch, time, _ = x.shape
        heads, kv_heads = self.num_heads, self.kv_heads
        projected = self.in_proj(x).reshape(batch, time, heads + 2 * kv_heads, self.head_dim)
        projected = projected.transpose(0, 2, 1, 3)
        if self.rope is None:
            rotated = projected[:, : heads + kv_heads]
        else:
            rotated = self.rope(projected[:, : heads + kv_heads], offset)
        return rotated[:, :heads], rotated[:, heads:], projected[:, heads + kv_heads :]

    def _merge(self, out: mx.array) -> mx.array:
        batch, _, time, _ = out.shape
        merged: mx.array = self.out_proj(out.transpose(0, 2, 1, 3).reshape(batch, time, -1))
        return merged

    def _chunk_mask(self, offset: int, time: int) -> mx.array:
        assert self.context is not None
        new = np.arange(offset, offset + time)
        slots = np.arange(min(offset, self.context))
        # Slot s holds the last position before `offset` that is congruent to it.
        stored = offset - 1 - (offset - 1 - slots) % self.context
        return window_mask(new, np.concatenate([stored, new]), self.context)

    def attend_quantized(self, queries: mx.array, keys: mx.array, values: mx.array, state: State) -> mx.array:
        """From new positions (queries scaled) to a ring in 8 bits and to themselves; writes, but does not advance.

        New positions are quantized first, so that every cut gives one result.
        """
        assert self.context is not None
        offset, time = int(state["offset"][0]), queries.shape[2]
        group = _kv_group(self.head_dim)
        filled = min(offset + 1, self.context) if time == 1 else min(offset, self.context)
        rings: list[list[mx.array]] = []
        for name, new in (("keys", keys), ("values", values)):
            names = (name, f"{name}_scales", f"{name}_biases")
            parts = mx.quantize(new, group_size=group, bits=8)
            past = [state[key][:, :, :filled] for key in names]
            for key, part in zip(names, parts, strict=True):
                _write(state, key, part, offset, self.context)
            if time == 1:
                rings.append([state[key][:, :, :filled] for key in names])
            else:
                rings.append([mx.concatenate([a, b], axis=2) for a, b in zip(past, parts, strict=True)])
        (kw, ks, kb), (vw, vs, vb) = rings
        batch, repeat = queries.shape[0], self.num_heads // self.kv_heads
        grouped = queries.reshape(batch, self.kv_heads, repeat * time, self.head_dim)
        scores = mx.quantized_matmul(grouped, kw, ks, kb, transpose=True, group_size=group, bits=8)
        if time > 1:
            mask = mx.tile(self._chunk_mask(offset, time), (repeat, 1))
            scores = mx.where(mask, scores, mx.array(-mx.inf, scores.dtype))
        weights = mx.softmax(scores, axis=-1, precise=True)
        out = mx.quantized_matmul(weights, vw, vs, vb, transpose=False, group_size=group, bits=8)
        return out.reshape(batch, self.num_heads, time, self.head_dim)


class CrossAttention(nn.Module):
    """Attention from every position to one fixed conditioning sequence: no mask, no position embedding.

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
        dim = source.shape[-1]
        projected = self._linear(source, dim, 3 * dim)
        keys, values = mx.split(projected, 2, axis=-1)
        return {"cross_keys": self._heads(keys), "cross_values": self._heads(values)}

    def __call__(self, x: mx.array, source: State) -> mx.array:
        """Attend from ``x`` [batch, time, dim] to a projected source."""
        queries = self._heads(self._linear(x, 0, x.shape[-1]))
        out = mx.fast.scaled_dot_product_attention(
            queries, source["cross_keys"], source["cross_values"], scale=self.scale
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


def _write(state: State, name: str, new: mx.array, offset: int, context: int) -> None:
    """Put ``new`` [batch, heads, time, ...] into the ring ``state[name]``; its first position is ``offset``."""
    time = new.shape[2]
    ring = state[name]
    new = new.astype(ring.dtype)
    if time >= context:
        shift = (offset + time) % context  # slot of the oldest of the last `context` positions
        last = new[:, :, time - context :]
        state[name] = mx.concatenate([last[:, :, context - shift :], last[:, :, : context - shift]], axis=2)
        return
    start = offset % context
    head = min(time, context - start)
    ring[:, :, start : start + head] = new if head == time else new[:, :, :head]
    if head < time:
        ring[:, :, : time - head] = new[:, :, head:]
