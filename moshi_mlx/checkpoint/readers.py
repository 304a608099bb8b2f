"""Files of weights as dicts of lazy arrays, checked before anything is allocated.

A safetensors header is validated here, byte by byte, before MLX opens the file: a truncated download or a hostile
header ends in a :class:`CheckpointError` that names the file and the tensor. MLX then reads each tensor straight into
its final memory when it is first used, so a tensor that is never used costs nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import mlx.core as mx

from ..disk import replacing
from ..errors import CheckpointError
from .gguf import read_gguf, read_gguf_header
from .opening import open_file

__all__ = [
    "INDEX_SUFFIX",
    "TensorInfo",
    "expand_shards",
    "inner_path",
    "parse_object",
    "read_json",
    "read_safetensors",
    "read_safetensors_header",
    "read_shapes",
    "read_tensors",
    "shown",
    "write_safetensors",
]

INDEX_SUFFIX = ".safetensors.index.json"

MAX_HEADER = 4 * 2**20
"""Longest header in bytes; the largest published one is 160 kB. JSON takes up to thirty times its size in memory."""
MAX_JSON = 2 * 2**20
MAX_TENSORS = 20_000
MAX_AXES = 8
MAX_NAME = 255
"""Longest name of a file, in bytes, that file systems allow."""

_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about a tensor.

    Attributes
    ----------
    dtype : str
        Name in the safetensors format, for instance ``BF16``.
    shape : tuple of int
    """

    dtype: str
    shape: tuple[int, ...]


def shown(names: Iterable[str], limit: int = 4) -> str:
    """The first few names and how many more there are, for an error message."""
    ordered = sorted(names)
    text = ", ".join(name if len(name) <= 100 else name[:97] + "..." for name in ordered[:limit])
    return text if len(ordered) <= limit else f"{text} and {len(ordered) - limit} more"


# -------------------------------------------------------------------------------------------------- JSON


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file that is not trusted.

    Raises
    ------
    CheckpointError
        If the file is missing, too large, not UTF-8, not JSON, nested too deeply, or not an object.
    """
    with open_file(path) as (file, size):
        if size > MAX_JSON:
            raise CheckpointError(f"{path} has {size} bytes, which is too much for a configuration")
        return parse_object(file.read(MAX_JSON), str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object from bytes that are not trusted; ``where`` is what to call them in messages.

    Raises
    ------
    CheckpointError
        As :func:`read_json`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(f"{where} has {key[:100]!r} twice")
            result[key] = value
        return result

    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply") from None
    except ValueError as error:  # bad UTF-8, bad JSON, absurd numbers
        raise CheckpointError(f"{where} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} should hold a JSON object, found {type(parsed).__name__}")
    return parsed


# ------------------------------------------------------------------------------------------- safetensors


def read_safetensors_header(path: str | os.PathLike[str]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata that a safetensors file declares, after checking that the file can hold them.

    Accepted as well: ``"__metadata__": null``, headers without padding, and offsets in another order than the names,
    all of which MLX has written.

    Raises
    ------
    CheckpointError
        Names the file, the tensor and what to do.
    """
    again = "the file is incomplete or damaged: fetch it again"
    with open_file(path) as (file, size):
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{path} has {size} bytes, but its header alone should have {length}: {again}"
                if size >= 8
                else f"{path} has {size} bytes and is not a safetensors file: {again}"
            )
        if length > MAX_HEADER:
            raise CheckpointError(f"{path}: a header of {length} bytes is not believable: {again}")
        header = parse_object(file.read(length), f"{path}: the header")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path}: {len(header)} tensors are not believable: {again}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: the header's __metadata__ should map names to strings")
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        where = f"{path}: tensor {name[:100]!r}"
        tensors[name], begin, end = _parse_entry(entry, where)
        spans.append((begin, end, name))
    available, position = size - 8 - length, 0
    for begin, end, name in sorted(spans):
        if end > available:
            raise CheckpointError(
                f"{path}: tensor {name[:100]!r} ends at byte {end} of the data, which has only {available}: {again}"
            )
        if begin != position:
            fault = "overlaps the one before it" if begin < position else f"leaves {begin - position} bytes unused"
            raise CheckpointError(f"{path}: tensor {name[:100]!r} {fault}: {again}")
        position = end
    if position != available:
        raise CheckpointError(f"{path} has {available - position} bytes after its last tensor: {again}")
    return tensors, metadata


