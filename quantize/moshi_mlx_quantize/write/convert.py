"""From a checkpoint to a smaller one, tensor by tensor.

Memory holds one tensor of the source at a time and a few MB of its quantized form, however large the model is. The
result is written to a staging folder, loaded strictly and run for one frame, and only then moved into place.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from moshi_mlx.checkpoint.fit import fit_lm, load_config
from moshi_mlx.checkpoint.layouts import stored_names
from moshi_mlx.checkpoint.quantization import Quantization
from moshi_mlx.checkpoint.readers import read_tensors
from moshi_mlx.checkpoint.resolve import CheckpointFiles
from moshi_mlx.disk import free_bytes
from moshi_mlx.errors import CheckpointError, MoshiError

from ..plan.recipes import Module, Plan, natural, part_of
from ..source import Source, any_conditions
from .writer import Entry, StreamingWriter, entry_bytes, explain

__all__ = ["Result", "check", "check_space", "planned_entries", "weights_name", "write_checkpoint"]

Progress = Callable[[int], None]
"""Called with the bytes that were just written."""

SPARE_BYTES = 64 * 2**20
"""Disk space that is left free."""
_CHUNK_BYTES = 32 * 2**20
_CLASSIC = {Quantization(4, 32): "q4", Quantization(8, 64): "q8", Quantization(6, 64): "q6"}
_CLASSIC_HELIUM = {Quantization(4, 64): "q4", Quantization(8, 64): "q8", Quantization(6, 64): "q6"}
_MAX_CHECK_MEMORY = 256 * 2**20


@dataclass
class Result:
    """What was written.

    Attributes
    ----------
    weights : str
        Name of the file of weights.
    bytes_before, bytes_after : int
        Size of the source's files of weights (and of its LoRA, if one was merged), and of the one that was written.
    errors : dict of str to float
        Relative error ``|w' - w| / |w|`` (Frobenius) by module.
    parts : dict of str to tuple
        (bytes, weights, squared error, squared norm) by part of the model.
    carried : list of str
        Other files that came along.
    """

    weights: str
    bytes_before: int = 0
    bytes_after: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    parts: dict[str, tuple[int, int, float, float]] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        """Over the whole file; scales, biases and what stays dense count."""
        sizes = self.parts.values()
        return 8 * sum(part[0] for part in sizes) / max(1, sum(part[1] for part in sizes))


# ---------------------------------------------------------------------------------------------- what will be written


def weights_name(plan: Plan, helium: bool) -> str:
    """Kyutai's own file name for the recipes that its programs know, ``model.safetensors`` for all others."""
    q = plan.uniform
    dense = [name for name, choice in plan.choices.items() if choice is None]
    classic = (_CLASSIC_HELIUM if helium else _CLASSIC).get(q) if q is not None and not dense else None
    return "model.safetensors" if classic is None else f"model.{classic}.safetensors"


def planned_entries(source: Source, plan: Plan) -> dict[str, Entry]:
    """Every tensor of the file by its name there; nothing is read."""
    entries: dict[str, Entry] = {}
    modules = {module.name: module for module in source.modules}
    for name, value in source.tensors.items():
        module = modules.get(name.rpartition(".")[0])
        if module is None or name.rpartition(".")[2] not in ("weight", "scales", "biases"):
            _add(entries, source, name, Entry(tuple(value.shape), value.dtype))
        elif name.endswith(".weight"):
            for part, entry in _module_entries(module, plan.choices.get(module.name), _float_of(source, module)):
                _add(entries, source, f"{module.name}.{part}", entry)
    return entries


def _float_of(source: Source, module: Module) -> mx.Dtype:
    """The type of a module's dense weights, or of its scales."""
    value = source.tensors.get(f"{module.name}.weight")
    conditions = module.part == "conditions" and value is not None and value.dtype != mx.uint32
    return value.dtype if conditions and value is not None else source.dtype


