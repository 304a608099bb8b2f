"""The pre-norm transformer of the codec and of the language model's time axis."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError, StateError
from ..state import State
from .attention import Attention, CrossAttention, Rope, Window

__all__ = [
    "GatedFeedForward",
    "LayerScale",
    "PlainFeedForward",
    "Transformer",
    "TransformerLayer",
    "make_norm",
    "make_rope",
]


def make_norm(kind: str, dim: int) -> nn.Module:
    """A normalization by its checkpoint name.

    ``rms_norm_f32`` is RMSNorm with eps 1e-8 (moshi ``modules/transformer.py``), ``rms_norm`` has eps 1e-5,
    ``layer_norm`` is LayerNorm with eps 1e-5. All compute in float32.
    """
    if kind == "rms_norm_f32":
        return nn.RMSNorm(dim, eps=1e-8)
    if kind == "rms_norm":
        return nn.RMSNorm(dim, eps=1e-5)
    if kind == "layer_norm":
        return nn.LayerNorm(dim, eps=1e-5)
    if kind == "layer_norm_f32":
        return nn.LayerNorm(dim, eps=1e-8)
    raise ConfigError(f"norm {kind!r} is not known; use rms_norm_f32, rms_norm, layer_norm or layer_norm_f32")


def make_rope(kind: str, max_period: float) -> Rope | None:
    """A position embedding by its checkpoint name: ``rope`` (interleaved), ``rope_concat`` (split-half), ``none``."""
    if kind == "none":
        return None
    if kind in ("rope", "rope_concat"):
        return Rope(interleaved=kind == "rope", max_period=max_period)
    raise ConfigError(f"positional embedding {kind!r} is not supported; use rope, rope_concat or none")


class GatedFeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): the first half of ``linear_in`` goes through SiLU and scales the second half."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.linear_in = nn.Linear(dim, 2 * hidden, bias=False)
        self.linear_out = nn.Linear(hidden, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, value = mx.split(self.linear_in(x), 2, axis=-1)
        out: mx.array = self.linear_out(_swiglu(gate, value))
        return out


@partial(mx.compile, shapeless=True)
def _swiglu(gate: mx.array, value: mx.array) -> mx.array:
    """One kernel instead of two."""
    out: mx.array = nn.silu(gate) * value
    return out


class PlainFeedForward(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden, bias=False)
        self.linear2 = nn.Linear(hidden, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = self.linear2(nn.gelu(self.linear1(x)))
        return out


class LayerScale(nn.Module):
    """A learnt factor per channel on a residual branch (Touvron et al. 2021)."""

    def __init__(self, dim: int, initial: float):
        super().__init__()
        self.scale = mx.full((dim,), initial)

    def __call__(self, x: mx.array) -> mx.array:
        return self.scale * x


class TransformerLayer(nn.Module):
    """``x += attention(norm1(x)); x += cross(norm_cross(x)); x += feed_forward(norm2(x))``.

    Parameters
    ----------
    dim, num_heads, context, rope, kv_repeat
        See :class:`Attention`.
    hidden : int
        Width of the feed-forward layer (per branch if gated).
    gated : bool
        SwiGLU if true, GELU otherwise.
    norm : str
        See :func:`make_norm`.
    layer_scale : float or None
        Initial value of a learnt factor on each branch.
    cross_attention : bool
        Whether to attend to a conditioning sequence in between.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        context: int | None,
        rope: Rope | None,
        kv_repeat: int = 1,
        gated: bool = True,
        norm: str = "rms_norm_f32",
        layer_scale: float | None = None,
        cross_attention: bool = False,
    ):
        super().__init__()
        self.norm1 = make_norm(norm, dim)
        self.self_attn = Attention(dim, num_heads, context=context, rope=rope, kv_repeat=kv_repeat)
        self.norm2 = make_norm(norm, dim)
        self.gating = GatedFeedForward(dim, hidden) if gated else PlainFeedForward(dim, hidden)
        if layer_scale is not None:
            self.layer_scale_1 = LayerScale(dim, layer_scale)
            self.layer_scale_2 = LayerScale(dim, layer_scale)
        if cross_attention:
            self.norm_cross = nn.LayerNorm(dim, eps=1e-5)
            self.cross_attention = CrossAttention(dim, num_heads)
            if layer_scale is not None:
                self.layer_scale_cross = LayerScale(dim, layer_scale)

    def __call__(self, x: mx.array, source: State | None = None, cross_mask: mx.array | None = None) -> mx.array:
        """A whole sequence; ``source`` is projected, ``cross_mask`` is [batch, 1, 1, slots]."""
        return self._rest(x + self._scaled("layer_scale_1", self.self_attn(self.norm1(x))), source, cross_mask)

    def step(self, x: mx.array, state: State, window: Window, cross_mask: mx.array | None = None) -> mx.array:
        """New positions; writes the layer's ring in ``state``."""
        attended = self.self_attn.step(self.norm1(x), state, window)
        source = state if "cross_keys" in state else None
        return self._rest(x + self._scaled("layer_scale_1", attended), source, cross_mask)

    def extend(self, x: mx.array, cache: Any, mask: Any) -> mx.array:
        """New positions; writes the layer's cache of mlx-lm's (:meth:`Attention.extend`)."""
        return self._rest(
            x + self._scaled("layer_scale_1", self.self_attn.extend(self.norm1(x), cache, mask)), None, None
        )

    def _rest(self, x: mx.array, source: State | None, mask: mx.array | None) -> mx.array:
        if source is not None:
            x = x + self._scaled("layer_scale_cross", self.cross_attention(self.norm_cross(x), source, mask))
        return x + self._scaled("layer_scale_2", self.gating(self.norm2(x)))

    def _scaled(self, name: str, x: mx.array) -> mx.array:
        scale: Any = self.get(name)
        return x if scale is None else scale(x)


