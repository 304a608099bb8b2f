"""One position through the language model: with MLX's kernels, or on the CPU with numpy's.

:func:`make_backend` chooses between them. On a GPU the model's modules are fastest. On a CPU, MLX splits
each norm, rotation and attention into ten operations or more, spends four microseconds on each of them,
and its Linux wheel has a matrix product without vector instructions; numpy spends half a microsecond and has a
proper BLAS. There :class:`NumpyBackend` computes the same values from the same memory.

Both are tested against the PyTorch reference, and against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from ..config import LmConfig
from ..errors import ConfigError
from ..layers.attention import Rope
from ..layers.transformer import TransformerLayer
from ..models.lm import DepthLayer, DepthTransformer, Lm, embed_ids
from ..models.sampling import RowSampling, Sampling, SamplingKind, keyed_noise, sample, sample_rows
from ..state import State, as_mlx, as_numpy, state_arrays
from .backend import choose_backend
from .blas import one_blas_thread

__all__ = ["Array", "Backend", "NumpyBackend", "make_backend"]

Floats = NDArray[Any]
Ints = NDArray[Any]
Array = Any
"""``mx.array`` or numpy array, as the backend's ``xp`` makes them."""
Embedded = tuple[Array, Array]

_KEPT_GRAPHS = 32
_BLOCK, _BLOCKED_BYTES, _UNPACKED_PRODUCT = 64, 2**22, 10**6
"""Columns of a block, the largest weight that is kept in blocks, and OpenBLAS' largest product without packing."""
_UNPACKED_BYTES = 2**31
"""Quantized models are unpacked for numpy up to this size in memory."""


class Backend:
    """One position at a time, with the model's own modules.

    Everything that changes is in a state that :meth:`open` makes, of arrays of the backend's own kind.

    Attributes
    ----------
    xp : module
        ``mlx.core`` or ``numpy``: where its arrays live.
    """

    xp: Any = mx

    def __init__(self, lm: Lm, compiled: bool = False):
        self._lm = lm
        self._compiled: dict[Any, Callable[..., Any]] | None = {} if compiled else None

    def open(self, state: State) -> State:
        """A state to step on, from :meth:`Lm.init_state` or from any backend."""
        return as_mlx(state)

    def computed(self, rows: Ints, total: int) -> Ints:
        """Which of a state's ``total`` rows are computed where ``rows`` step.

        Here all of them, so that there are few shapes and kernels: the results of waiting rows are not read.
        """
        return np.arange(total)

    def selection(self, rows: Ints, total: int) -> Any:
        """What :meth:`temporal` takes for ``rows``."""
        active = np.zeros(total, bool)
        active[rows] = True
        return mx.array(active)

    def fetch(self, state: State, *arrays: Array) -> list[NDArray[Any]]:
        """``arrays`` as numpy's; they are evaluated, and so is the state: its graph must not grow."""
        mx.eval(*arrays, *state_arrays(state))
        return [np.array(array) for array in arrays]

    def launch(self, *arrays: Array) -> None:
        """Begin to compute ``arrays`` while the graph of what follows is built."""
        mx.async_eval(*arrays)

    def noise(self, keys: Array, shape: tuple[int, ...]) -> Array:
        """Noise [rows, *shape] for :meth:`draw`, from a key [2] for each row."""
        return keyed_noise(keys, shape)

    def drawn(self, noise: Array | None) -> Array | None:
        """The noise of several draws, before the first of them."""
        return noise

    def temporal(
        self, tokens: Array, state: State, rows: Any = None, embedded: Embedded | None = None, sinks: int = 0
    ) -> Array:
        """Output [computed, dim] of the temporal transformer; advances ``state``.

        Parameters
        ----------
        tokens : array [computed, streams], int32
        state : State
        rows : optional
            A :meth:`selection`; default: all rows step.
        embedded : tuple of array [computed, dim] and array [computed], bool, optional
            Summed embeddings that some rows read in place of their tokens, and which these are.
        sinks : int
            See :meth:`~moshi_mlx.layers.attention.Window.make`.
        """
        x = self._lm.embed(mx.array(tokens)[:, :, None])
        if embedded is not None:
            vectors, given = embedded
            x = mx.where(given[:, None, None], vectors[:, None].astype(x.dtype), x)
        hidden: mx.array = self._lm.step_embedded(x, state, rows, sinks)[:, 0]
        return hidden

    def text_logits(self, hidden: Array) -> Array:
        """[computed, text_out] from ``hidden`` [computed, dim]."""
        return self._lm.text_linear(hidden)

    def depth(self, index: int, hidden: Array, token: Array, cache: list[Any]) -> Array:
        """As :meth:`DepthTransformer.step`; ``cache`` is an empty list at step 0."""
        return self._lm.depformer.step(index, hidden, token, cache)

    def settings(self, rows: RowSampling) -> Any:
        """What :meth:`draw` takes for rows that draw so."""
        return {name: mx.array(values) for name, values in rows.arrays.items()}

    def draw(self, logits: Array, kind: SamplingKind, settings: Any, noise: Array | None) -> Array:
        """A token for each row [rows], int32."""
        return sample_rows(logits, kind, settings, noise)

    def run(self, function: Callable[..., Any], kind: Hashable, *args: Any) -> Any:
        """``function(self, lm, kind, *args)``, whose operations depend on ``kind`` and on the shapes of ``args`` alone.

        Building the graph takes most of the Python time of a step, and other threads wait for the interpreter: on a
        GPU the graph is kept, for each kind and shape.
        """
        if self._compiled is None:
            return function(self, self._lm, kind, *args)
        known = self._compiled.get((function, kind))
        if known is None:
            if len(self._compiled) >= _KEPT_GRAPHS:
                self._compiled.clear()
            known = self._compiled[function, kind] = mx.compile(partial(function, self, self._lm, kind))
        return known(*args)


