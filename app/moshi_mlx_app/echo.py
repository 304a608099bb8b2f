"""Echo cancellation: what the loudspeaker plays is taken out of what the microphone hears.

Two cancellers work side by side. WebRTC's (AEC3, from the package ``livekit``) takes some 30 dB off from the first
second on, but while both sides speak it damages the user's voice. A plain adaptive filter takes off less, and leaves
the voice alone. So AEC3 is heard while only Moshi speaks, and the filter where AEC3 lets much through: then the user
speaks. ``benchmarks/echo.py`` measures it.

Both need the alignment that is made here: for every 10 ms of the microphone, the 10 ms that left the loudspeaker then.
The devices run on clocks of their own, in blocks of their own, and stop now and then. So each side says when its
samples leave or come, on one clock, and the reference is read where the microphone's time falls, a little early: an
echo that comes before its reference could not be cancelled. Small differences are left to the cancellers, larger ones
jump.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.errors import MoshiError
from moshi_mlx.realtime.ring import Ring

__all__ = ["AdaptiveFilter", "EchoError", "WebRtcEcho"]

Pcm = NDArray[np.float32]

_AHEAD = 0.030  # seconds by which the reference comes early at first: what devices misreport
_STEP = 0.005  # ... and by how much less if it is not known so early
_TOLERANCE = 0.025  # seconds of misalignment that are left to the canceller
_PATIENCE = 20  # frames of 10 ms that it must last before the reference jumps
_KEPT = 4.0  # seconds of reference that are kept
_AEC3_DELAY = 0.00925  # seconds by which AEC3's output comes later than its input (measured: 222 samples at 24 kHz)
_FILTER_SECONDS = 0.3  # of echo that the filter can model
# Decibels of AEC3's output relative to the filter's: up to the first only AEC3 is heard, from the second on the filter.
_ONLY_AEC3, _ONLY_FILTER = -14.0, -6.0


class EchoError(MoshiError):
    """Echo cancellation cannot be had; the message says what to do."""


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
    """

    def __init__(self, size: int, partitions: int, transition: float = 0.997):
        bins = size + 1
        self._size, self._keep = size, np.float32(transition**2)
        self._input = np.zeros(2 * size, np.float32)
        self._spectra = np.zeros((partitions, bins), np.complex64)  # of the reference, newest first
        self._weights = np.zeros((partitions, bins), np.complex64)
        # How wrong the weights may be: at first anything, less so for late echoes.
        fall = (10 ** (-0.05 * np.arange(partitions))).astype(np.float32)
        self._doubt = np.repeat(fall[:, None], bins, axis=1)
        self._rest = np.full(bins, 1e-3, np.float32)  # power of what the filter does not explain

    def __call__(self, reference: Pcm, heard: Pcm) -> Pcm:
        """``heard`` [size] without what follows from the ``reference`` [size] and those before it."""
        size = self._size
        self._input[:size] = self._input[size:]
        self._input[size:] = reference
        self._spectra[1:] = self._spectra[:-1].copy()
        self._spectra[0] = np.fft.rfft(self._input)
        echo = np.fft.irfft((self._weights * self._spectra).sum(axis=0))[size:]
        left = (heard - echo).astype(np.float32)
        error = np.fft.rfft(np.concatenate([np.zeros(size, np.float32), left])).astype(np.complex64)
        power = np.square(np.abs(self._spectra))
        self._rest += np.float32(0.3) * (np.square(np.abs(error)) - self._rest)
        # Half of each window is new: the factors of one half come from that.
        gain = 0.5 * self._doubt / (0.5 * (self._doubt * power).sum(axis=0) + self._rest + np.float32(1e-6))
        step = np.fft.irfft(gain * np.conj(self._spectra) * error)
        step[:, size:] = 0
        self._weights += np.fft.rfft(step).astype(np.complex64)
        self._doubt = (
            self._keep * (1 - 0.5 * gain * power) * self._doubt + (1 - self._keep) * np.square(np.abs(self._weights))
        ).astype(np.float32)
        return left


