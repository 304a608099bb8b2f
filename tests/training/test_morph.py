"""Other people out of the same voice: what changes, and that times stay where the sound is."""

from __future__ import annotations

import numpy as np
import pytest
from moshi_mlx_training.speech import morph
from moshi_mlx_training.speech.morph import Morph, draw, morphed, paused, places, stress_of
from moshi_mlx_training.speech.synthesis import SAMPLE_RATE, Utterance


def vowels(hertz: float = 120.0) -> Utterance:
    """Three seconds of a buzz through two resonances, with a pause in the middle: "aa", silence, "aa"."""
    rng = np.random.default_rng(0)
    pulses = np.zeros(3 * SAMPLE_RATE)
    pulses[np.arange(0, len(pulses), SAMPLE_RATE / hertz).astype(int)] = 1
    frequencies = np.fft.rfftfreq(len(pulses), 1 / SAMPLE_RATE)
    shape = sum(1 / (1 + ((frequencies - f) / 120) ** 2) for f in (700.0, 1800.0)) + 0.01
    pcm = np.fft.irfft(np.fft.rfft(pulses) * shape)
    pcm[SAMPLE_RATE : 2 * SAMPLE_RATE] = 0
    pcm = 0.1 * pcm / np.sqrt(np.mean(pcm**2)) + 1e-4 * rng.standard_normal(len(pcm))
    return Utterance(pcm.astype(np.float32), (("aa", 1.0), ("pau", 2.0), ("aa", 3.0)), (("one", 0.0), ("two", 2.0)))


def test_time_runs_as_the_tempo_says() -> None:
    """If this fails, phone labels lie beside the sounds after speech was made faster or slower."""
    assert places((1.0,), 4).tolist() == [0, 1, 2, 3, 4]
    assert places((0.5,), 4).tolist() == [0, 2, 4, 6, 8]
    uneven = places((2.0, 0.5), 100)
    assert (np.diff(uneven) > 0).all() and uneven[50] < uneven[100] - uneven[50]
    assert np.allclose(places((1.0,), 4, np.array([0, 1.0, 1.0, 0])), [0, 1, 2.25, 3.5, 4.5])


def test_one_word_is_stressed() -> None:
    """If this fails, emphasis falls on what is not said, or on everything."""
    stress = stress_of(vowels(), 1, 600)
    assert not stress[:400].any() and stress[400:].max() > 0.99
    assert not stress_of(vowels(), -1, 600).any() and not stress_of(vowels(), 2, 600).any()


