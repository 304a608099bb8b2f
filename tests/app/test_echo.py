"""Echo cancellation in simulated rooms (benchmarks/echo.py measures more of them)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from moshi_mlx_app.audio.adaptive import AdaptiveFilter, Drift, Interpolator
from moshi_mlx_app.audio.echo import EchoError, WebRtcEcho
from moshi_mlx_app.cli import main

from tests.app.test_talk import QUESTIONS, card, parrot  # noqa: F401
from tests.helpers.room import Room, dense, reduction, run

RATE = 24_000


class FakeProcessing:
    """Keeps what it is given; takes a reference out that is aligned to the sample."""

    def __init__(self, **_: Any):
        self.references: list[np.ndarray] = []

    def process_reverse_stream(self, frame: Any) -> None:
        self.references.append(np.frombuffer(frame.data, np.int16).copy())

    def process_stream(self, frame: Any) -> None:
        assert len(frame.data) == 480 and frame.rate == RATE

    def set_stream_delay_ms(self, delay: int) -> None:
        assert 0 <= delay < 100


def fake_livekit(monkeypatch: pytest.MonkeyPatch) -> list[FakeProcessing]:
    made: list[FakeProcessing] = []
    module = ModuleType("livekit")
    module.rtc = SimpleNamespace(  # type: ignore[attr-defined]
        AudioFrame=lambda data, rate, channels, size: SimpleNamespace(data=data, rate=rate),
        AudioProcessingModule=lambda **options: made.append(FakeProcessing(**options)) or made[-1],
    )
    monkeypatch.setitem(sys.modules, "livekit", module)
    return made


def lags(processing: FakeProcessing) -> np.ndarray:
    """For every 10 ms of the microphone, by how many samples its reference comes early."""
    found = []
    for index, reference in enumerate(processing.references):
        if reference[0] > 0:
            found.append(int(reference[0]) - 1 - index * 240)
    return np.array(found)


@pytest.mark.parametrize("drift", [0.0, 300e-6, -300e-6])
def test_the_reference_is_what_left_the_loudspeaker_at_that_time(monkeypatch: pytest.MonkeyPatch, drift: float) -> None:
    """If this fails, the canceller is shown sound that is played at another time, and takes nothing out."""
    made = fake_livekit(monkeypatch)
    echo = WebRtcEcho(RATE)
    far = (np.arange(1, 30_000) / 32_768).astype(np.float32)  # each sample spells its number
    out = run(echo, far, np.zeros_like(far), Room(drift=drift, noise=0.0, gain=0.0))
    assert len(out) % 240 == 0 and abs(len(out) - len(far)) < 400
    early = lags(made[0]) / RATE
    assert len(early) > 100
    assert (early > -0.001).all() and (early < 0.06).all()
    assert np.ptp(early) < 0.03


def test_a_loudspeaker_that_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, one stall of the loudspeaker leaves the echo in for the rest of the talk."""
    made = fake_livekit(monkeypatch)
    echo = WebRtcEcho(RATE)
    for block in range(300):
        now = block * 0.01 + 100.0
        late = 0.5 if block >= 100 else 0.0  # from here on everything is played half a second later
        count = np.arange(block * 240, block * 240 + 240) % 30_000 + 1
        echo.played((count / 32_768).astype(np.float32), now + late + 0.02)
        echo.cancel(np.zeros(240, np.float32), now)
    references = made[0].references
    last = int(references[-1][0]) - 1
    assert abs(last - (299 - 50) * 240 % 30_000) < 0.04 * RATE
    assert 1 <= echo.jumps <= 6


