"""The program's name and version."""

from __future__ import annotations

from importlib import metadata

__all__ = ["DISTRIBUTION", "program"]

DISTRIBUTION = "moshi-mlx-local"


def program() -> str:
    """``moshi-mlx-local 0.1.0``; run from a source tree that is not installed, it says so."""
    try:
        return f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}"
    except metadata.PackageNotFoundError:
        return f"{DISTRIBUTION} (not installed)"
