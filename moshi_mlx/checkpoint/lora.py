"""Low-rank updates of moshi-finetune (Hu et al. 2021, "LoRA"), merged into the weights: W + scaling * B A."""

from __future__ import annotations

import re
from collections.abc import Mapping

import mlx.core as mx

from ..config import LmConfig
from ..errors import CheckpointError
from .layouts import to_internal
from .readers import shown

__all__ = ["merge_lora"]


def merge_lora(
    params: Mapping[str, mx.array], update: Mapping[str, mx.array], scaling: float, config: LmConfig
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

    Returns
    -------
    dict of str to mx.array
        Merged matrices are float32; everything else keeps its type.

    Raises
    ------
    CheckpointError
        If the model is quantized, or a tensor has no counterpart or the wrong shape.
    """
    renamed = to_internal(update, "torch", config)
    pairs: dict[str, dict[str, mx.array]] = {}
    result = dict(params)
    replaced: set[str] = set()
    for name, value in renamed.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        target = f"{match[1]}.weight" if match else name.replace(".frozen_W.weight", ".weight")
        module = target.removesuffix(".weight")
        if f"{module}.scales" in params:
            raise CheckpointError(
                f"the update changes {module}, which is quantized: merge it into the bf16 checkpoint it was trained "
                "on, then quantize the result"
            )
        if target not in params:
            raise CheckpointError(f"the update changes {target}, which the model does not have")
        if match:
            pairs.setdefault(target, {})[match[2]] = value
        elif value.shape != params[target].shape:
            raise CheckpointError(
                f"the update holds {target} {list(value.shape)}, the model {list(params[target].shape)}"
            )
        elif target in replaced:
            raise CheckpointError(f"the update holds {target} twice: as it is, and as frozen_W")
        else:
            replaced.add(target)
            result[target] = value.astype(params[target].dtype)
    incomplete = [target for target, parts in pairs.items() if len(parts) != 2]
    if incomplete:
        raise CheckpointError(f"the update has only one of lora_A and lora_B for {shown(incomplete)}")
    for target, parts in pairs.items():
        weight, a, b = result[target], parts["A"], parts["B"]
        if a.ndim != 2 or b.ndim != 2 or (b.shape[0], a.shape[1]) != weight.shape or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"the update of {target}, {list(b.shape)} times {list(a.shape)}, does not fit {list(weight.shape)}"
            )
        product = b.astype(mx.float32) @ a.astype(mx.float32)
        result[target] = weight.astype(mx.float32) + scaling * product
    return result
