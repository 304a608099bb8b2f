"""Mimi frame by frame in numpy: what a conversation uses where there is no GPU.

MLX's wheel for Linux brings a matrix product without vector instructions, and takes 9 ns for an exponential; numpy
brings OpenBLAS and takes one. :class:`LeanEncoder` and :class:`LeanDecoder` compute what
:meth:`~moshi_mlx.mimi.Mimi.encode_step` and :meth:`~moshi_mlx.mimi.Mimi.decode_step` compute, from the same weights in
the same memory, for one sequence. Everything here is ``[time, channels]`` in float32; a stage is a function of new rows
that keeps what it needs of the old ones. The same figures in another order of summation: the tests hold both together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from .layers.attention import Attention
from .layers.conv import CausalConv, CausalConvTranspose, DepthwiseConvTranspose
from .layers.rvq import ResidualQuantizer, SplitResidualQuantizer
from .layers.seanet import ResidualBlock, SEANetDecoder, SEANetEncoder
from .layers.transformer import Transformer, TransformerLayer
from .mimi import Mimi
from .threads import one_blas_thread

__all__ = ["LeanDecoder", "LeanEncoder"]

Rows = NDArray[np.float32]
Stage = Callable[[Rows], Rows]
_FEW = 3
"""Up to this many rows, a product a row is faster than one for all: the matrix is read in order, and not packed."""


class LeanEncoder:
    """Frames to codes; a new one begins with silence.

    Parameters
    ----------
    mimi : Mimi
        With its weights evaluated. They are not copied.
    """

    def __init__(self, mimi: Mimi):
        one_blas_thread()
        self._stages = [_seanet(mimi.encoder), _transformer(mimi.encoder_transformer)]
        if "downsample" in mimi:
            self._stages.append(_Conv(mimi.downsample))
        self._quantize = _quantize(mimi.quantizer)

    def __call__(self, pcm: Rows) -> NDArray[np.int32]:
        """Codes [num_codebooks, frames], int32, of whole frames ``pcm`` [samples]."""
        x = pcm[:, None]
        for stage in self._stages:
            x = stage(x)
        return self._quantize(x)


class LeanDecoder:
    """Codes to frames; a new one begins with silence. As :class:`LeanEncoder`."""

    def __init__(self, mimi: Mimi):
        one_blas_thread()
        self._look_up = _dequantize(mimi.quantizer)
        self._stages: list[Stage] = [_Overlap(mimi.upsample)] if "upsample" in mimi else []
        self._stages += [_transformer(mimi.decoder_transformer), _seanet(mimi.decoder)]

    def __call__(self, codes: NDArray[np.int32]) -> Rows:
        """Samples [frames * frame_size], float32, of ``codes`` [codebooks, frames]."""
        x = self._look_up(codes)
        for stage in self._stages:
            x = stage(x)
        return np.ascontiguousarray(x[:, 0])


def _seen(weight: mx.array) -> Any:
    """A weight's memory as numpy sees it, without a copy."""
    return np.array(weight, copy=False)


def _matrix(linear: nn.Linear) -> Rows:
    """What rows are multiplied with, [inputs, outputs], in the order in which it is read."""
    return np.ascontiguousarray(_seen(linear.weight).T)


def _product(x: Rows, matrix: Rows) -> Rows:
    if len(x) > _FEW:
        out: Rows = x @ matrix
        return out
    out = np.empty((len(x), matrix.shape[1]), np.float32)
    for row, result in zip(x, out, strict=True):
        np.dot(row, matrix, out=result)
    return out


def _elu(x: Rows) -> Rows:
    """``exp(x) - 1`` below zero, which is never below ``x``; numpy's exp has vector instructions on more machines."""
    y = np.minimum(x, 0)
    np.exp(y, out=y)
    y -= 1
    out: Rows = np.maximum(x, y, out=y)
    return out


def _gelu(x: Rows) -> Rows:
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


def _erf(x: Rows) -> Rows:
    x = np.clip(x, -4, 4)
    square = x * x
    above, below = (_horner(square, powers) for powers in (_ERF_ABOVE, _ERF_BELOW))
    above *= x
    above /= below
    return above


def _horner(x: Rows, powers: Rows) -> Rows:
    y: Rows = x * powers[0]
    y += powers[1]
    for power in powers[2:]:
        y *= x
        y += power
    return y


