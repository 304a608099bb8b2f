"""``talk --captions``: what the user says, on the screen and in the recording's JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moshi_mlx_app.captions import TalkCaptions
from moshi_mlx_app.cli import main
from moshi_mlx_app.commands import talk as command
from moshi_mlx_app.models import fetch, measure
from moshi_mlx_app.models.recogniser import load_recogniser
from moshi_mlx_app.recording.recorder import Recorder

import moshi_mlx.realtime as realtime
from moshi_mlx.engine.text import Word
from moshi_mlx.errors import ConfigError
from moshi_mlx.tasks.dialogue import SessionFrame
from moshi_mlx.tasks.transcribe import Heard, SpeechToText
from tests.app.test_device import FakeCard
from tests.app.test_talk import card, parrot  # noqa: F401
from tests.helpers.parrot import Parrot
from tests.helpers.tiny import tiny_model


@pytest.fixture
def recogniser() -> SpeechToText:
    made = tiny_model(stt={"audio_delay_seconds": 0.04})
    assert isinstance(made, SpeechToText)
    return made


def test_the_recording_has_both_speakers(tmp_path: Path, recogniser: SpeechToText) -> None:
    """If this fails, a recording lacks what the user said, has it at other times, or as the model's own words."""
    rate, size = recogniser.sample_rate, recogniser.frame_size
    recorder = Recorder(tmp_path, rate, size)
    captions = TalkCaptions(realtime.Captions(recogniser), recorder.caption)
    recorder.start()
    sound = (0.1 * np.random.default_rng(0).standard_normal((40, size))).astype(np.float32)
    for start in (0, 100):  # the second conversation begins at another frame: its words count from there
        for index, frame in enumerate(sound, start):
            own = (Word("moo", index * size / rate, (index + 1) * size / rate),) if index % 10 == 0 else ()
            reply = SessionFrame(index, np.zeros(size, np.float32), "", own)
            recorder.tap(frame, reply)
            captions.tap(frame, reply)
        if not start:
            captions.stop()
            captions = TalkCaptions(realtime.Captions(recogniser), recorder.caption)
            recorder.stop()
            recorder.start()
    captions.stop()
    recorder.stop()
    expected = [word.text.strip() for word in recogniser.transcribe(sound.ravel(), rate).words]
    assert expected and len(recorder.files) == 2
    lines = " ".join(captions.lines()).split()
    assert lines == expected
    for path in recorder.files:
        found = json.loads(path.with_suffix(".json").read_text())
        heard = [word for word in found["words"] if word["speaker"] == "user"]
        assert sorted(word["text"] for word in heard) == sorted(expected)
        assert all(0 <= word["start"] <= word["end"] <= 40 * size / rate + 0.01 for word in heard)
        assert found["text"] == "moo moo moo moo"
        labels = {label for _, _, label in found["alignments"]}
        assert labels == {"SPEAKER_MAIN", "SPEAKER_OTHER"}


def test_only_where_there_is_time(
    recogniser: SpeechToText, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, captions make the conversation stutter on a slow machine, or are refused on a fast one."""
    monkeypatch.setattr(fetch, "load_model", lambda args, shown=True: recogniser)
    talker = tiny_model()
    frame = 1e3 / talker.frame_rate
    args = argparse.Namespace(captions="writer", quiet=True)

    def took(share: float) -> Any:
        stage = {"p50": share * frame / 2, "p95": share * frame / 2}
        return lambda *_: dict.fromkeys(("encode", "step", "decode", "frame"), stage)

    monkeypatch.setattr(measure, "unpaced", took(0.5))
    assert load_recogniser(args, talker) is recogniser
    monkeypatch.setattr(measure, "unpaced", took(1.0))
    assert load_recogniser(args, talker) is None
    assert "no captions: with tiny a frame of" in capsys.readouterr().err
    monkeypatch.setattr(fetch, "load_model", lambda args, shown=True: talker)
    with pytest.raises(ConfigError, match="is a model for dialogue: name a speech-to-text model"):
        load_recogniser(args, talker)


class Writer:
    """Stands for the recogniser: hears a word in every fifth frame, and a turn's end in every twentieth."""

    def __init__(self, model: Any):
        self.model, self.frames = model, 0

    def begin(self, tell: Any) -> Writer:
        self.tell = tell
        return self

    def feed(self, pcm: np.ndarray) -> None:
        self.frames += 1
        at = self.frames * 0.08
        words = (Word("hey", at - 0.08, at),) if self.frames % 5 == 0 else ()
        self.tell(Heard(at, "", words, 0.0, self.frames % 20 == 0))

    def finish(self) -> None:
        pass

    def speaking(self, caption: Any) -> bool:
        return False

    def stop(self) -> None:
        pass


def test_in_a_conversation(
    card: FakeCard,  # noqa: F811
    parrot: Parrot,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """If this fails, --captions shows nothing of what the user said, or records it nowhere."""
    monkeypatch.setattr(command, "load_recogniser", lambda args, model: argparse.Namespace(sample_rate=24_000))
    monkeypatch.setattr(realtime, "Captions", Writer)
    options = ["--no-aec", "--seconds", "2", "--backlog", "3", "--captions", "writer"]
    assert main(["talk", *options, "--record", str(tmp_path)]) == 0
    said, told = capsys.readouterr()
    assert "you: hey" in said + told
    (path,) = tmp_path.glob("*.wav")
    words = json.loads(path.with_suffix(".json").read_text())["words"]
    assert [word["text"] for word in words if word["speaker"] == "user"].count("hey") >= 1


def test_what_ended_is_said(recogniser: SpeechToText) -> None:
    """If this fails, captions stop without a word."""
    captions = TalkCaptions(realtime.Captions(recogniser), lambda words: None)
    captions._take(ConfigError("broken"), 0.0)
    assert captions.lines() == ["(captions have ended: broken)"]
    captions.stop()
