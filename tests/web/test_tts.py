"""``/api/tts_streaming``: the messages of Kyutai's text-to-speech clients, many clients, refusals."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import mlx.core as mx
import msgpack
import numpy as np
import pytest
from moshi_mlx_app.server.access import Guard
from moshi_mlx_app.server.engine import Engine
from moshi_mlx_app.server.queue import Line
from moshi_mlx_app.server.server import Server, listening
from moshi_mlx_app.server.speech import SpeechService

from moshi_mlx.engine.generator import GenerationConfig
from moshi_mlx.tasks.speak import DEFAULT_VOICE, TextToSpeech
from tests.helpers import parrot as birds
from tests.helpers.tts import tiny_speaker

TEXT = "the man will have one of the more"
SOON = 120.0


@asynccontextmanager
async def served(
    model: TextToSpeech, places: int = 8, token: str = "", voices: str = "nowhere/nothing"
) -> AsyncIterator[str]:
    service = SpeechService(model, places, voices=voices)
    guard = Guard("127.0.0.1", token)
    server = Server(Engine(birds.Parrot(), alone=False), guard, Line(1), GenerationConfig(), tts=service)
    async with listening(server, "127.0.0.1", 0) as port:
        yield f"127.0.0.1:{port}"


async def spoken(address: str, text: str, query: str = "", headers: dict[str, str] | None = None) -> list[Any]:
    """All messages of a text, sent as Kyutai's script sends it: word by word, then Eos."""
    async with aiohttp.ClientSession() as session:
        url = f"ws://{address}/api/tts_streaming?format=PcmMessagePack{query}"
        async with session.ws_connect(url, headers=headers) as socket:
            for word in text.split():
                await socket.send_bytes(msgpack.packb({"type": "Text", "text": word}))
            await socket.send_bytes(msgpack.packb({"type": "Eos"}))
            found = []
            async for received in socket:
                if received.type == aiohttp.WSMsgType.BINARY:
                    found.append(msgpack.unpackb(received.data))
            return found


def sound(messages: list[Any]) -> np.ndarray:
    return np.array([x for one in messages if one["type"] == "Audio" for x in one["pcm"]], np.float32)


def test_a_text() -> None:
    """If this fails, Kyutai's clients hear something else than `speak` gives, or get other times."""
    model = tiny_speaker()
    expected = model.speak(TEXT, seed=3)

    async def run() -> tuple[list[Any], list[Any]]:
        async with served(model) as address:
            both = await asyncio.gather(spoken(address, TEXT, "&seed=3"), spoken(address, "there is", "&seed=4"))
            return both[0], both[1]

    first, second = asyncio.run(asyncio.wait_for(run(), SOON))
    assert first[0] == {"type": "Ready"}
    np.testing.assert_allclose(sound(first), expected.pcm, atol=1e-6)
    np.testing.assert_allclose(sound(second), model.speak("there is", seed=4).pcm, atol=1e-6)
    words = [one for one in first if one["type"] == "Text"]
    assert [one["text"] for one in words] == TEXT.split()
    rate = model.frame_rate
    for one, word in zip(words, expected.words, strict=True):
        assert one["start_s"] == pytest.approx(word.start + 1 / rate, abs=1e-3)
        assert one["stop_s"] == pytest.approx(word.end + 1 / rate, abs=1e-3)
    assert all(len(one["pcm"]) == model.frame_size for one in first if one["type"] == "Audio")


def test_raw_sound_and_wav() -> None:
    """If this fails, clients without MessagePack, or with a POST, hear nothing."""
    model = tiny_speaker()
    expected = model.speak("one of the more").pcm

    async def run() -> tuple[bytes, bytes]:
        async with served(model) as address, aiohttp.ClientSession() as session:
            data = b""
            async with session.ws_connect(f"ws://{address}/api/tts_streaming?format=Pcm") as socket:
                await socket.send_str("one of")
                await socket.send_str("the more")
                await socket.send_bytes(b"\0")
                async for received in socket:
                    data += received.data
            url = f"http://{address}/api/tts_streaming"
            async with session.post(url, json={"text": "one of the more"}) as response:
                assert response.status == 200
                return data, await response.read()

    raw, wav = asyncio.run(asyncio.wait_for(run(), SOON))
    np.testing.assert_allclose(np.frombuffer(raw, "<f4"), expected, atol=1e-6)
    assert wav[:4] == b"RIFF" and wav[4:8] == b"\xff" * 4 and wav[40:44] == b"\xff" * 4
    np.testing.assert_allclose(np.frombuffer(wav[44:], "<i2") / 32767, expected, atol=1e-4)