class WebRtcEcho:
    """WebRTC's canceller, and a filter beside it, between one loudspeaker and one microphone.

    Parameters
    ----------
    rate : int
        Hertz, of both sides; a multiple of 100.

    Attributes
    ----------
    jumps : int
        How often the reference was aligned anew.

    Raises
    ------
    EchoError
        If the package ``livekit`` is missing or has no such thing.
    """

    def __init__(self, rate: int):
        try:
            from livekit import rtc

            self._frame = rtc.AudioFrame
            self._processing: Any = rtc.AudioProcessingModule(echo_cancellation=True)
        except Exception as error:  # missing, too old, or no library for this machine
            raise EchoError(
                f"there is no echo cancellation ({type(error).__name__}: {error}): use headphones, "
                "or run 'pip install livekit'"
            ) from None
        self._rate, self._size = rate, rate // 100
        self._ring = Ring(round(_KEPT * rate))
        self._anchor = (0, 0.0)  # samples that were played, and when the last of them leaves the loudspeaker
        self._place = 0  # sample of the reference that is next
        self._off = self._missed = 0
        self._ahead = _AHEAD
        self._pending = np.zeros(0, np.float32)
        self._reference = np.zeros(self._size, np.float32)
        self._filter = AdaptiveFilter(self._size, round(_FILTER_SECONDS * 100))
        self._filtered = np.zeros(self._size + round(_AEC3_DELAY * rate), np.float32)
        self._power = np.full(2, 1e-9)  # of AEC3's output and of the filter's
        self._share = 0.0  # of the filter in what is heard
        self.jumps = 0

    def played(self, pcm: Pcm, when: float) -> None:
        """From the loudspeaker's callback: ``pcm`` [samples] leaves the loudspeaker from ``when`` on."""
        self._ring.write(pcm)
        self._anchor = (self._ring.written, when + len(pcm) / self._rate)

    def cancel(self, pcm: Pcm, when: float) -> Pcm:
        """From the microphone's thread: ``pcm`` [samples], the first of which came at ``when``, without the echo.

        Returns
        -------
        array [n], float32
            In whole pieces of 10 ms; the rest waits for the next call.
        """
        start = when - len(self._pending) / self._rate
        samples = np.concatenate([self._pending, pcm])
        whole = len(samples) - len(samples) % self._size
        self._pending = samples[whole:]
        out = np.empty(whole, np.float32)
        for begin in range(0, whole, self._size):
            self._refer(start + begin / self._rate)
            out[begin : begin + self._size] = self._cancel(samples[begin : begin + self._size])
        return out

    def _cancel(self, heard: Pcm) -> Pcm:
        """10 ms without the echo of :attr:`_reference`."""
        self._processing.process_reverse_stream(self._as_frame(self._reference))
        frame = self._as_frame(heard)
        self._processing.set_stream_delay_ms(max(round(self._ahead * 1e3), 0))
        self._processing.process_stream(frame)
        out = np.frombuffer(frame.data, np.int16) / np.float32(32768)
        self._filtered = np.concatenate([self._filtered[self._size :], self._filter(self._reference, heard)])
        filtered = self._filtered[: self._size]
        self._power += 0.3 * (np.array([np.mean(np.square(out)), np.mean(np.square(filtered))]) - self._power)
        through = 10 * np.log10((self._power[0] + 1e-10) / (self._power[1] + 1e-10))
        share = float(np.clip((through - _ONLY_AEC3) / (_ONLY_FILTER - _ONLY_AEC3), 0, 1))
        ramp = np.linspace(self._share, share, self._size, dtype=np.float32)
        self._share = share
        return np.asarray(out + ramp * (filtered - out), np.float32)

    def _refer(self, when: float) -> None:
        """Read what leaves the loudspeaker at ``when``, or a little after it."""
        written, until = self._anchor
        wanted = written - round((until - when - self._ahead) * self._rate)
        off = wanted - self._place
        if self._off < _PATIENCE:
            self._off = self._off + 1 if abs(off) > _TOLERANCE * self._rate else 0
        if self._off >= _PATIENCE or abs(off) > self._rate or (written and not self.jumps):
            self._place, self._off = wanted, 0
            self.jumps += 1
        self._reference[:] = 0
        oldest = self._ring.written - self._ring.available
        # What was not played yet, or is forgotten, is silence.
        lead = min(max(oldest - self._place, 0), self._size)
        self._ring.skip_to(self._place + lead)
        self._ring.read_into(self._reference[lead:])
        self._place += self._size
        # Known only after it was needed: while something plays, that must not go on.
        late = written and self._place > self._ring.written
        self._missed = self._missed + 1 if late else 0
        if self._missed >= 5 and self._ahead > 0:
            self._ahead, self._missed, self._off = self._ahead - _STEP, 0, _PATIENCE

    def _as_frame(self, pcm: Pcm) -> Any:
        data = np.clip(np.rint(pcm * np.float32(32768)), -32768, 32767).astype(np.int16)
        return self._frame(bytearray(data.tobytes()), self._rate, 1, self._size)
