"""One conversation over the socket: what is said arrives, in order and unchanged, and it can be steered."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import replace
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import soundfile
from moshi_mlx_app.server.connection import Limits, Talk
from moshi_mlx_app.server.protocols.kyutai import Pcm

from tests.helpers.parrot import Parrot

from .serving import FRAME, RATE, SOON, Client, install, serving, tone


class Reader:
    """Says a word at every fifth frame."""

    def __init__(self, model: Any, **_: Any):
        self.count = 0

    def step(self, step: Any) -> tuple[str, tuple[()]]:
        self.count += 1
        return (" héllo" if self.count % 5 == 0 else ""), ()

    def reset(self) -> None:
        self.count = 0


def test_pcm_is_bit_exact(monkeypatch):
    """If it fails, uncompressed sound is changed, lost or reordered on its way."""
    install(monkeypatch)

    async def run() -> None:
        async with serving() as served, served.client() as client:
            metadata = await client.begun()
            assert (metadata["sample_rate"], metadata["frame_samples"], metadata["audio"]) == (RATE, FRAME, "pcm")
            for index in range(30):
                np.testing.assert_array_equal(await client.say(tone(index)), tone(index))

    asyncio.run(run())


def test_any_block_size_will_do(monkeypatch):
    """If it fails, a browser that sends blocks of another length than a frame is not understood."""
    install(monkeypatch)

    async def run() -> None:
        sound = np.concatenate([tone(index) for index in range(6)])
        async with serving() as served, served.client() as client:
            await client.begun()
            got = [np.zeros(0, np.int16)]
            for start in range(0, len(sound), 128):
                await client.socket.send_bytes(b"\x10" + sound[start : start + 128].astype("<i2").tobytes())
                if (start + 128) // FRAME > start // FRAME:
                    got.append(np.frombuffer(await client.until(0x10), "<i2"))
            np.testing.assert_array_equal(np.concatenate(got), sound)

    asyncio.run(run())


def test_pcm_round_trip_of_every_value():
    """If it fails, 16-bit sound is scaled or rounded wrongly."""
    every = np.arange(-32768, 32768).astype("<i2").tobytes()
    assert Pcm().encode(Pcm().decode(every)) == every
    loud = np.array([1.5, -1.5, 1.0], np.float32)
    assert np.frombuffer(Pcm().encode(loud), "<i2").tolist() == [32767, -32768, 32767]


def test_opus_is_what_the_engine_said(monkeypatch):
    """If it fails, something beside Opus itself changes the sound: the server's stream must decode to exactly what
    Opus makes of the engine's frames, and lie on them after the codec's delay."""
    sphn = pytest.importorskip("sphn")
    install(monkeypatch)
    path = files("moshi_mlx") / "assets" / "questions.wav"
    question = soundfile.read(str(path), 40 * FRAME, dtype="float32")[0].reshape(40, FRAME)
    spoken: list[np.ndarray] = []
    tap = Talk._tap

    def listening_tap(self: Talk, heard: Any, frame: Any) -> None:
        spoken.append(frame.pcm.copy())
        tap(self, heard, frame)

    monkeypatch.setattr(Talk, "_tap", listening_tap)

    async def run() -> np.ndarray:
        encoder, decoder = sphn.OpusStreamWriter(RATE), sphn.OpusStreamReader(RATE)
        got = []
        async with serving() as served, served.client("") as client:
            await client.begun()
            for index in range(40):
                await client.socket.send_bytes(b"\x01" + encoder.append_pcm(question[index]))
                got.append(decoder.append_bytes(await client.until(0x01)))
        return np.concatenate(got)

    got = asyncio.run(run())
    encoder, decoder = sphn.OpusStreamWriter(RATE), sphn.OpusStreamReader(RATE)
    expected = np.concatenate([decoder.append_bytes(encoder.append_pcm(frame)) for frame in spoken])
    np.testing.assert_array_equal(got, expected)
    said = np.concatenate(spoken)
    count = len(said) - 1000
    delay = int(np.argmax([float(np.dot(got[shift : shift + count], said[:count])) for shift in range(1000)]))
    error = got[delay : delay + count] - said[:count]
    snr = 10 * np.log10(np.sum(said[:count] ** 2) / np.sum(error**2))
    print(f"Opus: {delay} samples later ({delay / RATE * 1e3:.1f} ms), SNR {snr:.1f} dB")
    # Opus looks 6.5 ms ahead; what comes back is Opus of Opus's sound.
    assert 150 <= delay <= 160 and snr > 8


def test_text_comes_with_its_time(monkeypatch):
    """If it fails, Moshi's words are lost, damaged, or have no place in the recording."""
    install(monkeypatch, reader=Reader)

    async def run() -> None:
        async with serving() as served, served.client("audio=pcm&events=1") as client:
            await client.begun()
            pieces, events = [], []
            sounds = 0
            for index in range(12):
                await client.socket.send_bytes(b"\x10" + tone(index).tobytes())
                while sounds <= index:
                    kind, content = await client.next()
                    if kind == 0x02:
                        pieces.append(content.decode())
                    elif kind == 0x11 and json.loads(content)["type"] == "text":
                        events.append(json.loads(content))
                    sounds += kind == 0x10
            assert pieces == [" héllo", " héllo"]
            # The reader also saw position 0, which runs before the first frame.
            assert events == [
                {"type": "text", "text": " héllo", "time_s": 0.24},
                {"type": "text", "text": " héllo", "time_s": 0.64},
            ]

    asyncio.run(run())


