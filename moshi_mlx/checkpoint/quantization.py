"""Which modules of a checkpoint are quantized, and how: found from the tensors themselves.

A file of MLX records neither bits nor group size. Both follow from shapes once the true width of a module is known:
``group = width / scales.shape[-1]`` and ``bits = 32 * weight.shape[-1] / width``. A ``quantization`` block in
config.json, as mlx-lm writes it, is believed first, and must agree with the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import CheckpointError, ConfigError

__all__ = [
    "FLOATS",
    "MODES",
    "Quantization",
    "dequantize_tables",
    "find_quantization",
    "module_widths",
    "quantize_modules",
    "unpack_modules",
]

# Bits and group sizes that each of MLX's modes allows.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}

FLOATS = (mx.float16, mx.bfloat16, mx.float32)
"""Types of weights that are not quantized."""


@dataclass(frozen=True)
class Quantization:
    """How one module is quantized: bits per weight, weights per scale, and MLX's mode."""

    bits: int
    group_size: int
    mode: str = "affine"


def find_quantization(
    tensors: Mapping[str, mx.array],
    widths: Mapping[str, int],
    block: Mapping[str, Any] | None,
    layout_names: Callable[[str], list[str]],
) -> dict[str, Quantization]:
    """Bits, group size and mode of every module that has scales.

    Parameters
    ----------
    tensors : mapping of str to mx.array
        Under the model's own names.
    widths : mapping of str to int
        Input width of every module that can be quantized, by its name.
    block : mapping or None
        ``quantization`` of config.json: defaults, and overrides by module name.
    layout_names : callable
        All names that the file may use for one of our modules, to look overrides up.

    Raises
    ------
    CheckpointError
        If parts are missing or do not fit, or the block and the shapes contradict each other.
    """
    found: dict[str, Quantization] = {}
    for name in tensors:
        if name.endswith(".scales"):
            module = name.removesuffix(".scales")
            if module not in widths:
                raise CheckpointError(f"{name} is not expected: {module} is not a module that can be quantized")
            found[module] = _from_shapes(module, tensors, widths[module])
    for name in tensors:
        if name.endswith(".biases") and name.removesuffix(".biases") not in found:
            raise CheckpointError(f"{name} comes without scales")
    if block is not None:
        default = _block_entry("quantization", block, None)
        for module in widths:
            _check_block(module, found.get(module), block, default, layout_names(module))
    return found


def _from_shapes(module: str, tensors: Mapping[str, mx.array], width: int) -> Quantization:
    weight, scales = tensors.get(f"{module}.weight"), tensors[f"{module}.scales"]
    biases = tensors.get(f"{module}.biases")
    if weight is None or weight.dtype != mx.uint32 or weight.ndim != 2 or scales.ndim != 2:
        raise CheckpointError(f"{module} has scales, but its weight is not a packed uint32 matrix")
    groups, packed = scales.shape[-1], weight.shape[-1]
    if groups == 0 or width % groups or packed * 32 % width or weight.shape[0] != scales.shape[0]:
        raise CheckpointError(
            f"{module}: weight {list(weight.shape)} and scales {list(scales.shape)} do not fit the width {width}"
        )
    bits, group = packed * 32 // width, width // groups
    if biases is not None:
        if biases.shape != scales.shape or biases.dtype != scales.dtype:
            raise CheckpointError(f"{module}: scales and biases differ in shape or type")
        if scales.dtype not in FLOATS:
            raise CheckpointError(f"{module}.scales are {scales.dtype}; floats are needed")
        modes = ["affine"]
    elif scales.dtype == mx.uint8:
        modes = ["mxfp4", "nvfp4", "mxfp8"]
    else:
        raise CheckpointError(f"{module}.biases is missing")
    for mode in modes:
        if bits in MODES[mode][0] and group in MODES[mode][1]:
            return Quantization(bits, group, mode)
    raise CheckpointError(
        f"{module}: shapes say {bits} bits in groups of {group} ({'/'.join(modes)}), which MLX does not have"
    )