def _parse_entry(entry: Any, where: str) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} should have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise CheckpointError(
            f"{where} has the type {str(dtype)[:40]!r}, which cannot be used here; convert it to F32, F16 or BF16"
        )
    if not _naturals(shape) or len(shape) > MAX_AXES:
        raise CheckpointError(f"{where} has an impossible shape: {str(shape)[:100]}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has impossible data_offsets: {str(offsets)[:100]}")
    wanted = _ITEM_BYTES[dtype]
    for axis in shape:
        wanted *= axis
    if offsets[1] - offsets[0] != wanted:
        raise CheckpointError(
            f"{where}: {dtype} of shape {shape} takes {wanted} bytes, but data_offsets span {offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape)), offsets[0], offsets[1]


def _naturals(values: Any) -> bool:
    """Whether this is a list of integers from 0 to 2^53 (booleans are not integers)."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= 2**53 for value in values)


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Tensors of a checked file, none of them read yet, and its metadata."""
    declared, metadata = read_safetensors_header(path)
    try:
        loaded: Any = mx.load(os.fspath(path), format="safetensors")
    except (RuntimeError, ValueError, MemoryError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    for name, info in declared.items():
        if name not in loaded or tuple(loaded[name].shape) != info.shape:
            raise CheckpointError(f"{path}: tensor {name[:100]!r} is not read as its header says")
    return dict(loaded), metadata


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file: an interruption leaves nothing half made."""
    try:
        with replacing(path, ".safetensors") as partial:
            mx.save_safetensors(str(partial), dict(tensors), {"format": "mlx", **(metadata or {})})
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


# ----------------------------------------------------------------------------------------- several files


def inner_path(folder: Path, name: str, where: str) -> Path:
    """``folder/name`` for a file name that a file in the folder gave, which must stay inside the folder.

    Raises
    ------
    CheckpointError
        If the name is absolute or climbs out, or no file can be called so.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or re.search(r"[\\:\0]", name):
        raise CheckpointError(f"{where} names the file {name[:100]!r}, which is outside its folder: refused")
    if any(len(part.encode("utf-8", "replace")) > MAX_NAME for part in parts):
        raise CheckpointError(f"{where} names the file {name[:100]!r}, which is longer than a name can be")
    return folder.joinpath(*parts)


def expand_shards(path: str | os.PathLike[str]) -> list[Path]:
    """The files that hold the tensors: the path itself, or the shards that an index names."""
    path = Path(path)
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    shards = set(_weight_map(path).values())
    return [inner_path(path.parent, shard, str(path)) for shard in sorted(shards)]


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensors to files")
    return weight_map


def read_tensors(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> dict[str, mx.array]:
    """All tensors of one or more files: safetensors, GGUF, or the index of a sharded checkpoint.

    Raises
    ------
    CheckpointError
        If a file is broken, a shard is missing, the index and its shards differ, or a tensor comes twice.
    """
    tensors: dict[str, mx.array] = {}
    for path in _listed(paths):
        wanted: dict[str, str] | None = _weight_map(path) if path.name.endswith(INDEX_SUFFIX) else None
        for file in expand_shards(path):
            if wanted is not None and not os.path.isfile(file):
                raise CheckpointError(f"{path} names the file {file.name}, which is missing: fetch it")
            loaded = read_gguf(file) if file.suffix == ".gguf" else read_safetensors(file)[0]
            twice = tensors.keys() & loaded.keys()
            if twice:
                raise CheckpointError(f"{file} holds tensors that another file holds as well: {shown(twice)}")
            tensors.update(loaded)
        if wanted is not None and wanted.keys() - tensors.keys():
            raise CheckpointError(f"the files of {path} lack {shown(wanted.keys() - tensors.keys())}")
    return tensors


def read_shapes(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, from headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _listed(paths):
        for file in expand_shards(path):
            if file.suffix == ".gguf":
                shapes.update({info.name: info.shape for info in read_gguf_header(file)[0]})
            else:
                shapes.update({name: info.shape for name, info in read_safetensors_header(file)[0].items()})
    return shapes


def _listed(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]
