"""Crops of recorded speech, at their own speed and at another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from moshi_mlx_training.codec.data import FRAME_SAMPLES, Corpus
from moshi_mlx_training.speech.synthesis import LABEL_SAMPLES, SAMPLE_RATE


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Twenty seconds in which a tone of 500 Hz comes and goes every twentieth label, which says so."""
    labels = (np.arange(20 * SAMPLE_RATE // LABEL_SAMPLES) // 20 % 2).astype(np.uint8)
    time = np.arange(len(labels) * LABEL_SAMPLES) / SAMPLE_RATE
    tone = np.sin(2 * np.pi * 500 * time) * np.repeat(labels, LABEL_SAMPLES)
    (8000 * tone).astype(np.int16).tofile(tmp_path / "user-0000.pcm")
    labels.tofile(tmp_path / "user-0000.lab")
    return Corpus(tmp_path, ("user",))


@pytest.mark.parametrize("speed", [1.0, 0.8, 1.25])
def test_labels_follow_the_speed(corpus: Corpus, speed: float) -> None:
    """If this fails, phones are taught at other times than they are heard, or a voice at the wrong pitch."""
    pcm, labels = corpus.crop("user", 40, np.random.default_rng(0), speed)
    assert pcm.shape == (40 * FRAME_SAMPLES,) and pcm.dtype == np.float32 and labels.shape == (80,)
    level = np.sqrt(np.mean(pcm.reshape(80, LABEL_SAMPLES) ** 2, axis=1))
    heard = level > 0.5 * level.max()
    assert np.mean(heard == labels.astype(bool)) > 0.9
    spectrum = np.abs(np.fft.rfft(pcm * np.hanning(len(pcm))))
    peak = np.argmax(spectrum) * SAMPLE_RATE / len(pcm)
    assert peak == pytest.approx(500 * speed, rel=0.02)
