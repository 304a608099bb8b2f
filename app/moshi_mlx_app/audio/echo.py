"""Echo cancellation: what the loudspeaker plays is taken out of what the microphone hears.

Two cancellers work side by side. WebRTC's (AEC3, from the package ``livekit``) takes some 30 dB off from the first
second on, but while both sides speak it damages the user's voice. An adaptive filter
(:mod:`moshi_mlx_app.audio.adaptive`) takes off less, and leaves the voice alone. The filter knows how much echo it may
have missed: while it leaves no more than that, only Moshi speaks, and AEC3 is heard; while it leaves more, the user
speaks, and the filter is heard.
``benchmarks/echo.py`` measures it.

Both need the alignment that is made here: for every 10 ms of the microphone, the 10 ms that left the loudspeaker then.
The devices run on clocks of their own, in blocks of their own, and stop now and then. So each side says when its
samples leave or come, on one clock, and the reference is read where the microphone's time falls, a little early: an
echo that comes before its reference could not be cancelled. Large differences jump. Clocks of different speed are
found by ear: the response that the filter has learnt moves, and the reference is read faster or slower until it stays.
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

_AHEAD = 0.030  # seconds by which the reference comes early at first: what devices misreport
_STEP = 0.005  # ... and by how much less if it is not known so early
_TOLERANCE = 0.025  # seconds of misalignment that are left to the canceller
_PATIENCE = 20  # frames of 10 ms that it must last before the reference jumps
_KEPT = 4.0  # seconds of reference that are kept
_AEC3_DELAY = 0.00925  # seconds by which AEC3's output comes later than its input (measured: 222 samples at 24 kHz)
_FILTER_SECONDS = 0.3  # of echo that the filter can model
# Decibels of what the filter leaves, relative to the echo that it expects to leave: up to the first only AEC3 is heard,
# from the second on only the filter.
_ONLY_AEC3, _ONLY_FILTER = -3.0, 4.0
_LEAK_FIRST, _LEAK_LAST = 3.0, 0.003  # before it is known how fast the clocks are, and after
_SLOW, _FASTEST = 2e-5, 1e-3  # by which clocks differ without harm, and at most


class EchoError(MoshiError):
    """Echo cancellation cannot be had; the message says what to do."""


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
    drift : float
        By how much the loudspeaker's clock seems to run faster than the microphone's.

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
        self._drift, self._interpolate = Drift(self._size), Interpolator()
        self._around = np.zeros(self._interpolate.before + self._size + self._interpolate.after, np.float32)
        self._part = 0.0  # of a sample that the reference comes after _place
        self._gained = 0.0  # samples of the reference that were read beyond those that were heard
        self._match = np.zeros(3)  # of what is heard and the filter's echo: product, power of the one and of the other
        self._resting = 0  # blocks until the filter may be told to learn the room anew
        self._leak = _LEAK_FIRST  # share of the echo that the filter may miss without expecting it
        self._told = 0  # times that the drift was told
        self._filtered = np.zeros(self._size + round(_AEC3_DELAY * rate), np.float32)
        self._power = np.full(2, 1e-9)  # of what the filter leaves, and expected to leave
        self._share = 0.0  # of the filter in what is heard
        self.jumps = 0
        self.drift = 0.0

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
        """Mean square of the echo that the filter may have left in the last block."""
        echo = self._filter.echo
        self._match += 0.04 * (np.array([np.dot(heard, echo), np.dot(echo, echo), np.dot(heard, heard)]) - self._match)
        both, guess, all_of_it = self._match
        # 0 if what is heard holds the very echo that was guessed; a voice beside it, on average, changes nothing.
        wrong = 1 - both / (guess + 1e-9)
        leak = self._leak + 4 * min(max(wrong, 0.0), 1.0) ** 2
        self._resting = max(self._resting - 1, 0)
        if wrong > 0.6 and guess > 0.2 * all_of_it and not self._resting:
            self._filter.doubt_all()
            self._resting = 100
        return float(self._filter.expected + leak * np.mean(np.square(echo)))

    def _follow(self, heard: Pcm) -> None:
        """Read the reference at the speed of the loudspeaker's clock, as far as that can be heard."""
        weights = self._filter.weights
        lead = int(np.argmax(np.square(np.abs(weights)).sum(axis=1)))
        drift = self._drift(self._reference, heard, self._gained, lead)
        if drift is not None and abs(drift) < _FASTEST:
            self._told = min(self._told + 1, 10)
            self._leak = max(0.6 * self._leak, _LEAK_LAST)
            self.drift += (drift - self.drift) / self._told
            if self._told == 1 and abs(drift) > _SLOW:
                self._filter.doubt_all()  # what it learnt until now was on its way

    def _refer(self, when: float) -> None:
        """Read what leaves the loudspeaker at ``when``, or a little after it."""
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
        # What was not played yet, or is forgotten, is silence.
        lead = min(max(oldest - begin, 0), len(around))
        self._ring.skip_to(begin + lead)
        self._ring.peek_into(around[lead:])
        step = 1 + self.drift
        self._reference[:] = self._interpolate(around, self._part, step, self._size)
        # Known only after it was needed: while something plays, that must not go on.
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