def test_nothing_unknown_reaches_who_did_not_ask(monkeypatch):
    """If it fails, Kyutai's page throws: it stops at kinds of messages that it does not know."""
    install(monkeypatch)
    sphn = pytest.importorskip("sphn")

    async def run() -> set[int]:
        kinds = set()
        async with serving() as served, served.client("") as client:
            encoder = sphn.OpusStreamWriter(RATE)
            while 4 not in kinds:
                kind, content = await client.next()
                assert kind != -1, f"closed with {content.decode()}"
                kinds.add(kind)
            for _ in range(25):  # a second, in which the page would be told its figures five times
                await client.socket.send_bytes(b"\x01" + encoder.append_pcm(tone(0).astype(np.float32) / 32768))
                await asyncio.sleep(0.04)
                kind = 0
                while kind != 1:
                    kind, content = await client.next()
                    assert kind != -1, f"closed with {content.decode()}"
                    kinds.add(kind)
        return kinds

    assert asyncio.run(run()) - {6} == {0, 1, 4}  # a ping where the machine stood still for two seconds


def test_stats_and_steering(monkeypatch):
    """If it fails, the page's stats, mute, pause or new conversation do nothing."""
    install(monkeypatch)

    async def level(client: Client) -> float:
        return float(json.loads(await client.until(0x11, "stats"))["user_level_db"])

    async def run() -> None:
        async with serving() as served, served.client("audio=pcm&events=1") as client:
            await client.begun()
            for index in range(3):
                await client.say(tone(index))
            await level(client)
            assert -20 < await level(client) < -10
            await client.socket.send_bytes(b'\x11{"type":"mute"}')
            assert not (await client.say(tone(0))).any()
            assert await level(client) <= -90
            await client.socket.send_bytes(b'\x11{"type":"unmute"}')
            assert (await client.say(tone(0))).any()
            for pause, go_on in ((b"\x03\x02", b"\x03\x00"), (b'\x11{"type":"pause"}', b'\x11{"type":"resume"}')):
                await client.socket.send_bytes(pause)
                await client.socket.send_bytes(b"\x10" + tone(1).tobytes())
                await client.socket.send_bytes(go_on)
                np.testing.assert_array_equal(await client.say(tone(7)), tone(7))  # the first was not heard
            for anew in (b"\x03\x03", b'\x11{"type":"reset"}'):
                await client.socket.send_bytes(anew)
                await client.until(0x11, "reset")
                np.testing.assert_array_equal(await client.say(tone(9)), tone(9))
            await client.socket.send_bytes(b"\x03\x01")  # end of turn: nobody needs it where both talk at once
            await client.say(tone(3))

    asyncio.run(run())


def test_sampling_comes_from_the_query(monkeypatch):
    """If it fails, the settings of the page, or of Kyutai's, change nothing."""
    made: list[dict[str, Any]] = []
    install(monkeypatch, made)
    query = (
        "audio=pcm&text_temperature=0.5&text_topk=10&audio_temperature=0.25&audio_topk=40&pad_mult=2&text_seed=7"
        "&audio_seed=8&repetition_penalty=1.25&repetition_penalty_context=32&email=x&worker_auth_id=y"
    )

    async def run() -> dict[str, Any]:
        async with serving() as served, served.client(query) as client:
            return await client.begun()

    metadata = asyncio.run(run())
    generation = made[0]["generation"]
    assert (generation.text.temperature, generation.text.top_k) == (0.5, 10)
    assert (generation.audio.temperature, generation.audio.top_k) == (0.25, 40)
    assert (generation.repetition_penalty, generation.repetition_context) == (1.25, 32)
    assert generation.padding_bonus == 1.0  # before the temperature divides it
    assert made[0]["seed"] == 7
    assert metadata["sampling"]["pad_mult"] == 2 and metadata["sampling"]["text_topk"] == 10


@pytest.mark.parametrize(
    "query",
    [
        "audio=mp3",
        "text_temperature=warm",
        "text_topk=-1",
        "audio_temperature=nan",
        "seed=1.5",
        "audio_topk=" + "9" * 5000,
    ]
    + ["repetition_penalty=0", "text_temperature=1e-9"],
)
def test_a_bad_query_is_named(monkeypatch, query):
    """If it fails, a wrong setting is used silently, or ends the connection without a reason."""
    install(monkeypatch)

    async def run() -> tuple[str, int]:
        async with serving() as served, served.client(query) as client:
            return await client.end()

    error, code = asyncio.run(run())
    assert query.split("=")[0] in error and code == 1008 and len(error) < 200


