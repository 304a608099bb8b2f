"""Split a language model's temporal transformer among the ranks of a group, and count what that sends.

Each rank keeps some heads of every attention and some columns of every feed-forward layer, and the rings of its heads
(Shoeybi et al. 2019, "Megatron-LM", section 3). Two sums a layer, of the attention's and of the feed-forward's output,
put the parts together; a third one where there is a cross attention. Norms, embeddings and heads are on every rank.

The depth transformer is not split: it would add two sums per layer and codebook, 96 to Moshi's 64, to halve what takes
a tenth of a step. Rank 0 computes it; the others free it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.distributed import shard_inplace, shard_linear
from mlx.utils import tree_flatten

from ..config import LmConfig
from ..errors import ConfigError
from ..models.lm import Lm

__all__ = ["Description", "Traffic", "check_split", "split_lm", "step_traffic"]

Description = dict[str, tuple[str, list[int], bytes]]
"""Type, shape and first values of each weight, by name: what a conversation's fingerprint is made of."""

_FIRST = 8
_SMALLEST = 32
"""Columns of the smallest group that MLX quantizes together."""


@dataclass(frozen=True)
class Traffic:
    """What one position costs, for one rank.

    Attributes
    ----------
    sums : int
        Messages that all ranks wait for, one after the other.
    sum_bytes : int
        Their size, all together: what is summed. A ring sends 2 (n - 1) / n of it in each direction.
    orders : int
        Messages from rank 0 to each other one, for which nobody waits.
    """

    sums: int
    sum_bytes: int
    orders: int = 1


def step_traffic(config: LmConfig, rows: int = 1, itemsize: int = 2) -> Traffic:
    """Messages and bytes of one position of ``rows`` rows, with activations of ``itemsize`` bytes."""
    sums = (3 if config.cross_attention else 2) * config.num_layers
    return Traffic(sums, sums * rows * config.dim * itemsize)


def check_split(lm: Lm, size: int) -> None:
    """Refuse a number of ranks among which the model cannot be divided evenly.

    Raises
    ------
    ConfigError
        It names what does not divide.
    """
    attention = lm.transformer.layers[0].self_attn
    counts = {
        "heads": attention.num_heads,
        "key heads": attention.kv_heads,
        "feed-forward columns": lm.config.hidden,
    }
    for what, count in counts.items():
        if count % size:
            raise ConfigError(f"the model has {count} {what}, which {size} machines cannot divide evenly")


def split_lm(lm: Lm, group: Any) -> Description:
    """Keep only this rank's part of a model, in place.

    Its weights may be unread: whole ones are in memory for one layer at a time.

    Parameters
    ----------
    lm : Lm
    group : mx.distributed.Group

    Returns
    -------
    Description
        Of the weights before.

    Raises
    ------
    ConfigError
        If the model cannot be divided so; it is unchanged then.
    """
    size = group.size()
    check_split(lm, size)
    described: Description = {}
    for number, layer in enumerate(lm.transformer.layers):
        whole: Any = tree_flatten(layer.parameters())
        few = {name: mx.view(mx.contiguous(value.reshape(-1)[:_FIRST]), mx.uint8) for name, value in whole}
        about = {name: (str(value.dtype), list(value.shape)) for name, value in whole}
        del whole
        _split_layer(layer, group)
        mx.eval(layer.parameters(), few)
        for name, (dtype, shape) in about.items():
            described[f"transformer.layers.{number}.{name}"] = (dtype, shape, np.array(few[name]).tobytes())
    if group.rank():
        for name in ("depformer", "text_linear", "extra_heads"):
            if name in lm:
                del lm[name]
    return described


def _split_layer(layer: Any, group: Any) -> None:
    size, attention = group.size(), layer.self_attn
    queries = attention.num_heads * attention.head_dim
    keys = attention.kv_heads * attention.head_dim
    # Every rank takes its share of the queries, of the keys and of the values.
    shard_inplace(attention.in_proj, "all-to-sharded", segments=[queries, queries + keys], group=group)
    attention.num_heads //= size
    attention.kv_heads //= size
    shard_inplace(layer.gating.linear_in, "all-to-sharded", segments=2, group=group)  # gates and values
    if "cross_attention" in layer:
        cross = layer.cross_attention
        shard_inplace(cross.in_proj, "all-to-sharded", segments=3, group=group)
        cross.num_heads //= size
    for name, linear in _rows_parallel(layer).items():
        parent, _, last = name.rpartition(".")
        layer[parent][last] = shard_linear(_divisible(linear, size), "sharded-to-all", group=group)


def _divisible(linear: Any, size: int) -> Any:
    """The same layer, with groups of columns that can be divided: smaller groups of equal scale, or else unpacked."""
    if not isinstance(linear, nn.QuantizedLinear):
        return linear
    inputs, group = linear.scales.shape[-1] * linear.group_size, linear.group_size
    if inputs // size % group == 0:
        return linear
    if linear.mode == "affine" and group > _SMALLEST and inputs // size % _SMALLEST == 0:
        linear.scales, linear.biases = (
            mx.repeat(part, group // _SMALLEST, axis=-1) for part in (linear["scales"], linear["biases"])
        )
        linear.group_size = _SMALLEST
        return linear
    weight = mx.dequantize(
        linear.weight, linear.scales, linear.get("biases"), group_size=group, bits=linear.bits, mode=linear.mode
    )
    dense = nn.Linear(1, 1, bias=False)
    dense.weight = weight
    return dense


def _rows_parallel(layer: Any) -> dict[str, nn.Module]:
    """The linear layers whose inputs are divided and whose outputs are summed."""
    found = {"self_attn.out_proj": layer.self_attn.out_proj, "gating.linear_out": layer.gating.linear_out}
    if "cross_attention" in layer:
        found["cross_attention.out_proj"] = layer.cross_attention.out_proj
    return found
