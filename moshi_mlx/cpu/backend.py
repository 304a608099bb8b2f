"""Which of the two implementations computes: the networks in MLX, or their twins in numpy."""

from __future__ import annotations

import os

import mlx.core as mx

from ..errors import ConfigError

__all__ = ["BACKENDS", "VARIABLE", "choose_backend"]

BACKENDS = ("auto", "mlx", "numpy")
VARIABLE = "MOSHI_MLX_BACKEND"
"""Environment variable that says what ``auto`` means."""


def choose_backend(asked: str = "auto") -> str:
    """``"mlx"`` or ``"numpy"``. ``auto`` is what :data:`VARIABLE` says, or else numpy where MLX computes on the CPU.

    Raises
    ------
    ConfigError
        If it is asked for something else.
    """
    if asked == "auto":
        asked = os.environ.get(VARIABLE) or "auto"
    if asked not in BACKENDS:
        raise ConfigError(f"the backend is one of {', '.join(BACKENDS)}, not {asked!r}")
    if asked == "auto":
        return "numpy" if mx.default_device().type == mx.cpu else "mlx"
    return asked
