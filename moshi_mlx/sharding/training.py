"""Training on several machines by data: each rank has the whole model and a part of every batch.

Each process is one rank that ``mlx.launch`` has started, or the only one; it needs no other change than::

    ranks = DataParallel()
    batch = ranks.part(batch)                                     # its rows
    loss, gradients = ranks.average(*loss_and_gradients(batch), weight)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from numpy.typing import NDArray

from ..errors import ConfigError

__all__ = ["DataParallel"]

T = TypeVar("T")


class DataParallel:
    """The ranks that train together.

    Parameters
    ----------
    group : mx.distributed.Group, optional
        Default: MLX's global group, of one rank if nothing else was launched.
    """

    def __init__(self, group: Any = None):
        self._group = mx.distributed.init() if group is None else group
        self.rank: int = self._group.rank()
        self.size: int = self._group.size()

    def part(self, batch: Sequence[T]) -> list[T]:
        """This rank's rows of a batch.

        Raises
        ------
        ConfigError
            If there are fewer rows than ranks.
        """
        if len(batch) < self.size:
            raise ConfigError(f"a batch of {len(batch)} has no row for each of {self.size} machines: make it larger")
        return list(batch[self.rank :: self.size])

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes files and tells a person what happens."""
        return self.rank == 0

    def from_leader(self, tree: Any) -> Any:
        """Rank 0's arrays on every rank; other ranks give arrays of the same shapes."""
        if self.size == 1:
            return tree
        out: list[tuple[str, mx.array]] = []
        flat: list[tuple[str, mx.array]] = tree_flatten(tree)  # type: ignore[assignment]
        for name, value in sorted(flat, key=lambda entry: entry[0]):  # ranks need not have made it in one order
            given = value if self.leads else mx.zeros_like(value)
            out.append((name, mx.distributed.all_sum(given, group=self._group)))
            mx.eval(out[-1][1])
        return tree_unflatten(out) if isinstance(tree, (dict, list)) else out[0][1]

    def mean(self, values: Sequence[float] | NDArray[Any]) -> list[float]:
        """Means over the ranks, of a few numbers at once."""
        return [value / self.size for value in self._reduced(mx.distributed.all_sum, values)]

    def least(self, value: float) -> float:
        """The smallest of the ranks' values."""
        return self._reduced(mx.distributed.all_min, [value])[0]

    def any(self, flag: bool) -> bool:
        """True on every rank if it is on one."""
        return self._reduced(mx.distributed.all_max, [float(flag)])[0] > 0

    def _reduced(self, reduce: Any, values: Sequence[float] | NDArray[Any]) -> list[float]:
        if self.size == 1:
            return [float(value) for value in values]
        out = reduce(mx.array(np.asarray(values, np.float32)), group=self._group)
        return [float(value) for value in np.array(out)]

    def average(self, loss: mx.array, gradients: Any, weight: mx.array | float = 1.0) -> tuple[mx.array, Any]:
        """Loss and gradients of the whole batch, the same on all ranks.

        Parameters
        ----------
        loss : mx.array
            The mean over this rank's part.
        gradients : tree of mx.array
        weight : mx.array or float
            What that mean was taken over, for instance the number of tokens that count: parts weigh as much as they
            have. 0 if nothing counted.

        Returns
        -------
        mx.array, tree
            Not evaluated: gradients are sent as they become ready, joined to messages of up to 32 MiB
            (:func:`mlx.nn.average_gradients`), and one small message has all losses and weights.
        """
        if self.size == 1:
            return loss, gradients
        weight = mx.array(weight, mx.float32)
        some = weight > 0  # a mean over nothing is not a number
        weighted = mx.where(some, loss.astype(mx.float32) * weight, 0.0)
        sums = mx.distributed.all_sum(mx.stack([weighted, weight]), group=self._group)
        total = mx.maximum(sums[1], 1e-20)
        share = self.size * weight / total  # the sum that follows is divided by the number of ranks
        zero = mx.array(0.0)
        scaled = tree_map(
            lambda value: mx.where(some, value * share.astype(value.dtype), zero.astype(value.dtype)), gradients
        )
        return sums[0] / total, nn.average_gradients(scaled, self._group)
