"""Other people out of the same voice: the vocoder WORLD takes speech apart, and puts it together otherwise.

A voice is split into its pitch, the envelope of its spectrum and how much of it is noise, every 5 ms (Morise, Yokomori,
Ozawa 2016; the package ``pyworld``). What is changed stays the same over one utterance but for jitter, and phones and
words keep their places in the sound.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_mlx_training.speech.synthesis import LEVEL_DB, SAMPLE_RATE, SpeechUnavailable, Utterance

FRAME_MS = 5.0


@dataclass(frozen=True)
class Morph:
    """How a voice is changed; the defaults change nothing.

    Attributes
    ----------
    pitch : factor on the pitch
    intonation : factor on how far the pitch moves around its middle, in octaves; 0 is a monotone
    formants : factor on all frequencies of the envelope: a shorter vocal tract is above 1
    bend : the same for high frequencies alone, above 1 kHz more and more
    breath : 0 to 1, how much of what is voiced becomes noise
    jitter : standard deviation of the pitch from frame to frame, in octaves
    tilt : decibels an octave above 500 Hz
    tempo : factors on the speed, evenly over the utterance, with what lies between them in straight lines
    stressed : index of a word that is said higher, louder and slower; -1 is none
    """

    pitch: float = 1.0
    intonation: float = 1.0
    formants: float = 1.0
    bend: float = 1.0
    breath: float = 0.0
    jitter: float = 0.0
    tilt: float = 0.0
    tempo: tuple[float, ...] = (1.0,)
    stressed: int = -1


def draw(rng: np.random.Generator, words: int = 0) -> Morph:
    """Somebody else: a morph within what people's voices do, of an utterance of so many words."""
    size = rng.uniform(-1, 1)  # small people have short vocal tracts and high voices
    return Morph(
        pitch=float(2 ** (0.35 * size + rng.normal(0, 0.2))),
        intonation=float(rng.uniform(0.4, 1.9)),
        formants=float(1.1**size * rng.uniform(0.95, 1.05)),
        bend=float(rng.uniform(0.94, 1.06)),
        breath=float(rng.choice((0.0, rng.uniform(0.05, 0.6)))),
        jitter=float(rng.uniform(0.0, 0.025)),
        tilt=float(rng.uniform(-3.0, 2.0)),
        tempo=tuple(float(x) for x in rng.uniform(0.85, 1.2) * rng.uniform(0.75, 1.3, int(rng.integers(3, 7)))),
        stressed=int(rng.integers(words)) if words and rng.random() < 0.3 else -1,
    )


