"""GGUF files as candle writes them: Q8_0 matrices beside plain ones.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. A Q8_0 block is a
float16 scale and 32 int8 values; that is MLX's affine 8-bit quantization with groups of 32 and bias = -128 * scale,
so nothing is lost or expanded.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from .opening import open_file

__all__ = ["GgufTensor", "iterate_gguf", "read_gguf", "read_gguf_header"]

MAX_TENSORS = 20_000
MAX_STRING = 1 << 20
MAX_HEADER = 64 * 2**20
MAX_AXIS = 2**31 - 1
"""Longest axis that MLX has."""

_BLOCK = 32
_CHUNK = 16 * 2**20
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
# Bytes and values of a block, by ggml type number.
_TYPES = {0: ("F32", 4, 1), 1: ("F16", 2, 1), 8: ("Q8_0", 34, _BLOCK), 30: ("BF16", 2, 1)}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's entry: ``kind`` is F32, F16, BF16 or Q8_0; ``shape`` in row-major order; ``start`` in the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


class _Reader:
    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path, self.used = file, path, 0

    def bytes(self, count: int) -> bytes:
        self.used += count
        if self.used > MAX_HEADER:
            raise CheckpointError(f"{self.path}: the header is not believably long: fetch the file again")
        data = self.file.read(count)
        if len(data) != count:
            raise CheckpointError(f"{self.path} ends inside its header: fetch it again")
        return data

    def number(self, code: str) -> int:
        value: int = struct.unpack("<" + code, self.bytes(struct.calcsize(code)))[0]
        return value

    def string(self) -> str:
        length = self.number("Q")
        if length > MAX_STRING:
            raise CheckpointError(f"{self.path}: a name of {length} bytes is not believable: fetch the file again")
        return self.bytes(length).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Read a metadata value; only integers are kept, the rest is passed over."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and depth < 4:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                self.bytes(min(count, MAX_HEADER + 1) * _SCALARS[inner])
            else:
                for _ in range(min(count, MAX_HEADER)):  # the header's length limit ends this sooner
                    self.value(inner, depth + 1)
            return None
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: metadata of unknown type {kind}: fetch the file again")
        data = self.bytes(_SCALARS[kind])
        return int.from_bytes(data, "little") if kind == _UINT32 else None


def read_gguf_header(path: str | os.PathLike[str]) -> tuple[list[GgufTensor], int]:
    """The tensors that a file declares, checked against its length, and where their data begins.

    Raises
    ------
    CheckpointError
        If the header is broken or uses a type other than F32, F16, BF16 and Q8_0.
    """
    path = Path(path)
    with open_file(path) as (file, size):
        reader = _Reader(file, path)
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file")
        version = reader.number("I")
        if version not in (2, 3):
            raise CheckpointError(f"{path}: GGUF version {version} is not known; 2 and 3 are")
        count, pairs = reader.number("Q"), reader.number("Q")
        if count > MAX_TENSORS or pairs > MAX_TENSORS:
            raise CheckpointError(f"{path}: {count} tensors and {pairs} settings are not believable: fetch it again")
        alignment = 32
        for _ in range(pairs):
            key = reader.string()
            value = reader.value(reader.number("I"))
            if key == "general.alignment":
                alignment = value if isinstance(value, int) else 0
        if not 1 <= alignment <= 1 << 20:
            raise CheckpointError(f"{path}: an alignment of {alignment} bytes is not believable")
        entries = [_read_entry(reader) for _ in range(count)]
        data_start = -(-file.tell() // alignment) * alignment
    tensors = [GgufTensor(e.name, e.kind, e.shape, e.start + data_start, e.size) for e in entries]
    position = data_start
    for tensor in sorted(tensors, key=lambda t: t.start):
        if tensor.start < position:
            raise CheckpointError(f"{path}: tensor {tensor.name[:100]!r} overlaps another: fetch the file again")
        position = tensor.start + tensor.size
        if position > size:
            raise CheckpointError(
                f"{path}: tensor {tensor.name[:100]!r} ends at byte {position}, but the file has {size}: fetch it again"
            )
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise CheckpointError(f"{path} has a tensor twice")
    return tensors, data_start


def _read_entry(reader: _Reader) -> GgufTensor:
    name = reader.string()
    where = f"{reader.path}: tensor {name[:100]!r}"
    axes = reader.number("I")
    if axes > 4:
        raise CheckpointError(f"{where} has {axes} axes; at most 4 are possible")
    shape = tuple(reader.number("Q") for _ in range(axes))[::-1]
    kind = reader.number("I")
    offset = reader.number("Q")
    if kind not in _TYPES:
        raise CheckpointError(f"{where} has the ggml type {kind}; F32, F16, BF16 and Q8_0 can be read")
    label, block_bytes, block = _TYPES[kind]
    items = 1
    for axis in shape:
        items *= axis
    if items > 2**48 or max(shape, default=0) > MAX_AXIS or (block > 1 and (not shape or shape[-1] % block)):
        raise CheckpointError(f"{where} has an impossible shape for {label}: {list(shape)}")
    return GgufTensor(name, label, shape, offset, items // block * block_bytes)


def read_gguf(path: str | os.PathLike[str]) -> dict[str, mx.array]:
    """All tensors; a Q8_0 tensor ``X.weight`` becomes ``X.weight``, ``X.scales`` and ``X.biases`` as MLX has them.

    Tensors are read one by one in small pieces, so that memory holds hardly more than the result.
    """
    return dict(iterate_gguf(path))


def iterate_gguf(path: str | os.PathLike[str]) -> Iterator[tuple[str, mx.array]]:
    """Like :func:`read_gguf`, tensor by tensor: nothing is kept between two of them."""
    tensors, _ = read_gguf_header(path)
    try:
        with open_file(path) as (file, _):
            for tensor in tensors:
                file.seek(tensor.start)
                if tensor.kind == "Q8_0":
                    stem = _stem(tensor.name, path)
                    parts = _read_q8(file, tensor)
                    for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
                        yield stem + part, array
                else:
                    yield tensor.name, _read_plain(file, tensor)
    except (ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _stem(name: str, path: str | os.PathLike[str]) -> str:
    if not name.endswith("weight"):
        raise CheckpointError(f"{path}: tensor {name[:100]!r} is quantized, but is not called a weight")
    return name.removesuffix("weight")


def _read_plain(file: BinaryIO, tensor: GgufTensor) -> mx.array:
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[tensor.kind]
    array = mx.array(np.frombuffer(_exactly(file, tensor.size), dtype).reshape(tensor.shape))
    return array.view(mx.bfloat16) if tensor.kind == "BF16" else array


def _read_q8(file: BinaryIO, tensor: GgufTensor) -> tuple[mx.array, mx.array, mx.array]:
    *rows, width = tensor.shape
    count = int(np.prod(rows, dtype=np.int64)) if rows else 1
    groups = width // _BLOCK
    packed = np.empty((count, width), np.uint8)
    scales = np.empty((count, groups), np.float16)
    step = max(1, _CHUNK // max(1, groups * 34))
    for first in range(0, count, step):
        last = min(count, first + step)
        blocks = np.frombuffer(_exactly(file, (last - first) * groups * 34), np.uint8).reshape(-1, groups, 34)
        scales[first:last] = blocks[..., :2].copy().view(np.float16)[..., 0]
        # int8 value v is stored by MLX as the byte v + 128, which flips the sign bit.
        packed[first:last] = (blocks[..., 2:] ^ 0x80).reshape(last - first, width)
    weight = mx.array(packed.view(np.uint32)).reshape(*rows, width // 4)
    scale = mx.array(scales).reshape(*rows, groups)
    return weight, scale, scale * mx.array(-128.0, mx.float16)


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ValueError("the file ends too early")
    return data
