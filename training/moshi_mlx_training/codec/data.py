"""Hours of labelled speech on disk, and batches of it.

A shard is two files, read through memory maps: ``<kind>-NNNN.pcm`` (int16, 24 kHz) and ``<kind>-NNNN.lab`` (one uint8
phone for each 960 samples). ``answer`` shards hold the answering voice alone, ``user`` shards every other training
speaker. What a shard says, and who says it, depends on its kind and number only, so a corpus can grow while a trainer
runs: it looks again every two minutes.

    python -m moshi_mlx_training.codec.data runs/data --minutes 60
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soxr
from numpy.typing import NDArray

from moshi_mlx_training.speech import channel, dialogues, sentences
from moshi_mlx_training.speech import recipe as recipes
from moshi_mlx_training.speech.recipe import FIRST, FLITE_SHARE, Recipe
from moshi_mlx_training.speech.synthesis import (
    ANSWERING_VOICE,
    LABEL_SAMPLES,
    LEVEL_DB,
    SAMPLE_RATE,
    TRAINING,
    SpeechUnavailable,
    say,
)

KINDS = ("answer", "user")
FRAME_SAMPLES = 2 * LABEL_SAMPLES  # 80 ms: one column of codes
SHARD_MINUTES = 10
SPEED_SHARE, SPEED = 0.5, 1.25  # share of users heard through a wide channel that are played at another speed, at most


def utterance_plan(kind: str, rng: random.Random, recipe: Recipe = FIRST) -> tuple[str, str]:
    """(voice, text) of the next sentence of a shard of this kind."""
    if kind == "answer":
        text = rng.choice(dialogues.answers()) if rng.random() < 0.35 else sentences.sentence(rng)
        return ANSWERING_VOICE, text
    if recipe.voices == "all" or recipe.wordings == "many":
        voice = recipe.speaker(rng)
        return voice, recipe.asked(rng, 0.5).text if rng.random() < 0.4 else sentences.sentence(rng)
    flite = rng.random() < FLITE_SHARE
    group = [v for v in TRAINING if v != ANSWERING_VOICE and v.startswith("flite/") == flite]
    text = dialogues.ask(dialogues.pick(rng), rng) if rng.random() < 0.4 else sentences.sentence(rng)
    return rng.choice(group), text


def make_shard(folder: Path, kind: str, number: int, minutes: float = SHARD_MINUTES, recipe: Recipe = FIRST) -> float:
    """Synthesize one shard unless it is there; returns its length in seconds. Files appear whole or not at all."""
    stem = folder / f"{kind}-{number:04d}"
    if stem.with_suffix(".pcm").exists():
        return stem.with_suffix(".pcm").stat().st_size / 2 / SAMPLE_RATE
    plan = random.Random(f"{kind} {number}")
    rng = np.random.default_rng([KINDS.index(kind), number])
    wanted = int(minutes * 60 * SAMPLE_RATE)
    pieces: list[NDArray[np.int16]] = []
    labels: list[NDArray[np.uint8]] = []
    total = 0
    while total < wanted:
        voice, text = utterance_plan(kind, plan, recipe)
        try:
            utterance = say(text, voice, rng) if kind == "answer" else recipe.say(text, voice, rng)
        except SpeechUnavailable:
            if total == 0:
                raise
            continue  # a synthesizer may refuse a strange word
        # Speech starts anywhere inside a frame, as it does on a microphone.
        lead = int(rng.integers(LABEL_SAMPLES // 2, 12 * LABEL_SAMPLES))
        tail = int(rng.integers(0, 3 * LABEL_SAMPLES))
        count = -(-(lead + len(utterance.pcm) + tail) // LABEL_SAMPLES)
        pcm = np.zeros(count * LABEL_SAMPLES, np.int16)
        pcm[lead : lead + len(utterance.pcm)] = np.round(utterance.pcm * 32767).astype(np.int16)
        pieces.append(pcm)
        labels.append(utterance.labels(count, lead / SAMPLE_RATE))
        total += len(pcm)
    for suffix, array in ((".lab", np.concatenate(labels)), (".pcm", np.concatenate(pieces))):
        temporary = stem.with_suffix(suffix + ".tmp")
        array.tofile(temporary)
        os.replace(temporary, stem.with_suffix(suffix))
    return total / SAMPLE_RATE


class Corpus:
    """The shards of one folder, as crops and batches; ``wide`` channels are all of `channel`."""

    def __init__(self, folder: Path, kinds: Sequence[str] = KINDS, wide: bool = False) -> None:
        self.folder = folder
        self.wide = wide
        self.kinds = tuple(kinds)
        self.refresh()
        missing = [kind for kind in self.kinds if not self.shards[kind]]
        if missing:
            raise FileNotFoundError(
                f"no {' or '.join(missing)} shards in {folder}: make them with "
                f"'python -m moshi_mlx_training.codec.data {folder} --minutes 60'"
            )

    def refresh(self) -> None:
        """Map the shards that are there now."""
        self.shards = {
            kind: [
                (np.memmap(path, np.int16, "r"), np.fromfile(path.with_suffix(".lab"), np.uint8))
                for path in sorted(self.folder.glob(f"{kind}-*.pcm"))
            ]
            for kind in self.kinds
        }

    def seconds(self, kind: str) -> float:
        return sum(len(pcm) for pcm, _ in self.shards[kind]) / SAMPLE_RATE

    def crop(
        self, kind: str, frames: int, rng: np.random.Generator, speed: float = 1.0
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """(pcm [frames * 1920] float32, labels [frames * 2]) from anywhere; it may begin inside a word.

        ``speed`` other than 1 plays it faster or slower, which moves pitch and formants with it: another vocal tract.
        """
        pcm, labels = self.shards[kind][int(rng.integers(len(self.shards[kind])))]
        count = 2 * frames if speed == 1 else math.ceil(2 * frames * speed) + 2
        start = int(rng.integers(len(labels) - count))
        samples = pcm[start * LABEL_SAMPLES : (start + count) * LABEL_SAMPLES].astype(np.float32) / np.float32(32768)
        if speed == 1:
            return samples, labels[start : start + count]
        samples = soxr.resample(samples, SAMPLE_RATE * speed, SAMPLE_RATE, quality="MQ")[: frames * FRAME_SAMPLES]
        middles = ((np.arange(2 * frames) + 0.5) * speed).astype(np.int64)
        return samples, labels[start + middles]

    def batch(
        self, size: int, frames: int, rng: np.random.Generator, answer_share: float = 0.5
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """What the codec hears, what it should say, and the phones.

        Returns heard and target [size, frames * 1920] float32 and labels [size, frames, 2] int64. User voices vary
        in level, and some are heard through a room, noise and a tilted microphone while the target stays dry.
        """
        heard, target, labels = [], [], []
        for index in range(size):
            kind = "answer" if (index + rng.random()) / size < answer_share else "user"
            kind = kind if kind in self.shards else self.kinds[0]
            speed = 1.0
            if kind == "user" and self.wide and rng.random() < SPEED_SHARE:
                speed = float(np.exp(rng.uniform(-1, 1) * np.log(SPEED)))
            pcm, label = self.crop(kind, frames, rng, speed)
            if kind == "answer":
                pcm = pcm * np.float32(rng.uniform(0.8, 1.1))
                heard.append(pcm)
            elif self.wide:
                pcm = pcm * np.float32(10 ** ((rng.uniform(channel.QUIETEST, channel.LOUDEST) - LEVEL_DB) / 20))
                heard.append(channel.through(pcm, rng, levels=False) if rng.random() < 0.7 else pcm)
            else:
                pcm = pcm * np.float32(10 ** (rng.uniform(-14, 5) / 20))
                heard.append(through_microphone(pcm, rng) if rng.random() < 0.45 else pcm)
            target.append(pcm)
            labels.append(label)
        return (
            np.stack(heard),
            np.stack(target),
            np.stack(labels).astype(np.int64).reshape(size, frames, 2),
        )


def through_microphone(pcm: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """pcm [samples] with a random small room, spectral tilt and background noise; same length, direct path in place."""
    size = len(pcm)
    width = 1 << (size + SAMPLE_RATE // 2 - 1).bit_length()
    spectrum = np.fft.rfft(pcm, width)
    frequency = np.linspace(0, 1, len(spectrum))
    if (
        rng.random() < 0.6
    ):  # diffuse tail: decaying noise, 0.1 to 0.5 s to fall by 60 dB, 10 to 30 dB in all below direct
        length = SAMPLE_RATE // 2
        decay = np.exp(-6.9 * np.arange(length) / (SAMPLE_RATE * rng.uniform(0.1, 0.5)))
        tail = rng.standard_normal(length) * decay
        tail *= 10 ** (rng.uniform(-25, -6) / 20) / np.sqrt(np.sum(tail**2))
        tail[: int(rng.uniform(0.002, 0.01) * SAMPLE_RATE)] = 0
        spectrum = spectrum * (1 + np.fft.rfft(tail, width))
    if rng.random() < 0.6:
        spectrum = spectrum * 10 ** (rng.uniform(-9, 5) * frequency / 20)
        spectrum = spectrum * (1 - np.exp(-frequency * 12000 / rng.uniform(20, 150)))
    out = np.fft.irfft(spectrum, width)[:size]
    if rng.random() < 0.7:
        noise = np.fft.rfft(rng.standard_normal(size))
        noise *= (np.linspace(0, 1, len(noise)) + 0.01) ** rng.uniform(-1, 0)
        background = np.fft.irfft(noise, size)
        level = 10 ** (rng.uniform(-75, -38) / 20)  # of full scale: a quiet room to a loud fan
        out = out + background * level / max(1e-9, float(np.sqrt(np.mean(background**2))))
    return np.clip(out, -1, 1).astype(np.float32)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moshi_mlx_training.codec.data", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the shards go; those already there are kept")
    parser.add_argument("--minutes", type=float, default=60, help="in all, half of it the answering voice (60)")
    recipes.add_options(parser, "wordings", "voices", "leave_out", "morphed")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    recipe = recipes.from_options(options)
    try:
        recipes.hold(options.folder, recipe)
    except ValueError as error:
        parser.error(str(error))
    began, seconds = time.monotonic(), 0.0
    for number in range(max(1, round(options.minutes / 2 / SHARD_MINUTES))):
        for kind in KINDS:
            seconds += make_shard(options.folder, kind, number, recipe=recipe)
        print(f"{seconds / 3600:.2f} h of speech after {time.monotonic() - began:.0f} s", flush=True)
    print(json.dumps({"hours": round(seconds / 3600, 3), "seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
