"""Speech translation: Hibiki hears one language and speaks another while the speaker goes on."""

from __future__ import annotations

from typing import ClassVar

from .dialogue import Moshi

__all__ = ["Hibiki"]


class Hibiki(Moshi):
    """A loaded translation checkpoint."""

    purpose: ClassVar[str] = "translation"
    command: ClassVar[str] = "translate"
