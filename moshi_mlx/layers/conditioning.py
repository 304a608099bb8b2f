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

__all__ = ["Condition", "ConditionProvider", "TensorCondition"]


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
    """

    sum: mx.array | None = None
    cross: mx.array | None = None


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
        parts = {name: self._one(name, config, [row[name] for row in rows]) for name, config in configs.items()}
        total: mx.array | None = None
        for name in self._fuser.sum:
            if parts[name].shape[1] != 1:
                raise ConfigError(f"condition {name!r} is added to every input: it must have one slot")
            total = parts[name] if total is None else total + parts[name]
        cross = [parts[name] for name in self._fuser.cross]
        if not cross:
            return Condition(total, None)
        source = mx.concatenate(cross, axis=1)
        if self._fuser.cross_attention_pos_emb:
            positions = _sinusoids(source.shape[1], source.shape[2])
            source = source + self._fuser.cross_attention_pos_emb_scale * positions
        return Condition(total, source)

    def _one(self, name: str, config: ConditionerConfig, values: list[Any]) -> mx.array:
        conditioner = self.conditioners[name]
        if config.type == "lut":
            ids = [_row(name, config, value) for value in values]
            mask = np.array([[value is not None] for value in values])
            return conditioner(conditioner.embed(mx.array(ids)[:, None]).astype(mx.float32), mx.array(mask))
        for value in values:
            if value is None:
                continue
            if not isinstance(value, TensorCondition) or value.tensor.ndim != 2 or value.tensor.shape[1] != config.dim:
                raise ConfigError(f"condition {name!r} must be a TensorCondition of shape [slots, {config.dim}]")
            if value.mask is not None and np.shape(value.mask) != value.tensor.shape[:1]:
                found = list(np.shape(value.mask))
                raise ConfigError(f"condition {name!r}: one mask entry per slot, found {found}")
        slots = max([1, *(value.tensor.shape[0] for value in values if value is not None)])
        vectors = np.zeros((len(values), slots, config.dim), np.float32)
        mask = np.zeros((len(values), slots), bool)
        for index, value in enumerate(values):
            if value is None:
                continue
            length = value.tensor.shape[0]
            vectors[index, :length] = np.array(mx.array(value.tensor).astype(mx.float32))
            mask[index, :length] = True if value.mask is None else np.asarray(value.mask, bool)
        return conditioner(mx.array(vectors), mx.array(mask))


def _row(name: str, config: ConditionerConfig, value: str | None) -> int:
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