class _Conv:
    """:class:`~moshi_mlx.layers.conv.CausalConv`, with the last inputs in front of the new ones."""

    def __init__(self, conv: CausalConv):
        kernel, channels, outputs = conv.weight.shape
        self._kernel, self._stride, self._dilation = kernel, conv.stride, conv.dilation
        self._matrix = _seen(conv.weight).reshape(kernel * channels, outputs)
        self._bias = _seen(conv.bias) if "bias" in conv else None
        self._left = np.zeros((conv.context, channels), np.float32)
        self._repeat_first = conv.replicate

    def __call__(self, x: Rows) -> Rows:
        if len(self._left):
            if self._repeat_first:
                self._left[:], self._repeat_first = x[0], False
            x = np.concatenate([self._left, x])
            self._left = x[len(x) - len(self._left) :].copy()
        y = _product(self._windows(x), self._matrix)
        if self._bias is not None:
            y += self._bias
        return y

    def _windows(self, x: Rows) -> Rows:
        if self._kernel == 1 and self._stride == 1:
            return x
        rows, channels = x.shape
        count = (rows - (self._kernel - 1) * self._dilation - 1) // self._stride + 1
        along, across = x.strides
        shape, steps = (count, self._kernel, channels), (along * self._stride, along * self._dilation, across)
        windows: Rows = as_strided(x, shape, steps, writeable=False).reshape(count, self._kernel * channels)
        return windows


class _Overlap:
    """A transposed convolution, of all channels or within each: sums that later inputs still change are kept back."""

    def __init__(self, conv: CausalConvTranspose | DepthwiseConvTranspose):
        self._stride, self._bias, self._matrix = conv.stride, None, None
        self._weight = _seen(conv.weight)
        if isinstance(conv, CausalConvTranspose):
            channels, kernel, self._outputs = conv.weight.shape
            self._matrix = self._weight.reshape(channels, kernel * self._outputs)
            self._bias = _seen(conv.bias) if "bias" in conv else None
        else:
            kernel, self._outputs = conv.weight.shape
        self._kernel, self._blocks = kernel, -(-kernel // conv.stride)
        self._late = np.zeros((self._blocks - 1, conv.stride * self._outputs), np.float32)

    def __call__(self, x: Rows) -> Rows:
        time, wide = len(x), self._stride * self._outputs
        if self._matrix is not None:
            y = _product(x, self._matrix)
        else:
            y = (x[:, None] * self._weight).reshape(time, -1)
        if self._blocks * wide > y.shape[1]:
            y = np.pad(y, ((0, 0), (0, self._blocks * wide - y.shape[1])))
        total = np.zeros((time + self._blocks - 1, wide), np.float32)
        total[: len(self._late)] = self._late
        for block in range(self._blocks):
            total[block : block + time] += y[:, block * wide : (block + 1) * wide]
        self._late = total[time:].copy()
        out = total[:time].reshape(time * self._stride, self._outputs)
        if self._bias is not None:
            out += self._bias
        return out


def _chain(stages: list[Stage]) -> Stage:
    def run(x: Rows) -> Rows:
        for stage in stages:
            x = stage(x)
        return x

    return run


def _residual(block: ResidualBlock) -> Stage:
    narrow, widen = _Conv(block.narrow), _Conv(block.widen)

    def run(x: Rows) -> Rows:
        y = widen(_elu(narrow(_elu(x))))
        y += x
        return y

    return run


def _seanet(net: SEANetEncoder | SEANetDecoder) -> Stage:
    stages: list[Stage] = [_Conv(net.first)]
    for stage in net.stages:
        residuals = [_residual(block) for block in stage.residuals]
        make: Any = _Overlap if stage.resample_first else _Conv
        resample = [_elu, make(stage.resample)]
        stages += resample + residuals if stage.resample_first else residuals + resample
    return _chain([*stages, _elu, _Conv(net.last)])


def _layer_norm(norm: Any) -> Stage:
    weight, bias, epsilon = _seen(norm.weight), _seen(norm.bias), np.float32(norm.eps)

    def run(x: Rows) -> Rows:
        y: Rows = x - x.mean(axis=1, keepdims=True)
        variance = np.einsum("ij,ij->i", y, y)[:, None] / np.float32(y.shape[1])
        y *= 1 / np.sqrt(variance + epsilon)
        y *= weight
        y += bias
        return y

    return run


class _Attention:
    """:class:`~moshi_mlx.layers.attention.Attention`: each new position is written into the ring, then reads it."""

    def __init__(self, attention: Attention):
        assert attention.context is not None and attention.rope is not None and attention.rope.interleaved
        self._heads, self._context = attention.num_heads, attention.context
        size = attention.head_dim
        self._in, self._out = _matrix(attention.in_proj), _matrix(attention.out_proj)
        self._scale = np.float32(attention.scale)
        self._keys = np.zeros((self._heads, self._context, size), np.float32)
        self._values = np.zeros_like(self._keys)
        self._frequencies = attention.rope.max_period ** (-np.arange(0, size, 2) / size)
        self._offset = 0

    def __call__(self, x: Rows) -> Rows:
        projected = _product(x, self._in).reshape(len(x), 3, self._heads, -1)
        out = np.empty((len(x), self._heads, 1, projected.shape[-1]), np.float32)
        for (query, key, value), result in zip(projected, out, strict=True):
            turn = np.exp(1j * (self._offset * self._frequencies)).astype(np.complex64)
            slot, seen = self._offset % self._context, min(self._offset + 1, self._context)
            self._keys[:, slot] = (key.view(np.complex64) * turn).view(np.float32)
            self._values[:, slot] = value
            turned = (query.view(np.complex64) * turn).view(np.float32)
            turned *= self._scale
            scores = self._keys[:, :seen] @ turned[:, :, None]
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=1, keepdims=True)
            np.matmul(scores.swapaxes(1, 2), self._values[:, :seen], out=result)
            self._offset += 1
        merged: Rows = _product(out.reshape(len(x), -1), self._out)
        return merged


