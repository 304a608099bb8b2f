"""The linear half of echo cancellation: an adaptive filter, and how fast what it models drifts away.

Nothing here knows of devices or of time; :mod:`moshi_mlx_app.audio.echo` puts it to work.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

__all__ = ["AdaptiveFilter", "Drift", "Interpolator"]

Pcm = NDArray[np.float32]

_TAPS, _PHASES = 32, 512
_HOP, _APART = 34, 2  # blocks between looks at the drift, and looks between those that are compared
_LONGEST = 40  # blocks by which what is played may come earlier
_AGREED = 0.95  # share of the phases' agreement without which they say nothing
_RESPONSE_TIME = 0.3  # of a block's power in the power of what the filter does not explain


class AdaptiveFilter:
    """A linear echo canceller: the frequency-domain adaptive Kalman filter of Enzner and Vary (Signal Processing 86,
    2006), in partitions of one block. It needs no detector of double talk: what it does not explain slows it down.

    Parameters
    ----------
    size : int
        Samples in a block.
    partitions : int
        Blocks that an echo may last.
    transition : float
        How steady the room is, a block: its response is expected to keep this share of itself.

    Attributes
    ----------
    weights : array [partitions, size + 1], complex64
        The room's response, in pieces of a block, each as the spectrum of twice a block.
    echo : array [size], float32
        What it took out of the last block.
    expected : float
        Mean square that it expects to be left of the echo in the last block, by what it knows of its own errors.
    """

    def __init__(self, size: int, partitions: int, transition: float = 0.997):
        bins = size + 1
        self._size, self._keep = size, np.float32(transition**2)
        self._input = np.zeros(2 * size, np.float32)
        self._spectra = np.zeros((partitions, bins), np.complex64)  # of the reference, newest first
        self.weights = np.zeros((partitions, bins), np.complex64)
        self._rest = np.full(bins, 1e-3, np.float32)  # power of what the filter does not explain
        self.echo: Pcm = np.zeros(size, np.float32)
        self.expected = 0.0
        self.doubt_all()

    def doubt_all(self) -> None:
        """Believe nothing of what was learnt: the room is another one."""
        # How wrong the weights may be: at first anything, less so for late echoes.
        fall = (10 ** (-0.05 * np.arange(len(self.weights)))).astype(np.float32)
        self._doubt = np.repeat(fall[:, None], self._size + 1, axis=1)

    def __call__(self, reference: Pcm, heard: Pcm) -> Pcm:
        """``heard`` [size] without what follows from the ``reference`` [size] and those before it."""
        size = self._size
        self._input[:size] = self._input[size:]
        self._input[size:] = reference
        self._spectra[1:] = self._spectra[:-1].copy()
        self._spectra[0] = np.fft.rfft(self._input)
        self.echo = np.fft.irfft((self.weights * self._spectra).sum(axis=0))[size:].astype(np.float32)
        left = (heard - self.echo).astype(np.float32)
        error = np.fft.rfft(np.concatenate([np.zeros(size, np.float32), left])).astype(np.complex64)
        power = np.square(np.abs(self._spectra))
        self._rest += np.float32(_RESPONSE_TIME) * (np.square(np.abs(error)) - self._rest)
        # Half of each window is new: the factors of one half come from that.
        unsure = 0.5 * (self._doubt * power).sum(axis=0)
        self.expected = float(unsure.sum()) / size**2
        gain = 0.5 * self._doubt / (unsure + self._rest + np.float32(1e-6))
        step = np.fft.irfft(gain * np.conj(self._spectra) * error)
        step[:, size:] = 0
        self.weights += np.fft.rfft(step).astype(np.complex64)
        self._doubt = (
            self._keep * (1 - 0.5 * gain * power) * self._doubt + (1 - self._keep) * np.square(np.abs(self.weights))
        ).astype(np.float32)
        return left


class Drift:
    """By how much one clock is faster than another, from what is played and what is heard.

    What is heard comes later and later, or earlier and earlier, than what is played. Two windows of both give two
    spectra between them; a delay in the second turns the phase of each frequency in proportion to it, and the slope of
    the phase, by least squares weighted with the power, is the delay. Where the phases do not lie on a line, somebody
    else speaks, and nothing is said.

    Parameters
    ----------
    size : int
        Samples in a block.
    """

    def __init__(self, size: int):
        self._size, self._count = size, 2 * _HOP * size
        self._played = np.zeros(self._count + _LONGEST * size, np.float32)
        self._heard = np.zeros(self._count, np.float32)
        self._window = np.hanning(self._count).astype(np.float32)
        self._turn = np.pi * np.arange(self._count // 3) / (self._count // 2)  # of each bin's phase, a sample's delay
        self._looks: deque[tuple[NDArray[np.complex128], float]] = deque(maxlen=_APART + 1)
        self._lead = 0  # blocks by which what is played comes earlier
        self._blocks = 0
        self._place = 0.0

    def __call__(self, played: Pcm, heard: Pcm, place: float, lead: int) -> float | None:
        """Take a block of both.

        Parameters
        ----------
        played, heard : array [size]
        place : float
            Samples of the one clock that had passed when the block was played, less those of the other.
        lead : int
            Blocks by which ``played`` comes before it is ``heard``, roughly.

        Returns
        -------
        float or None
            The difference as a share of the clock's speed, if it can be told now.
        """
        for kept, fresh in ((self._played, played), (self._heard, heard)):
            kept[: -self._size] = kept[self._size :]
            kept[-self._size :] = fresh
        self._blocks += 1
        if self._blocks % _HOP:
            return None
        middle, self._place = self._place, place  # of the window, which is two hops long
        if self._blocks < 2 * _HOP:
            return None
        if abs(lead - self._lead) > 2:
            self._looks.clear()
            self._lead = min(lead, _LONGEST)
        end = len(self._played) - self._lead * self._size
        spectra = [
            np.fft.rfft(self._window * part)[: len(self._turn)]
            for part in (self._played[end - self._count : end], self._heard)
        ]
        both = np.conj(spectra[0]) * spectra[1]
        self._looks.append((both / np.sqrt(np.abs(both) + 1e-9), middle))
        if len(self._looks) <= _APART:
            return None
        (before, start), (now, stop) = self._looks[0], self._looks[-1]
        delay = self._delay(now * np.conj(before))
        return None if delay is None else (stop - start - delay) / (_APART * _HOP * self._size)

    def forget(self) -> None:
        """What is played jumps."""
        self._looks.clear()
        self._blocks = 0

    def _delay(self, together: NDArray[np.complex128]) -> float | None:
        """Samples by which the phases say that what is heard came later."""
        if np.abs(together).sum() < 1e-3:
            return None
        delay = 0.0
        # Newton's method, low frequencies first: theirs is the phase that cannot have turned further than it seems.
        for part in (8, 4, 2, 1, 1):
            turn = self._turn[: len(self._turn) // part]
            rest = together[: len(turn)] * np.exp(1j * turn * delay)
            slope = float(np.sum(np.square(turn) * np.maximum(rest.real, 0)))
            if slope <= 0:
                return None
            delay -= float(np.sum(turn * rest.imag)) / slope
        agreed = np.sum(together * np.exp(1j * self._turn * delay)).real / np.abs(together).sum()
        return delay if agreed > _AGREED else None


class Interpolator:
    """Samples between samples: a sinc of 32 taps under a Kaiser window."""

    before, after = _TAPS // 2, _TAPS // 2 + 2
    """Samples needed in front of the first place, and behind the last; one of each for steps that are not 1."""

    def __init__(self) -> None:
        at = np.arange(1 - _TAPS // 2, _TAPS // 2 + 1)[None, :] - (np.arange(_PHASES + 1) / _PHASES)[:, None]
        window = np.i0(9 * np.sqrt(np.clip(1 - np.square(at / (_TAPS // 2)), 0, 1))) / np.i0(9)
        self._taps = (np.sinc(at) * window).astype(np.float32)

    def __call__(self, samples: Pcm, part: float, step: float, count: int) -> Pcm:
        """``count`` values at ``before + part``, ``before + part + step``, ... of ``samples``.

        ``part`` is from 0 to 1, ``step`` so near to 1 that all of them lie within a sample of steps of 1.

        Returns
        -------
        array [count], float32
        """
        begin, end = part, part + (step - 1) * (count - 1)
        if begin == end == 0:
            return samples[self.before : self.before + count].copy()
        first, last = self._at(samples, begin, count), self._at(samples, end, count)
        return np.asarray(first + np.linspace(0, 1, count, dtype=np.float32) * (last - first), np.float32)

    def _at(self, samples: Pcm, part: float, count: int) -> Pcm:
        """All places shifted by one and the same ``part``, from -1 to 2."""
        whole = int(np.floor(part))
        taps = self._taps[round((part - whole) * _PHASES)]
        return np.convolve(samples[1 + whole : whole + count + _TAPS], taps[::-1], "valid")
