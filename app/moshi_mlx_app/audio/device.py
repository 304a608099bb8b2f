"""Microphone and loudspeaker at any rate, block size and number of channels; reopened when they come back.

::

    microphone callback > raw ring > [feeder: resample, echo canceller] > take(pcm)
    fill(pcm) > resample > loudspeaker callback

Callbacks copy, count and return. The microphone's sound is resampled in a thread, because the echo canceller is called
there too and may be slow. The loudspeaker's is resampled in the callback (some 50 µs for 10 ms): the sound has
to be read at the loudspeaker's own pace, and a thread in between would add a block of latency. Both use soxr's
variable-rate engine: the fixed-rate one works on transforms and returns 18 to 38 ms at a time, the other
holds 5 to 10 ms and returns even amounts.

A second thread opens the devices, watches them, and opens them again when they stop, or when the system's default has
changed and no device was named. PortAudio knows only the devices that were there when it was initialized, so it is
initialized again then. This module knows no model and no terminal.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.realtime.ring import Ring, Signal
from moshi_mlx_app.audio import portaudio
from moshi_mlx_app.audio.default_device import Defaults
from moshi_mlx_app.audio.portaudio import (
    Device,
    DeviceError,
    candidate_formats,
    devices,
    find_device,
    reason,
    silence_hint,
)
from moshi_mlx_app.audio.resampling import Resampler

__all__ = ["EchoCanceller", "SoundCard"]

Pcm = NDArray[np.float32]

_STILL = 3.0  # seconds without a callback after which a device counts as lost
_OPENING = 6.0  # the same for one that was just opened: PulseAudio takes up to 2 s
_RETRY = 1.0  # seconds between attempts to open
_SILENT = 3.0  # seconds of nothing but zeros after which there is a notice
_RAW_SECONDS = 2.0
_LEAST = 64  # smallest read: the jitter buffer stretches in proportion to the samples read


class EchoCanceller(Protocol):
    """Removes the loudspeaker's sound from the microphone's (see :mod:`moshi_mlx_app.audio.echo`)."""

    def played(self, pcm: Pcm, when: float) -> None:
        """Called in the loudspeaker's callback: ``pcm`` is played from ``when`` on (:func:`time.monotonic`)."""

    def cancel(self, pcm: Pcm, when: float) -> Pcm:
        """Called by the feeder: the microphone's ``pcm``, recorded from ``when`` on, without the echo."""


