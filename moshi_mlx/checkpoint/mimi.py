"""Mimi's weight files: the published layout, Kyutai's MLX port's, and :class:`moshi_mlx.models.mimi.Mimi`.

Everything here is a pure function from a dict of arrays to another, and lazy: nothing is computed or allocated until
the result is evaluated, so a file can be checked against a configuration by its shapes alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import CheckpointError
from ..models.mimi import Mimi, MimiConfig
from .finite import check_finite
from .readers import read_safetensors, read_safetensors_header

__all__ = ["is_published_layout", "load_mimi", "mimi_weights", "published_mimi_weights"]


class _Row(NamedTuple):
    """One module or parameter: our name, the published (PyTorch) one, that of Kyutai's MLX port, and its kind."""

    ours: str
    published: str
    mlx: str
    kind: str


@dataclass(frozen=True)
class _Kind:
    """How the axes of a kind of parameter are stored."""

    from_published: Callable[[mx.array], mx.array]
    to_published: Callable[[mx.array], mx.array]
    from_mlx: Callable[[mx.array], mx.array]
    to_mlx: Callable[[mx.array], mx.array]


def _same(array: mx.array) -> mx.array:
    return array


_KINDS = {
    "plain": _Kind(_same, _same, _same, _same),
    # ours [kernel, in, out]; PyTorch [out, in, kernel]; MLX [out, kernel, in]
    "conv": _Kind(
        lambda w: w.transpose(2, 1, 0),
        lambda w: w.transpose(2, 1, 0),
        lambda w: w.transpose(1, 2, 0),
        lambda w: w.transpose(2, 0, 1),
    ),
    # ours [in, kernel, out]; PyTorch [in, out, kernel]; MLX [out, kernel, in]
    "transposed": _Kind(
        lambda w: w.transpose(0, 2, 1),
        lambda w: w.transpose(0, 2, 1),
        lambda w: w.transpose(2, 1, 0),
        lambda w: w.transpose(2, 1, 0),
    ),
    # ours [kernel, channels]; PyTorch [channels, 1, kernel]; MLX [1, kernel, channels]
    "depthwise": _Kind(lambda w: w[:, 0].T, lambda w: w.T[:, None], lambda w: w[0], lambda w: w[None]),
    # a convolution of kernel 1. ours [out, in]; PyTorch [out, in, 1]; MLX [out, 1, in]
    "pointwise": _Kind(lambda w: w[:, :, 0], lambda w: w[:, :, None], lambda w: w[:, 0], lambda w: w[:, None]),
}

_TRANSFORMER = (
    _Row("norm1.weight", "norm1.weight", "norm1.weight", "plain"),
    _Row("norm1.bias", "norm1.bias", "norm1.bias", "plain"),
    _Row("self_attn.in_proj.weight", "self_attn.in_proj_weight", "self_attn.in_proj.weight", "plain"),
    _Row("self_attn.out_proj.weight", "self_attn.out_proj.weight", "self_attn.out_proj.weight", "plain"),
    _Row("layer_scale_1.scale", "layer_scale_1.scale", "layer_scale_1.scale", "plain"),
    _Row("norm2.weight", "norm2.weight", "norm2.weight", "plain"),
    _Row("norm2.bias", "norm2.bias", "norm2.bias", "plain"),
    _Row("gating.linear1.weight", "linear1.weight", "gating.linear1.weight", "plain"),
    _Row("gating.linear2.weight", "linear2.weight", "gating.linear2.weight", "plain"),
    _Row("layer_scale_2.scale", "layer_scale_2.scale", "layer_scale_2.scale", "plain"),
)


def _convolutions(config: MimiConfig) -> Iterator[_Row]:
    """The convolutions of both SEANets and of the change of frame rate, as modules.

    The published names number one flat list in which activations count; residual blocks hold
    (activation, convolution, activation, convolution).
    """
    blocks, stages = config.seanet.n_residual_layers, range(len(config.seanet.ratios))

    def residual(side: str, stage: int, block: int, number: int) -> Iterator[_Row]:
        ours = f"{side}.stages.{stage}.residuals.{block}"
        theirs = f"{side}.layers.{stage}.residuals.{block}.block"
        yield _Row(f"{ours}.narrow", f"{side}.model.{number}.block.1.conv.conv", f"{theirs}.0.conv.conv", "conv")
        yield _Row(f"{ours}.widen", f"{side}.model.{number}.block.3.conv.conv", f"{theirs}.1.conv.conv", "conv")

    yield _Row("encoder.first", "encoder.model.0.conv.conv", "encoder.init_conv1d.conv.conv", "conv")
    number = 1
    for stage in stages:
        for block in range(blocks):
            yield from residual("encoder", stage, block, number + block)
        number += blocks + 2
        ours, theirs = f"encoder.stages.{stage}.resample", f"encoder.layers.{stage}.downsample.conv.conv"
        yield _Row(ours, f"encoder.model.{number - 1}.conv.conv", theirs, "conv")
    yield _Row("encoder.last", f"encoder.model.{number + 1}.conv.conv", "encoder.final_conv1d.conv.conv", "conv")

    yield _Row("decoder.first", "decoder.model.0.conv.conv", "decoder.init_conv1d.conv.conv", "conv")
    number = 1
    for stage in stages:
        ours, theirs = f"decoder.stages.{stage}.resample", f"decoder.layers.{stage}.upsample.convtr.convtr"
        yield _Row(ours, f"decoder.model.{number + 1}.convtr.convtr", theirs, "transposed")
        for block in range(blocks):
            yield from residual("decoder", stage, block, number + 2 + block)
        number += blocks + 2
    yield _Row("decoder.last", f"decoder.model.{number + 1}.conv.conv", "decoder.final_conv1d.conv.conv", "conv")

    yield _Row("downsample", "downsample.conv.conv.conv", "downsample.conv.conv.conv", "conv")
    yield _Row("upsample", "upsample.convtr.convtr.convtr", "upsample.convtr.convtr.convtr", "depthwise")


