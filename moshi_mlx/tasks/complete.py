"""Text: Helium continues a prompt."""

from __future__ import annotations

from typing import ClassVar

from .dialogue import Moshi

__all__ = ["Helium"]


class Helium(Moshi):
    """A loaded Helium checkpoint."""

    purpose: ClassVar[str] = "text"
    command: ClassVar[str] = "complete"
