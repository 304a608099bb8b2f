"""What computes a model fastest on this machine: measured once, and remembered.

The codec can be computed by Rust, numpy or MLX, the language model of a small model by numpy or MLX; which is fastest
depends on the machine. Each is timed for a fraction of a second when a model is loaded for the first time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from moshi_mlx_app.models.select import read_remembered, remember

if TYPE_CHECKING:
    from moshi_mlx.tasks.dialogue import Moshi

__all__ = ["fastest_backend", "fastest_codec"]

_FILE = "fastest.json"


def fastest_codec(model: str, say: Callable[[str], object] = lambda _: None) -> dict[str, float]:
    """Milliseconds of a frame by codec, the fastest first; empty if the model has none.

    Parameters
    ----------
    model : str
        As for :func:`moshi_mlx.load`.
    say : callable
        Told what takes a moment.
    """
    from moshi_mlx.loading import measure_codec

    def measure() -> dict[str, float]:
        say("measuring which codec is fastest here")
        return measure_codec(model)

    folder = os.path.abspath(os.path.expanduser(model))
    # Another folder of that name, or other files in it, may have a codec that this one cannot be computed by.
    what = f"{folder} {os.stat(folder).st_mtime_ns}" if os.path.isdir(folder) else model
    return _once(f"codec of {what}", measure)


def fastest_backend(model: Moshi, say: Callable[[str], object] = lambda _: None) -> dict[str, float]:
    """Milliseconds of a step by backend, the fastest first; empty if only MLX can compute the model."""
    from moshi_mlx.loading import measure_backend

    def measure() -> dict[str, float]:
        say("measuring what computes the model fastest here")
        return measure_backend(model)

    return _once(f"model {model.name}", measure)


def _once(what: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What was remembered, or measured now."""
    kept = read_remembered(_FILE)
    figures = kept.get(what)
    if not isinstance(figures, dict) or not all(isinstance(value, float) for value in figures.values()):
        figures = {name: round(value, 3) for name, value in measure().items()}
        remember(_FILE, {**kept, what: figures})
    return dict(sorted(figures.items(), key=lambda item: item[1]))