def places(tempo: tuple[float, ...], frames: int, stress: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """When each of ``frames`` frames and the end behind them come at this tempo, in frames: [frames + 1], from 0.

    Where ``stress`` [frames] is 1, a quarter slower.
    """
    speed = np.interp(np.linspace(0, 1, frames), np.linspace(0, 1, len(tempo)), tempo)
    if stress is not None:
        speed = speed * 0.8**stress
    return np.concatenate([[0.0], np.cumsum(1 / speed)])


def stress_of(utterance: Utterance, word: int, frames: int) -> NDArray[np.float64]:
    """[frames]: how much each frame is stressed when this word is, rising to 1 inside it and falling again."""
    out = np.zeros(frames)
    if 0 <= word < len(utterance.words):
        starts = [start for _, start in utterance.words] + [len(utterance.pcm) / SAMPLE_RATE]
        begin, end = (round(seconds * 1000 / FRAME_MS) for seconds in starts[word : word + 2])
        out[begin:end] = np.sin(np.linspace(0, np.pi, end - begin))[: frames - begin]
    return out


def world() -> Any:
    """The vocoder's package.

    Raises
    ------
    SpeechUnavailable : it is not installed
    """
    # pyworld 0.3.5 asks pkg_resources for its own version, which newer setuptools do not have: it is lent another.
    lent = types.SimpleNamespace(get_distribution=importlib.metadata.distribution)
    missing = importlib.util.find_spec("pkg_resources") is None
    if missing:
        sys.modules["pkg_resources"] = lent  # type: ignore[assignment]
    try:
        import pyworld
    except ImportError:
        raise SpeechUnavailable("morphing voices needs pyworld: pip install pyworld (and a C++ compiler)") from None
    finally:
        if missing:
            del sys.modules["pkg_resources"]
    return pyworld


def morphed(utterance: Utterance, morph: Morph, rng: np.random.Generator) -> Utterance:
    """The utterance in the voice that ``morph`` makes of it, with its times moved along.

    Raises
    ------
    SpeechUnavailable : pyworld is not installed
    """
    pyworld = world()
    pcm = utterance.pcm.astype(np.float64)
    rough, times = pyworld.dio(pcm, SAMPLE_RATE, frame_period=FRAME_MS)
    pitch = pyworld.stonemask(pcm, rough, times, SAMPLE_RATE)
    envelope = pyworld.cheaptrick(pcm, pitch, times, SAMPLE_RATE)
    noisy = pyworld.d4c(pcm, pitch, times, SAMPLE_RATE)
    frames = len(pitch)
    stress = stress_of(utterance, morph.stressed, frames)
    moved = places(morph.tempo, frames, stress)
    # Frames of the result, and where in the original they come from.
    sources = np.interp(np.arange(int(moved[-1])), moved, np.arange(frames + 1))
    nearest = np.minimum(np.round(sources).astype(int), frames - 1)
    pitch, envelope, noisy, stress = pitch[nearest], envelope[nearest], noisy[nearest], stress[nearest]
    voiced = pitch > 0
    if voiced.any():
        octaves = np.log2(pitch[voiced])
        middle = np.median(octaves)
        octaves = middle + np.log2(morph.pitch) + morph.intonation * (octaves - middle)
        octaves += morph.jitter * rng.standard_normal(len(octaves)) + 0.3 * stress[voiced]
        pitch[voiced] = np.clip(2**octaves, 60, 500)
    bins = envelope.shape[1]
    hertz = np.linspace(0, SAMPLE_RATE / 2, bins)
    high = np.clip((hertz - 1000) / 4000, 0, 1)
    asked = np.minimum(hertz / morph.formants / (1 + (morph.bend - 1) * high), SAMPLE_RATE / 2) / hertz[1]
    below = np.minimum(asked.astype(int), bins - 2)
    part = np.clip(asked - below, 0, 1)
    logs = np.log(envelope + 1e-16)
    logs = logs[:, below] * (1 - part) + logs[:, below + 1] * part
    logs += morph.tilt * np.log2(np.maximum(hertz, 500) / 500) * (np.log(10) / 10)
    logs += stress[:, None] * np.log(2)  # 3 dB
    noisy = np.clip(noisy + morph.breath * high * (1 - noisy), 0, 1)
    parts = (np.ascontiguousarray(part) for part in (pitch, np.exp(logs), noisy))
    out = pyworld.synthesize(*parts, SAMPLE_RATE, FRAME_MS)
    out *= 10 ** (LEVEL_DB / 20) / max(1e-4, float(np.sqrt(np.mean(out**2))))
    known = np.arange(frames + 1) * FRAME_MS / 1000

    def when(seconds: float) -> float:
        return float(np.interp(seconds, known, moved * FRAME_MS / 1000))

    return Utterance(
        np.clip(out, -1, 1).astype(np.float32),
        tuple((name, when(end)) for name, end in utterance.phones),
        tuple((word, when(start)) for word, start in utterance.words),
    )


def paused(utterance: Utterance, word: int, seconds: float) -> Utterance:
    """The utterance with silence of so many seconds before a word, and its times moved along."""
    start = utterance.words[word][1]
    at, length = int(start * SAMPLE_RATE), round(seconds * SAMPLE_RATE)
    before, after = utterance.pcm[:at].copy(), utterance.pcm[at:].copy()
    fade = np.linspace(0, 1, min(120, at, len(after)), dtype=np.float32)  # 5 ms
    before[at - len(fade) :] *= fade[::-1]
    after[: len(fade)] *= fade
    phones: list[tuple[str, float]] = []
    begun = 0.0
    for name, end in utterance.phones:
        if begun < start < end and name != "pau":  # cut in two
            phones.append((name, start))
        if begun <= start < end:
            phones.append(("pau", start + seconds))
        phones.append((name, end + seconds if end > start else end))
        begun = end
    words = tuple(
        (name, begin + seconds if index >= word else begin) for index, (name, begin) in enumerate(utterance.words)
    )
    return Utterance(np.concatenate([before, np.zeros(length, np.float32), after]), tuple(phones), words)
