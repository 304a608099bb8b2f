"""Statistics of a conversation: stage times and latency. Sizes are fixed: nothing here grows with time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Stats", "Stopwatch"]


class Stopwatch:
    """The last durations of one stage, and the longest ever.

    Parameters
    ----------
    size : int
        How many are kept.
    """

    def __init__(self, size: int = 1024):
        self._seconds = np.zeros(size)
        self.count = 0
        self.longest = 0.0

    def add(self, seconds: float) -> None:
        self._seconds[self.count % len(self._seconds)] = seconds
        self.count += 1
        self.longest = max(self.longest, seconds)

    def percentile(self, percent: float) -> float:
        """Over the durations kept, in seconds; 0 before the first."""
        kept = self._seconds[: min(self.count, len(self._seconds))]
        return float(np.percentile(kept, percent)) if len(kept) else 0.0

    def recent(self) -> NDArray[np.float64]:
        """The durations kept, in seconds, oldest first."""
        size = len(self._seconds)
        return np.roll(self._seconds, -(self.count % size)) if self.count > size else self._seconds[: self.count].copy()

    @property
    def last(self) -> float:
        """The newest duration, in seconds; 0 before the first."""
        return float(self._seconds[(self.count - 1) % len(self._seconds)]) if self.count else 0.0


@dataclass
class Stats:
    """Counters of one conversation. Each is written by one thread; reading them is always safe.

    Attributes
    ----------
    frames : int
        Frames that went through the model.
    late : int
        Frames whose answer was ready later than two frame lengths after their last sample came.
    dropped_in : int
        Samples of the user that were dropped to keep the backlog within its bound.
    dropped_out : int
        Samples of the model that were dropped because they were not read.
    underruns : int
        Reads that ran out of samples.
    encode, step, decode : Stopwatch
        Time taken by each stage.
    latency : Stopwatch
        Latency: from a frame's last sample until its answer is ready to play.
    level_in, level_out : float
        Root mean square of the latest frame, -1 to 1 scale.
    """

    frames: int = 0
    late: int = 0
    dropped_in: int = 0
    dropped_out: int = 0
    underruns: int = 0
    level_in: float = 0.0
    level_out: float = 0.0
    encode: Stopwatch = field(default_factory=Stopwatch)
    step: Stopwatch = field(default_factory=Stopwatch)
    decode: Stopwatch = field(default_factory=Stopwatch)
    latency: Stopwatch = field(default_factory=Stopwatch)
