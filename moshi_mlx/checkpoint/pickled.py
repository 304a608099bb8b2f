"""Tensors from a file of ``torch.save``, without torch and without running anything that the file says.

Such a file is a ZIP archive of uncompressed members: ``data.pkl`` describes a tree of tensors, ``data/N`` are their
bytes. Python's unpickler would call whatever functions a pickle names; the one below knows some thirty instructions and
three names, builds dicts, lists, tuples and tensors out of them, and refuses the rest.
"""

from __future__ import annotations

import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO, NoReturn

import mlx.core as mx
import numpy as np

from ..disk import replacing
from ..errors import CheckpointError
from .opening import open_file

__all__ = ["read_torch_tensors", "write_torch_tensors"]

MAX_FILE = 256 * 2**20
MAX_MEMBERS = 4096
MAX_PICKLE = 2**20
MAX_TENSORS = 1024
_END_RECORD = 22
_LONGEST_COMMENT = 65535
_ENCRYPTED = 0x1

_STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": np.uint16,
    "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8,
    "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


class _Refused(Exception):
    """The pickle does something that a dict of tensors has no need of."""


class _Instructions(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> NoReturn:
        raise _Refused(f"its description uses the instruction {chr(code)!r}")


@dataclass(frozen=True)
class _Storage:
    key: str
    kind: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch_tensors(source: str | os.PathLike[str] | bytes, where: str | None = None) -> dict[str, mx.array]:
    """The dict of tensors in a ``.pt`` file.

    Parameters
    ----------
    source : path or bytes
        The file, or its contents.
    where : str, optional
        What to call it in messages.

    Returns
    -------
    dict of str to mx.array
        float64 comes as float32; everything else keeps its type.

    Raises
    ------
    CheckpointError
        If the file is anything but a dict of plain tensors saved by torch 1.6 or later.
    """
    where = where or ("the file" if isinstance(source, bytes) else str(source))
    if not isinstance(source, bytes):
        with open_file(source) as (file, size):
            if size > MAX_FILE:
                raise CheckpointError(f"{where} has {size} bytes, which is too much for a voice")
            source = file.read(MAX_FILE)
    try:
        return _read(BytesIO(source), len(source))
    except _Refused as error:
        raise CheckpointError(
            f"{where}: {error}; only a dict of tensors is read, as safetensors or torch.save"
        ) from None
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        ValueError,
        LookupError,
        OverflowError,
        TypeError,
        RuntimeError,  # an encrypted part, or a kind of compression that Python does not have
        EOFError,  # a part that ends early
        struct.error,
        MemoryError,
    ) as error:
        raise CheckpointError(f"{where} is damaged or not a file of torch.save: {str(error)[:200]}") from None


def _read(file: BinaryIO, size: int) -> dict[str, mx.array]:
    _check_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        described = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(described) != 1:
            raise _Refused(f"it has {len(described)} descriptions (data.pkl), not one")
        prefix = described[0].removesuffix("data.pkl")

        def member(name: str, limit: int) -> bytes:
            info = members.get(prefix + name)
            if info is None:
                raise _Refused(f"its part {name[:60]!r} is missing")
            if info.flag_bits & _ENCRYPTED:
                raise _Refused(f"its part {name[:60]!r} is encrypted, which torch never does")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise _Refused(f"its part {name[:60]!r} is compressed, which torch never does")
            if info.file_size > limit:
                raise _Refused(f"its part {name[:60]!r} has {info.file_size} bytes")
            return archive.read(info)

        if prefix + "byteorder" in members and member("byteorder", 16) != b"little":
            raise _Refused("its byte order is not little-endian")
        tree = _Unpickler(BytesIO(member("data.pkl", MAX_PICKLE))).load()
        if not isinstance(tree, dict) or not tree:
            raise _Refused(f"it holds a {type(tree).__name__.strip('_').lower()}, not a dict of tensors")
        if not all(isinstance(key, str) and isinstance(value, _Tensor) for key, value in tree.items()):
            raise _Refused("it holds other things than tensors")
        total = sum(math.prod(t.shape) * np.dtype(_STORAGES[t.storage.kind]).itemsize for t in tree.values())
        if total > size:  # tensors that share bytes have no place in a voice, and could be made to fill the memory
            raise _Refused("its tensors are larger than the file")
        return {key: _build(value, member, size) for key, value in tree.items()}


def _check_directory(file: BinaryIO, size: int) -> None:
    """Refuse a ZIP with absurdly many members before Python's reader makes an object of each."""
    file.seek(max(0, size - _END_RECORD - _LONGEST_COMMENT))
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END_RECORD:
        raise _Refused("it is not a ZIP archive (files of torch before 1.6 are not)")
    count = int.from_bytes(tail[at + 10 : at + 12], "little")
    directory = int.from_bytes(tail[at + 12 : at + 16], "little")
    wide = tail.rfind(b"PK\6\6", 0, at)
    if wide >= 0:
        directory = max(
            directory if directory < 2**32 - 1 else 0, int.from_bytes(tail[wide + 40 : wide + 48], "little")
        )
        count = int.from_bytes(tail[wide + 32 : wide + 40], "little")
    if count > MAX_MEMBERS or directory > MAX_MEMBERS * 128:
        raise _Refused(f"it has {count} members")