def make_backend(lm: Lm, kv_bits: int | None = None) -> Backend:
    """The backend for this device, this model and this cache; a model keeps it until its weights are replaced."""
    if lm.sharding is not None:
        backend: Backend = lm.sharding.backend(lm)
        return backend
    if lm.backend == "numpy" and kv_bits is not None:
        raise ConfigError("the backend numpy keeps no 8-bit cache: choose the backend mlx, or leave the cache as it is")
    if choose_backend(lm.backend) == "mlx" or kv_bits is not None or not NumpyBackend.suits(lm):
        # What mx.compile makes for a CPU is no faster, and takes a C++ compiler seconds.
        return Backend(lm, compiled=mx.default_device() != mx.cpu)
    known: NumpyBackend | None = getattr(lm, "_numpy_backend", None)
    if known is None or not known.current(lm):
        known = NumpyBackend(lm)
        object.__setattr__(lm, "_numpy_backend", known)
    return known


class NumpyBackend(Backend):
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
        return None  # a copied model creates its own

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

    def open(self, state: State) -> State:
        return as_numpy(state)

    def computed(self, rows: Ints, total: int) -> Ints:
        return rows

    def selection(self, rows: Ints, total: int) -> Any:
        return rows

    def fetch(self, state: State, *arrays: Array) -> list[NDArray[Any]]:
        return [np.asarray(array) for array in arrays]

    def launch(self, *arrays: Array) -> None:
        pass

    def noise(self, keys: Array, shape: tuple[int, ...]) -> Array:
        noise = keyed_noise(mx.array(keys), shape)
        mx.async_eval(noise)  # MLX's thread draws it while this one computes
        return noise

    def drawn(self, noise: Array | None) -> Array | None:
        return None if noise is None else np.array(noise)

    def temporal(
        self, tokens: Ints, state: State, rows: Any = None, embedded: Embedded | None = None, sinks: int = 0
    ) -> Floats:
        x = self._tables[0](tokens[:, 0])
        for stream, table in enumerate(self._tables[1:], start=1):
            x = x + table(tokens[:, stream])
        if embedded is not None:
            x = np.where(embedded[1][:, None], embedded[0], x)
        extra = state.get("condition_sum")
        if extra is not None:
            x = x + (extra if rows is None else extra[rows])[:, 0]
        states = state["transformer"]
        window = self._window(states, rows, sinks)
        with np.errstate(over="ignore"):  # exp in a SiLU: its limit is right
            for index, layer in enumerate(self._layers):
                x = layer(x, states[str(index)], window)
        states["offset"][slice(None) if rows is None else rows] += 1
        return self._norm(x)

    def _window(self, states: State, rows: Ints | None, sinks: int = 0) -> _Window:
        offsets, size = states["offset"], states["0"]["keys"].shape[2]
        if rows is not None:
            offsets = offsets[rows]
        first = int(offsets[0])
        alike = len(offsets) == 1 or bool((offsets == first).all())
        position = first if alike else offsets
        turn = None if self._turn is None else self._turn.at(position)
        cross = None
        if "cross_slots" in states:
            slots = states["cross_slots"] if rows is None else states["cross_slots"][rows]
            cross = _hide(states["0"]["cross_keys"].shape[2], slots)
        if sinks:  # a ring that has wrapped holds the whole context
            rows = np.arange(len(offsets)) if rows is None else rows
            pinned = states["pinned"][rows]
            slots = np.where(offsets < size, offsets, pinned + (offsets - pinned) % (size - pinned))
            far = None if self._turn is None else self._turn.at(np.minimum(offsets, size - 1))
            turn = None if self._turn is None else self._turn.at(offsets)
            counts = np.minimum(offsets + 1, size).tolist()
            return _Window(turn, slots, 0, rows, counts=counts, cross=cross, pinned=pinned.tolist(), far=far)
        if rows is None and alike:
            return _Window(turn, first % size, min(first + 1, size), cross=cross)
        counts = np.minimum(offsets + 1, size)
        if rows is None:
            longest = int(counts.max())
            return _Window(turn, offsets % size, longest, np.arange(len(counts)), _hide(longest, counts), cross=cross)
        return _Window(turn, offsets % size, 0, rows, counts=counts.tolist(), cross=cross)

    def text_logits(self, hidden: Floats) -> Floats:
        return self._text_linear(hidden)

    def depth(self, index: int, hidden: Floats, token: NDArray[np.int32], cache: list[Any]) -> Floats:
        assert self._depth is not None
        with np.errstate(over="ignore"):
            return self._depth.step(index, hidden, token, cache)

    def settings(self, rows: RowSampling) -> Any:
        return rows.groups

    def draw(self, logits: Floats, kind: SamplingKind, settings: Any, noise: Array | None) -> Ints:
        drawn = None if noise is None else np.array(noise)
        if len(settings) == 1:
            return self.sample(logits, settings[0][0], drawn)
        tokens = np.empty(len(logits), np.int32)
        for sampling, rows in settings:
            tokens[rows] = self.sample(logits[rows], sampling, None if drawn is None else drawn[rows])
        return tokens

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
    """The weight [outputs, inputs] of a linear layer or table, unpacked if it is quantized, with its update."""
    if "lora_a" in module:
        merged = mx.array(_dense(module.linear)) + module.scale * (module.lora_a @ module.lora_b).T
        mx.eval(merged)
        return _seen(merged)
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


