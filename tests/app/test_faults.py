"""What goes wrong while the whole program runs: it ends soon, keeps what it had, and names the cause."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from moshi_mlx_app.cli import main
from moshi_mlx_app.recording import recorder as record
from moshi_mlx_app.recording.recorder import Recorder

from tests.app.test_record import RATE, SIZE, frames, numbers
from tests.app.test_talk import PROGRAM, card, interrupted, parrot  # noqa: F401
from tests.helpers import parrot as helper

TIMES = int(os.environ.get("MOSHI_INTERRUPTS", "3"))
"""How often each program is interrupted; a long run sets it to hundreds."""


@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_a_codec_that_raises(
    stage: str,
    card: Any,  # noqa: F811
    parrot: Any,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If this fails, a codec's error in a talk hangs it, hides its cause, or costs the recording."""
    owner = helper._Ear if stage == "encode" else helper._Mouth
    really, count = getattr(owner, stage), [0]

    def broken(self: Any, sound: np.ndarray) -> np.ndarray:
        count[0] += 1
        if count[0] == 7:
            raise ValueError("the codec is out of tune")
        made: np.ndarray = really(self, sound)
        return made

    monkeypatch.setattr(owner, stage, broken)
    began = time.monotonic()
    assert main(["talk", "--no-aec", "--quiet", "--record", str(tmp_path)]) == 1
    assert time.monotonic() - began < 20
    said = capsys.readouterr().err
    assert "out of tune" in said and ("encoder" if stage == "encode" else "decoder") in said
    (wav,) = tmp_path.glob("*.wav")
    # What the codec had finished is there; a frame between the threads was not answered yet.
    assert len(soundfile.read(wav)[0]) >= (3 if stage == "encode" else 6) * SIZE
    json.loads(wav.with_suffix(".json").read_text())


def test_a_full_disk_in_a_talk(
    card: Any,  # noqa: F811
    parrot: Any,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If this fails, a disk that fills up ends the talk or destroys what was recorded before, or nobody is told."""
    really = os.pwrite

    def pwrite(file: int, data: bytes, place: int) -> int:
        if place + len(data) > 44 + 4 * SIZE * 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return really(file, data, place)

    monkeypatch.setattr(record.os, "pwrite", pwrite)
    assert main(["talk", "--no-aec", "--seconds", "3", "--json", "--record", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["frames"] > 10, "the talk went on"
    assert "No space left on device" in said.err and "could not be recorded" in said.err
    (wav,) = tmp_path.glob("*.wav")
    assert len(soundfile.read(wav)[0]) == 6 * SIZE
    json.loads(wav.with_suffix(".json").read_text())


def test_the_list_of_recordings_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a disk that was full for a moment leaves half a line in recordings.jsonl, and training fails."""
    monkeypatch.setattr(record, "_RETRY", 0.02)
    listing = tmp_path / "recordings.jsonl"
    listing.write_text('{"path": "older.wav", "duration": 1.0}\n')
    really, refused = os.write, [0]

    def write(file: int, data: bytes) -> int:
        if refused[0] < 3 and b"duration" in data:
            refused[0] += 1
            if refused[0] == 1:
                really(file, data[:9])  # as a disk does: a part of it still fits
            raise OSError(errno.ENOSPC, "No space left on device")
        return really(file, data)

    monkeypatch.setattr(record.os, "write", write)
    recorder = Recorder(tmp_path, RATE, SIZE)
    recorder.start()
    frames(recorder, 3)
    recorder.stop()
    assert refused[0] == 3
    lines = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [line["path"] for line in lines] == ["older.wav", recorder.files[0].name]
    assert numbers(recorder.files[0])[0] == [1, 2, 3]


@pytest.mark.parametrize("seed", range(TIMES))
def test_ctrl_c_while_a_recording_is_answered(seed: int, tmp_path: Path) -> None:
    """If this fails, Ctrl-C at some moment of `file` hangs, shows a traceback, or breaks what was answered."""
    delay = float(np.random.default_rng([1, seed]).uniform(0.05, 9.0))
    program = [sys.executable, "-m", "moshi_mlx_app", "file", "--demo", "--quiet", "-o", str(tmp_path / "a.wav")]
    status, errors = interrupted(program, delay)
    for wav in tmp_path.glob("*.wav"):
        assert len(soundfile.read(wav)[0]) > 0
        words = tmp_path / wav.name.replace(".wav", ".json")
        about = json.loads(words.read_text())
        assert about["complete"] == (status == 0)
    if status == 130:
        assert "stopped" in errors and ("nothing was written" in errors or list(tmp_path.glob("*.partial.wav")))


@pytest.mark.parametrize("seed", range(TIMES))
def test_ctrl_c_while_talking(seed: int, tmp_path: Path) -> None:
    """If this fails, Ctrl-C at some moment of `talk` hangs, shows a traceback, or breaks recording or trace."""
    delay = float(np.random.default_rng([2, seed]).uniform(0.05, 4.0))
    trace = tmp_path / "trace.json"
    program = [*PROGRAM, "talk", "--no-aec", "--quiet", "--record", str(tmp_path), "--trace", str(trace)]
    status, _ = interrupted(program, delay)
    for wav in tmp_path.glob("*.wav"):
        assert len(soundfile.read(wav)[0]) % SIZE == 0
        json.loads(wav.with_suffix(".json").read_text())
    assert not list(tmp_path.glob("*.partial"))
    if trace.exists():
        json.loads(trace.read_text())
    if list(tmp_path.glob("*.wav")):
        listed = [json.loads(line) for line in (tmp_path / "recordings.jsonl").read_text().splitlines()]
        assert {line["path"] for line in listed} == {wav.name for wav in tmp_path.glob("*.wav")}
        assert status == 130 and trace.exists()


def test_nothing_is_left_running() -> None:
    """If this fails, the tests above leave threads of a conversation behind."""
    until = time.monotonic() + 5
    while (left := [t.name for t in threading.enumerate() if t.name.startswith("moshi ")]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left
