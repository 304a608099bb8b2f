"""Speech to text: Kyutai's models that write words down some time after their sound."""

from __future__ import annotations

from typing import ClassVar

from .dialogue import Moshi

__all__ = ["SpeechToText"]


class SpeechToText(Moshi):
    """A loaded speech-to-text checkpoint."""

    purpose: ClassVar[str] = "speech-to-text"
    command: ClassVar[str] = "transcribe"
