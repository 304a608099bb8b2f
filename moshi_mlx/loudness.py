"""Loudness of a recording by ITU-R BS.1770-4, and a recording at a given loudness.

Own lines rather than pyloudnorm: that would bring scipy along, and a mono recording needs two filters and two gates.
The filters are BS.1770's as pyloudnorm designs them for any sample rate (its default class "K-weighting"), since
PersonaPlex's voices were levelled with it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .errors import AudioError

__all__ = ["at_loudness", "loudness"]

_BLOCK, _STEP = 0.4, 0.1  # seconds
_ABSOLUTE, _RELATIVE = -70.0, -10.0  # LUFS, LU

Samples = NDArray[np.float64]


def loudness(pcm: NDArray[np.float32], sample_rate: float) -> float:
    """Integrated loudness of a mono recording [samples], in LUFS; -inf if it is silent.

    Raises
    ------
    AudioError
        If it is shorter than one block of 0.4 seconds.
    """
    block = round(_BLOCK * sample_rate)
    if len(pcm) < block:
        raise AudioError(f"loudness needs {_BLOCK} seconds of sound at least, found {len(pcm) / sample_rate:.2f}")
    squares = np.cumsum(np.append(0.0, np.square(_weighted(np.asarray(pcm, np.float64), sample_rate))))
    count = round((len(pcm) / sample_rate - _BLOCK) / _STEP) + 1
    starts = (np.arange(count) * _STEP * sample_rate).astype(int)
    starts = starts[starts + block <= len(pcm)]
    power = (squares[starts + block] - squares[starts]) / (_BLOCK * sample_rate)
    with np.errstate(divide="ignore"):
        levels = -0.691 + 10 * np.log10(power)
        heard = power[levels > _ABSOLUTE]
        if not len(heard):
            return -math.inf
        gate = -0.691 + 10 * np.log10(heard.mean()) + _RELATIVE
        kept = power[(levels > gate) & (levels > _ABSOLUTE)]
    return float(-0.691 + 10 * np.log10(kept.mean()))


def at_loudness(pcm: NDArray[np.float32], sample_rate: float, lufs: float) -> NDArray[np.float32]:
    """The recording [samples], louder or softer, with the given integrated loudness.

    Raises
    ------
    AudioError
        If it is too short, or silent.
    """
    found = loudness(pcm, sample_rate)
    if not math.isfinite(found):
        raise AudioError("the recording is silent: there is nothing to level")
    return (pcm * np.float32(10 ** ((lufs - found) / 20))).astype(np.float32)


def _weighted(pcm: Samples, rate: float) -> Samples:
    """K-weighting: a high shelf for the head, then a high pass."""
    gain, shelf = 10 ** (4.0 / 40), _angle(1500.0, rate)
    cosine, alpha, root = math.cos(shelf), math.sin(shelf) / (2 * 2**-0.5), 2 * math.sqrt(gain)
    up, down = gain + 1, gain - 1
    pcm = _biquad(
        pcm,
        (
            gain * (up + down * cosine + root * alpha),
            -2 * gain * (down + up * cosine),
            gain * (up + down * cosine - root * alpha),
        ),
        (up - down * cosine + root * alpha, 2 * (down - up * cosine), up - down * cosine - root * alpha),
    )
    low = _angle(38.0, rate)
    cosine, alpha = math.cos(low), math.sin(low) / (2 * 0.5)
    return _biquad(pcm, ((1 + cosine) / 2, -(1 + cosine), (1 + cosine) / 2), (1 + alpha, -2 * cosine, 1 - alpha))


def _angle(hertz: float, rate: float) -> float:
    return 2 * math.pi * hertz / rate


def _biquad(pcm: Samples, b: tuple[float, float, float], a: tuple[float, float, float]) -> Samples:
    """A second-order filter, as a convolution with its impulse response: that is shorter than a second."""
    b0, b1, b2, a1, a2 = (value / a[0] for value in (*b, *a[1:]))
    response, size = [], min(len(pcm), 1 << 15)
    x1 = x2 = y1 = y2 = 0.0
    for index in range(size):
        x = 1.0 if not index else 0.0
        y = b0 * x + b1 * x1 + b2 * x2 - a1 * y1 - a2 * y2
        x1, x2, y1, y2 = x, x1, y, y1
        response.append(y)
    total = len(pcm) + size
    spectrum = np.fft.rfft(pcm, total) * np.fft.rfft(response, total)
    out: Samples = np.fft.irfft(spectrum, total)[: len(pcm)]
    return out
