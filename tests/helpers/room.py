"""A room in numbers: a loudspeaker, a microphone, walls between them, and devices with clocks of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Room", "dense", "reduction", "run"]


@dataclass(frozen=True)
class Room:
    """What lies between loudspeaker and microphone.

    Attributes
    ----------
    delay : float
        Seconds of the sound's way and of latency that the devices do not report.
    reverb : float
        Seconds until the echo has fallen by 60 dB.
    gain : float
        Of the echo, relative to what is played.
    distortion : float
        0 for a perfect loudspeaker; 1 squashes peaks like a laptop's at full volume.
    noise : float
        Root mean square of the microphone's own noise.
    drift : float
        By how much the loudspeaker's clock is faster than the microphone's.
    latency : float
        Seconds that the devices hold the sound, and say so.
    jitter : float
        Seconds by which callbacks come late, at most.
    """

    delay: float = 0.05
    reverb: float = 0.2
    gain: float = 0.5
    distortion: float = 0.0
    noise: float = 3e-4
    drift: float = 0.0
    latency: float = 0.02
    jitter: float = 0.004

    def echo(self, played: np.ndarray, rate: int, seed: int = 0) -> np.ndarray:
        """What of ``played`` [samples] comes to the microphone."""
        rng = np.random.default_rng(seed)
        if self.drift:
            played = np.interp(np.arange(len(played)) * (1 + self.drift), np.arange(len(played)), played)
        if self.distortion:
            played = np.tanh(played * 3 * self.distortion) / (3 * self.distortion)
        length = round(self.reverb * rate)
        tail = rng.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
        tail *= 0.5 / np.sqrt(np.sum(tail**2))
        response = np.concatenate([np.zeros(round(self.delay * rate)), [1.0], tail])
        size = len(played) + len(response)
        heard = np.fft.irfft(np.fft.rfft(played, size) * np.fft.rfft(response, size), size)[: len(played)]
        return self.gain * heard


def run(canceller: Any, far: np.ndarray, near: np.ndarray, room: Room, rate: int = 24_000, seed: int = 0) -> np.ndarray:
    """Play ``far`` and say ``near`` (both [samples]) in ``room``, block by block as callbacks come.

    Returns
    -------
    array [samples]
        What the canceller leaves, as late as it is.
    """
    rng = np.random.default_rng(seed)
    heard = near + room.echo(far, rate, seed) + room.noise * rng.standard_normal(len(near))
    leave, entry = 441, 384  # blocks of the two devices
    # The loudspeaker asks before it plays, the microphone comes after it heard.
    events = [(start / rate / (1 + room.drift) - room.latency, 0, start) for start in range(0, len(far), leave)]
    events += [((start + entry) / rate + room.latency / 2, 1, start) for start in range(0, len(near), entry)]
    out = []
    for at, kind, start in sorted(events):
        shake = rng.uniform(0, room.jitter)
        if kind == 0:
            canceller.played(far[start : start + leave].astype(np.float32), at + room.latency + shake)
        else:
            block = heard[start : start + entry].astype(np.float32)
            out.append(canceller.cancel(block, at - room.latency / 2 - len(block) / rate + shake))
    return np.concatenate(out)


def reduction(left: np.ndarray, echo: np.ndarray) -> float:
    """By how much the echo was reduced, in decibels."""
    count = min(len(left), len(echo))
    return float(10 * np.log10(np.sum(np.square(echo[:count])) / np.sum(np.square(left[:count]))))


def dense(speech: np.ndarray, rate: int = 24_000) -> np.ndarray:
    """Speech without its pauses: what is measured should be heard all the time."""
    block = rate // 20
    blocks = speech[: len(speech) // block * block].reshape(-1, block)
    level = np.sqrt(np.mean(np.square(blocks), 1))
    return blocks[level > 0.05 * level.max()].reshape(-1)