def _module_entries(module: Module, q: Quantization | None, dtype: mx.Dtype) -> list[tuple[str, Entry]]:
    if q is None:
        return [("weight", Entry((module.rows, module.width), dtype))]
    packed = Entry((module.rows, module.width * q.bits // 32), mx.uint32)
    groups = (module.rows, module.width // q.group_size)
    if q.mode != "affine":
        return [("weight", packed), ("scales", Entry(groups, mx.uint8))]
    return [("weight", packed), ("scales", Entry(groups, dtype)), ("biases", Entry(groups, dtype))]


def _add(entries: dict[str, Entry], source: Source, name: str, entry: Entry) -> None:
    for stored in stored_names(name, "mlx", source.config.lm):
        entries[stored] = entry


def check_space(folder: Path, wanted: int) -> None:
    """Refuse what will not fit.

    Raises
    ------
    CheckpointError
        Says how much is missing.
    """
    free = free_bytes(folder)
    if wanted + SPARE_BYTES > free:
        raise CheckpointError(
            f"the disk of {folder} has {free / 1e9:.2f} GB free, but {wanted / 1e9:.2f} GB are needed: make room, or "
            "write to another disk"
        )


# ---------------------------------------------------------------------------------------------------------- writing


def write_checkpoint(
    source: Source,
    plan: Plan,
    files: CheckpointFiles,
    folder: Path,
    *,
    reference: bool = False,
    made: Mapping[str, Any] | None = None,
    tuned: Mapping[str, Mapping[str, mx.array]] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Write weights, config.json and the files that belong to them.

    Parameters
    ----------
    source : Source
        Its tensors are used up.
    plan : Plan
    files : CheckpointFiles
        Where the codec and the tokenizer are.
    folder : path
        Must exist.
    reference : bool
        Name the files of a hub repository in config.json instead of copying them.
    made : mapping, optional
        How the file was made, for its metadata.
    tuned : mapping, optional
        Parts by module, to take instead of rounding.
    progress : callable, optional

    Raises
    ------
    CheckpointError
        If the disk is full, or a tensor of the source cannot be read or is not finite.
    """
    entries = planned_entries(source, plan)
    helium = source.config.model_type == "helium"
    result = Result(weights_name(plan, helium), bytes_before=source.size)
    carried, names = _carried(source, files, reference, {result.weights, "config.json", "README.md"})
    check_space(folder, entry_bytes(entries.values()) + sum(path.stat().st_size for path, _ in carried))
    # MLX would keep freed buffers for later, which would be most of the memory that is used here.
    limit = mx.set_cache_limit(0)
    try:
        with StreamingWriter(folder / result.weights, entries, _metadata(plan, made)) as writer:
            _write_tensors(source, plan, tuned or {}, writer, result, progress or (lambda _: None))
    finally:
        mx.set_cache_limit(limit)
    result.bytes_after = (folder / result.weights).stat().st_size
    for path, name in carried:
        _copy(path, folder / name)
        result.carried.append(name)
    config = make_config(source, plan, result.weights, names)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return result


def _metadata(plan: Plan, made: Mapping[str, Any] | None) -> dict[str, str]:
    return {"recipe": plan.name, **{key: str(value) for key, value in (made or {}).items()}}


def _write_tensors(
    source: Source,
    plan: Plan,
    tuned: Mapping[str, Mapping[str, mx.array]],
    writer: StreamingWriter,
    result: Result,
    progress: Progress,
) -> None:
    modules = {module.name: module for module in source.modules}
    while source.tensors:
        # In the order of layers: pieces of one stacked tensor follow each other, and it is let go.
        name = min(source.tensors, key=natural)
        module = modules.get(name.rpartition(".")[0])
        if module is not None and name.rpartition(".")[2] in ("weight", "scales", "biases"):
            _write_module(
                source, module, plan.choices.get(module.name), tuned.get(module.name), writer, result, progress
            )
            continue
        value = source.tensors.pop(name)
        _read(name, value)
        stored = stored_names(name, "mlx", source.config.lm)
        for target in stored:
            writer.write(target, value)
            progress(value.nbytes)
        _count(result, part_of(name), value.nbytes * len(stored), value.size * len(stored))


def _write_module(
    source: Source,
    module: Module,
    q: Quantization | None,
    tuned: Mapping[str, mx.array] | None,
    writer: StreamingWriter,
    result: Result,
    progress: Progress,
) -> None:
    dtype = _float_of(source, module)
    was = source.quantized.get(module.name)
    held = source.parts(module.name)
    for part in held:
        _read(f"{module.name}.{part}", source.tensors.pop(f"{module.name}.{part}"))
    rows = max(1, _CHUNK_BYTES // (4 * module.width))
    lost = norm = 0.0
    for first in range(0, module.rows, rows):
        chunk = {part: array[first : first + rows] for part, array in held.items()}
        if was is not None and was == q and tuned is None:
            parts, dense, back = chunk, None, None
        else:
            dense = chunk["weight"] if was is None else dequantize(chunk, was).astype(dtype)
            if tuned is not None:
                parts = {part: array[first : first + rows] for part, array in tuned.items()}
            else:
                parts = {"weight": dense} if q is None else quantize(dense, q)
            back = dense if q is None else dequantize(parts, q)
        mx.eval(list(parts.values()))
        if dense is not None and back is not None:
            exact = dense.astype(mx.float32)
            norm += float(mx.square(exact).sum())
            lost += float(mx.square(back.astype(mx.float32) - exact).sum()) if q is not None else 0.0
        for part, array in parts.items():
            for stored in stored_names(f"{module.name}.{part}", "mlx", source.config.lm):
                writer.write(stored, array, first)
                progress(array.nbytes)
    if not math.isfinite(norm) or not math.isfinite(lost):
        raise CheckpointError(f"{module.name} holds values that are not finite: the source is damaged, fetch it again")
    result.errors[module.name] = math.sqrt(lost / norm) if norm else 0.0
    size = module.bytes(q, dtype.size)
    _count(result, module.part, size, module.copies * module.rows * module.width, lost, norm)


def quantize(weight: mx.array, q: Quantization) -> dict[str, mx.array]:
    """The parts that MLX keeps for a quantized matrix."""
    parts = mx.quantize(weight, group_size=q.group_size, bits=q.bits, mode=q.mode)
    return dict(zip(("weight", "scales", "biases"), parts, strict=False))


def dequantize(parts: Mapping[str, mx.array], q: Quantization) -> mx.array:
    """What a quantized matrix stands for, in float32 (bfloat16 would round it once more)."""
    biases = parts.get("biases")
    if q.mode == "affine" and biases is not None:
        scales = parts["scales"].astype(mx.float32)
        return mx.dequantize(
            parts["weight"], scales, biases.astype(mx.float32), group_size=q.group_size, bits=q.bits
        )  # fmt: skip
    dense = mx.dequantize(parts["weight"], parts["scales"], group_size=q.group_size, bits=q.bits, mode=q.mode)
    return dense.astype(mx.float32)


def _read(name: str, array: mx.array) -> None:
    try:
        mx.eval(array)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise CheckpointError(f"{name} of the source cannot be read: {error}") from error


def _count(result: Result, part: str, size: int, weights: int, lost: float = 0.0, norm: float = 0.0) -> None:
    before = result.parts.get(part, (0, 0, 0.0, 0.0))
    result.parts[part] = (before[0] + size, before[1] + weights, before[2] + lost, before[3] + norm)


# ------------------------------------------------------------------------------------------------------ other files


def _carried(
    source: Source, files: CheckpointFiles, reference: bool, taken: set[str]
) -> tuple[list[tuple[Path, str]], dict[str, str]]:
    """Files to copy with their names, none of them taken, and what config.json shall say about them."""
    used = {name.casefold() for name in taken}
    copies: list[tuple[Path, str]] = []
    names: dict[str, str] = {}
    for part, key in (("mimi", "mimi_name"), ("mimi_config", "mimi_config_name"), ("tokenizer", "tokenizer_name")):
        path, name = getattr(files, part), files.names.get(part, "")
        if path is None:
            continue
        if name.startswith("hf://"):
            continue  # it stays where it is
        if reference and files.revision is not None:
            names[key] = f"hf://{files.source.split('@')[0]}/{name}"
            continue
        target = Path(name).name if "://" in name or "/" in name else name
        while target.casefold() in used:
            target = f"{part}-{target}"
        used.add(target.casefold())
        if target != name or source.data.get(key) not in (None, name):
            names[key] = target
        elif key == "mimi_config_name":
            names[key] = target
        copies.append((path, target))
    return copies, names


def make_config(source: Source, plan: Plan, weights: str, names: Mapping[str, str]) -> dict[str, Any]:
    """config.json of the result: the source's, and how each module is quantized, as mlx-lm writes it.

    Most modules have what the block says first; others are named, ``false`` where they stay dense.
    """
    config = dict(source.data)
    for key in ("quantization", "quantization_config", "moshi_name", "quantize"):
        config.pop(key, None)
    if source.merged:
        for key in ("lora", "lora_rank", "lora_scaling", "lora_name"):
            config.pop(key, None)
    config |= names
    if source.config.model_type != "helium":
        config["moshi_name"] = weights
    block = quantization_block(source.modules, plan)
    if block:
        config |= {"quantization": block, "quantization_config": block}
    return config


def quantization_block(modules: Sequence[Module], plan: Plan) -> dict[str, Any]:
    """The block for config.json; empty if nothing is quantized."""
    counts: dict[Quantization, int] = {}
    for module in modules:
        q = plan.choices.get(module.name)
        if q is not None:
            counts[q] = counts.get(q, 0) + module.copies * module.rows * module.width
    if not counts:
        return {}
    default = max(counts, key=lambda q: (counts[q], -q.bits, q.group_size))
    block: dict[str, Any] = _as_dict(default)
    for module in modules:
        q = plan.choices.get(module.name)
        if q != default:
            for alias in module.aliases or (module.name,):
                block[alias] = False if q is None else _as_dict(q)
    return block


def _as_dict(q: Quantization) -> dict[str, Any]:
    return {"group_size": q.group_size, "bits": q.bits, "mode": q.mode}


def _copy(path: Path, target: Path) -> None:
    try:
        shutil.copyfile(path, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
    except OSError as error:
        raise explain(target, error) from error


# ---------------------------------------------------------------------------------------------------------- checking


def check(folder: Path, weights: str) -> None:
    """Load the result strictly, as any program would, and run one frame through it.

    Weights are read while the frame passes and let go behind it, so memory stays bounded here as well.

    Raises
    ------
    CheckpointError
        If the result does not load, or computes values that are not finite.
    """
    previous = mx.set_cache_limit(0), mx.set_memory_limit(_MAX_CHECK_MEMORY)
    try:
        config = load_config(folder / "config.json", folder / weights)
        tensors = read_tensors(folder / weights)
        model = fit_lm(config, tensors)
        tokens = mx.array(np.zeros((1, model.config.num_streams, 2), np.int32))
        output = model(tokens, model.condition(any_conditions(model.config)))
        outputs = [output.text_logits.astype(mx.float32).sum(), output.logits.astype(mx.float32).sum()]
        del model, tensors, output  # what remains is the graph, which frees what it has passed
        mx.eval(outputs)
    except MoshiError as error:
        raise CheckpointError(f"the result does not load, and was thrown away: {error}") from error
    finally:
        mx.set_cache_limit(previous[0])
        mx.set_memory_limit(previous[1])
    if not all(math.isfinite(float(value)) for value in outputs):
        raise CheckpointError("the result computes values that are not finite, and was thrown away")
