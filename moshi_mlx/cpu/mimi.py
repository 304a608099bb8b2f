"""Mimi frame by frame in numpy, for conversations without a GPU.

MLX's wheel for Linux has a matrix product without vector instructions, and takes 9 ns for an exponential; numpy
has OpenBLAS and takes 1 ns. :class:`Encoder` and :class:`Decoder` compute what ``encode_step`` and ``decode_step``
of :class:`~moshi_mlx.models.mimi.Mimi` compute, from the same weights, with another order of summation. The tests
compare both.

Weights are prepared once for each model and shared by all of its streams. The state has the names and
shapes of the MLX one, in numpy arrays that a step writes in place. A step advances some rows of a state and neither
reads nor writes the others: threads may advance disjoint rows at the same time. Rows together cost less than one after
the other, and the results of each are bit for bit those of the row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from ..layers.attention import Attention
from ..layers.conv import CausalConv, CausalConvTranspose, DepthwiseConvTranspose
from ..layers.rvq import ResidualQuantizer, SplitResidualQuantizer
from ..layers.seanet import ResidualBlock, SEANetDecoder, SEANetEncoder
from ..layers.transformer import Transformer, TransformerLayer
from ..models.mimi import Mimi
from ..state import State, as_numpy, take_rows
from .blas import one_blas_thread

__all__ = ["Decoder", "Encoder", "Rows"]

Floats = NDArray[np.float32]
Rows = slice | NDArray[np.intp]
"""Which streams of a state: a slice with both ends, or distinct positions."""

_FEW = 3
"""Up to this many vectors in a row, a product a vector is faster than one for all: the matrix is not packed."""
_PANEL = 2**17
"""Values of a matrix that stay in the cache."""
_ZERO, _ONE, _LOWEST = np.float32(0), np.float32(1), np.float32(-np.inf)
_NEAR = 3
"""How many layers near the waveform take one row at a time."""
_TILE = 16
"""How often a bias is repeated, so that it is added to long vectors."""


class Encoder:
    """Frames to codes.

    Parameters
    ----------
    mimi : Mimi
        With its weights evaluated. Those of convolutions and codebooks are not copied.
    """

    def __init__(self, mimi: Mimi):
        one_blas_thread()
        self._fresh = as_numpy(mimi.init_encoder_state(1))
        self._seanet = _SEANet(mimi.encoder)
        self._transformer = _Transformer(mimi.encoder_transformer)
        self._downsample = _Conv(mimi.downsample, active=False) if "downsample" in mimi else None
        self._quantize = _Quantizer(mimi.quantizer)

    def init_state(self, batch: int) -> State:
        """What :meth:`step` carries from call to call for ``batch`` streams that begin with silence."""
        return take_rows(self._fresh, [0] * batch)

    def step(self, pcm: Floats, state: State, rows: Rows) -> NDArray[np.int32]:
        """Codes of the next frames of some streams.

        Parameters
        ----------
        pcm : array [len(rows), samples], float32
            Whole frames.
        state : State
            From :meth:`init_state`; its ``rows`` advance.
        rows : slice or array, integer
            Distinct positions along the state's first axis.

        Returns
        -------
        array [len(rows), num_codebooks, frames], int32
        """
        x = self._seanet.step(pcm[:, :, None], state["seanet"], rows)
        x = self._transformer.step(x, state["transformer"], rows)
        if self._downsample is not None:
            x = self._downsample.step(x, state["downsample"], rows)
        return self._quantize.encode(x)


class Decoder:
    """Codes to frames. The parameters are those of :class:`Encoder`."""

    def __init__(self, mimi: Mimi):
        one_blas_thread()
        self._fresh = as_numpy(mimi.init_decoder_state(1))
        self._quantize = _Quantizer(mimi.quantizer)
        self._upsample = _Upsample(mimi.upsample) if "upsample" in mimi else None
        self._transformer = _Transformer(mimi.decoder_transformer)
        self._seanet = _SEANet(mimi.decoder)

    def init_state(self, batch: int) -> State:
        """As :meth:`Encoder.init_state`."""
        return take_rows(self._fresh, [0] * batch)

    def step(self, codes: NDArray[np.int32], state: State, rows: Rows) -> Floats:
        """The next samples [len(rows), frames * frame_size] from ``codes`` [len(rows), codebooks, frames]."""
        x = self._quantize.decode(codes)
        if self._upsample is not None:
            x = self._upsample.step(x, state["upsample"], rows)
        x = self._transformer.step(x, state["transformer"], rows)
        return self._seanet.step(x, state["seanet"], rows)[:, :, 0]


def _seen(weight: mx.array) -> Any:
    """A weight's memory as numpy sees it, without a copy."""
    return np.array(weight, copy=False)


