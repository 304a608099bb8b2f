"""The linear part of echo cancellation: an adaptive filter, and an estimate of the drift between two clocks.

Nothing here depends on devices or real time; :mod:`moshi_mlx_app.audio.echo` uses it.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

__all__ = ["AdaptiveFilter", "Drift", "Interpolator"]

Pcm = NDArray[np.float32]

_TAPS, _PHASES = 32, 512
_HOP, _APART = 34, 2  # blocks between measurements of the drift, and measurements between those that are compared
_LONGEST = 40  # largest lead of the played sound, in blocks
_AGREED = 0.95  # smallest agreement of the phases at which they are used
_RESPONSE_TIME = 0.3  # of a block's power in the power of what the filter does not explain


class AdaptiveFilter:
    """A linear echo canceller: the frequency-domain adaptive Kalman filter of Enzner and Vary (Signal Processing 86,
    2006), in partitions of one block. It needs no double-talk detector: residual power slows its adaptation.

    Parameters
    ----------
    size : int
        Samples in a block.
    partitions : int
        Length of the echo in blocks.
    transition : float
        How stable the echo path is: the share of its response that is expected to remain after a block.

    Attributes
    ----------
    weights : array [partitions, size + 1], complex64
        The response of the echo path in partitions of a block, each as the spectrum of two blocks.
    echo : array [size], float32
        The echo that was subtracted from the last block.
    expected : float
        Expected mean square of the residual echo in the last block, by the error covariance.
    """

    def __init__(self, size: int, partitions: int, transition: float = 0.997):
        bins = size + 1
        self._size, self._keep = size, np.float32(transition**2)
        self._input = np.zeros(2 * size, np.float32)
        self._spectra = np.zeros((partitions, bins), np.complex64)  # of the reference, newest first
        self.weights = np.zeros((partitions, bins), np.complex64)
        self._residual_psd = np.full(bins, 1e-3, np.float32)  # power spectrum of the residual
        self.echo: Pcm = np.zeros(size, np.float32)
        self.expected = 0.0
        self.doubt_all()

    def doubt_all(self) -> None:
        """Reset the uncertainty after an echo-path change."""
        # Initial uncertainty of the weights, smaller for late echoes.
        fall = (10 ** (-0.05 * np.arange(len(self.weights)))).astype(np.float32)
        self._error_covariance = np.repeat(fall[:, None], self._size + 1, axis=1)

    def __call__(self, reference: Pcm, heard: Pcm) -> Pcm:
        """``heard`` [size] without the echo of the ``reference`` [size] and of earlier ones."""
        size = self._size
        self._input[:size] = self._input[size:]
        self._input[size:] = reference
        self._spectra[1:] = self._spectra[:-1].copy()
        self._spectra[0] = np.fft.rfft(self._input)
        self.echo = np.fft.irfft((self.weights * self._spectra).sum(axis=0))[size:].astype(np.float32)
        left = (heard - self.echo).astype(np.float32)
        error = np.fft.rfft(np.concatenate([np.zeros(size, np.float32), left])).astype(np.complex64)
        power = np.square(np.abs(self._spectra))
        self._residual_psd += np.float32(_RESPONSE_TIME) * (np.square(np.abs(error)) - self._residual_psd)
        # Half of each window is new, hence the factors of one half.
        unsure = 0.5 * (self._error_covariance * power).sum(axis=0)
        self.expected = float(unsure.sum()) / size**2
        gain = 0.5 * self._error_covariance / (unsure + self._residual_psd + np.float32(1e-6))
        step = np.fft.irfft(gain * np.conj(self._spectra) * error)
        step[:, size:] = 0
        self.weights += np.fft.rfft(step).astype(np.complex64)
        self._error_covariance = (
            self._keep * (1 - 0.5 * gain * power) * self._error_covariance
            + (1 - self._keep) * np.square(np.abs(self.weights))
        ).astype(np.float32)
        return left


class Drift:
    """The drift between the clocks of playback and recording.

    With drift, the recorded sound comes later and later, or earlier and earlier, than the played one. Two windows of
    both give two cross-spectra; a delay in the second turns the phase of each frequency in proportion to it, and the
    slope of the phase, by least squares weighted with the power, is the delay. Where the phases do not lie on a line,
    somebody else speaks, and there is no estimate.

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
        self._lead = 0  # lead of the played sound, in blocks
        self._blocks = 0
        self._place = 0.0

    def __call__(self, played: Pcm, heard: Pcm, place: float, lead: int) -> float | None:
        """Process a block of both.

        Parameters
        ----------
        played, heard : array [size]
        place : float
            Samples that one clock is ahead of the other at this block.
        lead : int
            Approximate delay from ``played`` to ``heard``, in blocks.

        Returns
        -------
        float or None
            The relative difference in speed, if there is an estimate.
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
        """Start over: the played sound jumped."""
        self._looks.clear()
        self._blocks = 0

    def _delay(self, together: NDArray[np.complex128]) -> float | None:
        """The delay between two cross-spectra, in samples, from their phases."""
        if np.abs(together).sum() < 1e-3:
            return None
        delay = 0.0
        # Newton's method, low frequencies first: their phase cannot have wrapped around.
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
    """Fractional interpolation: a sinc of 32 taps with a Kaiser window."""

    before, after = _TAPS // 2, _TAPS // 2 + 2
    """Samples needed before the first position and after the last; one of each is for steps other than 1."""

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
        """All positions shifted by the same ``part``, from -1 to 2."""
        whole = int(np.floor(part))
        taps = self._taps[round((part - whole) * _PHASES)]
        return np.convolve(samples[1 + whole : whole + count + _TAPS], taps[::-1], "valid")
