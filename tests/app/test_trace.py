"""``--trace``: the program's own trace, whatever ends the program."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from moshi_mlx_app.cli import main

from tests.app.conftest import FakeModel
from tests.app.test_device import until
from tests.app.test_talk import ENVIRONMENT, PROGRAM, QUESTIONS, ROOT, begun, card, parrot  # noqa: F401
from tests.realtime.test_trace import nested


def spans(path: Path) -> set[tuple[str, str]]:
    """Thread and name of every span in a trace."""
    events = json.loads(path.read_text())["traceEvents"]
    nested(events)
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    return {(names[event["tid"]], event["name"]) for event in events if event["ph"] == "X"}


def test_talk(card: Any, parrot: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """If this fails, nobody can see where a talk's delay comes from."""
    path = tmp_path / "talk.json"
    arguments = ["talk", "--no-aec", "--seconds", "1", "--quiet", "--record", str(tmp_path / "talks")]
    assert main([*arguments, "--trace", str(path)]) == 0
    found = spans(path)
    assert {("moshi encoder", "encode"), ("moshi model", "model"), ("moshi decoder", "decode")} <= found
    assert {("moshi feeder", "feed"), ("moshi decoder", "record")} <= found and "read" in {name for _, name in found}
    assert str(path) in capsys.readouterr().err


def test_a_talk_that_fails(card: Any, parrot: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """If this fails, the trace of the very talk that went wrong is missing."""
    parrot.fails_at = 5
    path = tmp_path / "talk.json"
    assert main(["talk", "--no-aec", "--quiet", "--trace", str(path)]) == 1
    assert "broken on purpose" in capsys.readouterr().err
    events = json.loads(path.read_text())["traceEvents"]
    assert [event for event in events if event["ph"] == "i" and event["name"] == "error"]


def test_a_recording_answered(model: FakeModel, here: Path) -> None:
    """If this fails, --trace does nothing for files, or an interrupted run loses it."""
    soundfile.write(here / "question.wav", np.zeros(24_000), 24_000)
    assert main(["file", "question.wav", "-o", "answer.wav", "--quiet", "--trace", "trace.json"]) == 0
    assert {("MainThread", "frame"), ("MainThread", "write")} <= spans(here / "trace.json")

    def interrupt(index: int) -> None:
        if index == 7:
            raise KeyboardInterrupt

    model.on_frame = interrupt
    assert main(["file", "question.wav", "-o", "other.wav", "--quiet", "--trace", "stopped.json"]) == 130
    events = json.loads((here / "stopped.json").read_text())["traceEvents"]
    assert len([event for event in events if event["name"] == "frame"]) == 8


def test_the_built_in_model_answers_a_recording(here: Path) -> None:
    """If this fails, the trace of a file does not show what codec and model took."""
    soundfile.write(here / "question.wav", np.zeros(4_000), 24_000)
    assert main(["file", "question.wav", "-o", "a.wav", "--quiet", "--tail", "1", "--trace", "trace.json"]) == 0
    found = spans(here / "trace.json")
    assert {("MainThread", name) for name in ("encode", "model", "decode", "frame", "write")} <= found


def test_a_place_that_cannot_be(model: FakeModel, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a mistyped folder is noticed after the work, or nothing says that the trace is missing."""
    soundfile.write(here / "question.wav", np.zeros(24_000), 24_000)
    for path, reason in (("nowhere/trace.json", "no such folder"), (".", "is a folder")):
        assert main(["file", "question.wav", "-o", "answer.wav", "--trace", path]) == 1
        assert reason in capsys.readouterr().err and not model.loaded


def test_ctrl_c(tmp_path: Path) -> None:
    """If this fails, Ctrl-C, the usual end of a talk, leaves half a trace or none."""
    path = tmp_path / "talk.json"
    with begun([*PROGRAM, "--no-aec", "--quiet", "--record", str(tmp_path), "--trace", str(path)]) as process:
        assert until(lambda: sum(wav.stat().st_size for wav in tmp_path.glob("*.wav")) > 50_000, 60)
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    spans(path)