def _matrix(linear: nn.Linear) -> Floats:
    """The matrix [inputs, outputs], laid out in the order in which it is read."""
    return np.ascontiguousarray(_seen(linear.weight).T)


def _product(x: Floats, matrix: Floats) -> Floats:
    """``x`` [rows, time, inputs] times ``matrix`` [inputs, outputs]; a row's result does not depend on the others.

    A library's product of all rows at once rounds differently for another number of rows, and would occasionally choose
    another code. So long rows are multiplied one by one; short ones vector by vector, with a panel of the matrix
    that stays in the cache for all of them.
    """
    batch, time, inputs = x.shape
    out = np.empty((batch, time, matrix.shape[1]), np.float32)
    if time > _FEW:
        np.matmul(x, matrix, out=out)
        return out
    vectors, results = x.reshape(-1, inputs), out.reshape(-1, matrix.shape[1])
    height = max(1, _PANEL // matrix.shape[1])
    for vector, result in zip(vectors, results, strict=True):
        np.dot(vector[:height], matrix[:height], out=result)
    for start in range(height, inputs, height):
        panel, rest = matrix[start : start + height], vectors[:, start : start + height]
        for vector, result in zip(rest, results, strict=True):
            result += np.dot(vector, panel)
    return out


class _Bias:
    """A vector that is added to every position."""

    def __init__(self, module: Any):
        self._bias = _seen(module.bias) if "bias" in module else None
        self._tiled = None if self._bias is None else np.tile(self._bias, _TILE)

    def add_to(self, y: Floats) -> None:
        """Add it to ``y`` [rows, time, channels], each row of which is contiguous."""
        if self._bias is None or self._tiled is None:
            return
        if y[0].size % len(self._tiled):
            y += self._bias
        else:
            long = y.reshape(len(y), -1, len(self._tiled))
            long += self._tiled


def _elu(x: Floats, out: Floats) -> Floats:
    """``exp(x) - 1`` below zero, which is never below ``x``; numpy's exp has vector instructions on more machines."""
    x.clip(_LOWEST, _ZERO, out=out)  # faster than a minimum with a number
    np.exp(out, out=out)
    out -= _ONE
    return np.maximum(x, out, out=out)


def _gelu(x: Floats) -> Floats:
    y = x * np.float32(0.5**0.5)
    y = _erf(y)
    y += 1
    y *= x
    y *= np.float32(0.5)
    return y


# Odd numerator and even denominator of a rational approximation on -4 .. 4, highest power first, as Eigen and XLA use
# it (MathFunctionsImpl.h, math.cc): at most 4e-7 off.
_ERF_ABOVE = np.array([-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
                       -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02], np.float32)  # fmt: skip
_ERF_BELOW = np.array([-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
                       -1.42647390514189e-02], np.float32)  # fmt: skip


def _erf(x: Floats) -> Floats:
    x = np.clip(x, -4, 4)
    square = x * x
    above, below = (_horner(square, powers) for powers in (_ERF_ABOVE, _ERF_BELOW))
    above *= x
    above /= below
    return above


def _horner(x: Floats, powers: Floats) -> Floats:
    y: Floats = x * powers[0]
    y += powers[1]
    for power in powers[2:]:
        y *= x
        y += power
    return y


class _Conv:
    """:class:`~moshi_mlx.layers.conv.CausalConv`, with an ELU before it where ``active``."""

    def __init__(self, conv: CausalConv, active: bool = True):
        kernel, channels, outputs = conv.weight.shape
        self._kernel, self._stride, self._dilation = kernel, conv.stride, conv.dilation
        self._matrix = _seen(conv.weight).reshape(kernel * channels, outputs)
        self._bias = _Bias(conv)
        self._context, self._replicate, self._active = conv.context, conv.replicate, active

    def step(self, x: Floats, state: State, rows: Rows) -> Floats:
        """``x`` [rows, time, channels] to [rows, time / stride, outputs]; advances ``rows`` of ``state``."""
        batch, time, channels = x.shape
        padded = np.empty((batch, self._context + time, channels), np.float32)
        new = padded[:, self._context :]
        if self._active:
            _elu(x, new)
        else:
            new[...] = x
        if self._context:
            left = state["left"][rows]
            if self._replicate:
                left = np.where(state["fresh"][rows], new[:, :1], left)
                state["fresh"][rows] = False
            padded[:, : self._context] = left
            state["left"][rows] = padded[:, time:]
        y = _product(self._windows(padded), self._matrix)
        self._bias.add_to(y)
        return y

    def _windows(self, x: Floats) -> Floats:
        """What each output reads, [rows, outputs, kernel * channels]."""
        batch, time, channels = x.shape
        if self._kernel == 1 and self._stride == 1:
            return x
        count = (time - self._context) // self._stride
        if channels == 1:  # long vectors are copied faster than short ones
            steps = (x.strides[0], self._dilation * x.itemsize, self._stride * x.itemsize)
            taps: Floats = np.ndarray((batch, self._kernel, count), np.float32, x, 0, steps)
            return taps.copy().swapaxes(1, 2)
        across = x.itemsize * channels
        strides = (x.strides[0], self._stride * across, self._dilation * across, x.itemsize)
        windows: Floats = np.ndarray((batch, count, self._kernel, channels), np.float32, x, 0, strides)
        return windows.copy().reshape(batch, count, -1)  # a copy, since BLAS takes no windows that overlap


class _Upsample:
    """:class:`~moshi_mlx.layers.conv.DepthwiseConvTranspose` with a kernel of two strides."""

    def __init__(self, conv: CausalConvTranspose | DepthwiseConvTranspose):
        kernel = conv.weight.shape[-2]
        assert kernel == 2 * conv.stride
        self._stride, self._weight, self._outputs = conv.stride, _seen(conv.weight), conv.weight.shape[-1]

    def step(self, x: Floats, state: State, rows: Rows) -> Floats:
        """``x`` [rows, time, channels] to [rows, time * stride, outputs]; advances ``rows`` of ``state``.

        Each input adds to the outputs of its own time and to those of the next one.
        """
        batch, time, _ = x.shape
        wide = self._stride * self._outputs
        total = np.empty((batch, time + 1, wide), np.float32)
        total[:, 0] = state["partial"][rows].reshape(batch, wide)
        self._contribute(x, total)
        state["partial"][rows] = total[:, time].reshape(batch, self._stride, self._outputs)
        return total[:, :time].reshape(batch, time * self._stride, self._outputs)

    def _contribute(self, x: Floats, total: Floats) -> None:
        y = (x[:, :, None] * self._weight).reshape(*x.shape[:2], -1)
        wide = total.shape[2]
        total[:, 1:] = y[:, :, wide:]
        total[:, :-1] += y[:, :, :wide]


class _ConvTranspose(_Upsample):
    """An ELU and a :class:`~moshi_mlx.layers.conv.CausalConvTranspose` with a kernel of two strides."""

    def __init__(self, conv: CausalConvTranspose):
        super().__init__(conv)
        self._matrix = self._weight.reshape(len(self._weight), -1)
        self._bias = _Bias(conv)

    def step(self, x: Floats, state: State, rows: Rows) -> Floats:
        y = super().step(_elu(x, np.empty(x.shape, np.float32)), state, rows)
        self._bias.add_to(y)
        return y

    def _contribute(self, x: Floats, total: Floats) -> None:
        wide = total.shape[2]
        if x.shape[1] <= _FEW:
            y = _product(x, self._matrix)
            total[:, 1:] = y[:, :, wide:]
            total[:, :-1] += y[:, :, :wide]
        else:
            np.matmul(x, self._matrix[:, wide:], out=total[:, 1:])
            total[:, :-1] += x @ self._matrix[:, :wide]


class _Residual:
    def __init__(self, block: ResidualBlock):
        self._narrow, self._widen = _Conv(block.narrow), _Conv(block.widen)

    def step(self, x: Floats, state: State, rows: Rows) -> Floats:
        y = self._widen.step(self._narrow.step(x, state["narrow"], rows), {}, rows)
        y += x
        return y


class _Stage:
    def __init__(self, stage: Any):
        self._residuals = [_Residual(block) for block in stage.residuals]
        self._first = stage.resample_first
        self._resample: Any = (_ConvTranspose if self._first else _Conv)(stage.resample)

    def step(self, x: Floats, state: State, rows: Rows) -> Floats:
        if self._first:
            x = self._resample.step(x, state["resample"], rows)
        for index, block in enumerate(self._residuals):
            x = block.step(x, state[str(index)], rows)
        return x if self._first else self._resample.step(x, state["resample"], rows)


class _SEANet:
    """Layers near the waveform process one row after the other, to stay in the cache; the others all rows at once."""

    def __init__(self, net: SEANetEncoder | SEANetDecoder):
        layers: list[tuple[str, Any]] = [("first", _Conv(net.first, active=False))]
        layers += [(str(index), _Stage(stage)) for index, stage in enumerate(net.stages)]
        layers.append(("last", _Conv(net.last)))
        encodes = isinstance(net, SEANetEncoder)
        near = min(_NEAR, len(layers))
        split = near if encodes else len(layers) - near
        self._parts = [(layers[:split], encodes), (layers[split:], not encodes)]

    def step(self, x: Floats, state: State, rows: Rows) -> Floats:
        for layers, singly in self._parts:
            if singly and len(x) > 1:
                each = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
                singles = [slice(int(row), int(row) + 1) for row in each]
                x = np.concatenate([_chain(layers, x[i : i + 1], state, row) for i, row in enumerate(singles)])
            else:
                x = _chain(layers, x, state, rows)
        return x


def _chain(layers: Sequence[tuple[str, Any]], x: Floats, state: State, rows: Rows) -> Floats:
    for name, layer in layers:
        x = layer.step(x, state[name], rows)
    return x


class _LayerNorm:
    def __init__(self, norm: Any):
        self._weight, self._bias, self._epsilon = _seen(norm.weight), _seen(norm.bias), np.float32(norm.eps)

    def __call__(self, x: Floats) -> Floats:
        share = np.float32(1 / x.shape[-1])
        y: Floats = np.subtract(x, np.add.reduce(x, axis=-1, keepdims=True) * share)
        variance = np.einsum("...i,...i->...", y, y)[..., None] * share
        y *= 1 / np.sqrt(variance + self._epsilon)
        y *= self._weight
        y += self._bias
        return y


class _Attention:
    """:class:`~moshi_mlx.layers.attention.Attention`: each new position is written into the ring, then reads it."""

    def __init__(self, attention: Attention):
        self._heads = attention.num_heads
        self._in, self._out = _matrix(attention.in_proj), _matrix(attention.out_proj)
        self._scale = np.float32(attention.scale)

    def step(self, x: Floats, state: State, plan: _Plan) -> Floats:
        batch, time, dim = x.shape
        projected = _product(x, self._in).reshape(batch, time, 3, self._heads, -1)
        turned = (projected[:, :, :2].view(np.complex64) * plan.turn).view(np.float32)
        queries = turned[:, :, 0] * self._scale
        keys, values = state["keys"], state["values"]
        out = np.empty((batch, time, self._heads, 1, projected.shape[-1]), np.float32)
        for now in range(time):
            keys[plan.writes[now]] = turned[:, now, 1]
            values[plan.writes[now]] = projected[:, now, 2]
            for here, there, count in plan.runs[now]:
                scores = keys[there, :, :count] @ queries[here, now, :, :, None]
                scores -= np.maximum.reduce(scores, axis=2, keepdims=True)
                np.exp(scores, out=scores)
                scores /= np.add.reduce(scores, axis=2, keepdims=True)
                np.matmul(scores.swapaxes(2, 3), values[there, :, :count], out=out[here, now])
        return _product(out.reshape(batch, time, dim), self._out)


class _Plan:
    """Where the new positions of some rows are written, and what they then read: the same in every layer.

    Attributes
    ----------
    turn : array [rows, time, 1, 1, head_dim / 2], complex
        Rotation of each position's queries and keys.
    writes : list of tuples
        By time, the index of the rows' slots in a ring [batch, heads, context, head_dim].
    runs : list of lists of (slice, slice, int)
        By time: rows of the input, the same in the state, and how many slots they see. Rows that lie side by side and
        see equally many are read together.
    """

    def __init__(self, offset: NDArray[Any], rows: NDArray[Any], time: int, context: int, frequencies: NDArray[Any]):
        positions = offset[:, None].astype(np.int64) + np.arange(time)
        self.turn = np.exp(1j * (positions[..., None] * frequencies)).astype(np.complex64)[:, :, None, None]
        slots, whole = (positions % context).T, slice(None)
        where = slice(int(rows[0]), int(rows[0]) + 1)  # of a single row, which is written faster
        self.writes: list[Any] = (
            [(where, whole, slot) for slot in slots[:, 0].tolist()]
            if len(rows) == 1
            else [(rows, whole, slot) for slot in slots]
        )
        self.runs = [_runs(rows, counts) for counts in np.minimum(positions + 1, context).T.tolist()]


def _runs(rows: NDArray[Any], counts: list[int]) -> list[tuple[slice, slice, int]]:
    runs, start, where = [], 0, rows.tolist()
    for index in range(1, len(where) + 1):
        if index == len(where) or where[index] != where[index - 1] + 1 or counts[index] != counts[start]:
            runs.append((slice(start, index), slice(where[start], where[index - 1] + 1), counts[start]))
            start = index
    return runs


class _Layer:
    def __init__(self, layer: TransformerLayer):
        self._norm1, self._norm2 = _LayerNorm(layer.norm1), _LayerNorm(layer.norm2)
        self._attention = _Attention(layer.self_attn)
        self._up, self._down = _matrix(layer.gating.linear1), _matrix(layer.gating.linear2)
        self._scale1, self._scale2 = (
            _seen(layer[name].scale) if name in layer else None for name in ("layer_scale_1", "layer_scale_2")
        )

    def step(self, x: Floats, state: State, plan: _Plan) -> Floats:
        y = self._attention.step(self._norm1(x), state, plan)
        if self._scale1 is not None:
            y *= self._scale1
        y += x
        z = _product(_gelu(_product(self._norm2(y), self._up)), self._down)
        if self._scale2 is not None:
            z *= self._scale2
        z += y
        return z


class _Transformer:
    def __init__(self, transformer: Transformer):
        attention = transformer.layers[0].self_attn
        assert attention.context is not None and attention.rope is not None and attention.rope.interleaved
        size = attention.head_dim
        self._context = attention.context
        self._frequencies = attention.rope.max_period ** (-np.arange(0, size, 2) / size)
        self._layers = [_Layer(layer) for layer in transformer.layers]

    def step(self, x: Floats, state: State, rows: Rows) -> Floats:
        time = x.shape[1]
        each = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        plan = _Plan(state["offset"][rows], each, time, self._context, self._frequencies)
        for index, layer in enumerate(self._layers):
            x = layer.step(x, state[str(index)], plan)
        state["offset"][rows] += time
        return x


class _Quantizer:
    def __init__(self, quantizer: SplitResidualQuantizer):
        groups: list[ResidualQuantizer] = [quantizer.rvq_first]
        if "rvq_rest" in quantizer:
            groups.append(quantizer.rvq_rest)
        self._groups = [
            (
                _matrix(group.input_proj),
                _matrix(group.output_proj),
                [(_seen(book.embedding), np.array(book.half_norms())) for book in group.codebooks],
            )
            for group in groups
        ]

    def encode(self, x: Floats) -> NDArray[np.int32]:
        """Codes [rows, codebooks, frames] of a latent ``x`` [rows, frames, dim]."""
        codes = []
        for matrix, _, books in self._groups:
            residual = _product(x, matrix).reshape(-1, matrix.shape[1])
            scores = np.empty((len(residual), len(books[0][0])), np.float32)
            height = max(1, _PANEL // residual.shape[1])
            for entries, half_norms in books:
                for start in range(0, len(entries), height):
                    panel = entries[start : start + height]
                    for vector, result in zip(residual, scores[:, start : start + height], strict=True):
                        np.dot(panel, vector, out=result)
                scores -= half_norms
                nearest = scores.argmax(axis=1)
                residual -= entries[nearest]
                codes.append(nearest.reshape(x.shape[:2]))
        return np.stack(codes, axis=1).astype(np.int32)

    def decode(self, codes: NDArray[np.int32]) -> Floats:
        """A latent [rows, frames, dim] of ``codes`` [rows, codebooks, frames]; there may be fewer than books."""
        rest, total = codes.swapaxes(0, 1), None
        for _, matrix, books in self._groups:
            here, rest = rest[: len(books)], rest[len(books) :]
            if not len(here):
                break
            part = _product(sum(entries[ids] for (entries, _), ids in zip(books, here, strict=False)), matrix)
            total = part if total is None else total + part
        assert total is not None
        return total
