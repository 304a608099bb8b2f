"""One position through the language model: with MLX's kernels, or on the CPU with numpy's.

:func:`make_stepper` is the one place that chooses. On a GPU the model's modules are the fast way. On a CPU, MLX takes
each norm, rotation and attention apart into ten operations and more, spends four microseconds on every one of them,
and its Linux wheel brings a matrix product without vector instructions; numpy spends half a microsecond and brings a
proper BLAS. There :class:`NumpyStepper` computes the same numbers from the same memory, one call after the other.

Both are tested against the PyTorch reference, and against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from .config import LmConfig
from .layers.attention import Rope
from .layers.transformer import TransformerLayer
from .lm import DepthLayer, DepthTransformer, Lm, embed_ids
from .sampling import Sampling, sample
from .streaming import State, as_mlx, as_numpy, copy_state, state_arrays
from .threads import one_blas_thread

__all__ = ["Array", "NumpyStepper", "Stepper", "make_stepper"]

Floats = NDArray[Any]
Array = Any
"""``mx.array`` or numpy array, as the stepper's ``xp`` makes them."""

_UNPACKED_BYTES = 2**31
"""Quantized models are unpacked for numpy up to this size in memory."""


class Stepper:
    """One position at a time, with the model's own modules.

    Everything that changes is in a state that :meth:`open` makes and only this stepper can use; :meth:`export` gives
    back the model's own kind.

    Attributes
    ----------
    xp : module
        ``mlx.core`` or ``numpy``: where its arrays live.
    """

    xp: Any = mx

    def __init__(self, lm: Lm):
        self._lm = lm

    def open(self, state: State) -> Any:
        """A state to step on, from :meth:`Lm.init_state` or :meth:`export`."""
        return state

    def export(self, state: Any) -> State:
        """A copy that later steps leave alone."""
        return copy_state(state)

    def wait(self, state: Any, *arrays: mx.array) -> None:
        """Evaluate ``arrays``, and the state: its graph must not grow."""
        mx.eval(*arrays, *state_arrays(state))

    def temporal(self, tokens: NDArray[np.int32], state: Any) -> Array:
        """Output [batch, dim] of the temporal transformer for ``tokens`` [batch, streams]; advances ``state``."""
        hidden = self._lm.step(mx.array(tokens)[:, :, None], state)[:, 0]
        mx.async_eval(hidden)  # it runs while the depth transformer's graph is built
        return hidden

    def text_logits(self, hidden: Array) -> Array:
        """[batch, text_out] from ``hidden`` [batch, dim]."""
        return self._lm.text_linear(hidden)

    def depth(self, index: int, hidden: Array, token: Array, cache: list[Any]) -> Array:
        """As :meth:`DepthTransformer.step`; ``cache`` is an empty list at step 0."""
        return self._lm.depformer.step(index, hidden, token, cache)

    def sample(self, logits: Array, sampling: Sampling, noise: Array | None) -> Array:
        """As :func:`moshi_mlx.sampling.sample`."""
        return sample(logits, sampling, noise)


def make_stepper(lm: Lm, kv_bits: int | None = None) -> Stepper:
    """The stepper for this device, this model and this cache; a model keeps it until its weights are replaced."""
    if mx.default_device() != mx.cpu or kv_bits is not None or not NumpyStepper.suits(lm):
        return Stepper(lm)
    known: NumpyStepper | None = getattr(lm, "_stepper", None)
    if known is None or not known.current(lm):
        known = NumpyStepper(lm)
        object.__setattr__(lm, "_stepper", known)
    return known


