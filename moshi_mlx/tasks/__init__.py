"""Uses of a model, one file each.

A checkpoint's ``model_type`` selects the class here, once; what a model can do is asked of that class.
"""

from __future__ import annotations

from collections.abc import Mapping

from .complete import Helium
from .dialogue import Moshi
from .personaplex import PersonaPlex
from .speak import TextToSpeech
from .transcribe import SpeechToText
from .translate import Hibiki

__all__ = ["TASKS"]

TASKS: Mapping[str, type[Moshi]] = {
    "moshi": Moshi,
    "hibiki": Hibiki,
    "stt": SpeechToText,
    "tts": TextToSpeech,
    "personaplex": PersonaPlex,
    "helium": Helium,
}
"""The class of a loaded checkpoint by its ``model_type``."""
