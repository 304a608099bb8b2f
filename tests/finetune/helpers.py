"""A small checkpoint and recordings to train it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ..helpers.checkpoints import write_checkpoint

Q4 = {"bits": 4, "group_size": 32}
WORDS = "hello moshi how are you today I am fine".split()


def checkpoint(folder: Path, quantized: bool = False) -> Path:
    """A model with codec and tokenizer."""
    return write_checkpoint(folder, mimi=True, quantize=Q4 if quantized else None)


def recording(path: Path, seconds: float, words: list[Any] | None = None, channels: int = 2, rate: int = 24000) -> Path:
    """A file of noise, with a word every half second unless others are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).normal(0, 0.05, (round(seconds * rate), channels))
    soundfile.write(str(path), noise, rate)
    if words is None:
        starts = np.arange(0.3, seconds - 0.3, 0.5)
        words = [[WORDS[i % len(WORDS)], [start, start + 0.3], "SPEAKER_MAIN"] for i, start in enumerate(starts)]
    path.with_suffix(".json").write_text(json.dumps({"alignments": words}))
    return path


def recordings(folder: Path) -> Path:
    """Two recordings, as a folder of ``talk --record``."""
    paths = [recording(folder / "one.wav", 5.0), recording(folder / "second.wav", 4.5)]
    lines = [json.dumps({"path": path.name, "duration": 5.0}) for path in paths]
    (folder / "recordings.jsonl").write_text("\n".join(lines) + "\n")
    return folder
