"""The command talk, with a model that repeats what it hears and devices made of Python."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from moshi_mlx_app.audio import device, portaudio
from moshi_mlx_app.cli import main
from moshi_mlx_app.screen.panel import Keys, State, _panel, decibels

import moshi_mlx
from moshi_mlx.realtime import Conversation
from moshi_mlx.state import read_state
from tests.app.test_device import FakeCard, until
from tests.helpers.parrot import Parrot, install, pump
from tests.helpers.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'app'}"}
QUESTIONS = ROOT / "moshi_mlx" / "assets" / "questions.wav"
PROGRAM = [sys.executable, "-m", "tests.helpers.parrot", "--fake-card"]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCard]:
    """Devices whose microphone hears a tone."""
    fake = FakeCard()
    monkeypatch.setattr(portaudio, "sounddevice", lambda: fake)
    pump(fake)
    yield fake
    fake.finished = True


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> Parrot:
    monkeypatch.setattr(moshi_mlx, "load", None)
    made = Parrot()
    install(made)
    return made


def begun(arguments: list[str]) -> subprocess.Popen[str]:
    """A program whose Ctrl-C is a person's, even where this test runs in a shell's background."""
    return subprocess.Popen(
        arguments,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        cwd=ROOT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def interrupted(arguments: list[str], delay: float) -> tuple[int, str]:
    """Status and complaints of a program that got Ctrl-C ``delay`` seconds after its start."""
    with begun(arguments) as process:
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        try:
            try:
                _, errors = process.communicate(timeout=15)
            except subprocess.TimeoutExpired:  # an extension module that was being imported may swallow the first
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise AssertionError(f"hung after Ctrl-C at {delay:.3f} s") from None
    # Before the program's first line Python itself is interrupted; that traceback, or silent end, is not ours.
    starting = process.returncode == -signal.SIGINT and "in _run\n" not in errors
    if starting or "failed to import the site module" in errors.casefold():
        return -signal.SIGINT, errors
    assert "Traceback" not in errors and process.returncode in (0, 130), (delay, process.returncode, errors)
    return process.returncode, errors


def test_without_a_verb_it_talks(
    card: FakeCard, parrot: Parrot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, the bare command does not converse, does not end when asked to, or records something else."""
    folder = tmp_path / "talks"
    assert main(["--no-aec", "--seconds", "2", "--backlog", "3", "--json", "--record", str(folder)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert 8 <= figures["frames"] <= 26 and figures["dropped_seconds"] == 0
    assert figures["device_openings"] == 1 and len(figures["latency_ms"]) == 2
    pcm, rate = soundfile.read(figures["files"][0])
    assert rate == 24_000 and len(pcm) == figures["frames"] * 1_920
    assert np.abs(pcm[4_000:]).max() > 0.09
    assert np.array_equal(pcm[:, 0], pcm[:, 1]), "the parrot says each frame as it hears it"
    assert all(stream.closed for stream in card.streams)


def test_a_model_that_fails(card: FakeCard, parrot: Parrot, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, an error in the middle of a talk hangs, hides its cause, or costs the recording."""
    parrot.fails_at = 5
    began = time.monotonic()
    assert main(["talk", "--no-aec", "--record", str(tmp_path)]) == 1
    assert time.monotonic() - began < 20
    assert "broken on purpose" in capsys.readouterr().err
    (wav,) = tmp_path.glob("*.wav")
    assert len(soundfile.read(wav)[0]) == 5 * 1_920


def test_what_is_wrong_is_said_before_the_model_is_loaded(
    card: FakeCard, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, a mistyped device is noticed after a download of gigabytes."""
    monkeypatch.setattr(moshi_mlx, "load", None)
    assert main(["talk", "--input-device", "nothing"]) == 1
    assert "no microphone is called 'nothing'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(
    card: FakeCard, parrot: Parrot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, a talk is not recorded and nobody knows."""
    (tmp_path / "file").write_text("")
    assert main(["talk", "--no-aec", "--record", str(tmp_path / "file"), "--seconds", "5"]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_device_that_vanishes_while_talking(
    card: FakeCard, parrot: Parrot, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, pulling a plug ends the talk."""
    monkeypatch.setattr(device, "_RETRY", 0.05)

    def pull() -> None:
        assert until(lambda: parrot.heard > 5, 60)
        for stream in list(card.streams):
            stream.active = False

    threading.Thread(target=pull).start()
    assert main(["talk", "--no-aec", "--seconds", "3", "--json"]) == 0
    said = capsys.readouterr()
    figures = json.loads(said.out)
    assert figures["device_openings"] == 2 and figures["frames"] > 12
    assert "has stopped; opening it again" in said.err and "sound again" in said.err


@pytest.mark.parametrize("delay", [0.05, 0.4, 0.9, 1.3, 1.7])
def test_ctrl_c_at_any_moment(delay: float, tmp_path: Path) -> None:
    """If this fails, Ctrl-C hangs or shows a traceback at some moment of the talk, or breaks the recording."""
    delay += float(np.random.default_rng(int(delay * 100)).uniform(0, 0.3))
    status, _ = interrupted([*PROGRAM, "--no-aec", "--record", str(tmp_path)], delay)
    assert status in (130, -signal.SIGINT)
    for wav in tmp_path.glob("*.wav"):
        assert len(soundfile.read(wav)[0]) % 1_920 == 0
        json.loads(wav.with_suffix(".json").read_text())


def test_keys_and_panel(tmp_path: Path) -> None:
    """If this fails, the keys do nothing, the panel is not drawn, or the terminal is left without echo."""
    child, master = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.environ.update(TERM="xterm", COLUMNS="120", LINES="24", PYTHONPATH=ENVIRONMENT["PYTHONPATH"])
        os.execv(sys.executable, [*PROGRAM, "talk", "--no-aec"])
    shown, end = "", time.monotonic() + 90
    script = [("q quit", b"m"), ("muted", b"m"), ("dB   Moshi", b"r"), ("recording 0", b""), ("recording 1 s", b"r")]
    script += [("recorded: recordings/", b" "), ("a new conversation", b"?"), ("ran out of sound", b"d")]
    script += [("sound again", b"q"), ("frames,", b"")]
    since = 0
    while time.monotonic() < end:
        if script and script[0][0] in shown[since:]:
            key = script.pop(0)[1]
            since = len(shown)
            os.write(master, key)
        if not select.select([master], [], [], 0.2)[0]:
            continue
        try:
            piece = os.read(master, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece.decode("utf-8", "replace")
    os.close(master)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert script in ([], [("frames,", b"")]), (script, shown[-500:])
    assert status == 0 and re.search(r"\d frames, \d+ late", shown)
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert list((tmp_path / "recordings").glob("*.wav"))


def test_the_panel_fits_and_tells() -> None:
    """If this fails, a narrow terminal shows rubbish, or a number is missing."""
    lines = _panel(State(75.0, 0.1, 0.0, 0.047, 0.12, 3, 1.25, 4, 12.0, False, False), keys=True, width=120)
    assert "1:15" in lines[0] and "-20 dB" in lines[0] and "recording 12 s" in lines[0] and "waiting" in lines[0]
    assert "latency 47 ms" in lines[1] and "late 3" in lines[1] and "dropped 1.2 s" in lines[1]
    assert "queue 120 ms" in lines[1] and "underruns 4" in lines[1] and "q quit" in lines[2]
    assert len(_panel(State(), keys=True, width=79)) == 3
    assert "muted" in _panel(State(user=0.5, muted=True), keys=False, width=79)[0]
    assert decibels(0.0) == -99 and decibels(1.0) == 0


def test_a_recordings_json_has_the_form_of_file(card: FakeCard, parrot: Parrot, tmp_path: Path) -> None:
    """If this fails, a program that reads what `file` writes cannot read what `talk` records."""
    assert main(["talk", "--no-aec", "--seconds", "1", "--quiet", "--seed", "5", "--record", str(tmp_path)]) == 0
    (wav,) = tmp_path.glob("*.wav")
    about = json.loads(wav.with_suffix(".json").read_text())
    keys = re.findall(r"^\| `(\w+)` ", (ROOT / "docs" / "recordings.md").read_text(), re.MULTILINE)
    assert set(about) == set(keys) and about["complete"] is True
    assert about["answer"] == {"file": wav.name, "channels": ["moshi", "user"]} and about["question"] is None
    assert about["seed"] == 5 and about["model"] == "parrot" and about["generation"]["text"]["temperature"] == 0.7
    assert about["duration"] == pytest.approx(soundfile.info(wav).duration, abs=1e-3)


def test_two_talks_record_into_one_folder_and_a_third_is_killed(tmp_path: Path) -> None:
    """If this fails, talks at the same time lose each other's recordings, or a killed one is never listed."""
    command = [*PROGRAM, "--no-aec", "--quiet", "--record", str(tmp_path)]
    with begun(command) as killed:
        assert until(lambda: sum(wav.stat().st_size for wav in tmp_path.glob("*.wav")) > 10_000, 60)
        with begun([*command, "--seconds", "1"]) as one, begun([*command, "--seconds", "1"]) as two:
            assert until(lambda: len(list(tmp_path.glob("*.wav"))) == 3, 60)
            killed.kill()
            for talk in (one, two):
                _, errors = talk.communicate(timeout=60)
                assert talk.returncode == 0, errors
        killed.communicate()
    lines = [json.loads(line) for line in (tmp_path / "recordings.jsonl").read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == sorted(wav.name for wav in tmp_path.glob("*.wav"))
    for line in lines:
        wav = tmp_path / line["path"]
        assert soundfile.info(wav).duration == pytest.approx(line["duration"])
        assert json.loads(wav.with_suffix(".json").read_text())["duration"] == pytest.approx(line["duration"])
    assert not list(tmp_path.glob(".*"))


def keys_after(monkeypatch: pytest.MonkeyPatch, script: list[tuple[int, str]]) -> None:
    """Keys that a person presses: each when so many frames have been heard, by a conversation of this test."""
    frames = [0]
    say = Conversation._say

    def counted(self: Conversation, *said: object) -> None:
        say(self, *said)  # type: ignore[arg-type]
        frames[0] = self.stats.frames

    def pressed(self: Keys) -> str:
        return script.pop(0)[1] if script and frames[0] >= script[0][0] else ""

    monkeypatch.setattr(Conversation, "_say", counted)
    monkeypatch.setattr(Keys, "pressed", pressed)


def test_keep_and_resume(
    card: FakeCard, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, a talk that was kept cannot be taken up again, or the wrong model takes it up."""
    keys_after(monkeypatch, [(10, "k"), (12, "q")])
    command = ["talk", "--no-aec", "--json", "--backlog", "3", "--record", str(tmp_path / "talks")]
    assert main([*command, "--model", "small", "--seed", "3"]) == 0
    said = capsys.readouterr()
    figures = json.loads(said.out)
    (kept,) = figures["kept"]
    assert f"kept: {kept}; continue it with --resume" in said.err and kept.endswith(".moshi")
    before = int(np.array(read_state(kept)[0]["frames"])[0])
    assert 10 <= before <= figures["frames"]

    keys_after(monkeypatch, [(6, "q")])
    assert main([*command, "--resume", kept]) == 0, "the file knows its model"
    figures = json.loads(capsys.readouterr().out)
    assert figures["model"] == "small" and figures["frames"] >= 6 and figures["kept"] == []
    about = json.loads(Path(figures["files"][0]).with_suffix(".json").read_text())
    assert about["generation"]["resumed"] == kept

    other = tiny_model(name="other")
    monkeypatch.setattr(moshi_mlx, "load", lambda *_, **__: other)
    assert main([*command, "--resume", kept]) == 1
    assert "with the model small, and this is other: load that model" in capsys.readouterr().err
    Path(kept).write_bytes(Path(kept).read_bytes()[:-9])
    monkeypatch.setattr(moshi_mlx, "load", None)
    for path in (kept, str(tmp_path / "none")):
        assert main([*command, "--resume", path]) == 1, "before a model is loaded"
        assert path in capsys.readouterr().err


def test_what_cannot_be_kept(
    card: FakeCard, parrot: Parrot, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, the key that keeps a talk ends it where the codec is rustymimi."""
    keys_after(monkeypatch, [(3, "k"), (8, "q")])
    assert main(["talk", "--no-aec", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["kept"] == [] and "a fake cannot be kept" in said.err
