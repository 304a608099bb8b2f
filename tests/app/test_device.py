"""Devices of every shape, their loss and return, on a PortAudio made of Python."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from moshi_mlx_app.audio import default_device as watching
from moshi_mlx_app.audio import device as module
from moshi_mlx_app.audio import portaudio
from moshi_mlx_app.audio.device import SoundCard
from moshi_mlx_app.audio.portaudio import Device, DeviceError, devices, find_device
from moshi_mlx_app.audio.resampling import Resampler
from moshi_mlx_app.cli import main

RATE = 24_000


class FakeStream:
    """Calls back when the test says so."""

    def __init__(self, card: FakeCard, kind: str, options: dict[str, Any]):
        device = card.list[options["device"]]
        most = device["max_input_channels" if kind == "input" else "max_output_channels"]
        if card.broken or options["samplerate"] not in card.rates or options["channels"] > most:
            raise card.PortAudioError("Invalid sample rate [PaErrorCode -9997]")
        self.kind, self.options, self.callback = kind, options, options["callback"]
        self.active, self.closed, self.latency = False, False, 0.01
        card.streams.append(self)

    def start(self) -> None:
        self.active = True

    def abort(self, ignore_errors: bool = True) -> None:
        self.active = False

    def close(self, ignore_errors: bool = True) -> None:
        self.closed = True

    def call(self, data: np.ndarray, **flags: bool) -> None:
        times = SimpleNamespace(currentTime=1.0, inputBufferAdcTime=0.99, outputBufferDacTime=1.02)
        status = SimpleNamespace(**{"input_overflow": False, "output_underflow": False, **flags})
        self.callback(data, len(data), times, status)


class FakeCard:
    """What this module uses of the package sounddevice."""

    class PortAudioError(Exception):
        pass

    def __init__(self) -> None:
        self.list = [
            self.entry("Built-in Mic", 1, 0, 48_000.0),
            self.entry("Built-in Speaker", 0, 2, 44_100.0),
            self.entry("Headset", 1, 2, 16_000.0),
            self.entry("Headset Pro", 2, 2, 48_000.0),
        ]
        self.rates = {16_000.0, 44_100.0, 48_000.0}
        self.default = SimpleNamespace(device=[0, 1])
        self.streams: list[FakeStream] = []
        self.broken = self.finished = False
        self.restarts = 0

    @staticmethod
    def entry(name: str, inputs: int, outputs: int, rate: float) -> dict[str, Any]:
        return {
            "name": name,
            "hostapi": 0,
            "max_input_channels": inputs,
            "max_output_channels": outputs,
            "default_samplerate": rate,
        }

    def query_hostapis(self) -> list[dict[str, Any]]:
        return [{"name": "Fake", "default_input_device": 0, "default_output_device": 1}]

    def query_devices(self) -> list[dict[str, Any]]:
        return self.list

    def _terminate(self) -> None:
        self.restarts += 1

    def _initialize(self) -> None:
        pass

    def InputStream(self, **options: Any) -> FakeStream:
        return FakeStream(self, "input", options)

    def OutputStream(self, **options: Any) -> FakeStream:
        return FakeStream(self, "output", options)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    fake = FakeCard()
    monkeypatch.setattr(portaudio, "sounddevice", lambda: fake)
    monkeypatch.setattr(module, "_RETRY", 0.02)
    return fake


def until(condition: Any, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return False


@pytest.mark.parametrize("source, target", [(48_000, 24_000), (44_100, 24_000), (16_000, 24_000), (24_000, 44_100)])
def test_resampling_is_clean_prompt_and_even(source: int, target: int) -> None:
    """If this fails, voices are distorted or aliased, or the resampler alone costs tens of milliseconds."""
    resample, block = Resampler(source, target), source // 100
    tone = np.sin(np.arange(2 * source) * (2 * np.pi * 1_000 / source)).astype(np.float32)
    pieces, held = [], []
    for start in range(0, len(tone), block):
        pieces.append(resample(tone[start : start + block]))
        held.append((start + block) / source - sum(map(len, pieces)) / target)
    assert 0 <= max(held) < 0.016
    assert max(map(len, pieces[5:])) - min(map(len, pieces[5:])) <= 1
    got = np.concatenate(pieces)[target // 10 :][: target // 2 * 2 - target // 5]
    spectrum = np.abs(np.fft.rfft(got * np.hanning(len(got))))
    frequency = np.fft.rfftfreq(len(got), 1 / target)
    beside = spectrum[np.abs(frequency - 1_000) > 20]
    assert spectrum.max() > 1e4 * beside.max()


def test_any_rate_and_channels(card: FakeCard) -> None:
    """If this fails, a headset at 16 kHz or a loudspeaker at 44.1 kHz sounds at the wrong pitch, or on one ear."""
    heard: list[np.ndarray] = []
    played = 0

    def fill(out: np.ndarray) -> None:
        nonlocal played
        out[:] = np.sin((played + np.arange(len(out))) * (2 * np.pi * 500 / RATE))
        played += len(out)

    with SoundCard(lambda pcm: heard.append(pcm.copy()), fill, RATE, input_device="2") as sound:
        microphone, loudspeaker = card.streams
        assert microphone.options["samplerate"] == 16_000 and loudspeaker.options["samplerate"] == 44_100
        assert loudspeaker.options["channels"] == 2 and microphone.options["channels"] == 1
        tone = np.sin(np.arange(16_000) * (2 * np.pi * 500 / 16_000)).astype(np.float32)
        out = []
        for start in range(0, 16_000, 160):
            microphone.call(tone[start : start + 160, None])
            block = np.full((441, 2), 9.0, np.float32)
            loudspeaker.call(block)
            out.append(block)
        assert until(lambda: sum(map(len, heard)) > 23_500)
        microphone.call(tone[:160, None], input_overflow=True)
        loudspeaker.call(np.zeros((333, 2), np.float32), output_underflow=True)
        assert (sound.overflows, sound.underflows, sound.dropped) == (1, 1, 0)
        sound.check()
    for pcm, rate in ((np.concatenate(heard), RATE), (np.concatenate(out)[:, 0], 44_100)):
        middle = pcm[rate // 4 : rate // 4 + rate // 2]
        assert np.argmax(np.abs(np.fft.rfft(middle))) == 250  # in steps of 2 Hz
        assert np.abs(np.diff(middle)).max() < 1.02 * 2 * np.pi * 500 / rate, "a click"
    assert np.array_equal(np.concatenate(out)[:, 0], np.concatenate(out)[:, 1])
    assert abs(played - RATE) < 1_000
    assert all(stream.closed for stream in card.streams)


def test_rates_that_the_device_refuses(card: FakeCard) -> None:
    """If this fails, a device that lies about its rate ends the program."""
    card.rates = {48_000.0}
    with SoundCard(lambda pcm: None, lambda out: None, RATE, input_device="2"):
        assert [stream.options["samplerate"] for stream in card.streams] == [48_000, 48_000]
    card.rates = set()
    with pytest.raises(
        DeviceError, match=r"microphone 'Built-in Mic' cannot be opened: Invalid sample rate.*--input-device"
    ):
        SoundCard(lambda pcm: None, lambda out: None, RATE).start()


def test_choosing(card: FakeCard) -> None:
    """If this fails, the wrong microphone listens."""
    known = devices()
    assert find_device(None, "input", known).name == "Built-in Mic"
    assert find_device(None, "output", known).name == "Built-in Speaker"
    assert find_device("headset", "input", known).index == 2, "the whole name wins"
    assert find_device("pro", "output", known).index == 3
    assert find_device("3", "input", known).index == 3
    for wanted, kind, message in (
        ("1", "input", "no microphone has the number 1"),
        ("xyz", "output", "no loudspeaker is called 'xyz'"),
        ("heads", "input", r"several microphones .*2: Headset, 3: Headset Pro"),
    ):
        with pytest.raises(DeviceError, match=message):
            find_device(wanted, kind, known)
    with pytest.raises(DeviceError, match="has no microphone"):
        find_device(None, "input", [])


def test_a_device_that_vanishes(card: FakeCard) -> None:
    """If this fails, unplugging a headset ends the talk, or plugging it in again does not continue it."""
    heard = []
    with SoundCard(lambda pcm: heard.append(len(pcm)), lambda out: out.fill(0), RATE, input_device="headset") as sound:
        gone, card.list[2] = card.list[2], card.entry("Something else", 1, 2, 48_000.0)
        card.list[3] = card.entry("Another", 1, 2, 48_000.0)
        card.streams[0].active = False
        assert until(lambda: not sound.open)
        assert until(lambda: any("no microphone is called 'headset'" in text for text in sound.notices()))
        assert card.streams[0].closed and card.streams[1].closed
        attempts = card.restarts
        assert until(lambda: card.restarts > attempts + 2), "it goes on looking"
        assert not any("waiting" in text for text in sound.notices()), "and says so once"
        card.list[2] = gone
        assert until(lambda: sound.open)
        assert until(lambda: any("sound again" in text for text in sound.notices()))
        card.streams[-2].call(np.ones((1_600, 1), np.float32))
        assert until(lambda: sum(heard) > 0)
        sound.reopen()
        assert until(lambda: sound.openings == 3)
        began = time.monotonic()
    assert time.monotonic() - began < 3.0  # two are promised
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("moshi ")]


def test_a_device_that_falls_silent(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a driver that stops calling leaves a talk that hears nothing and says nothing about it."""
    monkeypatch.setattr(module, "_OPENING", 0.1)
    with SoundCard(lambda pcm: None, lambda out: None, RATE) as sound:
        assert until(lambda: sound.openings >= 2)
        assert any("gone quiet" in text for text in sound.notices())


