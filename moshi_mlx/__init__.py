"""Moshi, Kyutai's full-duplex spoken dialogue model, on MLX.

::

    import moshi_mlx

    model = moshi_mlx.load("small")
    session = model.session(seed=0)
    frame = session.step(pcm)          # 80 ms in; frame.pcm is 80 ms out, frame.text what was said
"""

from __future__ import annotations

from .config import LmConfig, ModelConfig
from .engine.generator import GenerationConfig, Generator, Step
from .engine.text import TextTokenizer, Word
from .errors import (
    AudioError,
    CheckpointError,
    CodecError,
    ConfigError,
    DownloadError,
    MoshiError,
    StateError,
    TextError,
    TokenError,
)
from .loading import load
from .models.lm import Lm, LmOutput
from .models.mimi import Mimi, MimiConfig
from .models.sampling import Sampling
from .tasks.complete import Helium
from .tasks.dialogue import Moshi, Reply, Session, SessionFrame
from .tasks.personaplex import PersonaPlex
from .tasks.speak import TextToSpeech
from .tasks.transcribe import SpeechToText
from .tasks.translate import Hibiki

__all__ = [
    "AudioError",
    "CheckpointError",
    "CodecError",
    "ConfigError",
    "DownloadError",
    "GenerationConfig",
    "Generator",
    "Helium",
    "Hibiki",
    "Lm",
    "LmConfig",
    "LmOutput",
    "Mimi",
    "MimiConfig",
    "ModelConfig",
    "Moshi",
    "MoshiError",
    "PersonaPlex",
    "Reply",
    "Sampling",
    "Session",
    "SessionFrame",
    "SpeechToText",
    "StateError",
    "Step",
    "TextError",
    "TextToSpeech",
    "TextTokenizer",
    "TokenError",
    "Word",
    "load",
]