def _table(config: MimiConfig) -> Iterator[_Row]:
    """All parameters that a Mimi of this configuration may have."""
    for module in _convolutions(config):
        for name, kind in (("weight", module.kind), ("bias", "plain")):
            yield _Row(f"{module.ours}.{name}", f"{module.published}.{name}", f"{module.mlx}.{name}", kind)
    for side in ("encoder_transformer", "decoder_transformer"):
        for layer in range(config.transformer.num_layers):
            ours, theirs = f"{side}.layers.{layer}", f"{side}.transformer.layers.{layer}"
            for row in _TRANSFORMER:
                yield _Row(f"{ours}.{row.ours}", f"{theirs}.{row.published}", f"{theirs}.{row.mlx}", row.kind)
    semantic = config.quantizer.n_q_semantic
    for group, count in (("rvq_first", semantic), ("rvq_rest", config.quantizer.n_q - semantic)):
        name = f"quantizer.{group}"
        for projection in ("input_proj.weight", "output_proj.weight"):
            full = f"{name}.{projection}"
            yield _Row(full, full, full, "pointwise")
        for index in range(count):
            theirs = f"{name}.vq.layers.{index}"
            ours = f"{name}.codebooks.{index}.embedding"
            yield _Row(ours, f"{theirs}._codebook.embedding", f"{theirs}.codebook.embedding", "plain")


def mimi_weights(
    arrays: Mapping[str, mx.array], config: MimiConfig | None = None, num_codebooks: int | None = None
) -> dict[str, mx.array]:
    """Our parameters from the tensors of a file.

    Parameters
    ----------
    arrays : mapping of str to mx.array
        A whole file, in the published layout or in that of Kyutai's MLX port. Weight norm may be folded or not; any
        floating type is cast to float32. Codebooks past those asked for are ignored.
    config : MimiConfig
        Default: the published Mimi.
    num_codebooks : int or None
        How many codebooks to take; None: all that the configuration counts.

    Returns
    -------
    dict of str to mx.array, float32
        By the parameter names of :class:`~moshi_mlx.models.mimi.Mimi`; lazy.

    Raises
    ------
    CheckpointError
        If a tensor is missing, left over, misshapen or not floating; it is named.
    """
    config = config or MimiConfig()
    wanted: dict[str, mx.array] = dict(tree_flatten(Mimi(config, num_codebooks).parameters()))
    ported = any(name.startswith("encoder.init_conv1d.") for name in arrays)
    if not ported and not any(name.startswith("encoder.model.") for name in arrays):
        raise CheckpointError("this is not a Mimi file: it has neither encoder.model.* nor encoder.init_conv1d.*")
    rest = _fold_codebooks(_fold_weight_norm(_old_names(dict(arrays))))
    weights: dict[str, mx.array] = {}
    missing: list[str] = []
    for row in _table(config):
        name, kind = (row.mlx if ported else row.published), _KINDS[row.kind]
        array = rest.pop(name, None)
        if row.ours not in wanted:
            if array is not None and not name.startswith("quantizer."):
                rest[name] = array
            continue
        if array is None:
            missing.append(name)
            continue
        ours, theirs = (kind.from_mlx, kind.to_mlx) if ported else (kind.from_published, kind.to_published)
        expected = tuple(theirs(wanted[row.ours]).shape)
        if tuple(array.shape) != expected:
            raise CheckpointError(f"{name} has shape {list(array.shape)}, this Mimi needs {list(expected)}")
        weights[row.ours] = ours(_float32(name, array))
    if missing:
        raise CheckpointError(f"the Mimi file lacks {_some(missing)}")
    # More codebooks than the configuration knows of are no contradiction: each builds on the ones before it.
    left = [name for name in rest if not re.match(r"quantizer\.rvq_(first|rest)\.vq\.layers\.\d+\.", name)]
    if left:
        raise CheckpointError(f"the Mimi file holds what this configuration does not know: {_some(left)}")
    return weights