@pytest.mark.parametrize("system, hint", [("darwin", "System Settings > Privacy & Security"), ("linux", "is it muted")])
def test_nothing_but_zeros(card: FakeCard, monkeypatch: pytest.MonkeyPatch, system: str, hint: str) -> None:
    """If this fails, a Mac's user who has not allowed the microphone talks to a deaf program and learns nothing."""
    monkeypatch.setattr(portaudio, "sys", SimpleNamespace(platform=system))
    with SoundCard(lambda pcm: None, lambda out: None, RATE) as sound:
        for _ in range(40):
            card.streams[0].call(np.zeros((4_800, 1), np.float32))
            assert until(lambda: not sound._raw.available)
        assert until(lambda: any(hint in text for text in sound.notices()))
        for _ in range(40):
            card.streams[0].call(np.zeros((4_800, 1), np.float32))
            assert until(lambda: not sound._raw.available)
        time.sleep(0.05)
        assert sound.notices() == [], "once is enough"
    card.streams.clear()
    with SoundCard(lambda pcm: None, lambda out: None, RATE) as sound:
        card.streams[0].call(np.full((4_800, 1), 1e-4, np.float32))
        for _ in range(40):
            card.streams[0].call(np.zeros((4_800, 1), np.float32))
            assert until(lambda: not sound._raw.available)
        time.sleep(0.05)
        assert sound.notices() == [], "a microphone that was heard once is allowed"


