"""Validation of samples, in one place for the whole library.

Samples are floats from -1 to 1, or integers as sound files hold them, which are scaled: int16 and int32 by 2^15 and
2^31, uint8 (8-bit wav) around its silence, 128. Everything else is refused with a message that says what to do:
other types, values far beyond full scale (integers converted to floats), NaN, wrong shapes and rates.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import AudioError

__all__ = [
    "LONGEST_TAIL",
    "MAX_RATE",
    "MIN_RATE",
    "TAIL",
    "as_floats",
    "as_mono",
    "check_block",
    "check_frame",
    "check_rate",
    "check_tail",
]

Pcm = NDArray[np.float32]

MIN_RATE, MAX_RATE = 8_000, 192_000
"""Sample rates of recordings, hertz."""
TAIL, LONGEST_TAIL = 4.0, 3600.0
"""Seconds of silence after a recording, so that the answer can end: the default, and the maximum."""

_LOUDEST = 16.0  # float sound may exceed full scale slightly; integers taken as floats exceed it by thousands
_FULL_SCALE = {"int16": 2.0**15, "int32": 2.0**31}


def as_floats(pcm: ArrayLike) -> Pcm:
    """Samples of any shape as float32 from -1 to 1; float32 is not copied. NaN and infinity pass.

    Raises
    ------
    AudioError
        If they are not numbers, or of a type without a known full scale, or floats far beyond 1.
    """
    try:
        samples: NDArray[Any] = np.asarray(pcm)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise AudioError(f"numpy cannot read the samples ({reason}): give an array of numbers") from error
    kind, name = samples.dtype.kind, samples.dtype.name
    if kind in "USO":
        found = "Python objects" if kind == "O" else "text"
        raise AudioError(
            f"samples must be numbers, found {found}: read a sound file first, for example with soundfile.read"
        )
    if not samples.ndim:
        raise AudioError("pcm is one number: an array of samples is needed")
    if name == "uint8":
        return (samples.astype(np.float32) - 128) / np.float32(128)
    if name in _FULL_SCALE:
        return samples.astype(np.float32) / np.float32(_FULL_SCALE[name])
    if kind != "f":
        raise AudioError(
            f"samples of type {name} have no known full scale: give floats from -1 to 1, or int16, int32 or uint8"
        )
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is found as such
        samples = samples.astype(np.float32, copy=False)
    peak = max(samples.max(), -samples.min()) if samples.size else 0.0
    if _LOUDEST < peak < np.inf:
        raise AudioError(
            f"samples reach {peak:,.0f}, but floats go from -1 to 1: divide by the full scale (32768 for 16 bits), or "
            "give the integers as they are"
        )
    return samples


def check_block(pcm: ArrayLike, *, finite: bool = True) -> Pcm:
    """Any number of samples of one channel, as contiguous float32 [samples].

    Parameters
    ----------
    pcm : array [samples]
    finite : bool
        Whether NaN and infinity are refused.

    Raises
    ------
    AudioError
        As :func:`as_floats`, or if there is another number of axes, or a value is not finite.
    """
    samples = as_floats(pcm)
    if samples.ndim != 1:
        raise AudioError(
            f"sound must be one channel, an array [samples], found shape {list(samples.shape)}: average the channels"
        )
    if finite:
        bad = np.flatnonzero(~np.isfinite(samples))
        if bad.size:
            raise AudioError(f"sample {bad[0]} of {len(samples)} is not a finite number: the sound is damaged")
    return np.ascontiguousarray(samples)


def check_frame(pcm: ArrayLike, size: int) -> Pcm:
    """One frame: :func:`check_block` of exactly ``size`` samples.

    Raises
    ------
    AudioError
        As :func:`check_block`, or if there are more or fewer samples.
    """
    samples = as_floats(pcm)
    if samples.shape != (size,):
        raise AudioError(f"a frame is {size} samples of one channel, found shape {list(samples.shape)}")
    return check_block(samples)


def as_mono(pcm: ArrayLike, sample_rate: float, target_rate: float) -> Pcm:
    """A recording as a model hears it: channels averaged, resampled with soxr's best quality.

    Parameters
    ----------
    pcm : array [samples] or [samples, channels]
        As ``soundfile.read`` gives it.
    sample_rate, target_rate : float
        Its rate and the wanted one, hertz.

    Returns
    -------
    array [samples], float32
        At least one sample.

    Raises
    ------
    AudioError
        If there are no samples, the type, shape or rate makes no sense, or some samples are not finite.
    """
    check_rate(sample_rate)
    samples = as_floats(pcm)
    if samples.ndim > 2:
        raise AudioError(f"pcm must be [samples] or [samples, channels], found shape {list(samples.shape)}")
    if samples.size == 0:
        raise AudioError("the recording has no samples")
    if samples.ndim == 2:
        if samples.shape[0] < samples.shape[1]:
            raise AudioError(
                f"pcm has shape {list(samples.shape)}, more channels than samples: it must be [samples, channels], so "
                "transpose it (pcm.T)"
            )
        samples = samples.mean(axis=1)
    bad = np.flatnonzero(~np.isfinite(samples))
    if bad.size:
        raise AudioError(
            f"{bad.size} samples are not finite numbers, the first at {bad[0] / sample_rate:.3f} s: "
            "the file is damaged, or was written with a wrong format"
        )
    if sample_rate != target_rate:
        import soxr

        samples = soxr.resample(samples, sample_rate, target_rate, quality="VHQ").astype(np.float32)
        if not len(samples):  # too short for one sample at the new rate
            samples = np.zeros(1, np.float32)
    return np.ascontiguousarray(samples)


def check_rate(sample_rate: float) -> None:
    """Raise AudioError unless this is a sample rate in hertz."""
    if not isinstance(sample_rate, Real) or isinstance(sample_rate, bool):
        raise AudioError(f"a sample rate is a number of hertz, found {str(sample_rate)[:60]!r}")
    if not MIN_RATE <= sample_rate <= MAX_RATE:
        raise AudioError(
            f"a sample rate of {float(sample_rate):g} Hz makes no sense here: give the recording's, "
            f"from {MIN_RATE} to {MAX_RATE} Hz"
        )


def check_tail(seconds: float) -> None:
    """Raise AudioError unless this is a valid number of seconds of silence after a recording."""
    if not isinstance(seconds, Real) or not 0 <= seconds <= LONGEST_TAIL:
        raise AudioError(
            f"tail is the silence after the recording, from 0 to {LONGEST_TAIL:g} seconds, found {str(seconds)[:60]}"
        )