def test_without_the_package(
    card: Any,  # noqa: F811
    parrot: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """If this fails, a machine without the package cannot talk, or echoes without saying why."""
    monkeypatch.setitem(sys.modules, "livekit", None)
    with pytest.raises(EchoError, match="headphones, or run 'pip install livekit'"):
        WebRtcEcho(RATE)
    assert main(["talk", "--seconds", "0.3", "--json"]) == 0
    said = capsys.readouterr()
    assert "use headphones" in said.err and json.loads(said.out)["echo_cancellation"] is False
    assert main(["talk", "--seconds", "0.3", "--json", "--no-aec"]) == 0
    assert "headphones" not in capsys.readouterr().err


def speech(seconds: float, start: float = 0.0) -> np.ndarray:
    spoken = dense(soundfile.read(Path(QUESTIONS), dtype="float32")[0])
    return np.tile(spoken, 3)[round(start * RATE) : round((start + seconds) * RATE)]


def test_only_moshi_speaks() -> None:
    """If this fails, Moshi hears itself through the microphone and answers its own words."""
    pytest.importorskip("livekit", reason="the package livekit (WebRTC's echo cancellation) is not installed")
    far = speech(5) * np.float32(0.7)
    for room in (Room(), Room(delay=0.12, drift=200e-6, distortion=0.5)):
        left = run(WebRtcEcho(RATE), far, np.zeros_like(far), room)
        echo = room.echo(far, RATE)
        for second in range(1, 5):
            part = slice(second * RATE, (second + 1) * RATE)
            assert reduction(left[part], echo[part]) > 25


@pytest.mark.parametrize(
    "room", [Room(), Room(gain=1.0), Room(reverb=0.4), Room(drift=-200e-6)], ids=["usual", "loud", "hall", "clocks"]
)
def test_both_speak(room: Room) -> None:
    """If this fails, Moshi cannot be interrupted: what is said over its voice is damaged, or drowns in it."""
    pytest.importorskip("livekit", reason="the package livekit (WebRTC's echo cancellation) is not installed")
    far = speech(10) * np.float32(0.7)
    near = np.concatenate([np.zeros(8 * RATE, np.float32), speech(2, start=5.5)])
    left = run(WebRtcEcho(RATE), far, near, room)[8 * RATE + 222 :]
    clean = near[8 * RATE :][: len(left)]
    before = reduction(room.echo(far, RATE)[8 * RATE :], clean)
    after = reduction(left - clean, clean)
    assert 0 < before < 12 and after > before + 8, "the voice by what is there beside it"
    # The first tenth of a second over Moshi's voice is heard, too.
    began = slice(0, RATE // 10)
    assert reduction((left - clean)[began], clean[began]) > 3


def test_the_room_changes() -> None:
    """If this fails, Moshi hears its own voice for seconds after the laptop was moved."""
    pytest.importorskip("livekit", reason="the package livekit (WebRTC's echo cancellation) is not installed")
    far = speech(8) * np.float32(0.7)
    rooms = Room(), Room(delay=0.053)

    class Moved(Room):
        def echo(self, played: np.ndarray, rate: int, seed: int = 0) -> np.ndarray:
            first, then = (room.echo(played, rate, seed + index) for index, room in enumerate(rooms))
            return np.concatenate([first[: 4 * rate], then[4 * rate :]])

    left, echo = run(WebRtcEcho(RATE), far, np.zeros_like(far), Moved()), Moved().echo(far, RATE)
    assert reduction(left[5 * RATE :], echo[5 * RATE :]) > 12
    assert reduction(left[7 * RATE :], echo[7 * RATE :]) > 20


@pytest.mark.parametrize("share", [0.0, 80e-6, -300e-6])
def test_the_clocks_difference_is_heard(share: float) -> None:
    """If this fails, a microphone and a loudspeaker of different makes leave the echo in while both sides speak."""
    played = speech(5)
    place = np.arange(len(played)) * (1 + share) - 1_200
    heard = np.interp(place, np.arange(len(played)), played).astype(np.float32)
    drift, told = Drift(240), []
    for at in range(0, len(played) - 239, 240):
        said = drift(played[at : at + 240], heard[at : at + 240], 0.0, 5)
        told += [] if said is None else [said]
    assert len(told) >= 5
    assert np.mean(told) == pytest.approx(share, abs=15e-6) and np.ptp(told) < 100e-6
    other = speech(5, start=4.0)
    drift = Drift(240)
    said = [drift(played[at : at + 240], other[at : at + 240], 0.0, 5) for at in range(0, len(played) - 239, 240)]
    assert set(said) == {None}, "another voice says nothing of the clocks"


def test_between_samples() -> None:
    """If this fails, the reference that follows the loudspeaker's clock is distorted, and so is what is taken out."""
    interpolate = Interpolator()
    at = np.arange(interpolate.before + 240 + interpolate.after)
    wave = lambda place: np.sin(0.3 * place) + 0.5 * np.cos(2.0 * place)  # noqa: E731
    samples = wave(at).astype(np.float32)
    assert np.array_equal(interpolate(samples, 0.0, 1.0, 240), samples[interpolate.before :][:240])
    for part, step in ((0.4, 1.0), (0.999, 1.001), (0.0, 0.999), (0.7, 1.0003)):
        wanted = wave(interpolate.before + part + step * np.arange(240))
        assert np.abs(interpolate(samples, part, step, 240) - wanted).max() < 0.02


def test_the_filter_finds_a_room() -> None:
    """If this fails, the voice in double talk is only as good as AEC3 leaves it."""
    rng = np.random.default_rng(0)
    far = rng.standard_normal(3 * RATE).astype(np.float32) * np.float32(0.1)
    room = Room(noise=0.0, delay=0.01, reverb=0.1)
    heard = room.echo(far, RATE).astype(np.float32)
    adapt = AdaptiveFilter(240, 15)
    left = np.concatenate([adapt(far[at : at + 240], heard[at : at + 240]) for at in range(0, len(far), 240)])
    assert reduction(left[2 * RATE :], heard[2 * RATE :]) > 20


def test_only_the_user_speaks() -> None:
    """If this fails, echo cancellation spoils the user's speech even when there is no echo."""
    pytest.importorskip("livekit", reason="the package livekit (WebRTC's echo cancellation) is not installed")
    near = soundfile.read(Path(QUESTIONS), dtype="float32")[0][: 4 * RATE]
    left = run(WebRtcEcho(RATE), np.zeros_like(near), near, Room())
    size = 1 << 18
    place = int(np.argmax(np.fft.irfft(np.fft.rfft(left, size) * np.conj(np.fft.rfft(near, size)), size)))
    assert place < 0.02 * RATE
    left, near = left[place:], near[: len(left) - place]
    assert np.dot(left, near) / np.linalg.norm(left) / np.linalg.norm(near) > 0.95
