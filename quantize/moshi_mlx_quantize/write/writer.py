"""A safetensors file written piece by piece: the header first, then every tensor at its place, in any order.

Format: https://huggingface.co/docs/safetensors. Tensors with larger items come first, so that all are aligned.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx

from moshi_mlx.errors import CheckpointError

__all__ = ["Entry", "StreamingWriter", "entry_bytes", "explain"]

_NAMES = {
    mx.float32: ("F32", 4),
    mx.float16: ("F16", 2),
    mx.bfloat16: ("BF16", 2),
    mx.uint32: ("U32", 4),
    mx.uint8: ("U8", 1),
}


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return prod(self.shape) * _NAMES[self.dtype][1]


def entry_bytes(entries: Iterable[Entry]) -> int:
    """Size of all data."""
    return sum(entry.nbytes for entry in entries)


def explain(path: Path, error: OSError) -> CheckpointError:
    """An error of the system as one that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CheckpointError(f"the disk is full: {path} could not be written. Make room, or write to another disk")
    return CheckpointError(f"cannot write {path}: {error.strerror or error}")


class StreamingWriter:
    """Use it with ``with``: leaving it without an error checks that every byte was written, and syncs the file.

    Parameters
    ----------
    path : path
        Must not exist.
    entries : mapping of str to Entry
        Everything that the file will hold.
    metadata : mapping of str to str
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None):
        self.path = path
        self._entries = dict(entries)
        ordered = sorted(entries, key=lambda name: (-_NAMES[entries[name].dtype][1], name))
        header: dict[str, object] = {"__metadata__": {"format": "mlx", **(metadata or {})}}
        self._starts: dict[str, int] = {}
        position = 0
        for name in ordered:
            entry = entries[name]
            end = position + entry.nbytes
            header[name] = {
                "dtype": _NAMES[entry.dtype][0],
                "shape": list(entry.shape),
                "data_offsets": [position, end],
            }
            self._starts[name] = position
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._missing = {name: entry.nbytes for name, entry in entries.items()}
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError as error:
            raise explain(path, error) from error
        self._put(len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, array: mx.array, first_row: int = 0) -> None:
        """Write a tensor, or rows of it from ``first_row`` on."""
        entry = self._entries[name]
        rows = (array.shape[0] if array.ndim else 1) + first_row
        whole = entry.shape[0] if entry.shape else 1
        if array.dtype != entry.dtype or array.shape[1:] != entry.shape[1:] or rows > whole:
            raise CheckpointError(
                f"{name}: {list(array.shape)} {array.dtype} instead of {list(entry.shape)} {entry.dtype}"
            )
        row = entry.nbytes // max(1, whole)
        flat: Any = mx.contiguous(array).reshape(-1).view(mx.uint8) if array.size else b""
        data = memoryview(flat)
        self._put(data.cast("B"), self._data + self._starts[name] + first_row * row)
        self._missing[name] -= array.nbytes

    def _put(self, data: bytes | memoryview, position: int) -> None:
        view = memoryview(data)
        try:
            while len(view):
                count = os.pwrite(self._file, view[: 2**26], position)
                view, position = view[count:], position + count
        except OSError as error:
            raise explain(self.path, error) from error

    def __enter__(self) -> StreamingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                unwritten = [name for name, missing in self._missing.items() if missing]
                if unwritten:
                    raise CheckpointError(f"{self.path}: {unwritten[0]} was not written whole")
                os.fsync(self._file)
        except OSError as failure:
            raise explain(self.path, failure) from failure
        finally:
            os.close(self._file)
