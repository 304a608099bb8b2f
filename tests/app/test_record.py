"""Recordings of live conversations: complete, valid at any moment, patient with a full disk."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from moshi_mlx_app.recording import recorder as module
from moshi_mlx_app.recording.recorder import Recorder

from moshi_mlx.engine.text import Word
from moshi_mlx.tasks.dialogue import SessionFrame
from tests.app.test_device import until

ROOT = Path(__file__).resolve().parents[2]
RATE, SIZE = 24_000, 1_920


def frames(recorder: Recorder, count: int, start: int = 0) -> None:
    """Frames whose samples spell their number; every fifth ends a word."""
    for index in range(start, start + count):
        words = (Word(f" w{index}", index * 0.08, index * 0.08 + 0.3),) if index % 5 == 0 else ()
        voice = np.full(SIZE, (index + 1) / 1000, np.float32)
        recorder.tap(-voice, SessionFrame(index, voice, "", words))


def numbers(path: Path) -> tuple[list[int], list[int]]:
    """What the frames of a recording spell, left and right."""
    pcm, rate = soundfile.read(path, dtype="float32")
    assert rate == RATE and pcm.shape[1] == 2 and len(pcm) % SIZE == 0
    heard = np.round(pcm[::SIZE] * 1000).astype(int)
    assert (np.abs(pcm - np.repeat(heard, SIZE, 0) / 1000) < 1e-4).all()
    return list(heard[:, 0]), list(heard[:, 1])


def words(path: Path) -> list[Any]:
    found = json.loads(path.with_suffix(".json").read_text())
    if "duration" in found:  # it has come to its end
        said = [[word["text"], [word["start"], word["end"]], "SPEAKER_MAIN"] for word in found["words"]]
        assert said == found["alignments"] and found["text"] == " ".join(word for word, _, _ in said)
    return list(found["alignments"])


def test_the_layout(tmp_path: Path) -> None:
    """If this fails, moshi-finetune cannot read what was recorded, or the channels are swapped."""
    recorder = Recorder(tmp_path / "new" / "folder", RATE, SIZE)
    recorder.start()
    frames(recorder, 12)
    recorder.stop()
    (path,) = recorder.files
    assert path.parent == tmp_path / "new" / "folder"
    left, right = numbers(path)
    assert left == list(range(1, 13)) and right == [-number for number in left]
    assert words(path) == [
        ["w0", [0.0, 0.3], "SPEAKER_MAIN"],
        ["w5", [0.4, 0.7], "SPEAKER_MAIN"],
        ["w10", [0.8, 1.1], "SPEAKER_MAIN"],
    ]
    (line,) = (path.parent / "recordings.jsonl").read_text().splitlines()
    assert json.loads(line) == {"path": path.name, "duration": 12 * 0.08}
    assert recorder.notices() == [] and not recorder.running


def test_a_new_conversation_is_a_new_file_and_times_count_from_its_start(tmp_path: Path) -> None:
    """If this fails, words stand at the wrong times after a reset, or when recording began in the middle."""
    recorder = Recorder(tmp_path, RATE, SIZE)
    frames(recorder, 3)  # not yet
    recorder.start()
    frames(recorder, 6, start=7)
    frames(recorder, 2)
    recorder.stop()
    recorder.start()
    frames(recorder, 1, start=50)
    recorder.stop()
    assert [numbers(path)[0] for path in recorder.files] == [[8, 9, 10, 11, 12, 13], [1, 2], [51]]
    assert words(recorder.files[0]) == [["w10", [0.24, 0.54], "SPEAKER_MAIN"]]
    assert len((tmp_path / "recordings.jsonl").read_text().splitlines()) == 3


def test_too_long_for_one_wav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a talk of more than twelve hours leaves a wav that no program reads."""
    monkeypatch.setattr(module, "_LARGEST_WAV", 4 * SIZE * 5)
    recorder = Recorder(tmp_path, RATE, SIZE)
    recorder.start()
    frames(recorder, 12)
    recorder.stop()
    assert [len(numbers(path)[0]) for path in recorder.files] == [5, 5, 2]
    assert words(recorder.files[2]) == [["w10", [0.0, 0.3], "SPEAKER_MAIN"]]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a full disk ends the talk, or leaves a gap in the recording after room was made."""
    monkeypatch.setattr(module, "_RETRY", 0.02)
    room = [4 * SIZE * 3 + 100]
    really = os.pwrite

    def pwrite(file: int, data: bytes, place: int) -> int:
        new = place + len(data) - os.fstat(file).st_size
        if new > room[0]:
            if room[0] > 0 and new == len(data):  # as a disk does: a part of it still fits
                room[0] -= (part := min(room[0], len(data) - 1))
                return really(file, data[:part], place)
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= max(new, 0)
        return really(file, data, place)

    monkeypatch.setattr(module.os, "pwrite", pwrite)
    recorder = Recorder(tmp_path, RATE, SIZE)
    recorder.start()
    frames(recorder, 10)
    notices: list[str] = []
    assert until(lambda: notices.extend(recorder.notices()) or notices)
    assert "No space left on device" in notices[0] and recorder.running
    assert numbers(recorder.files[0])[0] == [1, 2, 3], "what is there is valid"
    words(recorder.files[0])
    frames(recorder, 10, start=10)
    time.sleep(0.1)
    room[0] = 10**9
    assert until(lambda: notices.extend(recorder.notices()) or len(notices) > 1)
    assert "nothing was lost" in notices[1]
    recorder.stop()
    assert numbers(recorder.files[0])[0] == list(range(1, 21))
    assert [word for word, _, _ in words(recorder.files[0])] == ["w0", "w5", "w10", "w15"]


def test_a_disk_that_stays_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, quitting hangs on a full disk, memory fills up, or the loss is not told."""
    monkeypatch.setattr(module, "_LAST_TRIES", 0.2)
    monkeypatch.setattr(module, "_HELD", 2.0)
    recorder = Recorder(tmp_path, RATE, SIZE)
    recorder.start()
    frames(recorder, 4)
    assert until(lambda: recorder.seconds > 0.3)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "pwrite", full)
        frames(recorder, 100, start=4)
        assert not recorder.running
        began = time.monotonic()
        recorder.stop()
        assert time.monotonic() - began < 5.0
    said = " ".join(recorder.notices())
    assert "recording has ended" in said and "could not be recorded" in said
    assert numbers(recorder.files[0])[0] == [1, 2, 3, 4]
    assert listed(tmp_path) == {recorder.files[0].name: 4 * 0.08}
    assert json.loads(recorder.files[0].with_suffix(".json").read_text())["complete"] is False


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    """If this fails, a typing mistake is noticed only after the talk."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "folder", tmp_path / "file"):
        with pytest.raises(OSError, match=r"file is a file; name a folder"):
            Recorder(folder, RATE, SIZE).start()


PROGRAM = """
import sys, time
from pathlib import Path
from tests.app.test_record import RATE, SIZE, Recorder, frames
recorder = Recorder(Path(sys.argv[1]), RATE, SIZE)
recorder.start()
for index in range(100000):
    frames(recorder, 1, start=index)
    print(index, flush=True)
    time.sleep(0.04)