def published_mimi_weights(mimi: Mimi) -> dict[str, mx.array]:
    """The tensors of ``mimi`` by their published names and shapes: what a file for any port of Mimi holds.

    Each codebook is written with a usage of one, so that its sum of embeddings is the embedding.
    """
    ours: dict[str, mx.array] = dict(tree_flatten(mimi.parameters()))
    tensors: dict[str, mx.array] = {}
    for row in _table(mimi.config):
        if row.ours not in ours:
            continue
        array = mx.contiguous(_KINDS[row.kind].to_published(ours[row.ours]))
        if row.published.endswith("._codebook.embedding"):
            codebook = row.published.removesuffix("embedding")
            tensors[f"{codebook}embedding_sum"] = array
            tensors[f"{codebook}cluster_usage"] = mx.ones(array.shape[:1])
            tensors[f"{codebook}_initialized"] = mx.ones((1,))
        else:
            tensors[row.published] = array
    return tensors


def load_mimi(path: str | os.PathLike[str], config: MimiConfig | None = None, num_codebooks: int | None = None) -> Mimi:
    """A :class:`~moshi_mlx.models.mimi.Mimi` with the weights of a safetensors file.

    Raises
    ------
    CheckpointError
        If the file cannot be read, does not fit the configuration, or holds NaN or infinity.
    """
    mimi = Mimi(config, num_codebooks)
    tensors = read_safetensors(path)[0]
    try:
        weights = mimi_weights(tensors, config, num_codebooks)
    except CheckpointError as error:
        other = ". A codec of other sizes than the published Mimi's needs a mimi_config.json, which config.json names "
        hint = f"{other}(mimi_config_name)" if config in (None, MimiConfig()) else ""
        raise CheckpointError(f"{path}: {error}{hint}") from error
    # Once, here: everything in the order in which it is read, and nothing lazy left for another thread. Linear layers
    # multiply by a transpose; MLX's CPU product is faster by a sixth if that is what lies in memory.
    linear = {f"{name}.weight" for name, module in mimi.named_modules() if isinstance(module, nn.Linear)}
    for name, array in weights.items():
        weights[name] = mx.contiguous(array.T).T if name in linear else mx.contiguous(array)
    check_finite(weights, os.fspath(path))
    mimi.update(tree_unflatten(list(weights.items())))
    mx.eval(mimi.parameters())
    return mimi


def is_published_layout(path: str | os.PathLike[str]) -> bool:
    """Whether a file names its tensors as the published one does."""
    return "encoder.model.0.conv.conv.bias" in read_safetensors_header(path)[0]


def _float32(name: str, array: mx.array) -> mx.array:
    if not mx.issubdtype(array.dtype, mx.floating):
        raise CheckpointError(f"{name} is {array.dtype}, not a floating type")
    return array.astype(mx.float32)


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _old_names(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Files saved by newer PyTorch code name the attention projections as lists of one."""
    return {
        name.replace("self_attn.in_projs.0.weight", "self_attn.in_proj_weight").replace(
            "self_attn.out_projs.0.weight", "self_attn.out_proj.weight"
        ): array
        for name, array in arrays.items()
    }


_WEIGHT_NORM = (
    (".weight_g", ".weight_v"),
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
)


def _fold_weight_norm(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """``w = g v / |v|`` over all axes but the first (Salimans & Kingma 2016), wherever a weight is stored so."""
    for gain, direction in _WEIGHT_NORM:
        for name in [name for name in arrays if name.endswith(gain)]:
            stem = name.removesuffix(gain)
            if stem + direction not in arrays:
                raise CheckpointError(f"the Mimi file lacks {stem}{direction}, the partner of {name}")
            g = _float32(name, arrays.pop(name))
            v = _float32(stem + direction, arrays.pop(stem + direction))
            if v.ndim != 3 or tuple(g.shape) != (v.shape[0], 1, 1):
                raise CheckpointError(f"{name} has shape {list(g.shape)}, which does not fit {list(v.shape)}")
            arrays[f"{stem}.weight"] = g * v / mx.sqrt(mx.sum(mx.square(v), axis=(1, 2), keepdims=True))
    return arrays


def _fold_codebooks(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Codebooks are stored as running sums and counts of what fell to each entry; an entry is their quotient."""
    for name in [name for name in arrays if name.endswith("codebook.embedding_sum")]:
        stem = name.removesuffix("embedding_sum")
        usage_name = f"{stem}cluster_usage"
        if usage_name not in arrays:
            raise CheckpointError(f"the Mimi file lacks {usage_name}")
        total, usage = _float32(name, arrays.pop(name)), _float32(usage_name, arrays.pop(usage_name))
        if tuple(usage.shape) != tuple(total.shape[:1]):
            raise CheckpointError(f"{usage_name} has shape {list(usage.shape)}, which does not fit {list(total.shape)}")
        for flag in ("_initialized", "initialized"):
            arrays.pop(stem + flag, None)
        arrays[f"{stem}embedding"] = total / mx.maximum(usage, 1e-5)[:, None]
    return arrays
