"""A recogniser beside something else: the words of each speaker, and nobody who waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from moshi_mlx.engine.text import Word
from moshi_mlx.errors import CodecError
from moshi_mlx.realtime import Captions
from moshi_mlx.realtime import captions as module
from moshi_mlx.tasks.transcribe import Heard, SpeechToText
from tests.helpers.tiny import tiny_model

SECONDS = 60.0


@pytest.fixture
def model() -> SpeechToText:
    made = tiny_model(stt={"audio_delay_seconds": 0.04})
    assert isinstance(made, SpeechToText)
    return made


class Told:
    def __init__(self) -> None:
        self.heard: list[Heard | Exception] = []

    def __call__(self, heard: Heard | Exception) -> None:
        self.heard.append(heard)

    @property
    def words(self) -> list[Word]:
        return [word for heard in self.heard if isinstance(heard, Heard) for word in heard.words]


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def frames(model: SpeechToText, seed: int, count: int = 30) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((count, model.frame_size))
    return (0.1 * noise).astype(np.float32)


def test_each_speaker_has_the_words_of_a_transcription(model: SpeechToText) -> None:
    """If this fails, captions are other words than `transcribe` writes, or one speaker gets another's."""
    captions = Captions(model)
    sounds, told = [frames(model, seed) for seed in range(3)], [Told() for _ in range(3)]
    speakers = [captions.begin(tell) for tell in told]
    for index in range(30):
        for speaker, sound in zip(speakers, sounds, strict=True):
            speaker.feed(sound[index])
    for speaker in speakers:
        speaker.finish()
    until(lambda: not captions._speakers)
    captions.stop()
    for sound, tell in zip(sounds, told, strict=True):
        expected = model.transcribe(sound.ravel(), model.sample_rate)
        assert expected.words and sorted(tell.words, key=lambda word: word.start) == list(expected.words)


def test_feeding_never_waits(model: SpeechToText, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a slow recogniser delays the conversation, or its words come at wrong times after a gap."""
    free = threading.Event()
    real = module.advance

    def slow(given: dict) -> dict:
        if given:
            free.wait(SECONDS)
        return real(given)

    monkeypatch.setattr(module, "advance", slow)
    captions, tell = Captions(model), Told()
    speaker = captions.begin(tell)
    sound = frames(model, 0, 200)
    began = time.monotonic()
    for frame in sound:
        speaker.feed(frame)
    assert time.monotonic() - began < 5
    free.set()
    speaker.finish()
    until(lambda: not captions._speakers)
    captions.stop()
    assert speaker.lost >= 200 / model.frame_rate - module._BACKLOG - 1
    last = tell.heard[-1]
    assert isinstance(last, Heard) and last.time == pytest.approx(200 / model.frame_rate, abs=0.1)
    assert all(0 <= word.start <= last.time for word in tell.words)


def test_an_error_ends_one_speaker(model: SpeechToText, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a failed caption is silent, or takes the thread with it."""
    real = module.advance

    def failing(given: dict) -> dict:
        if given:
            raise CodecError("broken")
        return real(given)

    captions, first, second = Captions(model), Told(), Told()
    with monkeypatch.context() as patch:
        patch.setattr(module, "advance", failing)
        captions.begin(first).feed(frames(model, 0)[0])
        until(lambda: bool(first.heard))
    assert isinstance(first.heard[0], CodecError)
    speaker = captions.begin(second)
    speaker.feed(frames(model, 0)[0])
    until(lambda: bool(second.heard))
    assert isinstance(second.heard[0], Heard)
    speaker.end()
    until(lambda: captions._work is None)
    captions.stop()