class _Matrix:
    """What rows [batch, inputs] are multiplied with.

    One row uses the weight as it is stored. For several rows, small weights are also kept in blocks of 64
    columns: OpenBLAS then needs no packing, which takes longer than the product itself where rows are few.
    """

    __slots__ = ("_blocks", "_most", "weight")

    def __init__(self, weight: Floats):
        self.weight = weight
        inputs = len(weight)
        self._most = min(_UNPACKED_PRODUCT // (inputs * _BLOCK), 64) if weight.nbytes <= _BLOCKED_BYTES else 0
        self._blocks: Floats | None = None

    def __call__(self, x: Floats) -> Floats:
        """``x`` [batch, inputs] times the weight: [batch, outputs]."""
        if len(x) == 1:
            return x @ self.weight
        weight, rows = self.weight, len(x)
        if rows > self._most:
            return x @ weight if weight.flags.c_contiguous else np.ascontiguousarray((weight.T @ x.T).T)
        if self._blocks is None:
            inputs, outputs = weight.shape
            padded = np.pad(weight, ((0, 0), (0, -outputs % _BLOCK)))
            self._blocks = np.ascontiguousarray(padded.reshape(inputs, -1, _BLOCK).swapaxes(0, 1))
        out: Floats = (x @ self._blocks).swapaxes(0, 1).reshape(rows, -1)[:, : weight.shape[1]]
        return out


def _matrix(module: Any, outputs: int | None = None) -> _Matrix:
    """The weight of a linear layer, or its first ``outputs`` columns.

    A dense weight is used as it is stored, [outputs, inputs]. One that is unpacked anyway is laid out in the order in
    which rows are multiplied, which takes a quarter less time.
    """
    weight = _dense(module)[:outputs].T
    return _Matrix(weight if isinstance(module, nn.Linear) else np.ascontiguousarray(weight))


def _hide(count: int, seen: Any) -> Floats | None:
    """What is added to scores [rows, 1, 1, count] so that each row sees its first ``seen``; None if all."""
    if (np.asarray(seen) >= count).all():
        return None
    return np.where(np.arange(count) < seen[:, None], np.float32(0), np.float32(-np.inf))[:, None, None]


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
            mean = np.einsum("ij,ij->i", x, x) / np.float32(dim) + np.float32(epsilon)
            out: Floats = x * (1 / np.sqrt(mean))[:, None]
            out *= weight
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

    def at(self, position: int | Ints) -> Callable[[Floats], Floats]:
        """The rotation for ``position``, one or one a row, of heads [batch, heads, head_dim]."""
        angles = np.multiply.outer(position, self._frequencies)
        turn = np.exp(1j * angles).astype(np.complex64)
        half = turn.shape[-1]
        if turn.ndim == 2:
            turn = turn[:, None]

        def interleaved(heads: Floats) -> Floats:
            turned: Floats = (heads.view(np.complex64) * turn).view(np.float32)
            return turned

        def halves(heads: Floats) -> Floats:
            turned = (heads[..., :half] + 1j * heads[..., half:]) * turn
            return np.concatenate([turned.real, turned.imag], axis=-1)

        return interleaved if self._interleaved else halves


@dataclass(frozen=True)
class _Window:
    """Where each row's new position is kept, and what it sees; the same for all layers.

    Where all rows of a state step, ``count`` slots are read, and ``mask`` hides what is not every row's. Where some of
    them step, ``counts`` says how many slots each of ``rows`` reads, one row after the other: their rings are not
    copied together. Of these, the first ``pinned`` are seen by queries that are turned by ``far`` instead.
    """

    turn: Callable[[Floats], Floats] | None
    slots: int | Ints
    count: int
    rows: Ints | None = None
    mask: Floats | None = None
    counts: Sequence[int] | None = None
    cross: Floats | None = None
    pinned: Sequence[int] | None = None
    far: Callable[[Floats], Floats] | None = None

    @property
    def selected(self) -> Any:
        """Index of the rows that step in a state's leaves."""
        return slice(None) if self.counts is None else self.rows


class _Attention:
    """Attention of one new position per sequence to keys and values [batch, kv_heads, slots, head_dim]."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int):
        self._heads, self._kv_heads, self._head_dim = heads, kv_heads, head_dim
        self._scale = np.float32(head_dim**-0.5)
        self._turned = heads + kv_heads

    def __call__(self, projected: Floats, window: _Window, keys: Floats, values: Floats) -> Floats:
        """Write ``projected`` [batch, channels] into the rings, and attend to what they hold: [batch, channels]."""
        batch, heads = len(projected), self._heads
        split = projected.reshape(batch, -1, self._head_dim)
        turned = split[:, : self._turned]
        if window.turn is not None:
            turned = window.turn(turned)
        rows = slice(None) if window.rows is None else window.rows
        keys[rows, :, window.slots] = turned[:, heads:]
        values[rows, :, window.slots] = split[:, self._turned :]
        queries = (turned[:, :heads] * self._scale).reshape(batch, self._kv_heads, -1, self._head_dim)
        if window.counts is None:
            count = window.count
            return attend(queries, keys[:, :, :count].swapaxes(2, 3), values[:, :, :count], window.mask)
        assert window.rows is not None
        out = np.empty((batch, heads * self._head_dim), np.float32)
        far = None
        if window.pinned is not None:
            far = split[:, :heads] if window.far is None else window.far(np.ascontiguousarray(split[:, :heads]))
            far = (far * self._scale).reshape(queries.shape)
        for index, (row, count) in enumerate(zip(window.rows.tolist(), window.counts, strict=True)):
            one = slice(row, row + 1)
            seen = keys[one, :, :count].swapaxes(2, 3), values[one, :, :count]
            this = slice(index, index + 1)
            kept = 0 if window.pinned is None else window.pinned[index]
            apart = None if far is None or not kept else far[this] @ seen[0][..., :kept]
            out[index] = attend(queries[this], *seen, first=apart)[0]
        return out


def attend(
    queries: Floats, keys: Floats, values: Floats, mask: Floats | None = None, first: Floats | None = None
) -> Floats:
    """Softmax attention [batch, channels] of queries [batch, kv_heads, repeat, head_dim], scaled.

    Keys are [batch, kv_heads, head_dim, slots], values [batch, kv_heads, slots, head_dim]; ``mask`` is added to scores.
    ``first`` are the scores of the first slots, if they are known.
    """
    weights = queries @ keys
    if first is not None:
        weights[..., : first.shape[-1]] = first
    if mask is not None:
        weights += mask
    weights -= np.maximum.reduce(weights, axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    out = weights @ values
    out /= np.add.reduce(weights, axis=-1, keepdims=True)
    return out.reshape(len(out), -1)


class _Gated:
    """SwiGLU."""

    def __init__(self, module: Any):
        self._in, self._out = _matrix(module.linear_in), _matrix(module.linear_out)
        self._hidden = len(self._out.weight)

    def __call__(self, x: Floats) -> Floats:
        both = self._in(x)
        gate, value = both[:, : self._hidden], both[:, self._hidden :]
        spread = np.negative(gate)
        np.exp(spread, out=spread)
        spread += np.float32(1)
        np.divide(gate, spread, out=spread)
        spread *= value
        return self._out(spread)


class _TemporalLayer:
    def __init__(self, layer: TransformerLayer):
        attention = layer.self_attn
        self._norm1, self._norm2 = _norm(layer.norm1), _norm(layer.norm2)
        self._in, self._out = _matrix(attention.in_proj), _matrix(attention.out_proj)
        self._attention = _Attention(attention.num_heads, attention.kv_heads, attention.head_dim)
        self._gating = _Gated(layer.gating)
        if "cross_attention" in layer:
            cross = layer.cross_attention
            self._norm_cross, self._cross_out = _norm(layer.norm_cross), _matrix(cross.out_proj)
            self._cross_in = _matrix(cross.in_proj, len(self._cross_out.weight))
            self._cross_shape, self._cross_scale = (cross.num_heads, 1, cross.head_dim), np.float32(cross.scale)

    def __call__(self, x: Floats, state: State, window: _Window) -> Floats:
        projected = self._in(self._norm1(x))
        attended = self._attention(projected, window, state["keys"], state["values"])
        x = x + self._out(attended)
        if "cross_keys" in state:
            keys, values = state["cross_keys"][window.selected], state["cross_values"][window.selected]
            queries = self._cross_in(self._norm_cross(x)) * self._cross_scale
            queries = queries.reshape(len(x), *self._cross_shape)
            x = x + self._cross_out(attend(queries, keys.swapaxes(2, 3), values, window.cross))
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
        if len(x) == 1:
            np.matmul(self._norm1(x), self._in[weights].weight, out=projected[index])
        else:
            projected[index] = self._in[weights](self._norm1(x))
        if turn is not None:
            turned[index] = turn(turned[index])
        attended = attend(queries[index] * self._scale, keys[..., : index + 1], values[:, :, : index + 1])
        x = x + self._out[weights](attended)
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
        x = self._in[weights](hidden) + self._tables[index](token)
        turn = None if self._turn is None else self._turn.at(index)
        for layer, own in zip(self._layers, cache, strict=True):
            x = layer.step(x, index, weights, turn, own)
        return self._out[index](x if self._norms is None else self._norms[index](x))
