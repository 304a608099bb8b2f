"""A small random text-to-speech model with a codec and a tokenizer."""

from __future__ import annotations

from typing import Any

from moshi_mlx.codec.base import MlxMimi, NumpyMimi
from moshi_mlx.config import ModelConfig
from moshi_mlx.engine.text import TextTokenizer
from moshi_mlx.tasks.speak import TextToSpeech
from tests.helpers.checkpoints import NO_FUSER
from tests.helpers.golden_lm import small_model
from tests.helpers.mimi import TINY, tiny_mimi
from tests.helpers.tokenizer import tokenizer_bytes

__all__ = ["tiny_speaker"]

_WORDS = 350


def tiny_speaker(way: str = "numpy", seed: int = 0, *, speakers: bool = False, ahead: int = 2) -> TextToSpeech:
    """Four codebooks, 160 samples a frame; with ``speakers`` it takes voices of 3 frames of 12 numbers."""
    changes: dict[str, Any] = {}
    if speakers:
        changes = {
            "cross_attention": True,
            "conditioners": {"speaker_wavs": {"type": "tensor", "tensor": {"dim": 12}}},
            "fuser": NO_FUSER | {"cross": ["speaker_wavs"]},
        }
    lm = small_model(
        seed,
        text_card=_WORDS,
        text_card_out=5,
        card=TINY["quantizer"]["bins"],
        n_q=4,
        dep_q=4,
        delays=[0, 0, 2, 2, 2],
        demux_second_stream=ahead > 0,
        **changes,
    )
    codec = (MlxMimi if way == "mlx" else NumpyMimi)(tiny_mimi(seed))
    config = ModelConfig(
        lm=lm.config,
        model_type="tts",
        tts_config={"audio_delay": 16.5 / codec.frame_rate, "second_stream_ahead": ahead},  # 16 frames, as published
        model_id={"sig": "00000000", "epoch": 2},
    )
    return TextToSpeech(config, lm, codec, TextTokenizer(tokenizer_bytes(_WORDS)), name="tiny-tts")