"""


def test_killed(tmp_path: Path) -> None:
    """If this fails, a crash loses more than a second of the talk, or leaves files that cannot be read."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "app")])
    environment = {**os.environ, "PYTHONPATH": path}
    for kill_at in (12, 57):
        folder = tmp_path / str(kill_at)
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE, env=environment, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) == kill_at:
                    break
            process.send_signal(signal.SIGKILL)
            last = max([kill_at, *(int(line) for line in process.stdout.read().split())])
        (wav,) = folder.glob("*.wav")
        left, _ = numbers(wav)
        assert left == list(range(1, len(left) + 1)) and len(left) >= last - 12
        found = [int(word[1:]) for word, _, _ in words(wav)]
        assert found == list(range(0, 5 * len(found), 5)) and found[-1] >= len(left) - 10


def recorded(folder: Path, kill_at: int) -> None:
    """A recording whose program is killed after so many frames."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "app")])}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == kill_at:
                break
        process.send_signal(signal.SIGKILL)
        process.stdout.read()


def listed(folder: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (folder / "recordings.jsonl").read_text().splitlines()]
    assert len({line["path"] for line in lines}) == len(lines)
    return {line["path"]: line["duration"] for line in lines}


def test_the_next_recording_lists_what_a_killed_one_left(tmp_path: Path) -> None:
    """If this fails, a talk that was killed is never listed for training, or its JSON stays without its end."""
    recorded(tmp_path, 23)
    (killed,) = tmp_path.glob("*.wav")
    assert not (tmp_path / "recordings.jsonl").exists()
    recorder = Recorder(tmp_path, RATE, SIZE)
    recorder.start()
    assert until(lambda: (tmp_path / "recordings.jsonl").exists())
    seconds = len(numbers(killed)[0]) * 0.08
    assert listed(tmp_path) == {killed.name: pytest.approx(seconds)}
    about = json.loads(killed.with_suffix(".json").read_text())
    assert about["complete"] is False and about["duration"] == pytest.approx(seconds, abs=1e-3)
    assert about["text"].startswith("w0 w5") and words(killed)
    assert killed.name in recorder.notices()[0]
    frames(recorder, 3)
    recorder.stop()
    assert listed(tmp_path) == {killed.name: pytest.approx(seconds), recorder.files[0].name: 3 * 0.08}
    assert not list(tmp_path.glob(".*")) and recorder.notices() == []


def test_the_end_of_a_recording_lists_what_was_killed_meanwhile(tmp_path: Path) -> None:
    """If this fails, a crash beside a long talk is listed only when somebody talks again."""
    recorder = Recorder(tmp_path, RATE, SIZE)
    recorder.start()
    frames(recorder, 2)
    assert until(lambda: recorder.seconds > 0.1)
    recorded(tmp_path, 5)
    recorder.stop()
    assert set(listed(tmp_path)) == {path.name for path in tmp_path.glob("*.wav")} and len(listed(tmp_path)) == 2


def test_what_is_still_recorded_is_left_alone(tmp_path: Path) -> None:
    """If this fails, two talks into one folder list each other's files before they end, or twice."""
    one, two = Recorder(tmp_path, RATE, SIZE), Recorder(tmp_path, RATE, SIZE)
    one.start()
    frames(one, 7)
    assert until(lambda: one.seconds > 0.5)
    two.start()
    frames(two, 4)
    two.stop()
    assert listed(tmp_path) == {two.files[0].name: 4 * 0.08}
    frames(one, 3, start=7)
    one.stop()
    assert listed(tmp_path) == {two.files[0].name: 4 * 0.08, one.files[0].name: 10 * 0.08}
    assert numbers(one.files[0])[0] == list(range(1, 11)) and one.files != two.files
    assert json.loads(one.files[0].with_suffix(".json").read_text())["complete"] is True
    assert not list(tmp_path.glob(".*"))


