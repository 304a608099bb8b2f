"""Signals made by arithmetic."""

from __future__ import annotations

import numpy as np


def speechlike(samples: int, sample_rate: int, seed: int = 0) -> np.ndarray:
    """A buzz that glides and a noise, through resonances that move, with pauses: float32 [samples], peak 0.5."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / sample_rate
    pitch = 120 + 40 * np.sin(2 * np.pi * 0.7 * time) + 15 * np.sin(2 * np.pi * 2.3 * time)
    phase = np.cumsum(pitch) / sample_rate
    voiced = (np.sin(2 * np.pi * 1.3 * time) > -0.4).astype(float)
    source = voiced * (2 * (phase % 1) ** 4 - 0.4) + (0.15 + 0.35 * (1 - voiced)) * rng.standard_normal(samples)
    out = np.zeros(samples)
    for low, high, rate in ((300, 800, 2.1), (900, 2300, 1.7), (2300, 3300, 1.1)):
        centre = 0.5 * (low + high) + 0.5 * (high - low) * np.sin(2 * np.pi * rate * time + low)
        radius = np.exp(-np.pi * 120 / sample_rate)
        turn = 2 * radius * np.cos(2 * np.pi * np.minimum(centre, 0.45 * sample_rate) / sample_rate)
        one = two = 0.0
        for index in range(samples):
            one, two = (1 - radius) * source[index] + turn[index] * one - radius**2 * two, one
            out[index] += one
    out *= 0.05 + 0.95 * np.clip(np.sin(2 * np.pi * 0.9 * time + 1) + 0.6, 0, 1)
    return (0.5 * out / np.abs(out).max()).astype(np.float32)
