"""``/api/asr-streaming``: the messages of Kyutai's speech-to-text clients, pauses, markers, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import mlx.core as mx
import msgpack
import numpy as np
import pytest
from moshi_mlx_app.server.access import Guard
from moshi_mlx_app.server.engine import Engine
from moshi_mlx_app.server.protocols import kyutai_asr
from moshi_mlx_app.server.protocols.kyutai_asr import Words
from moshi_mlx_app.server.queue import Line
from moshi_mlx_app.server.server import Server, Service, listening

from moshi_mlx.engine.generator import GenerationConfig
from moshi_mlx.engine.text import EPAD, PAD
from moshi_mlx.tasks.transcribe import SpeechToText
from tests.helpers import parrot as birds
from tests.helpers.signal import speechlike
from tests.helpers.tiny import tiny_model

SOON = 60.0


@pytest.fixture
def model() -> SpeechToText:
    made = tiny_model(stt={"audio_delay_seconds": 0.16})
    assert isinstance(made, SpeechToText)
    # Random weights hardly ever choose what separates words here: the tokens 0 and 3.
    weight = np.array(made.lm.text_linear.weight)
    weight[[EPAD, PAD]] *= 4
    made.lm.text_linear.weight = mx.array(weight)
    return made


@asynccontextmanager
async def served(model: SpeechToText, places: int = 4, token: str = "") -> AsyncIterator[str]:
    guard = Guard("127.0.0.1", token)
    service = Service(Engine(model), Line(places))
    server = Server(Engine(birds.Parrot(), alone=False), guard, Line(1), GenerationConfig(), stt=service)
    async with listening(server, "127.0.0.1", 0) as port:
        yield f"ws://127.0.0.1:{port}/api/asr-streaming"


def packed(kind: str, **values: Any) -> bytes:
    return bytes(msgpack.packb({"type": kind, **values}, use_single_float=True))


async def written(url: str, pcm: np.ndarray, block: int = 700, **options: Any) -> list[dict[str, Any]]:
    """All messages of a recording, sent as Kyutai's script sends a file: blocks, a marker, silence until it is back."""
    found: list[dict[str, Any]] = []
    async with aiohttp.ClientSession() as session, session.ws_connect(url, **options) as socket:
        found.append(msgpack.unpackb((await socket.receive()).data))
        for start in range(0, len(pcm), block):
            await socket.send_bytes(packed("Audio", pcm=pcm[start : start + block].tolist()))
        await socket.send_bytes(packed("Marker", id=7))

        async def silence() -> None:
            for _ in range(40):  # no more than may wait, or a slow machine leaves out what was said
                await socket.send_bytes(packed("Audio", pcm=[0.0] * block))
                await asyncio.sleep(0.05)

        quiet = asyncio.ensure_future(silence())
        try:
            async for received in socket:
                if received.type == aiohttp.WSMsgType.BINARY:
                    found.append(msgpack.unpackb(received.data))
                    if found[-1]["type"] == "Marker":
                        return found
        finally:
            quiet.cancel()
            await asyncio.gather(quiet, return_exceptions=True)
    return found


def texts(messages: list[dict[str, Any]]) -> list[str]:
    return [message["text"] for message in messages if message["type"] == "Word"]