def test_refusals() -> None:
    """If this fails, a client that asks for too much or for nonsense gets another voice, or silence."""
    model = tiny_speaker()

    async def run() -> dict[str, Any]:
        found: dict[str, Any] = {}
        async with served(model, places=1) as address, aiohttp.ClientSession() as session:
            found["voice"] = await spoken(address, "one", "&voice=nobody.wav")
            url = f"ws://{address}/api/tts_streaming?format=PcmMessagePack"
            async with session.ws_connect(url) as held:
                assert msgpack.unpackb((await held.receive()).data) == {"type": "Ready"}
                found["full"] = await spoken(address, "one")
                await held.send_bytes(b"\xc1 nonsense")
                found["nonsense"] = msgpack.unpackb((await held.receive()).data)
            found["again"] = await spoken(address, "one")
            found["nothing"] = await spoken(address, "")
            async with session.post(f"http://{address}/api/tts_streaming", data=b"{") as response:
                found["post"] = response.status
        return found

    found = asyncio.run(asyncio.wait_for(run(), SOON))
    assert [one["type"] for one in found["voice"]] == ["Error"] and "no voices by name" in found["voice"][0]["message"]
    assert found["full"] == [{"type": "Error", "message": "no free channels"}]
    assert found["nonsense"]["type"] == "Error" and found["post"] == 400
    assert len(sound(found["again"])) and found["nothing"] == [{"type": "Ready"}]


def test_the_token() -> None:
    """If this fails, Kyutai's clients cannot say their key, or nobody needs one."""

    async def run() -> list[Any]:
        async with served(tiny_speaker(), token="secret") as address:
            with pytest.raises(aiohttp.WSServerHandshakeError):
                await spoken(address, "one")
            await spoken(address, "one", "&auth_id=secret")
            return await spoken(address, "one", headers={"kyutai-api-key": "secret"})

    assert asyncio.run(asyncio.wait_for(run(), SOON))[0] == {"type": "Ready"}


def test_many_clients() -> None:
    """If this fails, 32 clients at once get each other's sound, or wait for each other."""
    model = tiny_speaker()

    async def run() -> list[list[Any]]:
        async with served(model, places=32) as address:
            return await asyncio.gather(*(spoken(address, "one of", f"&seed={seed}") for seed in range(32)))

    found = asyncio.run(asyncio.wait_for(run(), SOON))
    for seed in (0, 17, 31):
        np.testing.assert_allclose(sound(found[seed]), model.speak("one of", seed=seed).pcm, atol=1e-5)


@pytest.mark.skipif("TTS_RUST_SERVER_PY" not in os.environ, reason="TTS_RUST_SERVER_PY names Kyutai's script")
def test_kyutais_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, tts_rust_server.py of delayed-streams-modeling, unchanged, does not run against this server."""
    import soundfile

    path = Path(os.environ["TTS_RUST_SERVER_PY"])
    model = tiny_speaker(speakers=True)
    voices = tmp_path / "voices"
    (voices / "expresso").mkdir(parents=True)
    wavs = mx.array(np.random.default_rng(0).standard_normal((1, 12, 3)).astype(np.float32))
    mx.save_safetensors(str(voices / f"{DEFAULT_VOICE}.00000000@2.safetensors"), {"speaker_wavs": wavs})
    python = os.environ.get("TTS_RUST_SERVER_PYTHON", sys.executable)

    async def run() -> str:
        async with served(model, token="public_token", voices=str(voices)) as address:
            arguments = [str(path), "-", str(tmp_path / "out.wav"), "--url", f"ws://{address}"]
            process = await asyncio.create_subprocess_exec(
                python, *arguments, stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
                stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            out, _ = await process.communicate(b"one of the more\n")
            assert process.returncode == 0, out.decode()
            return out.decode()

    asyncio.run(asyncio.wait_for(run(), SOON))
    pcm, _ = soundfile.read(tmp_path / "out.wav", dtype="float32")
    voice = model.voice(DEFAULT_VOICE, DEFAULT_VOICE, source=str(voices))
    np.testing.assert_allclose(pcm, model.speak("one of the more", voice=voice).pcm, atol=1e-3)