def _build(tensor: _Tensor, member: Callable[[str, int], bytes], limit: int) -> mx.array:
    """The tensor's array, after checking that its strides stay inside its storage."""
    kind = _STORAGES[tensor.storage.kind]
    flat: np.ndarray[Any, Any] = np.frombuffer(member(f"data/{tensor.storage.key}", limit), kind)
    last = tensor.offset + sum((axis - 1) * stride for axis, stride in zip(tensor.shape, tensor.strides, strict=True))
    if 0 not in tensor.shape and last >= flat.size:
        raise _Refused("a tensor reaches beyond its bytes")
    strides = [stride * flat.itemsize for stride in tensor.strides]
    array = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides, writeable=False).copy()
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    result = mx.array(array)
    return result.view(mx.bfloat16) if tensor.storage.kind == "BFloat16Storage" else result


class _Dict(dict[str, Any]):
    """A dict that hashes strings only: tuples in tuples in tuples would overflow the stack."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str):
            raise _Refused("it has keys that are not strings")
        super().__setitem__(key, value)


def _no_items() -> _Dict:
    """What torch saves as an empty OrderedDict."""
    return _Dict()


class _Unpickler(pickle._Unpickler):
    """The standard library's unpickler in Python, with a few of its instructions and without any name looked up.

    Unlike the one in C it keeps its memo in a dict, where a large index takes no memory.
    """

    dispatch = _Instructions(
        (code, run)
        for code, run in pickle._Unpickler.dispatch.items()
        if bytes([code])
        in (
            pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
            pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE,
            pickle.SHORT_BINUNICODE, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1,
            pickle.TUPLE2, pickle.TUPLE3, pickle.SETITEM, pickle.SETITEMS, pickle.BINPUT, pickle.LONG_BINPUT,
            pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID,
            pickle.REDUCE,
        )
    )  # fmt: skip
    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(_Dict())
    tensors = 0

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("collections", "OrderedDict"):
            return _no_items
        if module == "torch" and name in _STORAGES:
            return name
        raise _Refused(f"it wants to use {module[:60]}.{name[:60]}")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(kind), str(key), str(), int()) if kind in _STORAGES and key.isalnum():
                return _Storage(key, kind)
        raise _Refused("it refers to bytes in an unknown way")

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        self.tensors += 1
        if (
            isinstance(storage, _Storage)
            and all(_naturals(part) for part in ((offset,), shape, strides))
            and len(shape) == len(strides) <= 8
            and self.tensors <= MAX_TENSORS
        ):
            return _Tensor(storage, offset, shape, strides)
        raise _Refused("it has an impossible tensor")


def _naturals(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and 0 <= value < 2**48 for value in values)


_SAVED = {
    mx.float32: ("FloatStorage", mx.uint32),
    mx.float16: ("HalfStorage", mx.uint16),
    mx.bfloat16: ("BFloat16Storage", mx.uint16),
    mx.int64: ("LongStorage", mx.uint64),
    mx.int32: ("IntStorage", mx.uint32),
}


def write_torch_tensors(path: str | os.PathLike[str], tensors: Mapping[str, mx.array]) -> None:
    """Write a dict of tensors as ``torch.save`` does; an interruption leaves nothing half made.

    Raises
    ------
    CheckpointError
        If it cannot be written.
    """
    text = b"".join(_pickled(name, tensor, str(index)) for index, (name, tensor) in enumerate(tensors.items()))
    try:
        with replacing(path, ".pt") as partial, zipfile.ZipFile(partial, "w") as archive:
            archive.writestr("voice/data.pkl", b"\x80\x02}(" + text + b"u.")
            archive.writestr("voice/byteorder", "little")
            for index, tensor in enumerate(tensors.values()):
                bits = np.array(mx.view(mx.contiguous(tensor), _SAVED[tensor.dtype][1]))
                archive.writestr(f"voice/data/{index}", bits.tobytes())
            archive.writestr("voice/version", "3\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def _pickled(name: str, tensor: mx.array, key: str) -> bytes:
    """Instructions that put one contiguous tensor on the stack, behind its name."""

    def text(value: str) -> bytes:
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data

    def numbers(values: list[int]) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.ndim)]
    kind = f"ctorch\n{_SAVED[tensor.dtype][0]}\n".encode()
    storage = b"(" + text("storage") + kind + text(key) + text("cpu") + b"J" + struct.pack("<i", tensor.size) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    shape = b"K\x00" + numbers(list(tensor.shape)) + numbers(strides)
    return text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + shape + b"\x89" + hooks + b"tR"