class NumpyStepper(Stepper):
    """The same in numpy: for the CPU, in float32.

    Dense weights are the model's own memory, seen by numpy; quantized ones are unpacked.
    """

    xp = np

    def __init__(self, lm: Lm):
        super().__init__(lm)
        one_blas_thread()
        config = lm.config
        self._weights = _weights(lm)
        mx.eval(self._weights)
        self._tables = [_table(lm.text_emb), *(_table(table) for table in lm.audio_embs)]
        self._layers = [_TemporalLayer(layer) for layer in lm.transformer.layers]
        self._norm, self._text_linear = _norm(lm.out_norm), _matrix(lm.text_linear)
        self._turn = _Rotation.of(lm.transformer.layers[0].self_attn.rope, config.dim // config.num_heads)
        self._depth = _Depth(lm.depformer, config) if config.dep_q else None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copied model makes its own

    @staticmethod
    def suits(lm: Lm) -> bool:
        """Whether the model computes in float32 and fits into memory unpacked."""
        if lm.dtype != mx.float32:
            return False
        unpacked = sum(
            module.scales.size * module.group_size * 4
            for _, module in lm.named_modules()
            if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
        )
        return bool(unpacked <= _UNPACKED_BYTES)

    def current(self, lm: Lm) -> bool:
        """Whether ``lm`` still has the weights that this was made from."""
        mine, its = self._weights, _weights(lm)
        return len(mine) == len(its) and all(a is b for a, b in zip(mine, its, strict=True))

    def open(self, state: State) -> Any:
        return as_numpy(state)

    def export(self, state: Any) -> State:
        return as_mlx(state)

    def wait(self, state: Any, *arrays: mx.array) -> None:
        pass

    def temporal(self, tokens: NDArray[np.int32], state: Any) -> Floats:
        x = self._tables[0](tokens[:, 0])
        for stream, table in enumerate(self._tables[1:], start=1):
            x = x + table(tokens[:, stream])
        extra = state.get("condition_sum")
        if extra is not None:
            x = x + extra[:, 0]
        states = state["transformer"]
        turn = None if self._turn is None else self._turn.at(int(states["0"]["offset"][0]))
        with np.errstate(over="ignore"):  # exp in a SiLU: its limit is right
            for index, layer in enumerate(self._layers):
                x = layer(x, states[str(index)], turn)
        return self._norm(x)

    def text_logits(self, hidden: Floats) -> Floats:
        return hidden @ self._text_linear

    def depth(self, index: int, hidden: Floats, token: NDArray[np.int32], cache: list[Any]) -> Floats:
        assert self._depth is not None
        with np.errstate(over="ignore"):
            return self._depth.step(index, hidden, token, cache)

    def sample(self, logits: Floats, sampling: Sampling, noise: Floats | None) -> NDArray[np.int32]:
        if sampling.temperature == 0:
            return np.asarray(np.argmax(logits, axis=-1), np.int32)
        assert noise is not None
        if 0 < sampling.top_p < 1 or sampling.min_p > 0:
            return np.array(sample(mx.array(logits), sampling, mx.array(noise)))
        tempered = logits / np.float32(sampling.temperature)
        count = logits.shape[-1]
        if 0 < sampling.top_k < count:
            kth = np.partition(tempered, count - sampling.top_k, axis=-1)[..., count - sampling.top_k, None]
            tempered[tempered < kth] = -np.inf
        tempered += noise
        return np.asarray(np.argmax(tempered, axis=-1), np.int32)


def _weights(lm: Lm) -> list[Any]:
    named: Any = tree_flatten(lm.parameters())
    return [value for _, value in named]


def _seen(weight: mx.array) -> Floats:
    """A weight's memory as numpy sees it, without a copy."""
    return np.array(weight, copy=False)


def _dense(module: Any) -> Floats:
    """The weight [outputs, inputs] of a linear layer or table, unpacked if it is quantized."""
    if not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        return _seen(module.weight)
    weight = mx.dequantize(
        module.weight,
        module.scales,
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    ).astype(mx.float32)
    mx.eval(weight)
    return _seen(weight)


def _matrix(module: Any) -> Floats:
    """What rows are multiplied with, [inputs, outputs]."""
    return _dense(module).T


def _norm(module: Any) -> Callable[[Floats], Floats]:
    """RMSNorm or LayerNorm over rows [batch, dim]."""
    weight, epsilon = _seen(module.weight), float(module.eps)
    if isinstance(module, nn.RMSNorm):
        dim = len(weight)

        def rms(x: Floats) -> Floats:
            if len(x) == 1:
                row = x[0]
                scaled: Floats = x * (weight * (float(row.dot(row)) / dim + epsilon) ** -0.5)
                return scaled
            mean = np.einsum("ij,ij->i", x, x)[:, None] / np.float32(dim) + np.float32(epsilon)
            out: Floats = x / np.sqrt(mean) * weight
            return out

        return rms
    bias = _seen(module.bias) if "bias" in module else np.float32(0)

    def layer_norm(x: Floats) -> Floats:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        out: Floats = centred / np.sqrt(variance + np.float32(epsilon)) * weight + bias
        return out

    return layer_norm


def _table(module: nn.Module) -> Callable[[NDArray[np.int32]], Floats]:
    """An embedding table: ids [batch] to vectors [batch, width], -1 to zeros."""
    if not isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
        return lambda ids: np.array(embed_ids(module, mx.array(ids)))
    weight = _dense(module)

    def look_up(ids: NDArray[np.int32]) -> Floats:
        vectors: Floats = weight[ids]
        if ids.min() < 0:
            vectors[ids < 0] = 0
        return vectors

    return look_up


class _Rotation:
    """Rotary embedding: each pair of a head's channels is a complex number, turned by position times frequency."""

    def __init__(self, rope: Rope, head_dim: int):
        half = head_dim // 2
        self._interleaved = rope.interleaved
        self._frequencies = np.exp(np.arange(half) * (-np.log(rope.max_period) / half))

    @classmethod
    def of(cls, rope: Rope | None, head_dim: int) -> _Rotation | None:
        return None if rope is None else cls(rope, head_dim)

    def at(self, position: int) -> Callable[[Floats], Floats]:
        """The rotation for ``position``, of heads [batch, heads, head_dim]."""
        turn = np.exp(1j * (position * self._frequencies)).astype(np.complex64)
        half = len(turn)

        def interleaved(heads: Floats) -> Floats:
            turned: Floats = (heads.view(np.complex64) * turn).view(np.float32)
            return turned

        def halves(heads: Floats) -> Floats:
            turned = (heads[..., :half] + 1j * heads[..., half:]) * turn
            return np.concatenate([turned.real, turned.imag], axis=-1)

        return interleaved if self._interleaved else halves


class _Attention:
    """Attention of one new position per sequence to keys and values [batch, kv_heads, slots, head_dim]."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int):
        self._heads, self._kv_heads, self._head_dim = heads, kv_heads, head_dim
        self._scale = np.float32(head_dim**-0.5)
        self._turned = heads + kv_heads

    def __call__(
        self,
        projected: Floats,
        turn: Callable[[Floats], Floats] | None,
        keys: Floats,
        values: Floats,
        slot: int,
        count: int,
    ) -> Floats:
        """Write ``projected`` [batch, channels] into ``slot``, and attend to the first ``count``: [batch, channels]."""
        batch, heads = len(projected), self._heads
        split = projected.reshape(batch, -1, self._head_dim)
        turned = split[:, : self._turned]
        if turn is not None:
            turned = turn(turned)
        keys[:, :, slot] = turned[:, heads:]
        values[:, :, slot] = split[:, self._turned :]
        queries = (turned[:, :heads] * self._scale).reshape(batch, self._kv_heads, -1, self._head_dim)
        return attend(queries, keys[:, :, :count].swapaxes(2, 3), values[:, :, :count])


def attend(queries: Floats, keys: Floats, values: Floats) -> Floats:
    """Softmax attention [batch, channels] of queries [batch, kv_heads, repeat, head_dim], scaled.

    Keys are [batch, kv_heads, head_dim, slots], values [batch, kv_heads, slots, head_dim].
    """
    weights = queries @ keys
    weights -= np.maximum.reduce(weights, axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    out = weights @ values
    out /= np.add.reduce(weights, axis=-1, keepdims=True)
    return out.reshape(len(out), -1)


class _Gated:
    """SwiGLU."""

    def __init__(self, module: Any):
        self._in, self._out = _matrix(module.linear_in), _matrix(module.linear_out)
        self._hidden = self._out.shape[0]

    def __call__(self, x: Floats) -> Floats:
        both = x @ self._in
        gate, value = both[:, : self._hidden], both[:, self._hidden :]
        spread = np.negative(gate)
        np.exp(spread, out=spread)
        spread += np.float32(1)
        np.divide(gate, spread, out=spread)
        spread *= value
        out: Floats = spread @ self._out
        return out


class _TemporalLayer:
    def __init__(self, layer: TransformerLayer):
        attention = layer.self_attn
        assert attention.context is not None
        self._norm1, self._norm2 = _norm(layer.norm1), _norm(layer.norm2)
        self._in, self._out = _matrix(attention.in_proj), _matrix(attention.out_proj)
        self._attention = _Attention(attention.num_heads, attention.kv_heads, attention.head_dim)
        self._context = attention.context
        self._gating = _Gated(layer.gating)
        if "cross_attention" in layer:
            cross = layer.cross_attention
            self._norm_cross, self._cross_out = _norm(layer.norm_cross), _matrix(cross.out_proj)
            self._cross_in = _matrix(cross.in_proj)[:, : self._cross_out.shape[0]]
            self._cross_shape, self._cross_scale = (cross.num_heads, 1, cross.head_dim), np.float32(cross.scale)

    def __call__(self, x: Floats, state: dict[str, Any], turn: Callable[[Floats], Floats] | None) -> Floats:
        offset, context = int(state["offset"][0]), self._context
        attended = self._attention(
            self._norm1(x) @ self._in, turn, state["keys"], state["values"], offset % context, min(offset + 1, context)
        )
        state["offset"] = state["offset"] + np.int32(1)
        x = x + attended @ self._out
        if "cross_keys" in state:
            queries = self._norm_cross(x) @ self._cross_in * self._cross_scale
            queries = queries.reshape(len(x), *self._cross_shape)
            x = x + attend(queries, state["cross_keys"].swapaxes(2, 3), state["cross_values"]) @ self._cross_out
        return x + self._gating(self._norm2(x))


class _DepthLayer:
    """Its cache is what its input projections gave in this frame: [steps, batch, channels], seen in three ways."""

    def __init__(self, layer: DepthLayer, config: LmConfig):
        heads = config.depformer_num_heads
        kv_heads, head_dim = heads // config.depth_kv_repeat, config.depformer_dim // heads
        self._norm1, self._norm2 = _norm(layer.norm1), _norm(layer.norm2)
        self._in = [_matrix(module) for module in layer.in_proj]
        self._out = [_matrix(module) for module in layer.out_proj]
        self._gating = [_Gated(module) for module in layer.gating]
        self._queries = (kv_heads, heads // kv_heads, head_dim)
        self._heads, self._turned = heads, heads + kv_heads
        self._scale = np.float32(head_dim**-0.5)

    def new_cache(self, steps: int, batch: int) -> tuple[Floats, ...]:
        """Room for a frame: what was projected; its heads; the queries among them, the keys and the values."""
        kv_heads, _, head_dim = self._queries
        projected = np.empty((steps, batch, (self._turned + kv_heads) * head_dim), np.float32)
        heads = projected.reshape(steps, batch, -1, head_dim)
        queries = heads[:, :, : self._heads].reshape(steps, batch, *self._queries)
        keys, values = heads[:, :, self._heads : self._turned], heads[:, :, self._turned :]
        return projected, heads[:, :, : self._turned], queries, keys.transpose(1, 2, 3, 0), values.transpose(1, 2, 0, 3)

    def step(self, x: Floats, index: int, weights: int, turn: Any, cache: tuple[Floats, ...]) -> Floats:
        projected, turned, queries, keys, values = cache
        np.matmul(self._norm1(x), self._in[weights], out=projected[index])
        if turn is not None:
            turned[index] = turn(turned[index])
        attended = attend(queries[index] * self._scale, keys[..., : index + 1], values[:, :, : index + 1])
        x = x + attended @ self._out[weights]
        return x + self._gating[weights](self._norm2(x))


class _Depth:
    def __init__(self, depth: DepthTransformer, config: LmConfig):
        self._schedule: Sequence[int] = config.schedule
        self._turn = _Rotation.of(depth.rope, config.depformer_dim // config.depformer_num_heads)
        self._in = [_matrix(module) for module in depth.linear_in]
        self._tables = [_table(table) for table in depth.embs]
        self._layers = [_DepthLayer(layer, config) for layer in depth.layers]
        norms = depth.get("norms")
        self._norms = None if norms is None else [_norm(norm) for norm in norms]
        self._out = [_matrix(module) for module in depth.linear_out]

    def step(self, index: int, hidden: Floats, token: NDArray[np.int32], cache: list[Any]) -> Floats:
        if not index:
            cache += [layer.new_cache(len(self._schedule), len(hidden)) for layer in self._layers]
        weights = self._schedule[index]
        x = hidden @ self._in[weights] + self._tables[index](token)
        turn = None if self._turn is None else self._turn.at(index)
        for layer, own in zip(self._layers, cache, strict=True):
            x = layer.step(x, index, weights, turn, own)
        return (x if self._norms is None else self._norms[index](x)) @ self._out[index]
