"""Low-rank updates on a model, with mlx-lm's layers, and their files, which are moshi-finetune's.

The base stays as it is, packed where it is quantized. Of moshi-finetune's defaults: every linear layer has an update,
A is uniform within one over the root of the inputs (Kaiming uniform with a = sqrt 5), B is zero, the scale is not
divided by the rank, and with ``ft_embed`` every embedding table is trained as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from moshi_mlx.checkpoint.layouts import stored_names
from moshi_mlx.config import LmConfig
from moshi_mlx.disk import replacing
from moshi_mlx.errors import ConfigError
from moshi_mlx.models.lm import Lm

__all__ = ["FILE", "Adapter", "adapted_sizes", "add_adapter", "file_names", "flat", "save_adapter", "trained_tables"]

FILE = "lora.safetensors"
Part = Literal["all", "temporal", "depth"]

# Rows of their weights are used apart, or they are no part of what moshi-finetune trains a dialogue model for.
_LEFT_OUT = re.compile(r"(^|\.)(cross_attention|condition_provider|extra_heads)(\.|$)")


@dataclass(frozen=True)
class Adapter:
    """What is trained.

    Attributes
    ----------
    rank : int
    scaling : float
        Factor on the product of the two matrices.
    part : {"all", "temporal", "depth"}
        Linear layers of the whole model, or of one of its transformers. Kyutai's program reads files of "all" only.
    embeddings : bool
        Whether the embedding tables are trained, too.
    """

    rank: int = 16
    scaling: float = 2.0
    part: Part = "all"
    embeddings: bool = False


def flat(tree: Any) -> dict[str, mx.array]:
    """Arrays of a tree by their dotted names."""
    return dict(cast("list[tuple[str, mx.array]]", tree_flatten(tree)))


def add_adapter(lm: Lm, adapter: Adapter, seed: int = 0) -> None:
    """Freeze a model and add the parameters that are trained, in float32.

    Raises
    ------
    ConfigError
        If the rank is larger than a layer, or the model already has an update beside it.
    """
    from mlx_lm.tuner.lora import LoRALinear

    if any("lora_a" in module for module in lm.modules()):
        raise ConfigError("the model has a low-rank update beside its quantized weights: train it without one")
    mx.random.seed(seed)
    lm.freeze()
    layers: list[tuple[str, nn.Module]] = []
    for name, module in _linear_layers(lm, adapter.part):
        layer = LoRALinear.from_base(module, r=adapter.rank, scale=adapter.scaling)
        narrow = min(layer.lora_a.shape[0], layer.lora_b.shape[1])
        if adapter.rank > narrow:
            raise ConfigError(
                f"rank {adapter.rank} is larger than {name}, which is {narrow} wide: choose a smaller one"
            )
        layer.linear.freeze()
        layers.append((name, layer))
    lm.update_modules(tree_unflatten(layers))
    if adapter.embeddings:
        tables = list(trained_tables(lm))
        lm.update_modules(tree_unflatten([(name, _dense(table)) for name, table in tables]))
        for _, table in trained_tables(lm):
            table.unfreeze(recurse=False, keys="weight")
            table.weight = table.weight.astype(mx.float32)
    lm.train()
    mx.eval(lm.parameters())


def adapted_sizes(lm: Lm, adapter: Adapter) -> list[tuple[int, int]]:
    """Inputs and outputs of every layer that gets an update, or has one."""
    sizes = []
    for _, module in _linear_layers(lm, adapter.part):
        outputs, inputs = module.weight.shape
        sizes.append((inputs * 32 // module.bits if isinstance(module, nn.QuantizedLinear) else inputs, outputs))
    return sizes


def _linear_layers(lm: Lm, part: Part) -> Iterator[tuple[str, Any]]:
    for name, module in lm.named_modules():
        if not isinstance(module, (nn.Linear, nn.QuantizedLinear)) or _LEFT_OUT.search(name):
            continue
        depth = name.startswith("depformer.")
        if part == "all" or depth == (part == "depth"):
            yield name, module


def trained_tables(lm: Lm) -> Iterator[tuple[str, nn.Module]]:
    """Embedding tables with their names: moshi-finetune's parameters with "emb" in their names."""
    for name, module in lm.named_modules():
        if re.fullmatch(r"text_emb|audio_embs\.\d+|depformer\.embs\.\d+", name):
            yield name, module


def _dense(table: nn.Module) -> nn.Module:
    """A table that can be trained: unpacked if it is quantized."""
    if not isinstance(table, nn.QuantizedEmbedding):
        return table
    weight = mx.dequantize(
        table.weight, table.scales, table.get("biases"), group_size=table.group_size, bits=table.bits, mode=table.mode
    )
    dense = nn.Embedding(1, 1)
    dense.weight = weight
    dense.freeze()
    return dense


def file_names(name: str, config: LmConfig) -> str:
    """A trained parameter's name in moshi-finetune's file."""
    module, _, leaf = name.rpartition(".")
    leaf = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}.get(leaf, leaf)
    (stored,) = stored_names(f"{module}.{leaf}", "torch", config)
    return re.sub(r"(transformer\.layers\.\d+\.self_attn\.(?:in|out)_proj)\.lora", r"\1s.0.lora", stored)


def save_adapter(
    folder: Path, parameters: Mapping[str, mx.array], config: LmConfig, adapter: Adapter, base: Mapping[str, Any]
) -> None:
    """Write ``lora.safetensors`` and ``config.json``, each whole or not at all.

    Parameters
    ----------
    folder : path
        Exists.
    parameters : mapping of str to mx.array
        ``lm.trainable_parameters()`` by name; written in bfloat16.
    config : LmConfig
    adapter : Adapter
    base : mapping
        config.json of the model that was trained.
    """
    tensors = {}
    for name, value in parameters.items():
        turned = value.T if name.endswith((".lora_a", ".lora_b")) else value
        tensors[file_names(name, config)] = mx.contiguous(turned.astype(mx.bfloat16))
    with replacing(folder / FILE) as partial:
        _write(partial, dict(sorted(tensors.items())))
    about = {**base, "lora": True, "lora_rank": adapter.rank, "lora_scaling": adapter.scaling}
    with replacing(folder / "config.json") as partial:
        partial.write_text(json.dumps(about, indent=4), encoding="utf-8")


def _write(path: Path, tensors: Mapping[str, mx.array]) -> None:
    """A safetensors file of bfloat16 in this order, as Hugging Face's library writes it; MLX's order is arbitrary."""
    head: dict[str, Any] = {}
    at = 0
    for name, value in tensors.items():
        head[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(memoryview(value.view(mx.uint16)).cast("B"))  # type: ignore[arg-type]
