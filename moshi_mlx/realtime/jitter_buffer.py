"""The jitter buffer: plays decoded frames at the loudspeaker's pace.

The model's sound comes in frames of 80 ms, at the microphone's pace and a little unevenly; the loudspeaker takes
blocks at its own. In between, a small target delay is kept: just enough that no block finds the ring
empty. An underrun increases it; after a while without underruns it decreases again, more slowly each time that was too
early. To follow clock drift, or a change of the target delay, sound is played slightly faster or slower, by at most
half a percent, with interpolation: no sample is dropped, so there are no clicks. Only a large excess, which accumulates
while the loudspeaker stalls and would take minutes to play off in this way, is skipped at once, with a short
cross-fade.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .ring import Ring

__all__ = ["JitterBuffer"]

_STRETCH = 200  # at most one sample in this many is added or dropped
_STEP = 0.010  # seconds by which an underrun increases the target delay
_WINDOW = 4.0  # seconds over which the lowest fill level is taken
_PILE = 0.06  # excess over the target delay, in seconds, that is skipped if it lasts ...
_PILE_WINDOW = 1.0  # ... for this many seconds
_FADE = 0.005
_PATIENCE, _MOST_PATIENCE = 30.0, 600.0  # seconds without an underrun before the target delay decreases
_NARROWING = 0.25  # share of the increase that is taken back


class JitterBuffer:
    """The reader of the output ring.

    Parameters
    ----------
    ring : Ring
        Samples; written by the decoder.
    sample_rate : int
    target_delay : float
        Initial target delay: seconds of sound that should be left after a read.
    most : float
        Largest target delay in seconds. An excess beyond twice this is skipped.
    """

    def __init__(self, ring: Ring, sample_rate: int, target_delay: float = 0.02, most: float = 0.4):
        self._ring = ring
        self._rate = sample_rate
        self._target_delay = self._first = round(target_delay * sample_rate)
        self._most = round(most * sample_rate)
        self._work = np.zeros(0, np.float32)
        self._lowest = ring.capacity
        self._since = 0
        self._pile, self._pile_since = ring.capacity, 0
        self._correction = 0
        self._playing = False
        self._held = 0
        self._clear_to = 0
        self._calm, self._patience, self._narrowed = 0, round(_PATIENCE * sample_rate), False
        self.underruns = 0
        self.skipped = 0

    @property
    def target_delay(self) -> float:
        """Target delay: seconds of sound that should be left after a read."""
        return self._target_delay / self._rate

    @property
    def filling(self) -> float:
        """Seconds of sound waiting to be played."""
        return self._ring.available / self._rate

    def clear(self) -> None:
        """Writer's side: discard what has been written so far."""
        self._clear_to = self._ring.written

    def read_into(self, out: NDArray[np.float32]) -> None:
        """Reader's side: fill ``out`` [samples]; never blocks, silence where there is no sound."""
        count = len(out)
        if self._clear_to:
            self._ring.skip_to(self._clear_to)
            self._clear_to = 0
            self._playing = False
        available = self._ring.available
        # A frame may come just after a read or just before it, so one block's length is ignored.
        target_delay = max(self._target_delay, count + count // 4)
        if not self._playing:
            # Frames come in bursts: start one target delay after the first, so that the next is in time by as much.
            self._held = self._held + count if available else 0
            if self._held <= target_delay or available < count:
                out[:] = 0
                return
            self._playing, self._held = True, 0
            self._lowest, self._since, self._correction = available, 0, 0
            self._pile, self._pile_since = available, 0
        if available < count:
            got = self._ring.read_into(out)
            _fade_out(out, got)
            self._playing = False
            self.underruns += 1
            self._widen()
            return
        excess = available - count - 2 * self._most
        if excess > target_delay:
            self.skipped += self._ring.skip(excess)
            available -= excess
        self._pile = min(self._pile, available - count)
        self._pile_since += count
        if self._pile_since >= _PILE_WINDOW * self._rate:
            pile = self._pile - target_delay
            self._pile, self._pile_since = available, 0
            if pile > _PILE * self._rate:
                self._leave_out(pile, out)
                self._lowest, self._since, self._correction = self._ring.available, 0, 0
                self._pile = self._ring.available
                return
        shift = self._shift(count, available - count, target_delay)
        if shift == 0:
            self._ring.read_into(out)
        else:
            self._read_warped(out, count + shift)
        self._lowest = min(self._lowest, self._ring.available)
        self._since += count
        self._calm += count
        if self._calm >= self._patience:
            self._narrow()

    def _widen(self) -> None:
        self._target_delay = min(self._target_delay + round(_STEP * self._rate), self._most)
        if self._narrowed:  # it was decreased too early: wait longer the next time
            self._patience = min(2 * self._patience, round(_MOST_PATIENCE * self._rate))
        self._calm, self._narrowed = 0, False

    def _narrow(self) -> None:
        wider = self._target_delay - self._first
        self._target_delay -= min(wider, max(round(_STEP * self._rate), round(_NARROWING * wider)))
        self._calm, self._narrowed = 0, wider > 0

    def _shift(self, count: int, left: int, target_delay: int) -> int:
        """Extra samples to read (or to leave) to approach the target delay."""
        if self._since >= _WINDOW * self._rate:
            self._correction = self._lowest - target_delay
            if abs(self._correction) < 0.002 * self._rate:
                self._correction = 0
            self._lowest, self._since = left, 0
        limit = max(1, count // _STRETCH)
        shift = min(max(self._correction, -limit), limit, left)
        self._correction -= shift
        return shift

    def _leave_out(self, count: int, out: NDArray[np.float32]) -> None:
        """Skip ``count`` samples and fill ``out``, with a cross-fade from the skipped sound."""
        fade = min(round(_FADE * self._rate), len(out))
        before = np.empty(fade, np.float32)
        self._ring.peek_into(before)
        self.skipped += self._ring.skip(count)
        self._ring.read_into(out)
        rise = np.linspace(0, 1, fade, dtype=np.float32)
        out[:fade] = before + rise * (out[:fade] - before)

    def _read_warped(self, out: NDArray[np.float32], take: int) -> None:
        """Fill ``out`` from ``take`` samples, slightly more or fewer than its length, by cubic interpolation."""
        if len(self._work) < take + 1:
            self._work = np.zeros(2 * take, np.float32)
        # One sample beyond the last, if it is there, so that the next block continues the curve.
        work = self._work[: take + 1]
        got = self._ring.peek_into(work)
        if got <= take:
            work[take] = work[take - 1]
        self._ring.skip(take)
        out[:] = _resample(work, len(out))


def _resample(samples: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """``count`` values at even steps over ``samples`` without its last one (Catmull-Rom spline)."""
    take = len(samples) - 1
    at = np.arange(count) * (take / count)
    whole = at.astype(np.int64)
    part: NDArray[np.float32] = (at - whole).astype(np.float32)
    before = samples[np.maximum(whole - 1, 0)]
    here, after = samples[whole], samples[whole + 1]
    later = samples[np.minimum(whole + 2, take)]
    slope, slope_after = (after - before) / 2, (later - here) / 2
    rise = after - here
    curve = 3 * rise - 2 * slope - slope_after
    twist = slope + slope_after - 2 * rise
    return np.asarray(here + part * (slope + part * (curve + part * twist)), np.float32)


def _fade_out(out: NDArray[np.float32], got: int) -> None:
    """Silence after ``got`` samples, with a fade of 2 ms at 24 kHz so that the end does not click."""
    out[got:] = 0
    ramp = min(got, 48)
    if ramp:
        out[got - ramp : got] *= np.linspace(1, 0, ramp, dtype=np.float32)