def test_many_programs_record_into_one_folder(tmp_path: Path) -> None:
    """If this fails, talks that end in one moment lose lines of recordings.jsonl, or take one file's name."""
    recorders = [Recorder(tmp_path, RATE, SIZE) for _ in range(8)]
    for recorder in recorders:
        recorder.start()
    for recorder in recorders:
        for start in range(0, 60, 20):  # a gap each time: three files
            frames(recorder, 3, start=start)
    for recorder in recorders:
        recorder.stop()
    files = [path for recorder in recorders for path in recorder.files]
    assert len(set(files)) == 24 and listed(tmp_path) == {path.name: pytest.approx(0.24) for path in files}


def test_words_that_were_cut_off_are_left_out(tmp_path: Path) -> None:
    """If this fails, a kill in the middle of a word makes the whole JSON unreadable for good."""
    recorder = Recorder(tmp_path, RATE, SIZE)
    recorder.start()
    frames(recorder, 12)
    assert until(lambda: recorder.seconds > 0.9)
    (wav,) = tmp_path.glob("*.wav")
    text = wav.with_suffix(".json").read_text()
    copy = tmp_path / "killed"
    copy.mkdir()
    (copy / wav.name).write_bytes(wav.read_bytes())
    (copy / wav.with_suffix(".json").name).write_text(text[: text.index('"w10"') + 3])
    (copy / f".{wav.name}.lock").touch()
    recorder.stop()
    other = Recorder(copy, RATE, SIZE)
    other.start()
    other.stop()
    assert listed(copy) == {wav.name: pytest.approx(0.96)}
    assert [word for word, _, _ in words(copy / wav.name)] == ["w0", "w5"]


def test_only_recordings_are_recovered(tmp_path: Path) -> None:
    """If this fails, what a person took out of the list comes back, or a stranger's file is listed for training."""
    recorder = Recorder(tmp_path, RATE, SIZE)
    recorder.start()
    frames(recorder, 3)
    recorder.stop()
    (tmp_path / "recordings.jsonl").write_text("")
    soundfile.write(tmp_path / "music.wav", np.zeros((100, 2)), RATE)
    soundfile.write(tmp_path / "2026-01-01_00-00-00.wav", np.zeros((100, 1)), RATE)
    for name in ("music", "2026-01-01_00-00-00", "2026-01-02_00-00-00"):
        (tmp_path / f"{name}.json").write_text("[]")
        (tmp_path / f".{name}.wav.lock").touch()
    again = Recorder(tmp_path, RATE, SIZE)
    again.start()
    again.stop()
    assert (tmp_path / "recordings.jsonl").read_text() == "" and again.notices() == []
    assert (tmp_path / "music.json").read_text() == (tmp_path / "2026-01-01_00-00-00.json").read_text() == "[]"


def test_a_list_whose_last_line_was_not_ended(tmp_path: Path) -> None:
    """If this fails, the next recording is written into somebody's last line, and training fails at both."""
    (tmp_path / "recordings.jsonl").write_text('{"path": "mine.wav", "duration": 1.0}')
    recorder = Recorder(tmp_path, RATE, SIZE)
    recorder.start()
    frames(recorder, 2)
    recorder.stop()
    assert list(listed(tmp_path)) == ["mine.wav", recorder.files[0].name]
