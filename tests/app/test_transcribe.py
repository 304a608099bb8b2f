"""``moshi-mlx-local transcribe``: recordings and the microphone in, words out, in every format."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from moshi_mlx_app.cli import main
from moshi_mlx_app.commands import transcribe as command
from moshi_mlx_app.models import fetch
from moshi_mlx_app.recording.subtitles import written

from moshi_mlx.engine.text import Word
from moshi_mlx.printable import printable
from moshi_mlx.tasks.transcribe import Heard, SpeechToText
from tests.helpers.signal import speechlike
from tests.helpers.tiny import tiny_model

WORDS = [Word(" Hello,", 0.5, 0.9), Word(" you.", 0.9, 1.3), Word("Who", 3.0, 3.2), Word("is", 3.2, 61.5)]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> SpeechToText:
    """A random model that the command loads."""
    made = tiny_model(stt={"audio_delay_seconds": 0.04})
    monkeypatch.setattr(fetch, "load_model", lambda args, shown=True: made)
    assert isinstance(made, SpeechToText)
    return made


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        pcm = speechlike(8_000 * (number + 1), 16_000, number)
        soundfile.write(tmp_path / f"r{number}.wav", pcm, 16_000)
    return tmp_path


def expected(model: SpeechToText, path: Path) -> Any:
    pcm, rate = soundfile.read(path, dtype="float32")
    return model.transcribe(pcm, rate)


def test_formats() -> None:
    """If this fails, a player shows no subtitles, or shows them at the wrong time."""
    assert written("txt", WORDS, [2.0]) == "Hello, you.\nWho is\n"
    assert written("srt", WORDS) == (
        "1\n00:00:00,500 --> 00:00:01,300\nHello, you.\n\n2\n00:00:03,000 --> 00:00:03,200\nWho\n\n"
        "3\n00:00:03,200 --> 00:01:01,500\nis\n\n"
    )
    assert written("vtt", WORDS[:2]) == "WEBVTT\n\n1\n00:00:00.500 --> 00:00:01.300\nHello, you.\n\n"
    found = json.loads(written("json", WORDS, [2.0], {"file": "a.wav"}))
    assert found["file"] == "a.wav" and found["turns"] == [2.0] and found["text"] == "Hello, you. Who is"
    assert found["words"][0] == {"text": "Hello,", "start": 0.5, "end": 0.9, "speaker": "user"}
    assert found["alignments"][2] == ["Who", [3.0, 3.2], "SPEAKER_OTHER"]
    assert written("srt", []) == "" and written("txt", []) == ""
    assert "\x1b" not in written("srt", [Word("\x1b[2J", 0, 1)])


def test_one_recording(here: Path, model: SpeechToText, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, the words of a recording are not printed, or are not the model's."""
    assert main(["transcribe", "r0.wav"]) == 0
    said, told = capsys.readouterr()
    assert said.split() == printable(expected(model, here / "r0.wav").text).split()
    assert "real-time factor" in told


@pytest.mark.parametrize("form", ["txt", "json", "srt", "vtt"])
def test_a_file(here: Path, model: SpeechToText, form: str) -> None:
    """If this fails, the words are not written where and as they were asked for."""
    assert main(["transcribe", "r0.wav", "-o", f"out.{form}", "--quiet"]) == 0
    found = expected(model, here / "r0.wav")
    about = {"file": "r0.wav", "duration": round(found.seconds_audio, 3), "complete": True}
    assert (here / f"out.{form}").read_text() == written(form, found.words, found.turns, about)
    assert main(["transcribe", "r0.wav", "-o", f"out.{form}"]) == 1  # it exists
    assert main(["transcribe", "r0.wav", "-o", f"out.{form}", "--force", "--quiet"]) == 0


def test_many(here: Path, model: SpeechToText) -> None:
    """If this fails, recordings that go through the model together get each other's words."""
    assert main(["transcribe", "r0.wav", "r1.wav", "r2.wav", "--format", "json", "--at-once", "2"]) == 0
    for number in range(3):
        found = json.loads((here / f"r{number}.json").read_text())
        assert found["complete"] and found["text"] == expected(model, here / f"r{number}.wav").text


def test_ctrl_c_keeps_what_was_written(
    here: Path, model: SpeechToText, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, an hour's words are lost because somebody stopped in the last minute."""
    whole = expected(model, here / "r2.wav")
    assert len(whole.words) > 2
    take, seen = command._File.take, []

    def stops(self: Any, heard: Heard) -> None:
        take(self, heard)
        seen.append(heard)
        if len(self.words) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(command._File, "take", stops)
    assert main(["transcribe", "r2.wav", "-o", "out.json", "--quiet"]) == 130
    found = json.loads((here / "out.partial.json").read_text())
    assert not found["complete"] and len(found["words"]) == 2 and not (here / "out.json").exists()
    assert "out.partial.json" in capsys.readouterr().err


def test_the_microphone(
    here: Path, model: SpeechToText, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, what is said into the microphone is not written down, or Ctrl-C loses it."""
    pcm = speechlike(12_000, 24_000, 2)

    class Card:
        def __init__(self, take: Any, fill: Any, rate: int, **_: Any):
            self.take = take

        def __enter__(self) -> Card:
            def speak() -> None:
                for start in range(0, len(pcm), 500):
                    self.take(pcm[start : start + 500])
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGINT)

            threading.Thread(target=speak, daemon=True).start()
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def notices(self) -> list[str]:
            return []

        def check(self) -> None:
            pass

    from moshi_mlx_app.audio import device, portaudio

    monkeypatch.setattr(device, "SoundCard", Card)
    monkeypatch.setattr(portaudio, "devices", list)
    monkeypatch.setattr(portaudio, "find_device", lambda *_: None)
    assert main(["transcribe", "-o", "said.json"]) == 130
    found = json.loads((here / "said.json").read_text())
    assert capsys.readouterr().out.split() == printable(found["text"]).split()
    assert found["text"] == model.transcribe(pcm[: found_frames(found) * model.frame_size], 24_000).text


def found_frames(found: Any) -> int:
    return round(found["duration"] * 150)


def test_bad_requests(here: Path, model: SpeechToText, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a mistake on the command line gives a crash, or a file nobody asked for."""
    for arguments, reason in (
        (["r0.wav", "r1.wav", "-o", "x.txt"], "one recording"),
        (["r0.wav", "-o", "x.doc"], "must end in"),
        (["-", "-"], "can be read once"),
    ):
        assert main(["transcribe", *arguments]) == 2
        assert reason in capsys.readouterr().err
    assert main(["transcribe", "nobody.wav"]) == 1
    assert "nobody.wav" in capsys.readouterr().err
    soundfile.write("empty.wav", np.zeros(0, np.float32), 16_000)
    assert main(["transcribe", "empty.wav"]) == 1


def test_a_model_that_does_not_write(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, a dialogue model's answers are taken for the words of the recording."""
    monkeypatch.setattr(fetch, "load_model", lambda args, shown=True: tiny_model())
    assert main(["transcribe", "r0.wav"]) == 1
    told = capsys.readouterr().err
    assert "model for dialogue" in told and "moshi-mlx-local talk" in told
