"""Streaming sample-rate conversion."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Resampler"]

Pcm = NDArray[np.float32]


class Resampler:
    """Converts one channel from one sample rate to another, block by block, with low latency.

    Parameters
    ----------
    source, target : float
        Hertz.
    """

    def __init__(self, source: float, target: float):
        self._stream: Any = None
        if source != target:
            import soxr

            self._stream = soxr.ResampleStream(source, target, 1, dtype="float32", quality="HQ", vr=True)

    def __call__(self, pcm: Pcm) -> Pcm:
        """Convert [samples] at the source's rate; returns the samples that are ready at the target's rate."""
        if self._stream is None:
            return pcm
        return np.asarray(self._stream.resample_chunk(pcm), np.float32)
