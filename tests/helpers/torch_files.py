"""Files as ``torch.save`` writes them, made without torch: good ones, and with any pickle inside."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

_STORAGES = {
    mx.float32: ("FloatStorage", np.float32),
    mx.float16: ("HalfStorage", np.float16),
    mx.bfloat16: ("BFloat16Storage", np.uint16),
    mx.int64: ("LongStorage", np.int64),
}


def write_pt(path: Path, tensors: Mapping[str, mx.array]) -> Path:
    """Write a dict of tensors."""
    program = b"\x80\x02}q\x00("
    parts: dict[str, bytes] = {}
    for index, (name, value) in enumerate(tensors.items()):
        kind, dtype = _STORAGES[value.dtype]
        array = np.array(value.view(mx.uint16) if value.dtype == mx.bfloat16 else value).astype(dtype)
        strides = [stride // array.itemsize for stride in array.strides]
        program += text(name) + tensor(str(index), kind, array.size, 0, list(array.shape), strides)
        parts[f"data/{index}"] = array.tobytes()
    return write_archive(path, program + b"u.", parts)


def tensor(key: str, kind: str, size: int, offset: int, shape: list[int], strides: list[int]) -> bytes:
    """The pickle of one tensor."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + integer(size) + b"tQ"
    sizes = b"(" + b"".join(map(integer, shape)) + b"t(" + b"".join(map(integer, strides)) + b"t"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + integer(offset) + sizes + hooks + b"tR"


def write_archive(path: Path, program: bytes, parts: Mapping[str, bytes], compress: bool = False) -> Path:
    """Write a ZIP with a pickle and the bytes of its storages."""
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", b"little")
        for name, data in parts.items():
            archive.writestr(f"archive/{name}", data)
        archive.writestr("archive/version", b"3\n")
    path.write_bytes(buffer.getvalue())
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data
