"""Conditions: named settings, or voices, that a model was trained to follow (moshi ``conditioners/``)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import ConditionerConfig, FuserConfig
from ..errors import ConfigError

__all__ = ["Condition", "ConditionProvider", "TensorCondition", "match_slots"]


@dataclass(frozen=True)
class TensorCondition:
    """A sequence of vectors, for instance voices.

    Attributes
    ----------
    tensor : array [slots, dim], float
    mask : array [slots], bool, or None
        Which slots are real; the others are replaced by the learnt padding. None: all.
    """

    tensor: np.ndarray | mx.array
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Condition:
    """What conditions add to the model, for every row of a batch.

    Attributes
    ----------
    sum : mx.array [batch, 1, dim] or None
        Added to every input.
    cross : mx.array [batch, slots, dim] or None
        Attended to at every position.
    cross_slots : mx.array [batch], int32, or None
        How many of the slots are the row's own; after them comes padding, which the row does not see. None: all.
    """

    sum: mx.array | None = None
    cross: mx.array | None = None
    cross_slots: mx.array | None = None


class _Conditioner(nn.Module):
    def __init__(self, config: ConditionerConfig, output_dim: int):
        super().__init__()
        if config.type == "lut":
            self.embed = nn.Embedding(config.n_bins + 1, config.dim)
        self.output_proj = nn.Linear(config.dim, output_dim, bias=False)
        self.learnt_padding = mx.zeros((1, 1, output_dim))

    def __call__(self, vectors: mx.array, mask: mx.array) -> mx.array:
        """Project ``vectors`` [batch, slots, dim]; slots outside ``mask`` [batch, slots] become the learnt padding."""
        keep = mask[..., None]
        padding: mx.array = self.learnt_padding.astype(mx.float32)
        return mx.where(keep, self.output_proj(vectors), padding)


class ConditionProvider(nn.Module):
    """All conditioners of a model.

    Parameters
    ----------
    configs : mapping of str to ConditionerConfig
    fuser : FuserConfig
        Which condition is added and which is attended to.
    output_dim : int
        Width of the model.
    """

    def __init__(self, configs: Mapping[str, ConditionerConfig], fuser: FuserConfig, output_dim: int):
        super().__init__()
        self.conditioners = {name: _Conditioner(config, output_dim) for name, config in configs.items()}
        self._configs = tuple(configs.items())  # not a dict: mlx.nn would take it for children
        self._fuser = fuser

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Condition:
        """Compute the conditions of a batch.

        Parameters
        ----------
        rows : sequence of mapping
            For each row of the batch, a value for every conditioner: a name out of ``possible_values`` or None for a
            table, a :class:`TensorCondition` or None for a tensor.

        Raises
        ------
        ConfigError
            If a value is missing, unknown or misshapen.
        """
        configs = dict(self._configs)
        for row in rows:
            unknown = sorted(set(row) - set(configs))
            missing = sorted(set(configs) - set(row))
            if unknown or missing:
                raise ConfigError(
                    f"this model takes the conditions {sorted(configs)}: "
                    + (f"{missing} not given" if missing else f"{unknown} not known")
                )
        # One row after the other: slots that another row needs would move this one's positions.
        made = [self._fuse({name: self._one(name, configs[name], row[name]) for name in configs}) for row in rows]
        sums, sources = ([part for part in parts if part is not None] for parts in zip(*made, strict=True))
        total = mx.concatenate(sums) if sums else None
        if not sources:
            return Condition(total)
        counts = [source.shape[1] for source in sources]
        padded = [mx.pad(source, [(0, 0), (0, max(counts) - source.shape[1]), (0, 0)]) for source in sources]
        return Condition(total, mx.concatenate(padded), mx.array(counts, mx.int32))

    def _fuse(self, parts: Mapping[str, mx.array]) -> tuple[mx.array | None, mx.array | None]:
        """What one row adds [1, 1, dim] and attends to [1, slots, dim], from each condition's [1, slots, dim]."""
        total: mx.array | None = None
        for name in self._fuser.sum:
            if parts[name].shape[1] != 1:
                raise ConfigError(f"condition {name!r} is added to every input: it must have one slot")
            total = parts[name] if total is None else total + parts[name]
        cross = [parts[name] for name in self._fuser.cross]
        if not cross:
            return total, None
        source = mx.concatenate(cross, axis=1)
        if self._fuser.cross_attention_pos_emb:
            positions = _sinusoids(source.shape[1], source.shape[2])
            source = source + self._fuser.cross_attention_pos_emb_scale * positions
        return total, source

    def _one(self, name: str, config: ConditionerConfig, value: Any) -> mx.array:
        """One condition [1, slots, dim]."""
        conditioner = self.conditioners[name]
        if config.type == "lut":
            ids = mx.array([[_table_row(name, config, value)]])
            return conditioner(conditioner.embed(ids).astype(mx.float32), mx.array([[value is not None]]))
        if value is None:
            value = TensorCondition(np.zeros((1, config.dim)), np.zeros(1, bool))
        if not isinstance(value, TensorCondition) or value.tensor.ndim != 2 or value.tensor.shape[1] != config.dim:
            raise ConfigError(f"condition {name!r} must be a TensorCondition of shape [slots, {config.dim}]")
        slots = value.tensor.shape[0]
        if value.mask is not None and np.shape(value.mask) != (slots,):
            raise ConfigError(f"condition {name!r}: one mask entry per slot, found {list(np.shape(value.mask))}")
        mask = np.ones(slots, bool) if value.mask is None else np.asarray(value.mask, bool)
        return conditioner(mx.array(value.tensor).astype(mx.float32)[None], mx.array(mask)[None])


