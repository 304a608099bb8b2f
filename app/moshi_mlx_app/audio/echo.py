"""Echo cancellation: removes what the loudspeaker plays from what the microphone records.

Two cancellers work side by side. WebRTC's (AEC3, from the package ``livekit``) removes some 30 dB from the first
second on, but while both sides speak it damages the user's voice. An adaptive filter
(:mod:`moshi_mlx_app.audio.adaptive`) removes less, and does not harm the voice. The filter estimates its residual
echo: while the residual is no larger, only Moshi speaks, and AEC3's output is used; while it is larger, the user
speaks, and the filter's output is used.
``benchmarks/echo.py`` measures it.

Both need alignment: for every 10 ms of the microphone, the 10 ms that left the loudspeaker at that time.
The devices have separate clocks and block sizes, and stop now and then. So each side reports when its samples are
played or recorded, on one common clock, and the reference is read at the microphone's time, slightly early: an echo
that comes before its reference could not be cancelled. Large differences are corrected by a jump. The drift between
the clocks is estimated from the sound itself, and the reference is read faster or slower to follow it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.errors import MoshiError
from moshi_mlx.realtime.ring import Ring
from moshi_mlx_app.audio.adaptive import AdaptiveFilter, Drift, Interpolator

__all__ = ["EchoError", "WebRtcEcho"]

Pcm = NDArray[np.float32]

_AHEAD = 0.030  # initial lead of the reference, seconds: covers errors in the reported latency
_STEP = 0.005  # ... reduced by this much when the reference is not available so early
_TOLERANCE = 0.025  # seconds of misalignment that the canceller can handle
_PATIENCE = 20  # frames of 10 ms of misalignment before the reference jumps
_KEPT = 4.0  # seconds of reference that are kept
_AEC3_DELAY = 0.00925  # seconds of AEC3's algorithmic delay (measured: 222 samples at 24 kHz)
_FILTER_SECONDS = 0.3  # of echo that the filter can model
# Decibels of the filter's residual, relative to the expected one: up to the first only AEC3's output is used,
# from the second on only the filter's.
_ONLY_AEC3, _ONLY_FILTER = -3.0, 4.0
_LEAK_FIRST, _LEAK_LAST = 3.0, 0.003  # before the drift is known, and after
_SLOW, _FASTEST = 2e-5, 1e-3  # drift that does no harm, and largest plausible drift


class EchoError(MoshiError):
    """Echo cancellation is not available; the message says what to do."""


class WebRtcEcho:
    """WebRTC's canceller and an adaptive filter, for one loudspeaker and one microphone.

    Parameters
    ----------
    rate : int
        Hertz, of both sides; a multiple of 100.

    Attributes
    ----------
    jumps : int
        How often the reference was realigned.
    drift : float
        Estimated relative speed of the loudspeaker's clock over the microphone's.

    Raises
    ------
    EchoError
        If the package ``livekit`` is missing or too old.
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
        self._anchor = (0, 0.0)  # samples played so far, and when the last of them leaves the loudspeaker
        self._place = 0  # sample of the reference that is next
        self._off = self._missed = 0
        self._ahead = _AHEAD
        self._pending = np.zeros(0, np.float32)
        self._reference = np.zeros(self._size, np.float32)
        self._filter = AdaptiveFilter(self._size, round(_FILTER_SECONDS * 100))
        self._drift, self._interpolate = Drift(self._size), Interpolator()
        self._around = np.zeros(self._interpolate.before + self._size + self._interpolate.after, np.float32)
        self._part = 0.0  # fraction of a sample to add to _place
        self._gained = 0.0  # samples of the reference read in excess of those recorded
        self._match = np.zeros(3)  # of the recording and the filter's echo: their product, and the power of each
        self._resting = 0  # blocks until the filter's uncertainty may be reset again
        self._leak = _LEAK_FIRST  # unexpected share of the echo that the filter may miss
        self._told = 0  # number of drift estimates
        self._filtered = np.zeros(self._size + round(_AEC3_DELAY * rate), np.float32)
        self._power = np.full(2, 1e-9)  # of the filter's residual, and of the expected one
        self._share = 0.0  # of the filter in the output
        self.jumps = 0
        self.drift = 0.0

    def played(self, pcm: Pcm, when: float) -> None:
        """Called in the loudspeaker's callback: ``pcm`` [samples] is played from ``when`` on."""
        self._ring.write(pcm)
        self._anchor = (self._ring.written, when + len(pcm) / self._rate)

    def cancel(self, pcm: Pcm, when: float) -> Pcm:
        """Called in the microphone's thread: ``pcm`` [samples], recorded from ``when`` on, without the echo.

        Returns
        -------
        array [n], float32
            In whole blocks of 10 ms; the rest is kept for the next call.
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
        left = self._filter(self._reference, heard)
        self._filtered = np.concatenate([self._filtered[self._size :], left])
        filtered = self._filtered[: self._size]
        self._power += 0.3 * (np.array([np.mean(np.square(left)), self._may_miss(heard)]) - self._power)
        unexplained = 10 * np.log10((self._power[0] + 1e-10) / (self._power[1] + 1e-10))
        share = float(np.clip((unexplained - _ONLY_AEC3) / (_ONLY_FILTER - _ONLY_AEC3), 0, 1))
        ramp = np.linspace(self._share, share, self._size, dtype=np.float32)
        self._share = share
        self._follow(heard)
        return np.asarray(out + ramp * (filtered - out), np.float32)

    def _may_miss(self, heard: Pcm) -> float:
        """Mean square of the residual echo that the filter may have left in the last block."""
        echo = self._filter.echo
        self._match += 0.04 * (np.array([np.dot(heard, echo), np.dot(echo, echo), np.dot(heard, heard)]) - self._match)
        both, guess, all_of_it = self._match
        # 0 if the recording contains exactly the estimated echo; on average, a voice does not change this.
        wrong = 1 - both / (guess + 1e-9)
        leak = self._leak + 4 * min(max(wrong, 0.0), 1.0) ** 2
        self._resting = max(self._resting - 1, 0)
        if wrong > 0.6 and guess > 0.2 * all_of_it and not self._resting:
            self._filter.doubt_all()
            self._resting = 100
        return float(self._filter.expected + leak * np.mean(np.square(echo)))

    def _follow(self, heard: Pcm) -> None:
        """Estimate the drift, and read the reference at the speed of the loudspeaker's clock."""
        weights = self._filter.weights
        lead = int(np.argmax(np.square(np.abs(weights)).sum(axis=1)))
        drift = self._drift(self._reference, heard, self._gained, lead)
        if drift is not None and abs(drift) < _FASTEST:
            self._told = min(self._told + 1, 10)
            self._leak = max(0.6 * self._leak, _LEAK_LAST)
            self.drift += (drift - self.drift) / self._told
            if self._told == 1 and abs(drift) > _SLOW:
                self._filter.doubt_all()  # the filter was learning a moving target until now

    def _refer(self, when: float) -> None:
        """Read the reference that is played at ``when`` or slightly later."""
        written, until = self._anchor
        wanted = written - round((until - when - self._ahead) * self._rate)
        off = wanted - self._place
        if self._off < _PATIENCE:
            self._off = self._off + 1 if abs(off) > _TOLERANCE * self._rate else 0
        if self._off >= _PATIENCE or abs(off) > self._rate or (written and not self.jumps):
            self._place, self._part, self._off = wanted, 0.0, 0
            self._drift.forget()
            self._told = min(self._told, 1)  # perhaps these are other devices
            self.jumps += 1
        around = self._around
        around[:] = 0
        begin = self._place - self._interpolate.before
        oldest = self._ring.written - self._ring.available
        # What was not played yet, or is no longer kept, is silence.
        lead = min(max(oldest - begin, 0), len(around))
        self._ring.skip_to(begin + lead)
        self._ring.peek_into(around[lead:])
        step = 1 + self.drift
        self._reference[:] = self._interpolate(around, self._part, step, self._size)
        # The reference was late: while something plays, this must not continue.
        late = written and begin + len(around) > self._ring.written
        self._part += self._size * step
        self._gained += self._size * self.drift
        whole = int(self._part)
        self._place, self._part = self._place + whole, self._part - whole
        self._missed = self._missed + 1 if late else 0
        if self._missed >= 5 and self._ahead > 0:
            self._ahead, self._missed, self._off = self._ahead - _STEP, 0, _PATIENCE

    def _as_frame(self, pcm: Pcm) -> Any:
        data = np.clip(np.rint(pcm * np.float32(32768)), -32768, 32767).astype(np.int16)
        return self._frame(bytearray(data.tobytes()), self._rate, 1, self._size)