class Transformer(nn.Module):
    """A stack of :class:`TransformerLayer`; its arguments are theirs.

    Attributes
    ----------
    recompute : bool
        Whether a whole sequence keeps only the inputs of its layers for the backward pass, which computes the rest
        again (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    """

    def __init__(self, num_layers: int, *args: Any, **kwargs: Any):
        super().__init__()
        self.recompute = False
        self.layers = [TransformerLayer(*args, **kwargs) for _ in range(num_layers)]

    def init_state(
        self,
        batch: int,
        dtype: mx.Dtype = mx.float32,
        kv_bits: int | None = None,
        source: mx.array | None = None,
        source_slots: mx.array | None = None,
        slots: int | None = None,
        pinned: bool = False,
    ) -> State:
        """The next position of each row, and for each layer an empty ring and the projected conditioning sequence.

        Parameters
        ----------
        batch, dtype, kv_bits, slots
            As for :meth:`Attention.init_ring`.
        source : mx.array [batch, n, dim], optional
            A conditioning sequence.
        source_slots : mx.array [batch], int32, optional
            How much of it is real in each row; the rest is padding, which no row sees. Default: all.
        pinned : bool
            Also hold how many of its first positions a row keeps when its ring wraps: 0 for now.
        """
        state: State = {"offset": mx.zeros((batch,), mx.int32)}
        if pinned:
            state["pinned"] = mx.zeros((batch,), mx.int32)
        if source is not None:
            full = mx.full((batch,), source.shape[1], mx.int32)
            state["cross_slots"] = full if source_slots is None else source_slots.astype(mx.int32)
        for index, layer in enumerate(self.layers):
            state[str(index)] = layer.self_attn.init_ring(batch, dtype, kv_bits, slots)
            if source is not None:
                state[str(index)].update(layer.cross_attention.project_source(source))
        return state

    def __call__(self, x: mx.array, source: mx.array | None = None, source_slots: mx.array | None = None) -> mx.array:
        """A whole sequence ``x`` [batch, time, dim], with an optional conditioning ``source`` [batch, slots, dim]."""
        mask = None if source is None or source_slots is None else _real(source_slots, source.shape[1])
        for layer in self.layers:
            run = nn.utils.checkpoint(layer) if self.recompute else layer
            if source is None:
                x = run(x)
            else:
                x = run(x, layer.cross_attention.project_source(source), mask)
        return x

    def step(self, x: mx.array, state: State, active: mx.array | None = None, sinks: int = 0) -> mx.array:
        """New positions ``x`` [batch, time, dim]; advances ``state``.

        Parameters
        ----------
        x : mx.array [batch, time, dim]
        state : State
            A ring that is smaller than the context must have room for the new positions.
        active : mx.array [batch], bool, optional
            Rows that advance. The others stay where they are; their results are meaningless.
        sinks : int
            See :meth:`~moshi_mlx.layers.attention.Window.make`.
        """
        first, offset, time = state["0"], mx.array(state["offset"]), x.shape[1]
        if len(offset) != x.shape[0]:
            raise StateError(f"state holds {len(offset)} sequences, the input {x.shape[0]}")
        context: Any = self.layers[0].self_attn.context
        window = Window.make(offset, time, first["keys"], context, active, state.get("pinned"), sinks)
        cross = _real(state["cross_slots"], first["cross_keys"].shape[2]) if "cross_slots" in state else None
        for index, layer in enumerate(self.layers):
            x = layer.step(x, state[str(index)], window, cross)
        state["offset"] = offset + (time if active is None else time * active.astype(mx.int32))
        return x

    def extend(self, x: mx.array, caches: Sequence[Any], mask: Any) -> mx.array:
        """New positions ``x`` [batch, time, dim]; writes mlx-lm's caches, one for each layer."""
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.extend(x, cache, mask)
        return x


def _real(counts: mx.array, slots: int) -> mx.array:
    """Which of ``slots`` are not padding [batch, 1, 1, slots], by their number in each row."""
    mask: mx.array = mx.arange(slots) < counts[:, None]
    return mask[:, None, None]
