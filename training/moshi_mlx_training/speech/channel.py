"""What lies between a mouth and the codec: rooms, microphones, noise, telephones, levels.

Every function takes and returns pcm [samples], float32, 24 kHz, of the same length, with the direct sound where it was;
everything that is drawn comes from the generator passed in. ``through`` puts them one after the other.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moshi_mlx_training.speech.synthesis import SAMPLE_RATE, resample

Pcm = NDArray[np.float32]

SPEED_OF_SOUND = 343.0
# container, coding, sampling rate, compression: what telephones and calls over networks use, by libsndfile
CODECS = (
    ("WAV", "GSM610", 8000, None),
    ("WAV", "ULAW", 8000, None),
    ("WAV", "ALAW", 8000, None),
    ("AU", "G721_32", 8000, None),
    ("AU", "G723_24", 8000, None),
    ("OGG", "OPUS", 8000, 1.0),
    ("OGG", "OPUS", 16000, 1.0),
    ("OGG", "OPUS", 24000, 1.0),
    ("OGG", "VORBIS", 24000, 1.0),
)
ROOM, MICROPHONE, NOISE, TELEPHONE = 0.5, 0.6, 0.6, 0.15  # shares of what goes through each
QUIETEST, LOUDEST = -45.0, -14.0  # root mean square of speech, dB below full scale


def _rms(pcm: NDArray[np.floating]) -> float:
    return max(1e-6, float(np.sqrt(np.mean(np.square(pcm, dtype=np.float64)))))


def _filtered(pcm: Pcm, response: NDArray[np.complexfloating] | NDArray[np.floating], width: int) -> Pcm:
    return np.fft.irfft(np.fft.rfft(pcm, width) * response, width)[: len(pcm)].astype(np.float32)


def _width(samples: int, more: int = SAMPLE_RATE // 10) -> int:
    return 1 << (samples + more - 1).bit_length()


def room_response(rng: np.random.Generator) -> NDArray[np.float64]:
    """Impulse response [samples] of a box with random walls, speaker and microphone; the direct sound is 1 at 0.

    Echoes up to the third wall are those of mirror images (Allen and Berkley, 1979); what comes later is decaying noise
    that falls by 60 dB in the time that Eyring's formula gives.
    """
    size = rng.uniform((2.2, 2.2, 2.2), (9.0, 7.0, 3.2))
    absorbed = float(rng.uniform(0.1, 0.6))
    speaker = rng.uniform(0.1, 0.9, 3) * size
    microphone = np.clip(speaker + rng.normal(0, rng.uniform(0.1, 1.2), 3), 0.1, size - 0.1)
    direct = max(0.05, float(np.linalg.norm(microphone - speaker)))
    order = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 3, indexing="ij"), -1).reshape(-1, 3)
    order = order[np.abs(order).sum(1) <= 3]
    images = np.where(order % 2 == 0, order * size + speaker, (order + 1) * size - speaker)
    distances = np.maximum(direct, np.linalg.norm(images - microphone, axis=1))
    walls = np.abs(order).sum(1)
    gains = direct / distances * (1 - absorbed) ** (walls / 2)
    volume, surface = float(np.prod(size)), 2 * float(size[0] * size[1] + size[1] * size[2] + size[0] * size[2])
    falls = float(np.clip(0.161 * volume / (-surface * np.log(1 - absorbed)), 0.08, 0.9))
    response = np.zeros(int(min(falls, 0.6) * SAMPLE_RATE) + 1)
    delays = np.round((distances - direct) / SPEED_OF_SOUND * SAMPLE_RATE).astype(int)
    keep = delays < len(response)
    np.add.at(response, delays[keep], gains[keep])
    # Energy of a diffuse tail over that of the direct sound, by the room's constant.
    constant = surface * absorbed / (1 - absorbed)
    energy = min(4.0, 16 * np.pi * direct**2 / constant)
    tail = rng.standard_normal(len(response)) * np.exp(-6.9 * np.arange(len(response)) / (falls * SAMPLE_RATE))
    tail = np.convolve(tail, [0.25, 0.5, 0.25], mode="same")  # air and walls swallow high tones first
    tail[: int(3 * size.min() / SPEED_OF_SOUND * SAMPLE_RATE)] = 0  # there the images are
    response += tail * np.sqrt(energy / max(1e-9, float(np.sum(tail**2)))) * 0.5
    response[0] = 1
    return response


def room(pcm: Pcm, rng: np.random.Generator) -> Pcm:
    """pcm as heard some way off in a room, as loud as before."""
    response = room_response(rng)
    width = _width(len(pcm), len(response))
    out = _filtered(pcm, np.fft.rfft(response, width), width)
    return out * np.float32(_rms(pcm) / _rms(out))


def microphone_response(frequencies: NDArray[np.floating], rng: np.random.Generator) -> NDArray[np.float64]:
    """Gain at each frequency [n] in Hz: low and high end, tilt, two broad bumps or dips; 1 at 1 kHz."""
    at = np.append(np.maximum(frequencies, 1.0), 1000.0)
    low, high = np.exp(rng.uniform(np.log((20, 4000)), np.log((300, 12000))))
    gain = 1 / np.sqrt(1 + (low / at) ** 4) / np.sqrt(1 + (at / high) ** 6)
    octaves = np.log2(at / 1000)
    decibels = rng.uniform(-2.5, 1.5) * octaves
    for _ in range(2):
        center, width = rng.uniform(-2.5, 3.0), rng.uniform(0.3, 1.2)
        decibels += rng.uniform(-7, 7) * np.exp(-(((octaves - center) / width) ** 2))
    gain *= 10 ** (decibels / 20)
    return gain[:-1] / gain[-1]


def microphone(pcm: Pcm, rng: np.random.Generator) -> Pcm:
    """pcm through a microphone that is not flat, as loud as before."""
    width = _width(len(pcm))
    out = _filtered(pcm, microphone_response(np.fft.rfftfreq(width, 1 / SAMPLE_RATE), rng), width)
    return out * np.float32(_rms(pcm) / _rms(out))


def background(samples: int, rng: np.random.Generator, like: Pcm | None = None) -> Pcm:
    """Noise [samples], root mean square 1: steady, the hum of the mains, knocks, or shaped like the speech ``like``."""
    kind = rng.choice(("steady", "hum", "knocks", "speech"))
    if kind == "hum":
        time, base = np.arange(samples) / SAMPLE_RATE, rng.choice((50.0, 60.0))
        noise = sum(
            rng.random() / n * np.sin(2 * np.pi * (base * n * time + rng.random())) for n in (1, 2, 3, 4, 6, 8, 12)
        )
    elif kind == "knocks":
        noise = np.zeros(samples)
        for _ in range(1 + samples // SAMPLE_RATE * int(rng.integers(1, 6))):
            length = int(rng.uniform(0.01, 0.12) * SAMPLE_RATE)
            at = int(rng.integers(max(1, samples - length)))
            burst = rng.standard_normal(length) * np.exp(-5 * np.arange(length) / length) * rng.uniform(0.2, 1)
            noise[at : at + length] += burst[: samples - at]
    else:
        spectrum = np.fft.rfft(rng.standard_normal(samples))
        if kind == "speech" and like is not None and _rms(like) > 1e-5:
            wanted = np.abs(np.fft.rfft(like, samples))
            smooth = np.convolve(np.pad(wanted, 100, mode="edge"), np.full(201, 1 / 201), mode="valid")
            spectrum *= smooth[: len(spectrum)]
        else:
            spectrum *= (np.linspace(0, 1, len(spectrum)) + 0.01) ** rng.uniform(-1.2, 0)
        noise = np.fft.irfft(spectrum, samples)
        if rng.random() < 0.3:  # it comes and goes
            points = samples // 6000 + 2  # four a second
            slow = np.interp(np.arange(samples), np.linspace(0, samples, points), rng.uniform(0.1, 1, points))
            noise *= slow
    return (noise / _rms(np.asarray(noise))).astype(np.float32)


def noise(pcm: Pcm, rng: np.random.Generator) -> Pcm:
    """pcm with a background that is 5 to 45 dB quieter."""
    loud = _rms(pcm) * 10 ** (-rng.uniform(5, 45) / 20)
    return pcm + np.float32(loud) * background(len(pcm), rng, pcm)


def telephone(pcm: Pcm, rng: np.random.Generator) -> Pcm:
    """pcm through the codec of a telephone or of a call over a network."""
    import soundfile

    container, coding, rate, compression = CODECS[int(rng.integers(len(CODECS)))]
    peak = max(1e-4, float(np.abs(pcm).max())) / 0.7
    narrow = resample(pcm / np.float32(peak), SAMPLE_RATE, rate)
    file = io.BytesIO()
    more = {} if compression is None else {"compression_level": compression}
    soundfile.write(file, narrow, rate, format=container, subtype=coding, **more)
    file.seek(0)
    wide = resample(soundfile.read(file, dtype="float32")[0], rate, SAMPLE_RATE) * np.float32(peak)
    return np.pad(wide, (0, max(0, len(pcm) - len(wide))))[: len(pcm)]


def level(pcm: Pcm, rng: np.random.Generator) -> Pcm:
    """pcm as loud as people are at a microphone, sometimes evened out by its automatic gain, sometimes clipped."""
    out = pcm * np.float32(10 ** (rng.uniform(QUIETEST, LOUDEST) / 20) / _rms(pcm))
    if rng.random() < 0.2:
        frame = SAMPLE_RATE // 20
        loud = np.sqrt(np.mean(np.square(np.pad(out, (0, -len(out) % frame))).reshape(-1, frame), axis=1))
        # Up within a second, down within 50 ms, as recorders do.
        followed, now = np.empty(len(loud)), max(1e-4, float(loud[0]))
        for index, value in enumerate(loud):
            now = max(float(value), 0.95 * now)
            followed[index] = now
        gain = np.clip(0.1 / np.maximum(followed, 1e-4), 0.25, 6.0)
        out = out * np.interp(np.arange(len(out)), np.arange(len(gain)) * frame, gain).astype(np.float32)
    if rng.random() < 0.05:
        ceiling = float(np.abs(out).max()) * rng.uniform(0.3, 0.8)
        out = np.clip(out, -ceiling, ceiling)
    return np.clip(out, -1, 1).astype(np.float32)


def through(pcm: Pcm, rng: np.random.Generator, levels: bool = True) -> Pcm:
    """pcm as somebody's microphone or telephone gives it; as loud as it was unless ``levels``."""
    steps: tuple[tuple[Callable[[Pcm, np.random.Generator], Pcm], float], ...] = (
        (room, ROOM), (noise, NOISE), (microphone, MICROPHONE), (level, float(levels)), (telephone, TELEPHONE),
    )  # fmt: skip
    for step, share in steps:
        if rng.random() < share:
            pcm = step(pcm, rng)
    return np.clip(pcm, -1, 1).astype(np.float32)