def test_the_systems_choice_changes(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a headset that is plugged in is ignored, or a device chosen by name is abandoned."""
    news: list[dict[str, str | None]] = []

    class Told(watching.Defaults):
        def start(self) -> None:
            pass

        def changed(self) -> dict[str, str | None] | None:
            return news.pop() if news else None

    monkeypatch.setattr(module, "Defaults", Told)
    with SoundCard(lambda pcm: None, lambda out: None, RATE, output_device="headset pro", follow=True) as sound:
        news.append({"input": "Built-in Mic", "output": "Built-in Speaker"})
        assert until(lambda: not news)
        time.sleep(0.1)
        assert sound.openings == 1, "what was open is what the system chose, or was chosen here"
        card.default.device = [2, 1]
        news.append({"input": "Headset", "output": None})
        assert until(lambda: sound.openings == 2)
        assert sound.input is not None and sound.input.name == "Headset"
        assert sound.output is not None and sound.output.name == "Headset Pro"
        notices: list[str] = []
        assert until(lambda: notices.extend(sound.notices()) or "sound again: Headset > Headset Pro" in notices)
        assert "the system's microphone is 'Headset' now; opening it" in notices
    assert (
        SoundCard(lambda pcm: None, lambda out: None, RATE, input_device="1", output_device="2", follow=True)._defaults
        is None
    )


FAKE = """
import pathlib
entries = [dict(name=f"device {number}") for number in range(3)]
choice = [0, 1]
def _initialize():
    choice[:] = map(int, pathlib.Path(__file__).with_name("choice").read_text().split())
def _terminate():
    print("a library has something to say")
def query_devices():
    return entries
def query_hostapis():
    return ({"default_input_device": choice[0], "default_output_device": choice[1]},)
_initialize()
"""


def test_another_process_asks_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, changes of the default device are not noticed, or the process that asks outlives its owner."""
    (tmp_path / "sounddevice.py").write_text(FAKE)
    (tmp_path / "choice").write_text("0 1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    defaults, seen = watching.Defaults(every=0.05), []

    def look() -> bool:
        seen.append(defaults.changed())
        return seen[-1] is not None

    defaults.start()
    assert until(look) and seen[-1] == {"input": "device 0", "output": "device 1"}
    time.sleep(0.3)
    assert not look(), "it speaks only when something has changed"
    (tmp_path / "choice").write_text("")
    time.sleep(0.3)
    assert not look(), "a system that fails for a moment has said nothing"
    (tmp_path / "choice").write_text("2 -1")
    assert until(look) and seen[-1] == {"input": "device 2", "output": None}
    process = defaults._process
    assert process is not None and process.poll() is None
    defaults.stop()
    assert process.poll() is not None
    command = [sys.executable, watching.__file__, "0.05"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as orphan:
        assert orphan.stdin is not None
        orphan.stdin.close()
        assert orphan.wait(10) == 0, "it ends with its owner"
    monkeypatch.setattr(watching.sys, "executable", str(tmp_path / "nothing"))
    broken = watching.Defaults()
    broken.start()
    assert broken.changed() is None
    broken.stop()


def test_errors_in_callbacks_reach_the_owner(card: FakeCard) -> None:
    """If this fails, a fault in a callback is an endless silence."""

    def broken(out: np.ndarray) -> None:
        raise RuntimeError("broken on purpose")

    with SoundCard(lambda pcm: None, broken, RATE) as sound:
        block = np.ones((441, 2), np.float32)
        card.streams[1].call(block)
        assert not block.any()
        with pytest.raises(RuntimeError, match="on purpose"):
            sound.check()


def test_errors_while_opening_reach_the_owner(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a fault in the thread that opens the devices is an endless silence, or ten seconds of waiting."""
    with SoundCard(lambda pcm: None, lambda out: None, RATE) as sound:
        monkeypatch.setattr(card, "query_devices", lambda: [{}])
        sound.reopen()
        assert until(lambda: sound._failure is not None) and not sound.open
        with pytest.raises(KeyError, match="hostapi"):
            sound.check()
    assert all(stream.closed for stream in card.streams)
    with pytest.raises(KeyError, match="hostapi"):
        SoundCard(lambda pcm: None, lambda out: None, RATE).start()


def test_no_portaudio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a Linux machine without PortAudio answers with a traceback."""

    class Missing:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "sounddevice":
                raise OSError("PortAudio library not found")

    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    monkeypatch.setattr(portaudio.sys, "platform", "linux")
    assert main(["devices"]) == 1
    assert "apt-get install libportaudio2" in capsys.readouterr().err


def test_the_verb_devices(card: FakeCard, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, nobody can find the number of a microphone, or scripts cannot read the list."""
    assert main(["devices"]) == 0
    said = capsys.readouterr().out
    assert "Built-in Mic" in said and "default microphone" in said and "default loudspeaker" in said
    assert main(["devices", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == [entry["name"] for entry in card.list]
    assert listed[0]["default_input"] and Device(**listed[1]).default_output
    card.list = []
    assert main(["devices"]) == 0
    assert "no sound device" in capsys.readouterr().out