class SoundCard:
    """An open microphone and loudspeaker, kept open.

    Parameters
    ----------
    take : callable or None
        Receives the microphone's sound, [samples] float32 at ``rate``, in a thread of this object. None: no microphone
        is opened.
    fill : callable
        Fills an array [samples] with the sound to play; called in the loudspeaker's callback, must not block.
    rate : int
        Sample rate of ``take`` and ``fill``, hertz.
    input_device, output_device : str, optional
        See :func:`find_device`.
    echo : EchoCanceller, optional
    latency : float, optional
        Seconds of system buffering in each direction; by default a value that suits the system.
    follow : bool, optional
        Follow the system's default device when it changes. By default on macOS; elsewhere the sound server does it.

    Attributes
    ----------
    overflows, underflows : int
        Blocks that the system lost or missed, as it reports them.
    dropped : int
        Samples of the microphone that were lost because the feeder stalled for seconds.
    openings : int
        How often the devices were opened.
    """

    def __init__(
        self,
        take: Callable[[Pcm], object] | None,
        fill: Callable[[Pcm], object],
        rate: int,
        *,
        input_device: str | None = None,
        output_device: str | None = None,
        echo: EchoCanceller | None = None,
        latency: float | None = None,
        follow: bool | None = None,
    ):
        self._take: Callable[[Pcm], object] = take or (lambda pcm: None)
        self._fill, self._rate, self._echo = fill, rate, echo
        self._kinds = ("output",) if take is None else ("input", "output")
        self._wanted = {"input": input_device, "output": output_device}
        self._latency = latency
        followed = sys.platform == "darwin" if follow is None else follow
        self._defaults = Defaults() if followed and None in self._wanted.values() else None
        self._streams: list[Any] = []
        self._threads: list[threading.Thread] = []
        self._raw = Ring(1)
        self._raw_rate = float(rate)
        self._bell, self._watch = Signal(), Signal()
        self._opened = threading.Event()
        self._stopping = False
        self._reopen = False
        self._notices: deque[str] = deque(maxlen=100)
        self._failure: BaseException | None = None
        self._opened_at = 0.0
        self._anchor = (0, 0.0)  # samples of the microphone, and when the last of them came
        self._last_call = {"input": 0.0, "output": 0.0}
        self.input: Device | None = None
        self.output: Device | None = None
        self.overflows = self.underflows = self.dropped = self.openings = 0
        self.latency_in = self.latency_out = 0.0

    def __enter__(self) -> SoundCard:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def open(self) -> bool:
        """Whether both devices are running."""
        return bool(self._streams)

    @property
    def cancels_echo(self) -> bool:
        """Whether an echo canceller is in the microphone's path."""
        return self._echo is not None

    def start(self, within: float = 10.0) -> SoundCard:
        """Open both devices.

        Raises
        ------
        DeviceError
            If they cannot be opened: at the start this is more likely a wrong setting than a loose plug.
        """
        for name, target in (("feeder", self._feed), ("devices", self._keep_open)):
            self._threads.append(threading.Thread(target=target, name=f"moshi {name}", daemon=True))
            self._threads[-1].start()
        if not self._opened.wait(within):
            self.stop()
            raise DeviceError(f"the sound devices do not answer within {within:g} s; choose others, or restart them")
        if not self._streams:
            self.stop()
            assert self._failure is not None
            raise self._failure
        if self._defaults is not None:
            self._defaults.start()
        return self

    def stop(self) -> None:
        """Close them. Returns within two seconds, even if the system does not release a device."""
        self._stopping = True
        self._watch.ring()
        self._bell.ring()
        if self._defaults is not None:
            self._defaults.stop()
        until = time.monotonic() + 2.0
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def reopen(self) -> None:
        """Enumerate the devices again and open the requested ones, or the system's new defaults."""
        self._reopen = True
        self._watch.ring()

    def notices(self) -> list[str]:
        """Notices since the last call: devices lost and found, a silent microphone."""
        news = []
        while self._notices:
            news.append(self._notices.popleft())
        return news

    # ----------------------------------------------------------------------------------------------- callbacks

    def _heard(self, data: Pcm, count: int, times: Any, status: Any) -> None:
        now = time.monotonic()
        try:
            if status.input_overflow:
                self.overflows += 1
            mono = data[:, 0] if data.shape[1] == 1 else data.mean(axis=1)
            self.dropped += count - self._raw.write(mono)
            self._anchor = (self._raw.written, now - _held(times.currentTime - times.inputBufferAdcTime))
            self._last_call["input"] = now
            self._bell.ring()
        except Exception as error:  # must not leave a callback: PortAudio would end the stream without a reason
            self._failure = error

    def _player(self, rate: float, channels: int) -> Callable[[Pcm, int, Any, Any], None]:
        """The loudspeaker's callback, with its own buffers."""
        resample, ratio = Resampler(self._rate, rate), self._rate / rate
        work = np.zeros(self._rate, np.float32)
        left = np.zeros(0, np.float32)

        def play(out: Pcm, count: int, times: Any, status: Any) -> None:
            nonlocal left
            now = time.monotonic()
            try:
                if status.output_underflow:
                    self.underflows += 1
                when = now + _held(times.outputBufferDacTime - times.currentTime)
                done = min(len(left), count)
                out[:done] = left[:done, None]
                left = left[done:]
                while done < count:
                    # All that this block needs at once, so that the jitter buffer knows how much is read at a time.
                    piece = work[: min(max(math.ceil((count - done) * ratio), _LEAST), len(work))]
                    self._fill(piece)
                    if self._echo is not None:
                        self._echo.played(piece, when + done / rate)
                    fresh = resample(piece)
                    part = fresh[: count - done]
                    out[done : done + len(part)] = part[:, None]
                    left = fresh[len(part) :]
                    done += len(part)
                self._last_call["output"] = now
            except Exception as error:
                out[:] = 0
                self._failure = error

        return play

    # ------------------------------------------------------------------------------------------------- threads

    def _feed(self) -> None:
        """From the raw ring to :attr:`_take`."""
        ring, rate = self._raw, self._raw_rate
        resample = Resampler(rate, self._rate)
        buffer = np.zeros(0, np.float32)
        zeros, doubted, read = 0, False, 0
        try:
            while not self._stopping:
                if ring is not self._raw:  # reopened, perhaps at another rate
                    ring, rate = self._raw, self._raw_rate
                    resample, zeros, doubted, read = Resampler(rate, self._rate), 0, False, 0
                count, came = self._anchor
                available = ring.available
                if not available:
                    self._bell.wait(0.2)
                    continue
                if len(buffer) < available:
                    buffer = np.zeros(2 * available, np.float32)
                first = came - (count - read) / rate  # when the first of these samples came
                got = ring.read_into(buffer[:available])
                read += got
                raw = buffer[:got]
                if zeros >= 0:
                    zeros = -1 if raw.any() else zeros + got
                    if zeros > _SILENT * rate and not doubted:
                        doubted = True
                        self._notices.append(silence_hint(self.input))
                pcm = resample(raw)
                if not len(pcm):
                    continue
                if self._echo is not None:
                    pcm = self._echo.cancel(pcm, first)
                self._take(pcm)
        except BaseException as error:  # it reaches the owner through `check`
            self._failure = error

    def check(self) -> None:
        """Raise the error of a thread or a callback, if there was one."""
        if self._failure is not None and not isinstance(self._failure, DeviceError):
            raise self._failure

    def _keep_open(self) -> None:
        """Open the devices, watch them, reopen them."""
        try:
            self._open_and_watch()
        except BaseException as error:  # it reaches the owner through `start` or `check`
            self._failure = error
        finally:
            self._close()
            self._opened.set()

    def _open_and_watch(self) -> None:
        attempt, told = 0, ""
        while not self._stopping:
            if not self._streams:
                try:
                    self._open(refresh=attempt > 0)
                    if isinstance(self._failure, DeviceError):
                        self._failure = None
                    if told:
                        self._notices.append(f"sound again: {_names(self.input, self.output)}")
                    told = ""
                except DeviceError as error:
                    self._close()
                    if attempt == 0:
                        self._failure = error
                        self._opened.set()
                        return
                    if str(error) != told:
                        told = str(error)
                        self._notices.append(f"waiting for the sound devices: {error}")
                attempt += 1
                self._opened.set()
            self._watch.wait(0.25 if self._streams else _RETRY)
            asked, self._reopen = self._reopen, False
            trouble = self._trouble() or self._elsewhere()
            if self._streams and (trouble or asked) and not self._stopping:
                told = trouble or "looking for the sound devices again"
                self._notices.append(told)
                self._close()

    def _trouble(self) -> str:
        """What is wrong with the open devices; an empty string if nothing is."""
        now = time.monotonic()
        found = [self.input, self.output][-len(self._kinds) :]
        for kind, device, stream in zip(self._kinds, found, self._streams, strict=False):
            what = "microphone" if kind == "input" else "loudspeaker"
            name = f"the {what} {device.name!r}" if device else f"the {what}"
            try:
                if not stream.active:
                    return f"{name} has stopped; opening it again"
            except Exception as error:
                return f"{name} has failed ({reason(error)}); opening it again"
            patience = _STILL if self._last_call[kind] > self._opened_at + 1 else _OPENING
            if now - max(self._last_call[kind], self._opened_at) > patience:
                return f"{name} has gone quiet; opening it again"
        return ""

    def _elsewhere(self) -> str:
        """A notice about a new default device of the system; an empty string if there is none."""
        changed = None if self._defaults is None else self._defaults.changed()
        for kind, device in (("input", self.input), ("output", self.output)):
            name = (changed or {}).get(kind)
            if name and device is not None and self._wanted[kind] is None and name != device.name:
                what = "microphone" if kind == "input" else "loudspeaker"
                return f"the system's {what} is {name!r} now; opening it"
        return ""

    def _open(self, *, refresh: bool) -> None:
        sd = portaudio.sounddevice()
        known = devices(refresh=refresh)
        self.input = find_device(self._wanted["input"], "input", known) if "input" in self._kinds else None
        self.output = find_device(self._wanted["output"], "output", known)
        latency: float | str = self._latency or ("low" if sys.platform == "darwin" else 0.02)
        for kind, device in (("input", self.input), ("output", self.output)):
            if device is None:
                continue
            error: Exception | None = None
            for rate, channels in candidate_formats(device, kind):
                try:
                    self._streams.append(self._stream(sd, kind, device, rate, channels, latency))
                    break
                except (sd.PortAudioError, ValueError) as failure:
                    error = failure
            else:
                what = "microphone" if kind == "input" else "loudspeaker"
                raise DeviceError(
                    f"the {what} {device.name!r} cannot be opened: {reason(error)}; "
                    f"close other programs that use it, or choose another with --{kind}-device"
                )
        self._opened_at = time.monotonic()
        try:
            for stream in self._streams:
                stream.start()
        except sd.PortAudioError as failure:
            raise DeviceError(f"the sound devices cannot be started: {reason(failure)}") from None
        self.openings += 1

    def _stream(self, sd: Any, kind: str, device: Device, rate: float, channels: int, latency: float | str) -> Any:
        # The system's own block size where it is good; ALSA's smallest are too small for its plugins.
        block = 0 if sys.platform == "darwin" else round(rate / 100)
        shared = {"device": device.index, "samplerate": rate, "channels": channels, "dtype": "float32"}
        if kind == "input":
            self._raw_rate = rate
            self._anchor = (0, time.monotonic())
            self._raw = Ring(round(_RAW_SECONDS * rate))
            stream = sd.InputStream(blocksize=block, latency=latency, callback=self._heard, **shared)
            self.latency_in = float(stream.latency)
        else:
            play = self._player(rate, channels)
            stream = sd.OutputStream(blocksize=block, latency=latency, callback=play, **shared)
            self.latency_out = float(stream.latency)
        return stream

    def _close(self) -> None:
        """Close in a separate thread: a driver whose device is gone may not return."""
        streams, self._streams = self._streams, []
        if streams:
            closer = threading.Thread(target=_close_all, args=(streams,), name="moshi closing", daemon=True)
            closer.start()
            closer.join(1.0)


def _close_all(streams: list[Any]) -> None:
    for stream in streams:
        try:
            stream.abort(ignore_errors=True)
            stream.close(ignore_errors=True)
        except Exception:  # it is gone either way
            pass


def _held(seconds: float) -> float:
    """A latency reported by the system, if plausible; some report nothing, or nonsense."""
    return seconds if 0 <= seconds <= 1 else 0.0


def _names(microphone: Device | None, loudspeaker: Device | None) -> str:
    return f"{microphone.name if microphone else '?'} > {loudspeaker.name if loudspeaker else '?'}"
