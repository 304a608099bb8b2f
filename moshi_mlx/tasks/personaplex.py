"""Dialogue in a role: PersonaPlex, a Moshi with a voice and a role given by prompts."""

from __future__ import annotations

from typing import ClassVar

from .dialogue import Moshi

__all__ = ["PersonaPlex"]


class PersonaPlex(Moshi):
    """A loaded PersonaPlex checkpoint."""

    purpose: ClassVar[str] = "dialogue"
    command: ClassVar[str] = "talk"
