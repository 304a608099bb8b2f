"""The program on a sound card without hardware: sound goes in at the microphone and comes out of the loudspeaker."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from moshi_mlx_app.audio.default_device import Defaults

from tests.app.test_talk import ENVIRONMENT, QUESTIONS, ROOT
from tests.helpers.virtual_audio import RATE, VirtualAudio, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())


@pytest.fixture(scope="module")
def card() -> Iterator[VirtualAudio]:
    """One for all of these tests; a short path, because sockets do not like long ones."""
    folder = Path(tempfile.mkdtemp(prefix="va-"))
    audio = VirtualAudio(folder)
    try:
        audio.start()
    except TimeoutError as error:
        pytest.skip(f"no virtual sound card: {error}")
    yield audio
    audio.stop()
    shutil.rmtree(folder, ignore_errors=True)


def talk(card: VirtualAudio, *arguments: str, parrot: bool = True, **options: Any) -> subprocess.Popen[str]:
    """The program, with the parrot in place of a model or with the built-in one."""
    module = "tests.helpers.parrot" if parrot else "moshi_mlx_app"
    return subprocess.Popen(
        [sys.executable, "-m", module, "talk", "--no-aec", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={
            **card.environment,
            "PYTHONPATH": ENVIRONMENT["PYTHONPATH"],
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(card.folder / "cache"),
        },
        cwd=ROOT,
        text=True,
        **options,
    )


class Ear:
    """Keeps what a source of the card gives, and when it came."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self._process = process
        self._pieces: list[bytes] = []
        self._starts: list[float] = []
        self._count = 0
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        while piece := self._process.stdout.read(960):
            self._pieces.append(piece)
            self._count += len(piece) // 2
            self._starts.append(time.monotonic() - self._count / RATE)

    def so_far(self) -> np.ndarray:
        """The sound that has come until now."""
        return np.frombuffer(b"".join(list(self._pieces)), "<i2").astype(np.float32) / 32768

    def stop(self) -> tuple[np.ndarray, float]:
        """The sound, and when its first sample was played or heard, by the promptest of all pieces."""
        self._process.terminate()
        self._process.wait()
        self._thread.join(5)
        return self.so_far(), min(self._starts)


def play(card: VirtualAudio, pcm: np.ndarray) -> subprocess.Popen[bytes]:
    """Into the microphone, in the background."""
    process = card.microphone()
    data = (np.clip(pcm, -1, 1) * 32767).astype("<i2").tobytes()

    def write() -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(data)
            process.stdin.close()
        except BrokenPipeError:
            pass

    threading.Thread(target=write, daemon=True).start()
    return process


def alike(sound: np.ndarray, inside: np.ndarray) -> float:
    """Normalized correlation of ``sound`` with the best matching place of ``inside``."""
    size = 1 << int(np.ceil(np.log2(len(sound) + len(inside))))
    product = np.fft.irfft(np.fft.rfft(inside, size) * np.conj(np.fft.rfft(sound, size)), size)
    place = int(np.argmax(product[: len(inside)]))
    match = inside[place : place + len(sound)]
    return float(np.dot(sound[: len(match)], match) / (np.linalg.norm(sound) * np.linalg.norm(match) + 1e-9))