def test_an_engine_that_fails_ends_its_own_conversation(monkeypatch):
    """If it fails, a fault inside one conversation hangs its client or hurts another."""
    install(monkeypatch)
    parrot = Parrot(fails_at=2, fails_for=13)

    async def run() -> None:
        async with serving(parrot) as served, served.client() as client:
            await client.begun()
            async with served.client("audio=pcm&seed=13") as other:
                await other.begun()
                for _ in range(4):
                    await other.socket.send_bytes(b"\x10" + tone(0).tobytes())
                error, code = await other.end()
                assert "broken on purpose" in error and code == 1011
            np.testing.assert_array_equal(await client.say(tone(1)), tone(1))
            await served.until_free(1)

    asyncio.run(run())


def test_the_end_of_the_server_is_told(monkeypatch):
    """If it fails, Ctrl-C leaves people talking to nobody."""
    install(monkeypatch)

    async def run() -> None:
        async with serving(places=1) as served:
            async with served.client("audio=pcm&events=1") as client, served.client("audio=pcm&events=1") as waiting:
                await client.begun()
                await waiting.until(0x11, "queue")
                stopping = asyncio.create_task(served.server._stop(None))  # type: ignore[arg-type]
                assert json.loads(await client.until(0x11, "end"))["reason"] == "the server stops"
                assert await client.end() == ("", 1001)
                assert await waiting.end() == ("", 1001)
                await asyncio.wait_for(stopping, SOON)

    asyncio.run(run())


def test_a_server_that_stood_still_blames_nobody(monkeypatch):
    """If it fails, a machine that was held up for some seconds ends every conversation ("sound came faster than time
    passes", "the client does not read"), or answers what was said long ago."""
    install(monkeypatch)
    limits = replace(Limits(), ahead=1.0, gone=1.0, bytes=48_000.0, messages=15.0)

    async def run() -> None:
        async with serving(limits=limits) as served, served.client("audio=pcm&events=1") as client:
            await client.begun()
            await client.say(tone(0))
            for _ in range(2):
                await asyncio.sleep(0.3)
                time.sleep(3.0)  # server and all
                for index in range(36):  # what was said meanwhile
                    await client.socket.send_bytes(b"\x10" + tone(index).tobytes())
                # The last of it is answered soon; most was left out, and counted.
                got = 0
                while (await client.heard() != tone(35)).any():
                    got += 1
                assert got < 12
            stats = json.loads(await client.until(0x11, "stats"))
            assert stats["dropped_samples"] > 1.5 * RATE
            with contextlib.suppress(ConnectionError):
                for _ in range(40):  # the allowance is for once
                    await client.socket.send_bytes(b"\x10" + tone(1).tobytes())
            error, code = await client.end()
            assert "faster than time" in error and code == 1008

    asyncio.run(run())


def test_conversations_are_recorded(monkeypatch, tmp_path):
    """If it fails, --record keeps nothing, mixes two people up, or does so without their knowing."""
    install(monkeypatch)

    async def run() -> None:
        async with serving(record=tmp_path / "talks") as served:
            assert (await served.info())["recorded"] is True
            async with served.client() as one, served.client() as other:
                assert (await one.begun())["recorded"] is True
                await other.begun()
                for index in range(5):
                    await one.say(tone(index))
                    await other.say(tone(index + 10))
            await served.until_free(2)
        async with serving() as served, served.client() as client:
            assert (await client.begun())["recorded"] is False and (await served.info())["recorded"] is False

    asyncio.run(run())
    told = [json.loads(line) for line in (tmp_path / "talks" / "recordings.jsonl").read_text().splitlines()]
    wavs = sorted((tmp_path / "talks").glob("*.wav"))
    assert len(wavs) == 2 and sorted(each["path"] for each in told) == [wav.name for wav in wavs]
    first = {}
    for wav in wavs:
        both, rate = soundfile.read(wav, dtype="int16")
        assert rate == RATE and len(both) == 5 * FRAME and wav.with_suffix(".json").exists()
        np.testing.assert_array_equal(both[:, 0], both[:, 1])  # the parrot says what it hears
        first[int(both[100, 0])] = wav
    assert set(first) == {int(tone(0)[100]), int(tone(10)[100])}


def test_a_recording_that_cannot_begin(monkeypatch, tmp_path):
    """If it fails, a folder that went away ends in a fault for the visitor, or its path is told to strangers."""
    install(monkeypatch)
    (tmp_path / "talks").write_text("a file")
    told: list[str] = []

    async def run() -> None:
        async with serving(record=tmp_path / "talks", on_fault=told.append) as served, served.client() as client:
            assert await client.end() == ("this conversation cannot be recorded", 1011)
            await served.until_free(2)

    asyncio.run(run())
    assert len(told) == 1 and str(tmp_path / "talks") in told[0]


def test_kv_bits_reach_the_generator(monkeypatch):
    """If it fails, --kv-bits does nothing in the browser."""
    made: list[dict[str, Any]] = []
    install(monkeypatch, made)

    async def run() -> None:
        async with serving(kv_bits=8) as served, served.client() as client:
            await client.begun()

    asyncio.run(run())
    assert made[0]["kv_bits"] == 8