def match_slots(row: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both rows with as many slots in every :class:`TensorCondition`, filled up with the learnt padding.

    Guidance compares a conditioned model with one that attends to padding alone, but to as much of it.
    """
    pair = dict(row), dict(other)
    for name in pair[0].keys() & pair[1].keys():
        given = [values[name] for values in pair]
        sizes = [value.tensor.shape for value in given if isinstance(value, TensorCondition) and value.tensor.ndim == 2]
        if not sizes:
            continue
        slots, dim = max(size[0] for size in sizes), sizes[0][1]
        for values, value in zip(pair, given, strict=True):
            if value is None:
                values[name] = TensorCondition(np.zeros((slots, dim)), np.zeros(slots, bool))
            elif isinstance(value, TensorCondition) and value.tensor.ndim == 2:
                more = slots - value.tensor.shape[0]
                tensor = np.array(mx.array(value.tensor).astype(mx.float32))
                mask = np.ones(len(tensor), bool) if value.mask is None else np.asarray(value.mask, bool)
                values[name] = TensorCondition(np.pad(tensor, ((0, more), (0, 0))), np.pad(mask, (0, more)))
    return pair


def _table_row(name: str, config: ConditionerConfig, value: str | None) -> int:
    """Row of a named value; the last one for None (moshi ``conditioners/text.py``, NoopTokenizer)."""
    if value is None:
        return config.n_bins
    if not isinstance(value, str):
        raise ConfigError(f"condition {name!r} must be a string or None, found {value!r}")
    if not config.possible_values:
        return int(hashlib.sha256(value.encode()).hexdigest(), 16) % config.n_bins
    if value not in config.possible_values:
        raise ConfigError(f"condition {name!r}: {value!r} is not one of {list(config.possible_values)}")
    return config.possible_values.index(value)


def _sinusoids(length: int, dim: int) -> mx.array:
    """Sinusoidal positions [1, length, dim]: cosines, then sines (moshi ``modules/transformer.py``)."""
    half = dim // 2
    exponent = np.arange(half, dtype=np.float32) / (half - 1)
    phase = np.arange(length, dtype=np.float32)[:, None] / np.float32(10000.0) ** exponent
    return mx.array(np.concatenate([np.cos(phase), np.sin(phase)], axis=1)[None])