def test_words(model: SpeechToText) -> None:
    """If this fails, Kyutai's clients get other words than `transcribe`, or each other's, or no end."""
    rate = model.sample_rate
    sounds = [speechlike(3 * rate, rate, seed).astype(np.float32) for seed in range(3)]

    async def run() -> list[list[dict[str, Any]]]:
        async with served(model) as url:
            return list(await asyncio.gather(*(written(url, pcm) for pcm in sounds)))

    for pcm, messages in zip(sounds, asyncio.run(asyncio.wait_for(run(), SOON)), strict=True):
        assert messages[0] == {"type": "Ready"} and messages[-1] == {"type": "Marker", "id": 7}
        words = Words(model.tokenizer, model.frame_rate, model.audio_delay)
        expected = []
        with model.session(seed=0) as session:
            for index in range(len(pcm) // model.frame_size):
                frame = session.step(pcm[index * model.frame_size : (index + 1) * model.frame_size])
                expected += words.step(index, int(frame.step.text[0]))
        found = [message for message in messages if message["type"] in ("Word", "EndWord")]
        assert len(texts(expected)) > 3 and texts(found)[: len(texts(expected))] == texts(expected)
        for one, other in zip(found, expected, strict=False):
            assert one == pytest.approx(other, abs=1e-3)


def test_times_of_kyutais_server() -> None:
    """If this fails, words stand elsewhere in time than with Kyutai's server: 0 begins a word and ends the last."""

    class Tokenizer:
        def decode(self, tokens: list[int]) -> str:
            return "".join(map(chr, tokens))

    words = Words(Tokenizer(), 12.5, 0.5)  # type: ignore[arg-type]
    rows = [3, 3, 3, 3, 3, 3, EPAD, 104, 105, 3, EPAD, 121, 3, 3, EPAD]
    said = [message for index, token in enumerate(rows) for message in words.step(index, token)]
    assert [message["type"] for message in said] == ["Word", "EndWord", "Word", "EndWord"]
    assert said[0]["text"] == "hi" and said[0]["start_time"] == pytest.approx(8 / 12.5 - 0.5)
    assert said[1]["stop_time"] == pytest.approx(12 / 12.5 - 0.5) == said[2]["start_time"]
    assert said[2]["text"] == "y" and said[3]["stop_time"] == pytest.approx(16 / 12.5 - 0.5)


def test_who_comes_too_many_or_without_a_key(model: SpeechToText) -> None:
    """If this fails, a client that has no place waits in silence, or strangers are let in."""

    async def run() -> list[Any]:
        async with served(model, places=1, token="secret") as url, aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.WSServerHandshakeError):
                await session.ws_connect(url)
            headers = {"kyutai-api-key": "secret"}
            async with session.ws_connect(url, headers=headers) as first:
                ready = msgpack.unpackb((await first.receive()).data)
                async with session.ws_connect(f"{url}?auth_id=secret") as second:
                    await first.close()
                    return [ready, msgpack.unpackb((await second.receive()).data)]

    assert asyncio.run(asyncio.wait_for(run(), SOON)) == [{"type": "Ready"}] * 2


@pytest.mark.parametrize(
    "message",
    [
        b"", b"\xc1", msgpack.packb(3), packed("Nothing"), packed("Audio"), packed("Audio", pcm="loud"),
        packed("Audio", pcm=[0.0, float("nan")]), packed("Audio", pcm=[[0.0]]), packed("Audio", pcm=[None]),
        packed("OggOpus", data="text"), "text",
    ],
)  # fmt: skip
def test_nonsense_ends_one(model: SpeechToText, message: bytes | str) -> None:
    """If this fails, a broken client is answered with nothing, or takes others with it."""
    rate = model.sample_rate
    pcm = speechlike(rate, rate, 0).astype(np.float32)

    async def run() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        async with served(model) as url, aiohttp.ClientSession() as session:
            other = asyncio.ensure_future(written(url, pcm))
            async with session.ws_connect(url) as socket:
                assert msgpack.unpackb((await socket.receive()).data) == {"type": "Ready"}
                await (socket.send_str(message) if isinstance(message, str) else socket.send_bytes(message))
                told = msgpack.unpackb((await socket.receive()).data)
            return told, await other

    told, other = asyncio.run(asyncio.wait_for(run(), SOON))
    assert told["type"] == "Error" and told["message"] and other[-1]["type"] == "Marker"


def test_opus(model: SpeechToText) -> None:
    """If this fails, clients that send Ogg/Opus are not heard."""
    sphn = pytest.importorskip("sphn", reason="comes with the web extra")
    if model.sample_rate not in (8_000, 12_000, 16_000, 24_000, 48_000):
        encoder = None
    else:
        encoder = sphn.OpusStreamWriter(model.sample_rate)

    async def run() -> str:
        async with served(model) as url, aiohttp.ClientSession() as session:
            async with session.ws_connect(url) as socket:
                await socket.receive()
                data = b"OggS nonsense" if encoder is None else bytes(encoder.append_pcm(np.zeros(1_920, np.float32)))
                await socket.send_bytes(packed("OggOpus", data=data))
                await socket.send_bytes(packed("Marker", id=1))
                for _ in range(40):
                    await socket.send_bytes(packed("Audio", pcm=[0.0] * model.frame_size))
                while True:
                    told = msgpack.unpackb((await socket.receive()).data)
                    if told["type"] in ("Marker", "Error"):
                        return str(told["type"])

    assert asyncio.run(asyncio.wait_for(run(), SOON)) in ("Marker", "Error")


def test_markers_are_bounded(model: SpeechToText, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a client that sends markers only fills the server's memory."""

    async def run() -> dict[str, Any]:
        async with served(model) as url, aiohttp.ClientSession() as session:
            async with session.ws_connect(url) as socket:
                await socket.receive()
                for number in range(1002):
                    await socket.send_bytes(packed("Marker", id=number))
                while (received := await socket.receive()).type == aiohttp.WSMsgType.BINARY:
                    told: dict[str, Any] = msgpack.unpackb(received.data)
                    if told["type"] == "Error":
                        return told
                raise AssertionError("it says nothing")

    assert "markers" in asyncio.run(asyncio.wait_for(run(), SOON))["message"]
    assert kyutai_asr.__all__
