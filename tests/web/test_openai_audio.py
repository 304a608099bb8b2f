"""``/v1/audio/speech`` and ``/v1/audio/transcriptions``: by the openai package, by hand, and by clients that go."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import soundfile
from moshi_mlx_app.server.access import Guard
from moshi_mlx_app.server.engine import Engine
from moshi_mlx_app.server.queue import Line
from moshi_mlx_app.server.server import Server, Service, listening
from moshi_mlx_app.server.speech import SpeechService

from moshi_mlx.engine.generator import GenerationConfig
from moshi_mlx.tasks.transcribe import SpeechToText
from tests.helpers import parrot as birds
from tests.helpers.tiny import tiny_model
from tests.helpers.tts import tiny_speaker

from .test_openai import openai_python

HERE = Path(__file__).parent
TEXT = "one of the more"
SOON = 120.0


@pytest.fixture
def recogniser() -> SpeechToText:
    model = tiny_model(stt={"audio_delay_seconds": 0.04}, name="writer")
    assert isinstance(model, SpeechToText)
    return model


@pytest.fixture
def wav(tmp_path: Path, recogniser: SpeechToText) -> Path:
    path = tmp_path / "talk.wav"
    noise = np.random.default_rng(0).standard_normal(60 * recogniser.frame_size) * 0.1
    soundfile.write(path, noise, recogniser.sample_rate)
    return path


@asynccontextmanager
async def served(stt: SpeechToText | None, places: int = 4, token: str = "") -> AsyncIterator[str]:
    server = Server(
        Engine(birds.Parrot(), alone=False), Guard("127.0.0.1", token), Line(1), GenerationConfig(),
        stt=None if stt is None else Service(Engine(stt), Line(1)),
        tts=SpeechService(tiny_speaker(), places, voices="nowhere/nothing"),
    )  # fmt: skip
    async with listening(server, "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}/v1"


def heard(data: str, samples: int) -> np.ndarray:
    sound = bytearray(base64.b64decode(data))
    if sound[:4] == b"fLaC":
        # A stream says that its length is unknown, which players take and libsndfile does not.
        assert not any(sound[22:26]) and not sound[21] & 0xF
        sound[22:26] = samples.to_bytes(4, "big")
    pcm, _ = soundfile.read(io.BytesIO(sound), dtype="float32")
    return pcm


def test_the_openai_package(recogniser: SpeechToText, wav: Path) -> None:
    """If this fails, programs written for OpenAI's speech and transcriptions get errors, other words or other sound."""
    python = openai_python()
    pcm, rate = soundfile.read(wav, dtype="float32")
    expected, said = tiny_speaker().speak(TEXT).pcm, recogniser.transcribe(pcm, rate)

    async def run() -> bytes:
        async with served(recogniser, token="secret") as url:
            process = await asyncio.create_subprocess_exec(
                python, str(HERE / "openai_audio_client.py"), url, "secret", str(wav), TEXT,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            out, errors = await process.communicate()
            assert process.returncode == 0, errors.decode()
            return out

    found: dict[str, Any] = json.loads(asyncio.run(asyncio.wait_for(run(), SOON)))
    assert "writer" in found["models"] and len(found["models"]) == 3
    samples = np.frombuffer(base64.b64decode(found["pcm"]), "<i2") / 32767
    np.testing.assert_allclose(samples, expected, atol=1e-4)
    assert found["sse_pcm"] == found["pcm"] and found["sse"][-1] == "speech.audio.done"
    wave = base64.b64decode(found["wav"])
    assert wave[:4] == b"RIFF" and wave[44:] == base64.b64decode(found["pcm"])
    np.testing.assert_allclose(heard(found["flac"], len(expected)), expected, atol=1e-4)
    for lossy in ("mp3", "opus"):
        assert len(heard(found[lossy], 0)) >= 0.9 * len(expected)
    assert found["wrong voice"][0] == "voice" and "no voices by name" in found["wrong voice"][1]
    assert found["wrong input"][0] == "input" and found["wrong speed"][0] == "speed"
    assert found["wrong response_format"][0] == "response_format"
    text = " ".join(word.text.strip() for word in said.words)
    assert said.words and found["json"] == text and found["text"].strip() == text
    assert found["vtt"].startswith("WEBVTT") and " --> " in found["srt"]
    assert [word for word, _, _ in found["words"]] == [word.text.strip() for word in said.words]
    starts = [start for _, start, _ in found["words"]]
    assert starts == pytest.approx([word.start for word in said.words], abs=1e-3)
    assert " ".join(found["segments"]) == text
    assert "".join(found["deltas"][:-1]) == text == found["deltas"][-1]
    assert found["events"][0][0] == "transcript.text.delta" and found["events"][-1][0] == "transcript.text.done"
    assert not any(extra for _, extra in found["events"]), "fields that the package's types do not know"
    assert "sound" in found["not sound"] and "/" not in found["not sound"].replace("the file", "")
    assert found["nothing"]


def test_hostile_requests(recogniser: SpeechToText, wav: Path) -> None:
    """If this fails, nonsense gets another answer than its error, or takes the server down for others."""
    big = b"x" * (1 << 20)

    async def form(fields: dict[str, Any]) -> aiohttp.FormData:
        data = aiohttp.FormData()
        for name, value in fields.items():
            data.add_field(name, value, filename="a.wav" if isinstance(value, bytes) else None)
        return data

    async def run() -> list[tuple[int, str]]:
        found = []
        async with served(recogniser) as url, aiohttp.ClientSession() as session:
            speech, write = f"{url}/audio/speech", f"{url}/audio/transcriptions"
            for body in (b"", b"{", b"[]", b'{"input": 3}', b'{"input": "one", "voice": 7}', b"[" * 60000, big,
                         json.dumps({"input": "one " * 2000, "voice": "default"}).encode(),
                         json.dumps({"input": "🙂", "voice": "default"}).encode()):  # fmt: skip
                async with session.post(speech, data=body) as response:
                    found.append((response.status, (await response.json())["error"]["message"]))
            for fields in ({}, {"model": "x"}, {"file": "no file", "model": big.decode()},
                           {"file": wav.read_bytes(), "response_format": "odt"},
                           {"file": wav.read_bytes(), "timestamp_granularities[]": "year"},
                           {"file": b"RIFF" + big}):  # fmt: skip
                async with session.post(write, data=await form(fields)) as response:
                    found.append((response.status, (await response.json())["error"]["message"]))
            async with session.post(write, data=b"x", headers={"Content-Type": "multipart/form-data"}) as response:
                found.append((response.status, (await response.json())["error"]["message"]))
            async with session.post(write, data=await form({"file": wav.read_bytes()})) as response:
                assert response.status == 200 and "text" in await response.json()
        return found

    found = asyncio.run(asyncio.wait_for(run(), SOON))
    assert {status for status, _ in found} == {400, 413}, found
    assert all(0 < len(said) < 200 and "\n" not in said for _, said in found), found


def test_clients_that_go(recogniser: SpeechToText, wav: Path) -> None:
    """If this fails, a client that hangs up keeps its place, or its recording is written down for nobody."""
    pcm, rate = soundfile.read(wav)
    long = io.BytesIO()
    soundfile.write(long, np.tile(pcm, 500), rate, format="WAV")

    async def run() -> None:
        async with served(recogniser, places=1) as url:
            for path in ("speech", "transcriptions"):
                data: Any = json.dumps(
                    {"input": "one of the more " * 100, "voice": "default", "response_format": "pcm"}
                )
                if path == "transcriptions":
                    data = aiohttp.FormData()
                    data.add_field("file", long.getvalue(), filename="a.wav")
                    data.add_field("stream", "true")
                async with aiohttp.ClientSession() as session:
                    async with session.post(f"{url}/audio/{path}", data=data) as response:
                        assert response.status == 200
                        await response.content.read(10)
            async with aiohttp.ClientSession() as session:
                for _ in range(100):
                    body = {"input": "one", "voice": "default", "response_format": "pcm"}
                    async with session.post(f"{url}/audio/speech", json=body) as response:
                        if response.status == 200:
                            break
                        assert response.status == 503
                        await asyncio.sleep(0.1)
                assert response.status == 200
                form = aiohttp.FormData()
                form.add_field("file", wav.read_bytes(), filename="a.wav")
                async with session.post(f"{url}/audio/transcriptions", data=form) as response:
                    assert response.status == 200 and await response.json()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_without_the_models() -> None:
    """If this fails, a server without a recogniser promises to write things down."""

    async def run() -> int:
        async with served(None) as url, aiohttp.ClientSession() as session:
            async with session.post(f"{url}/audio/transcriptions", data=b"") as response:
                return response.status

    assert asyncio.run(asyncio.wait_for(run(), SOON)) in (404, 405)