def _layer(layer: TransformerLayer) -> Stage:
    norm1, norm2, attend = _layer_norm(layer.norm1), _layer_norm(layer.norm2), _Attention(layer.self_attn)
    up, down = _matrix(layer.gating.linear1), _matrix(layer.gating.linear2)
    scales = [_seen(layer[name].scale) if name in layer else None for name in ("layer_scale_1", "layer_scale_2")]

    def run(x: Rows) -> Rows:
        y = attend(norm1(x))
        if scales[0] is not None:
            y *= scales[0]
        y += x
        z = _product(_gelu(_product(norm2(y), up)), down)
        if scales[1] is not None:
            z *= scales[1]
        z += y
        return z

    return run


def _transformer(transformer: Transformer) -> Stage:
    return _chain([_layer(layer) for layer in transformer.layers])


def _groups(quantizer: SplitResidualQuantizer) -> list[ResidualQuantizer]:
    return [quantizer.rvq_first, *([quantizer.rvq_rest] if "rvq_rest" in quantizer else [])]


def _quantize(quantizer: SplitResidualQuantizer) -> Callable[[Rows], NDArray[np.int32]]:
    groups = []
    for group in _groups(quantizer):
        books = [(_seen(book.embedding), np.array(book.half_norms())) for book in group.codebooks]
        groups.append((_matrix(group.input_proj), books))

    def run(x: Rows) -> NDArray[np.int32]:
        codes = []
        for matrix, books in groups:
            residual = _product(x, matrix)
            for entries, half_norms in books:
                scores = np.stack([entries @ row for row in residual])
                scores -= half_norms
                nearest = scores.argmax(axis=1)
                residual -= entries[nearest]
                codes.append(nearest)
        return np.stack(codes).astype(np.int32)

    return run


def _dequantize(quantizer: SplitResidualQuantizer) -> Callable[[NDArray[np.int32]], Rows]:
    groups = [
        (_matrix(group.output_proj), [_seen(book.embedding) for book in group.codebooks])
        for group in _groups(quantizer)
    ]

    def run(codes: NDArray[np.int32]) -> Rows:
        rest, out = list(codes), None
        for matrix, books in groups:
            here, rest = rest[: len(books)], rest[len(books) :]
            if not here:
                break
            part = _product(sum(entries[ids] for entries, ids in zip(books, here, strict=False)), matrix)
            out = part if out is None else out + part
        assert out is not None
        return out

    return run
