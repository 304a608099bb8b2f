"""Rooms, microphones, noise, telephones and levels: what they do to sound, and what they leave as it was."""

from __future__ import annotations

import numpy as np
import pytest
from moshi_mlx_training.speech import channel
from moshi_mlx_training.speech.channel import SAMPLE_RATE, Pcm

STEPS = (channel.room, channel.microphone, channel.noise, channel.telephone, channel.level, channel.through)


def voice(seconds: float = 1.5) -> Pcm:
    """Something like whispered speech: noise with little above 3 kHz, in bursts, between two silences."""
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    hiss = np.fft.rfft(np.random.default_rng(99).standard_normal(len(time)))
    hiss /= 1 + (np.linspace(0, 12, len(hiss)) / 3) ** 4
    bursts = np.maximum(0, np.sin(2 * np.pi * 3 * time)) * ((time > 0.2) & (time < seconds - 0.3))
    return (0.1 * np.fft.irfft(hiss, len(time)) * bursts).astype(np.float32)


def lag(one: Pcm, other: Pcm) -> int:
    """By how many samples ``other`` comes after ``one``."""
    size = 2 * len(one)
    found = int(np.argmax(np.fft.irfft(np.fft.rfft(other, size) * np.conj(np.fft.rfft(one, size)))))
    return found - size if found > len(one) else found


@pytest.mark.parametrize("step", STEPS)
def test_sound_keeps_its_place_and_repeats(step) -> None:  # type: ignore[no-untyped-def]
    """If this fails, labels and word times no longer belong to the sound, or a data set cannot be made again."""
    pcm = voice()
    kept = pcm.copy()
    for seed in range(12):
        out = step(pcm, np.random.default_rng(seed))
        assert out.dtype == np.float32 and out.shape == pcm.shape and np.isfinite(out).all()
        assert np.array_equal(out, step(pcm, np.random.default_rng(seed)))
        # An echo can be louder than the direct sound once a microphone has coloured both.
        assert abs(lag(pcm, out)) <= (0.015 if step is channel.through else 0.004) * SAMPLE_RATE
    assert np.array_equal(pcm, kept)
    quiet = step(np.zeros(9600, np.float32), np.random.default_rng(0))
    assert np.isfinite(quiet).all() and np.abs(quiet).max() <= 1


def test_rooms_differ_and_the_direct_sound_is_first() -> None:
    """If this fails, users are heard in one room, or before they speak."""
    responses = [channel.room_response(np.random.default_rng(seed)) for seed in range(40)]
    direct = np.array([response[0] for response in responses])
    late = np.array([float(np.sum(response[1:] ** 2)) for response in responses])
    assert (direct == 1).all()
    assert late.min() < 0.1 and 0.5 < np.median(late) < 8 and late.max() > 2
    assert len({len(response) for response in responses}) > 20
    assert all(np.sum(r[-len(r) // 4 :] ** 2) < 0.05 * np.sum(r[1:] ** 2) for r in responses)  # they fade


def test_microphones_differ_and_keep_the_middle() -> None:
    """If this fails, all microphones sound alike, or some take the voice away."""
    frequencies = np.array([60.0, 1000.0, 3000.0, 8000.0])
    gains = np.stack([channel.microphone_response(frequencies, np.random.default_rng(seed)) for seed in range(60)])
    assert np.allclose(gains[:, 1], 1)
    decibels = 20 * np.log10(gains)
    assert (decibels.std(0)[[0, 2, 3]] > 2).all() and np.abs(decibels[:, 2]).max() < 25


def test_noise_has_the_level_that_was_drawn() -> None:
    """If this fails, noise drowns the speech, or is never there."""
    pcm = voice()
    ratios = []
    for seed in range(60):
        added = channel.noise(pcm, np.random.default_rng(seed)) - pcm
        ratios.append(10 * np.log10(np.mean(pcm**2) / np.mean(added**2)))
    assert min(ratios) > 4.5 and max(ratios) < 45.5 and np.ptp(ratios) > 25
    kinds = {
        round(float(np.abs(np.fft.rfft(channel.background(24000, np.random.default_rng(s))))[:200].sum()))
        for s in range(20)
    }
    assert len(kinds) > 10


def test_telephones_are_narrow() -> None:
    """If this fails, a telephone is as good as a microphone."""
    rng = np.random.default_rng(0)
    hiss = (0.1 * rng.standard_normal(SAMPLE_RATE)).astype(np.float32)

    def above(pcm: Pcm, hertz: float) -> float:
        power = np.abs(np.fft.rfft(pcm)) ** 2
        return float(power[np.fft.rfftfreq(len(pcm), 1 / SAMPLE_RATE) > hertz].sum() / power.sum())

    shares = [above(channel.telephone(hiss, np.random.default_rng(seed)), 4400) for seed in range(40)]
    assert above(hiss, 4400) > 0.5 and sum(share < 0.01 for share in shares) > 15
    assert max(shares) > 0.2  # calls over networks have more


def test_levels_are_those_of_people() -> None:
    """If this fails, quiet speakers and clipped ones are never heard in training."""
    made = [channel.level(voice(), np.random.default_rng(seed)) for seed in range(200)]
    loud = np.array([10 * np.log10(np.mean(pcm**2)) for pcm in made])
    assert loud.min() < -42 and loud.max() > -17
    assert all(np.abs(pcm).max() <= 1 for pcm in made)
    flat = [float(np.mean(np.abs(pcm) > 0.99 * np.abs(pcm).max())) for pcm in made]
    assert 2 <= sum(share > 0.01 for share in flat) <= 40
    before = 10 * np.log10(np.mean(voice() ** 2))
    same = [channel.through(voice(), np.random.default_rng(seed), levels=False) for seed in range(40)]
    assert max(abs(10 * np.log10(np.mean(pcm**2)) - before) for pcm in same) < 3
