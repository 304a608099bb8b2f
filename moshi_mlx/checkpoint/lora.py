"""Low-rank updates of moshi-finetune (Hu et al. 2021, "LoRA"): W + scaling * B A.

They are merged into dense weights. Beside quantized weights they stay on their own: rounding the sum again would lose
most of a small update.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..config import LmConfig
from ..errors import CheckpointError
from .layouts import to_internal
from .readers import shown

__all__ = ["LowRank", "attach_lora", "merge_lora"]

LowRank = dict[str, tuple[mx.array, mx.array]]
"""A [rank, in] and B [out, rank] of modules, by their names."""


def merge_lora(
    params: Mapping[str, mx.array],
    update: Mapping[str, mx.array],
    scaling: float,
    config: LmConfig,
    beside: LowRank | None = None,
) -> dict[str, mx.array]:
    """Add an update to a model's weights.

    Parameters
    ----------
    params : mapping of str to mx.array
        The model's tensors under its own names.
    update : mapping of str to mx.array
        ``lora.safetensors``: PyTorch's names with ``lora_A.weight`` [rank, in] and ``lora_B.weight`` [out, rank] for
        ``weight``. Where the embeddings were trained too (``ft_embed``) it holds their whole tables, and for their
        linear layers ``frozen_W.weight`` [out, in], which takes the place of ``weight`` before the product is added.
        Stacked updates of older versions are cut like the weights they belong to.
    scaling : float
        Factor as saved in config.json (``lora_scaling``); not divided by the rank.
    config : LmConfig
    beside : dict, optional
        Receives what belongs to quantized modules, for :func:`attach_lora`; without it they are refused.

    Returns
    -------
    dict of str to mx.array
        Merged matrices are float32; everything else keeps its type.

    Raises
    ------
    CheckpointError
        If a module is quantized and ``beside`` is not given, or a tensor has no counterpart or the wrong shape.
    """
    renamed = to_internal(update, "torch", config)
    pairs: dict[str, dict[str, mx.array]] = {}
    result = dict(params)
    replaced: set[str] = set()
    for name, value in renamed.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        target = f"{match[1]}.weight" if match else name.replace(".frozen_W.weight", ".weight")
        module = target.removesuffix(".weight")
        quantized = f"{module}.scales" in params
        if quantized and (beside is None or ".cross_attention." in module):
            raise CheckpointError(
                f"the update changes {module}, which is quantized: merge it into the bf16 checkpoint it was trained "
                "on, then quantize the result"
            )
        if target not in params:
            raise CheckpointError(f"the update changes {target}, which the model does not have")
        if match:
            pairs.setdefault(target, {})[match[2]] = value
        elif value.shape != params[target].shape and not quantized:
            raise CheckpointError(
                f"the update holds {target} {list(value.shape)}, the model {list(params[target].shape)}"
            )
        elif target in replaced:
            raise CheckpointError(f"the update holds {target} twice: as it is, and as frozen_W")
        else:
            replaced.add(target)
            for part in ("scales", "biases"):  # a whole table takes the place of a quantized one
                result.pop(f"{module}.{part}", None)
            result[target] = value if quantized else value.astype(params[target].dtype)
    incomplete = [target for target, parts in pairs.items() if len(parts) != 2]
    if incomplete:
        raise CheckpointError(f"the update has only one of lora_A and lora_B for {shown(incomplete)}")
    for target, parts in pairs.items():
        weight, a, b = result[target], parts["A"], parts["B"]
        module = target.removesuffix(".weight")
        if beside is not None and f"{module}.scales" in result:
            beside[module] = (a, b)
            continue
        if a.ndim != 2 or b.ndim != 2 or (b.shape[0], a.shape[1]) != weight.shape or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"the update of {target}, {list(b.shape)} times {list(a.shape)}, does not fit {list(weight.shape)}"
            )
        product = b.astype(mx.float32) @ a.astype(mx.float32)
        result[target] = weight.astype(mx.float32) + scaling * product
    return result


def attach_lora(model: nn.Module, pairs: LowRank, scaling: float, dtype: mx.Dtype) -> None:
    """Put updates beside the quantized modules of a model: y = W x + scaling * B A x.

    Raises
    ------
    CheckpointError
        If a shape does not fit.
    """
    if not pairs:
        return
    from mlx_lm.tuner.lora import LoRALinear

    modules: dict[str, Any] = dict(model.named_modules())
    layers = []
    for name, (a, b) in pairs.items():
        if not isinstance(modules[name], (nn.Linear, nn.QuantizedLinear)):
            raise CheckpointError(f"the update changes {name}, which is not a linear layer")
        layer = LoRALinear.from_base(modules[name], r=a.shape[0], scale=scaling)
        if a.ndim != 2 or b.ndim != 2 or a.T.shape != layer.lora_a.shape or b.T.shape != layer.lora_b.shape:
            fit = [layer.lora_b.shape[1], layer.lora_a.shape[0]]
            raise CheckpointError(f"the update of {name}, {list(b.shape)} times {list(a.shape)}, does not fit {fit}")
        layer.lora_a, layer.lora_b = a.T.astype(dtype), b.T.astype(dtype)
        layers.append((name, layer))
    model.update_modules(tree_unflatten(layers))
