"""A full-size Mimi checkpoint with realistic random weights, and speech to put through it.

    python -m tests.parity.full_mimi MIMI.safetensors

The file has the size, names and types of the published one. No trained weights are needed to compare numbers.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

SAMPLE_RATE = 24000
RECORDING = Path(__file__).parents[2] / "moshi_mlx" / "assets" / "questions.wav"
TEXT = """The north wind and the sun were disputing which was the stronger, when a traveler came along wrapped in a
warm cloak. They agreed that the one who first succeeded in making the traveler take his cloak off should be considered
stronger than the other. Then the north wind blew as hard as he could, but the more he blew the more closely did the
traveler fold his cloak around him; and at last the north wind gave up the attempt. Then the sun shined out warmly, and
immediately the traveler took off his cloak. And so the north wind was obliged to confess that the sun was the stronger
of the two."""


def speech(folder: Path, seconds: float) -> np.ndarray:
    """Speech at 24 kHz, float32 [samples]: the recorded questions, or what a synthesizer on this machine says."""
    import soundfile
    import soxr

    path = RECORDING
    if not path.is_file():
        path = folder / "speech.wav"
        if shutil.which("flite"):
            command = ["flite", "-voice", "slt", "-t", TEXT, "-o", str(path)]
        elif shutil.which("espeak-ng"):
            command = ["espeak-ng", "-w", str(path), TEXT]
        else:
            raise FileNotFoundError(f"{RECORDING} is missing, and neither flite nor espeak-ng is installed")
        subprocess.run(command, check=True)
    pcm, rate = soundfile.read(path, dtype="float32", always_2d=True)
    pcm = soxr.resample(pcm.mean(axis=1), rate, SAMPLE_RATE).astype(np.float32)
    pcm = np.tile(pcm, int(np.ceil(seconds * SAMPLE_RATE / len(pcm))))[: int(seconds * SAMPLE_RATE)]
    return (0.5 * pcm / np.abs(pcm).max()).astype(np.float32)


def write_checkpoint(path: Path, pcm: np.ndarray, seed: int = 0) -> None:
    """Write the checkpoint, fitted to ``pcm`` [samples] at 24 kHz (20 s are enough)."""
    import torch
    from safetensors.torch import save_file

    from tests.helpers.mimi_torch import build, make_realistic, published_state

    torch.manual_seed(seed)
    model = build()
    make_realistic(model, pcm[: len(pcm) // model.frame_size * model.frame_size], seed)
    save_file(published_state(model), path)


def main() -> None:
    target = Path(sys.argv[1])
    write_checkpoint(target, speech(target.parent, 20.0))


if __name__ == "__main__":
    main()