def test_a_pause_moves_what_comes_after() -> None:
    """If this fails, what follows a pause is labelled as if it had not been there."""
    before = vowels()
    after = paused(before, 1, 0.75)
    assert len(after.pcm) == len(before.pcm) + 0.75 * SAMPLE_RATE
    assert after.words == (("one", 0.0), ("two", 2.75))
    assert after.phones == (("aa", 1.0), ("pau", 2.0), ("pau", 2.75), ("aa", 3.75))
    assert not after.pcm[2 * SAMPLE_RATE : int(2.75 * SAMPLE_RATE)].any()
    assert np.array_equal(after.pcm[-SAMPLE_RATE // 2 :], before.pcm[-SAMPLE_RATE // 2 :])
    inside = paused(Utterance(before.pcm, (("aa", 3.0),), (("one", 0.0), ("two", 2.5))), 1, 0.5)
    assert inside.phones == (("aa", 2.5), ("pau", 3.0), ("aa", 3.5))


def test_people_differ() -> None:
    """If this fails, the morphs are all the same person, or no person."""
    drawn = [draw(np.random.default_rng(seed), 5) for seed in range(300)]
    pitches, formants = np.array([m.pitch for m in drawn]), np.array([m.formants for m in drawn])
    assert 0.45 < pitches.min() < 0.75 and 1.4 < pitches.max() < 2.2
    assert 0.84 < formants.min() < 0.92 and 1.08 < formants.max() < 1.16
    assert np.corrcoef(pitches, formants)[0, 1] > 0.4
    assert {m.stressed for m in drawn} == {-1, 0, 1, 2, 3, 4}
    assert 30 < sum(m.breath > 0 for m in drawn) < 270
    assert draw(np.random.default_rng(7)) == draw(np.random.default_rng(7))


@pytest.fixture
def world() -> object:
    try:
        return morph.world()
    except morph.SpeechUnavailable as reason:
        pytest.skip(f"{reason}, of the 'train' extra")


def pitch_of(utterance: Utterance, world) -> np.ndarray:  # type: ignore[no-untyped-def]
    pcm = utterance.pcm.astype(np.float64)
    rough, times = world.dio(pcm, SAMPLE_RATE)
    return world.stonemask(pcm, rough, times, SAMPLE_RATE)


def test_morphs_do_what_they_are_called(world) -> None:  # type: ignore[no-untyped-def]
    """If this fails, a morph changes something else than it says, or phones leave their places."""
    before, rng = vowels(), np.random.default_rng(0)

    def center(utterance: Utterance) -> float:
        power = np.abs(np.fft.rfft(utterance.pcm)) ** 2
        return float((power * np.fft.rfftfreq(len(utterance.pcm), 1 / SAMPLE_RATE)).sum() / power.sum())

    def middle(utterance: Utterance) -> float:
        pitch = pitch_of(utterance, world)
        return float(np.median(pitch[pitch > 0]))

    plain = morphed(before, Morph(), rng)
    assert abs(middle(plain) - 120) < 2 and plain.phones == before.phones
    assert middle(morphed(before, Morph(pitch=1.5), rng)) == pytest.approx(180, abs=4)
    assert center(morphed(before, Morph(formants=1.15), rng)) > 1.08 * center(plain)
    assert center(morphed(before, Morph(tilt=-6), rng)) < 0.9 * center(plain)
    slow = morphed(before, Morph(tempo=(0.5,)), rng)
    assert len(slow.pcm) == pytest.approx(2 * len(plain.pcm), rel=0.01)
    assert [end for _, end in slow.phones] == pytest.approx([2.0, 4.0, 6.0], abs=0.02)
    for utterance in (plain, slow, morphed(before, draw(np.random.default_rng(3)), rng)):
        gap = utterance.pcm[
            int((utterance.phones[0][1] + 0.08) * SAMPLE_RATE) : int((utterance.phones[1][1] - 0.08) * SAMPLE_RATE)
        ]
        assert np.abs(gap).max() < 0.02 < np.abs(utterance.pcm).max()  # silence is where its label says
    shaky = pitch_of(morphed(before, Morph(jitter=0.05), rng), world)
    steady = pitch_of(plain, world)
    moves = [float(np.median(np.abs(np.diff(np.log2(pitch[pitch > 0]))))) for pitch in (shaky, steady)]
    assert moves[0] > 5 * moves[1]


class Vocoder:
    """Stands for pyworld: a voice at 120 Hz with one resonance at 2 kHz in its first half, and silence after it."""

    BINS = 513

    def dio(self, pcm: np.ndarray, rate: int, frame_period: float) -> tuple[np.ndarray, np.ndarray]:
        frames = round(len(pcm) / rate * 1000 / frame_period) + 1
        self.time = np.arange(frames) * frame_period / 1000
        return np.where(self.time < 1.5, 120.0 * 2 ** (0.2 * np.sin(8 * self.time)), 0.0), self.time

    def stonemask(self, pcm: np.ndarray, pitch: np.ndarray, times: np.ndarray, rate: int) -> np.ndarray:
        return pitch

    def cheaptrick(self, pcm: np.ndarray, pitch: np.ndarray, times: np.ndarray, rate: int) -> np.ndarray:
        hertz = np.linspace(0, rate / 2, self.BINS)
        return np.tile(np.exp(-(((hertz - 2000) / 200) ** 2)) + 1e-6, (len(pitch), 1))

    def d4c(self, pcm: np.ndarray, pitch: np.ndarray, times: np.ndarray, rate: int) -> np.ndarray:
        return np.full((len(pitch), self.BINS), 0.1)

    def synthesize(
        self, pitch: np.ndarray, envelope: np.ndarray, noisy: np.ndarray, rate: int, period: float
    ) -> np.ndarray:
        assert len(pitch) == len(envelope) == len(noisy) and all(a.flags.c_contiguous for a in (pitch, envelope, noisy))
        self.pitch, self.envelope, self.noisy = pitch, envelope, noisy
        return 0.1 * np.random.default_rng(0).standard_normal(int(len(pitch) * period * rate / 1000))


def test_each_number_of_a_morph_changes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, what the vocoder is told is not what the morph says."""
    vocoder = Vocoder()
    monkeypatch.setattr(morph, "world", lambda: vocoder)

    def made(**changes) -> tuple[np.ndarray, np.ndarray, np.ndarray, Utterance]:  # type: ignore[no-untyped-def]
        out = morphed(vowels(), Morph(**changes), np.random.default_rng(1))
        return vocoder.pitch, vocoder.envelope, vocoder.noisy, out

    pitch, envelope, _, plain = made()
    peak = int(envelope[0].argmax())
    assert plain.phones == vowels().phones and plain.words == vowels().words
    voiced = pitch > 0
    assert np.allclose(made(pitch=1.5)[0][voiced], 1.5 * pitch[voiced])
    assert np.allclose(np.ptp(np.log2(made(intonation=0.5)[0][voiced])), 0.5 * np.ptp(np.log2(pitch[voiced])))
    assert np.ptp(made(intonation=0)[0][voiced]) < 1e-6
    assert 0.02 < np.std(np.log2(made(jitter=0.03)[0][voiced] / pitch[voiced])) < 0.04
    assert not made(jitter=0.03)[0][~voiced].any()
    assert made(formants=1.2)[1][0].argmax() == pytest.approx(1.2 * peak, abs=1)
    assert made(bend=1.2)[1][0].argmax() > peak + 2
    tilted = made(tilt=-6)[1][0] / envelope[0]
    assert np.allclose(10 * np.log10(tilted[[10, 85, 170]]), [0, -12, -18], atol=0.3)  # below 500 Hz, at 2 and 4 kHz
    breathy = made(breath=0.5)[2]
    assert np.allclose(breathy[:, :20], 0.1) and np.allclose(breathy[:, -1], 0.55)
    slow, fast = made(tempo=(0.5,)), made(tempo=(2.0,))
    assert len(slow[0]) == pytest.approx(4 * len(fast[0]), rel=0.01)
    assert [end for _, end in slow[3].phones] == pytest.approx([2.0, 4.0, 6.0], abs=0.01)
    assert [start for _, start in fast[3].words] == pytest.approx([0.0, 1.0], abs=0.01)
    stressed = made(stressed=0)
    assert len(stressed[0]) > len(pitch) and 1.1 < stressed[0].max() / pitch.max() < 1.25
    assert stressed[1].max() == pytest.approx(2 * envelope.max(), rel=0.02)


def test_morphing_needs_its_vocoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a machine without pyworld gets a traceback instead of the way to install it."""
    monkeypatch.setitem(__import__("sys").modules, "pyworld", None)
    with pytest.raises(morph.SpeechUnavailable, match="pip install pyworld"):
        morphed(vowels(), Morph(), np.random.default_rng(0))
