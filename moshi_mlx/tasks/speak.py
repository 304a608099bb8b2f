"""Text to speech: Kyutai's models that read text ahead of its sound."""

from __future__ import annotations

from typing import ClassVar

from .dialogue import Moshi

__all__ = ["TextToSpeech"]


class TextToSpeech(Moshi):
    """A loaded text-to-speech checkpoint."""

    purpose: ClassVar[str] = "text-to-speech"
    command: ClassVar[str] = "speak"
