"""One model on several machines: MLX's distributed engine, with orders and signs of life beside it.

::

    with launch(ranks=2) as leader:                          # or hosts=["mac1", "mac2"]
        model = moshi_mlx.load("small", sharding=leader)     # each rank keeps its part
        model.reply(...)
"""

from __future__ import annotations

from .launch import launch
from .leader import Leader
from .split import Traffic, step_traffic

__all__ = ["Leader", "Traffic", "launch", "step_traffic"]
