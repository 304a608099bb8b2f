"""Learning rate and momentum of a step: PyTorch's ``OneCycleLR`` as moshi-finetune uses it.

The rate rises from ``peak / 25`` to ``peak`` along half a cosine and falls to ``peak / 25e4``; Adam's first beta falls
from 0.95 to 0.85 and rises again.
"""

from __future__ import annotations

import math

__all__ = ["one_cycle"]

DIVISOR, FINAL_DIVISOR = 25.0, 1e4
HIGH_BETA, LOW_BETA = 0.95, 0.85


def one_cycle(step: int, steps: int, peak: float, rising: float = 0.05) -> tuple[float, float]:
    """Learning rate and beta1 of a step.

    Parameters
    ----------
    step : int
        From 0.
    steps : int
        Of the whole training.
    peak : float
        Largest learning rate.
    rising : float
        Share of the steps in which the rate rises.
    """
    turn, last = rising * steps - 1, steps - 1
    low = peak / DIVISOR
    if step <= turn and turn > 0:
        return _between(low, peak, step / turn), _between(HIGH_BETA, LOW_BETA, step / turn)
    if last <= turn:
        return peak, LOW_BETA
    done = min(1.0, (step - turn) / (last - turn))
    return _between(peak, low / FINAL_DIVISOR, done), _between(LOW_BETA, HIGH_BETA, done)


def _between(start: float, end: float, done: float) -> float:
    """Half a cosine from ``start`` to ``end``."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * done))