def _block_entry(where: str, entry: Mapping[str, Any], default: Quantization | None) -> Quantization | None:
    """A block's or an override's own bits, group size and mode; None if it has none."""
    if default is None and "bits" not in entry and "group_size" not in entry:
        return None
    values = {
        "bits": entry.get("bits", default.bits if default else 4),
        "group_size": entry.get("group_size", default.group_size if default else 64),
        "mode": entry.get("mode", default.mode if default else "affine"),
    }
    if values["mode"] not in MODES:
        raise ConfigError(f"{where}: mode {values['mode']!r} is not known; known are {', '.join(MODES)}")
    for key in ("bits", "group_size"):
        if type(values[key]) is not int:
            raise ConfigError(f"{where}: {key} must be an integer, found {values[key]!r}")
    return Quantization(**values)


def _check_block(
    module: str,
    found: Quantization | None,
    block: Mapping[str, Any],
    default: Quantization | None,
    names: list[str],
) -> None:
    key = next((name for name in [module, *names] if name in block), None)
    said: Quantization | None = default
    if key is None:
        if found is None:  # whatever has no scales stays dense, as in mlx-lm
            return
    elif block[key] is False or block[key] is None:
        said = None
    elif isinstance(block[key], Mapping):
        said = _block_entry(f"quantization.{key}", block[key], default)
    elif block[key] is not True:
        raise ConfigError(f"quantization.{key} must be an object, true or false, found {block[key]!r}")
    if said is None and key is None:
        return  # a block of overrides alone says nothing about the rest
    if found != said:
        raise CheckpointError(
            f"{module}: config.json says {_text(said)}, but the file holds {_text(found)}. "
            "The two do not belong together: fetch both again, or quantize again"
        )


def _text(q: Quantization | None) -> str:
    return "not quantized" if q is None else f"{q.bits} bits in groups of {q.group_size} ({q.mode})"


def module_widths(model: nn.Module) -> dict[str, int]:
    """Input width of every module whose weights can be quantized, tables inside larger modules included."""
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return {
        name.removesuffix(".weight"): value.shape[-1]
        for name, value in parameters.items()
        if name.endswith(".weight") and value.ndim == 2
    }


def quantize_modules(model: nn.Module, found: Mapping[str, Quantization]) -> set[str]:
    """Replace linear layers and embeddings by quantized ones of exactly the sizes found; nothing is computed.

    Returns
    -------
    set of str
        The modules replaced. Others in ``found`` are tables inside larger modules, which stay dense.
    """
    replaced: set[str] = set()

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        q = found.get(path)
        if q is None or not isinstance(module, (nn.Linear, nn.Embedding)):
            return False
        replaced.add(path)
        return {"group_size": q.group_size, "bits": q.bits, "mode": q.mode}

    if found:
        nn.quantize(model, class_predicate=choose)
    return replaced


def dequantize_tables(
    tensors: dict[str, mx.array], found: Mapping[str, Quantization], dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Expand the quantized tables named in ``found`` into dense ones."""
    result = dict(tensors)
    for module, q in found.items():
        weight, scales = result.pop(f"{module}.weight"), result.pop(f"{module}.scales")
        biases = result.pop(f"{module}.biases", None)
        dense = mx.dequantize(weight, scales, biases, group_size=q.group_size, bits=q.bits, mode=q.mode)
        result[f"{module}.weight"] = dense.astype(dtype)
    return result


def unpack_modules(model: nn.Module) -> None:
    """The same numbers without packing, in place: on a CPU, products with packed weights take several times as long."""
    plain: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            continue
        weight = mx.dequantize(
            module.weight, module.scales, module.get("biases"), module.group_size, module.bits, module.mode
        )
        other = nn.Embedding(1, 1) if isinstance(module, nn.QuantizedEmbedding) else nn.Linear(1, 1, bias=False)
        other.weight = weight
        plain.append((name, other))
    model.update_modules(tree_unflatten(plain))
    mx.eval(model.parameters())