def recorded_seconds(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.wav")) / (4 * RATE)


def grown(folder: Path, seconds: float) -> bool:
    """Wait until so much is recorded."""
    end = time.monotonic() + 60
    while time.monotonic() < end and recorded_seconds(folder) < seconds:
        time.sleep(0.05)
    return recorded_seconds(folder) >= seconds


def test_a_question_goes_in_and_an_answer_comes_out(card: VirtualAudio, tmp_path: Path) -> None:
    """If this fails, the live program is deaf or dumb: microphone, model or loudspeaker are not connected."""
    question, rate = soundfile.read(QUESTIONS, dtype="float32")
    assert rate == RATE
    question = question[: 3 * RATE]
    ear = Ear(card.loudspeaker())
    program = talk(card, "--backlog", "3", "--json", "--record", str(tmp_path), parrot=False)
    # Not by the clock: a busy machine takes long to load a model.
    assert grown(tmp_path, 0.5), "recording has begun"
    speaking = play(card, question)
    assert grown(tmp_path, recorded_seconds(tmp_path) + 4.0)
    program.send_signal(signal.SIGINT)
    out, errors = program.communicate(timeout=60)
    speaking.kill()
    speaking.wait()
    played, _ = ear.stop()
    assert program.returncode == 130, errors
    figures = json.loads(out)
    recorded, _ = soundfile.read(figures["files"][0], dtype="float32")
    # A tenth of a second at a time: the player stretches sound a little, and leaves some out where it piled up.
    # On a busy machine PulseAudio loses some, too.
    asked = question[np.argmax(np.abs(question) > 0.1) :]
    pieces = [asked[at : at + RATE // 10] for at in range(0, RATE // 2, RATE // 10)]
    assert np.median([alike(piece, recorded[:, 1]) for piece in pieces]) > 0.8, "the model heard the question"
    # That it comes out unchanged is seen below, with a voice that a busy machine does not interrupt.
    assert np.abs(recorded[len(recorded) // 2 :, 0]).max() > 0.01, "the model spoke"
    assert np.mean(np.abs(played[-2 * RATE :]) > 0.003) > 0.1, "the loudspeaker played"
    assert json.loads(Path(figures["files"][0]).with_suffix(".json").read_text())["alignments"], "with words"


def test_from_mouth_to_ear(card: VirtualAudio, tmp_path: Path) -> None:
    """If this fails, the machinery around the model answers later than a person would bear.

    A parrot in place of the model, so that what is measured is devices, rings, frames and PulseAudio's own buffers.
    """
    rng = np.random.default_rng(0)
    burst = np.sin(np.arange(240) * (2 * np.pi * 1_000 / RATE)).astype(np.float32) * 0.8
    sound = np.zeros(7 * RATE, np.float32)
    for number in range(10):
        start = round((1.0 + 0.6 * number + rng.uniform(0, 0.08)) * RATE)
        sound[start : start + len(burst)] = burst
    program = talk(card, "--json", "--backlog", "1", "--record", str(tmp_path))
    assert grown(tmp_path, 1.5), "it listens, and PulseAudio's loudspeaker runs"
    mouth, ear = Ear(card.loudspeaker("into_mic.monitor")), Ear(card.loudspeaker())
    speaking = play(card, sound)
    assert grown(tmp_path, recorded_seconds(tmp_path) + 7.5)
    program.send_signal(signal.SIGINT)
    out, errors = program.communicate(timeout=60)
    speaking.kill()
    speaking.wait()
    (said, said_at), (heard, heard_at) = mouth.stop(), ear.stop()
    assert program.returncode == 130, errors
    spoken, repeated = onsets(said) / RATE + said_at, onsets(heard) / RATE + heard_at
    delays = np.array(
        [min(after) for one in spoken if len(after := [two - one for two in repeated if 0 < two - one < 0.6])]
    )
    print(
        f"\nmouth to ear over {len(delays)} impulses: median {np.median(delays) * 1e3:.0f} ms, "
        f"{delays.min() * 1e3:.0f} to {delays.max() * 1e3:.0f}; figures {out.strip()}"
    )
    figures = json.loads(out)
    assert len(delays) >= 2
    assert np.median(delays) > 0.08, "an answer cannot come before its frame is whole"
    if figures["late"] == 0:  # a busy machine stalls whole stages: its delays say nothing about the program
        assert len(delays) >= 6
        assert np.median(delays) < 0.45
        assert figures["dropped_seconds"] == 0


def onsets(pcm: np.ndarray) -> np.ndarray:
    """Samples at which something begins after silence."""
    loud = np.flatnonzero(np.abs(pcm) > 0.1)
    return loud[np.diff(loud, prepend=-RATE) > RATE // 5] if len(loud) else loud


def test_the_systems_choice_changes_while_talking(
    card: VirtualAudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, who chooses another loudspeaker in the system's settings hears nothing there.

    PulseAudio takes the sound along by itself; the process that asks PortAudio meanwhile must not disturb it.
    """

    def pactl(*words: str) -> None:
        subprocess.run(["pactl", *words], env=card.environment, check=True, capture_output=True)

    for name, value in card.environment.items():
        monkeypatch.setenv(name, value)
    pactl("load-module", "module-null-sink", "sink_name=headset", f"rate={RATE}", "channels=1")
    ear, defaults = Ear(card.loudspeaker("headset.monitor")), Defaults(every=0.2)
    program = talk(card, "--json", "--record", str(tmp_path))
    try:
        assert grown(tmp_path, 0.5), "recording has begun"
        defaults.start()
        speaking = play(card, 0.5 * np.sin(np.arange(90 * RATE) * (2 * np.pi * 500 / RATE)))
        assert grown(tmp_path, recorded_seconds(tmp_path) + 1.0)
        pactl("set-default-sink", "headset")
        end = time.monotonic() + 60
        while np.sum(np.abs(ear.so_far()) > 0.05) <= RATE / 4 and time.monotonic() < end:
            time.sleep(0.2)
        program.send_signal(signal.SIGINT)
        out, errors = program.communicate(timeout=60)
        speaking.kill()
        speaking.wait()
        chosen = defaults.changed()
    finally:
        defaults.stop()
        program.kill()
        pactl("set-default-sink", "speaker")
    played, _ = ear.stop()
    figures = json.loads(out)
    assert figures["device_openings"] == 1, errors
    assert np.sum(np.abs(played) > 0.05) > RATE / 4, "the headset played"
    assert chosen is not None and chosen["input"] and chosen["output"], "PortAudio was asked"


def test_the_plug_is_pulled_and_put_back(card: VirtualAudio, tmp_path: Path) -> None:
    """If this fails, losing the devices hangs or ends a talk, or costs what was recorded."""
    program = talk(card, "--json", "--record", str(tmp_path))
    assert grown(tmp_path, 1.0), "it listens"
    card.stop()
    time.sleep(1.5)
    card.start()
    assert grown(tmp_path, recorded_seconds(tmp_path) + 1.0), "it listens again"
    program.send_signal(signal.SIGINT)
    out, errors = program.communicate(timeout=60)
    assert program.returncode == 130, errors
    figures = json.loads(out)
    assert figures["device_openings"] == 2
    assert "opening it again" in errors and "waiting for the sound devices" in errors and "sound again" in errors
    assert "Expression" not in errors, "the libraries' own complaints are kept off the terminal"
    assert len(soundfile.read(figures["files"][0])[0]) == figures["frames"] * 1_920


def test_a_file_that_may_not_grow_and_ctrl_c(card: VirtualAudio, tmp_path: Path) -> None:
    """If this fails, a full disk ends the talk or damages the recording, or Ctrl-C hangs then."""
    room = 150_000
    program = talk(
        card,
        "--json",
        "--record",
        str(tmp_path),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    assert grown(tmp_path, 1.4), "the room is full"  # not by the clock: a busy machine starts slowly
    time.sleep(2.5)
    began = time.monotonic()
    program.send_signal(signal.SIGINT)
    out, errors = program.communicate(timeout=20)
    assert time.monotonic() - began < 6 and program.returncode == 130, errors
    figures = json.loads(out)
    assert f"recording waits: {figures['files'][0]}: File too large" in errors and "could not be recorded" in errors
    recorded = len(soundfile.read(figures["files"][0])[0]) // 1_920
    assert recorded == (room - 44) // (4 * 1_920) and figures["frames"] > recorded
    json.loads(Path(figures["files"][0]).with_suffix(".json").read_text())
