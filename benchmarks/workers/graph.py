"""Count the operations that a step would have on a GPU, without one.

Imported by workers of both environments, hence by its plain name.

On a GPU, MLX's norm, rotation and attention are one kernel each; on a CPU it splits them before they can be
counted. Here one operation of the right shape replaces each of them (its values are meaningless), and operations that
only view memory differently are distinguished from those that compute.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "Full", "NumberOfElements",
    "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip


def count(*arrays: mx.array) -> tuple[int, int]:
    """Primitives in the graph under ``arrays``, and those of them that compute something."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *arrays)
        found = re.findall(r'label ="([^"]*)", shape=rectangle', path.read_text())
    return len(found), sum(name not in VIEWS for name in found)


@contextmanager
def fused() -> Iterator[None]:
    """Norm, rotation and attention are one primitive each, as on a GPU. What is computed is not to be used."""
    fast: Any = mx.fast
    names = ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")
    kept = {name: getattr(fast, name) for name in names}
    one = mx.array(1.0)
    fast.rms_norm = fast.layer_norm = lambda x, weight, *_, **__: mx.logaddexp(x, weight)
    fast.rope = lambda x, *_, **__: mx.logaddexp(x, one)

    def attention(queries: mx.array, keys: mx.array, values: mx.array, **_: Any) -> mx.array:
        batch, heads, time, dim = queries.shape
        left = mx.broadcast_to(keys[:, :1, :1, :1], (batch, heads, time, 1))
        return mx.addmm(queries, left, mx.broadcast_to(values[:, :1, :1], (batch, heads, 1, dim)))

    fast.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(fast, name, function)
