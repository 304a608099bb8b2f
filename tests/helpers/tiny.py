"""A whole random model, whose frames take a millisecond: codec, language model and tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np

from moshi_mlx.codec.base import MlxMimi, NumpyMimi
from moshi_mlx.config import ModelConfig
from moshi_mlx.cpu.lm import Backend
from moshi_mlx.engine import generator as generate
from moshi_mlx.engine.text import TextTokenizer
from moshi_mlx.tasks import TASKS
from moshi_mlx.tasks.dialogue import Moshi
from tests.helpers.golden_lm import small_model
from tests.helpers.mimi import TINY, tiny_mimi
from tests.helpers.signal import speechlike
from tests.helpers.tokenizer import tokenizer_bytes

__all__ = ["WAYS", "sound", "tiny_model", "use"]

WAYS = ("numpy", "mlx")
"""How a machine computes: a CPU in numpy, a GPU with MLX's modules."""
_BOOKS, _WORDS = 4, 350


def tiny_model(way: str = "numpy", seed: int = 0, name: str = "tiny", stt: dict[str, Any] | None = None) -> Moshi:
    """A model that hears and speaks four codebooks, 160 samples a frame; with ``stt`` it only writes."""
    own = 0 if stt is not None else _BOOKS
    lm = small_model(
        seed,
        text_card=_WORDS,
        card=TINY["quantizer"]["bins"],
        n_q=_BOOKS + own,
        dep_q=own,
        delays=[0, *[0, 1, 1, 1] * (2 if own else 1)],
    )
    config = ModelConfig(lm=lm.config, model_type="moshi" if stt is None else "stt", stt_config=stt or {})
    codec = (MlxMimi if way == "mlx" else NumpyMimi)(tiny_mimi(seed))
    return TASKS[config.model_type](config, lm, codec, TextTokenizer(tokenizer_bytes(_WORDS)), name=name)


def use(way: str, monkeypatch: Any = None) -> None:
    """Let language models compute this way from now on."""
    if way == "mlx":
        plain = lambda lm, kv_bits: Backend(lm)  # noqa: E731
        if monkeypatch is None:
            generate.make_backend = plain
        else:
            monkeypatch.setattr(generate, "make_backend", plain)


def sound(model: Moshi, frames: int, seed: int = 0) -> list[np.ndarray]:
    """Frames of something like speech."""
    pcm = speechlike(frames * model.frame_size, model.sample_rate, seed).astype(np.float32)
    return list(pcm.reshape(frames, model.frame_size))
