"""The sound devices that PortAudio knows.

PortAudio enumerates them once, when it is initialized: devices plugged in later are found by :func:`devices` with
``refresh``, which ends all open streams.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from moshi_mlx.errors import MoshiError

__all__ = [
    "Device",
    "DeviceError",
    "candidate_formats",
    "devices",
    "find_device",
    "reason",
    "silence_hint",
    "sounddevice",
]


class DeviceError(MoshiError):
    """No microphone or loudspeaker can be used; the message says what to do."""


@dataclass(frozen=True)
class Device:
    """A microphone, a loudspeaker, or both.

    Attributes
    ----------
    index : int
        PortAudio's number; it changes when devices come and go.
    inputs, outputs : int
        Channels.
    rate : float
        Its own sample rate, hertz.
    default_input, default_output : bool
        Whether it is the system's default.
    """

    index: int
    name: str
    host: str
    inputs: int
    outputs: int
    rate: float
    default_input: bool
    default_output: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def sounddevice() -> Any:
    """The package; imported late, because its import looks for the system's library."""
    try:
        with _hushed():
            import sounddevice as package
    except ImportError as error:
        raise DeviceError(f"the package 'sounddevice' is missing ({error}): run 'pip install sounddevice'") from None
    except OSError:
        way = "'sudo apt-get install libportaudio2'" if sys.platform == "linux" else "'pip install -U sounddevice'"
        raise DeviceError(f"PortAudio, the library for sound devices, is missing: run {way}") from None
    return package


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Silence standard error: ALSA's library complains there about every missing device."""
    if sys.platform != "linux":
        yield
        return
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def devices(*, refresh: bool = False) -> list[Device]:
    """Every sound device.

    Parameters
    ----------
    refresh : bool
        Enumerate the devices again. No stream may be open.

    Raises
    ------
    DeviceError
        If PortAudio is missing or fails.
    """
    sd = sounddevice()
    try:
        if refresh:
            with _hushed():
                sd._terminate()  # there is no public way
                sd._initialize()
        hosts = sd.query_hostapis()
        default_input, default_output = (
            index if index >= 0 else hosts[0][f"default_{kind}_device"]
            for kind, index in zip(("input", "output"), sd.default.device, strict=True)
        )
        found = []
        for index, entries in enumerate(sd.query_devices()):
            host = hosts[entries["hostapi"]]
            found.append(
                Device(
                    index=index,
                    name=str(entries["name"]),
                    host=str(host["name"]),
                    inputs=int(entries["max_input_channels"]),
                    outputs=int(entries["max_output_channels"]),
                    rate=float(entries["default_samplerate"]),
                    default_input=index == default_input,
                    default_output=index == default_output,
                )
            )
        return found
    except sd.PortAudioError as error:
        raise DeviceError(f"the sound devices cannot be listed: {reason(error)}") from None


def find_device(wanted: str | None, kind: str, among: list[Device]) -> Device:
    """The device that ``--input-device`` or ``--output-device`` names.

    Parameters
    ----------
    wanted : str or None
        A number, or part of a name (an exact match wins); None for the system's default.
    kind : {"input", "output"}

    Raises
    ------
    DeviceError
        If there is none, or several.
    """
    what = "microphone" if kind == "input" else "loudspeaker"
    usable = [device for device in among if (device.inputs if kind == "input" else device.outputs) > 0]
    look = "'moshi-mlx-local devices' lists them"
    if not usable:
        raise DeviceError(f"this machine has no {what}: plug one in, or check the system's sound settings")
    if wanted is None:
        for device in usable:
            if device.default_input if kind == "input" else device.default_output:
                return device
        return usable[0]
    if wanted.strip().isdigit():
        for device in usable:
            if device.index == int(wanted):
                return device
        raise DeviceError(f"no {what} has the number {wanted}; {look}")
    whole = [device for device in usable if device.name.casefold() == wanted.casefold()]
    found = whole or [device for device in usable if wanted.casefold() in device.name.casefold()]
    if not found:
        raise DeviceError(f"no {what} is called {wanted!r}; {look}")
    if len(found) > 1 and not whole:
        names = ", ".join(f"{device.index}: {device.name}" for device in found)
        raise DeviceError(f"several {what}s are called {wanted!r} ({names}); name one by its number")
    return found[0]


def candidate_formats(device: Device, kind: str) -> list[tuple[float, int]]:
    """Rates and channels to try, the device's own first."""
    most = device.inputs if kind == "input" else device.outputs
    # One channel of a microphone is the first one; a loudspeaker's single channel would be the left one.
    channels = [1, min(2, most), most] if kind == "input" else [min(2, most), 1, most]
    rates = [device.rate, 48_000.0, 44_100.0, 24_000.0, 16_000.0]
    return [(rate, count) for rate in dict.fromkeys(rates) for count in dict.fromkeys(channels)]


def silence_hint(device: Device | None) -> str:
    """What to do about a microphone that gives nothing but zeros."""
    name = f"the microphone {device.name!r}" if device else "the microphone"
    if sys.platform == "darwin":
        return (
            f"{name} gives nothing but zeros: allow your terminal to use it in System Settings > Privacy & Security > "
            "Microphone, then start the terminal again"
        )
    return f"{name} gives nothing but zeros: is it muted, or the wrong one? 'moshi-mlx-local devices' lists them"


def reason(error: Exception | None) -> str:
    """PortAudio's message on one line."""
    return " ".join(str(error).split()).rstrip(".")
