"""What clients of OpenAI's protocols send: events of every type, with fields of every kind."""

from __future__ import annotations

import base64
import contextlib
import json
import random
from pathlib import Path
from typing import Any

import aiohttp
from moshi_mlx_app.server.protocols.openai_live import LiveTalk
from moshi_mlx_app.server.protocols.openai_realtime import RealtimeTalk

from tests.web.serving import Served, tone

from . import Attack, Attempt, fuzzer
from .files import mutate
from .server import _World

DOORS: dict[str, list[str]] = {
    "/v1/realtime": [*RealtimeTalk.handlers, "output_audio_buffer.clear", "transcription_session.update", ""],
    "/v1/live/sessions": [*LiveTalk.handlers, "session.output_audio_fixture.play", "transport.dtmf.send", "\ud800"],
}
_SOUND = base64.b64encode(tone(1).astype("<i2").tobytes()).decode()
_FIELDS = [
    "audio", "session", "item", "item_id", "content_index", "audio_end_ms", "response", "response_id", "content",
    "event_id", "previous_item_id", "type", "model", "instructions", "format", "rate", "input", "output", "voice",
    "turn_detection", "tools", "output_modalities", "metadata", "role", "id", "text", "delegation", "delegation_id",
    "responses", "triggers", "silence_duration_ms", "prefix_padding_ms", "transcript", "__proto__",
]  # fmt: skip
_STRINGS = [
    "", "x", "\ud800", "\u202e\x00", "x" * 2000, _SOUND, _SOUND[:-1], "AAAA", "====", "é", "realtime", "audio/pcm",
    "audio/pcmu", "audio/pcma", "server_vad", "semantic_vad", "message", "user", "assistant", "system", "input_text",
    "input_audio", "output_text", "function_call", "gpt-live-1", "one", "text", "audio",
]  # fmt: skip
_NUMBERS = [0, 1, -1, 8000, 16_000, 24_000, 44_100, 2**63, 10**400, 1.5, 1e308, True, None]


def value(rng: random.Random, depth: int = 0) -> Any:
    """A JSON value."""
    kind = rng.randrange(8 if depth < 4 else 5)
    if kind < 3:
        return rng.choice(_STRINGS)
    if kind < 5:
        return rng.choice(_NUMBERS)
    if kind < 7:
        return {rng.choice(_FIELDS): value(rng, depth + 1) for _ in range(rng.randrange(5))}
    return [value(rng, depth + 1) for _ in range(rng.randrange(4))]


def event(rng: random.Random, path: str) -> dict[str, Any]:
    """An event of one of the types that are known here, or nearly."""
    made = {"type": rng.choice(DOORS[path])}
    if rng.random() < 0.5:  # what a client may send
        message = {"type": "message", "role": rng.choice(["user", "assistant", "system"]), "content": [value(rng)]}
        parts: dict[str, Any] = {
            "audio": _SOUND,
            "item_id": "one",
            "content_index": 0,
            "audio_end_ms": 100,
            "content": "x",
            "item": rng.choice([{**message, "id": "one"}, message, value(rng)]),
            "session": rng.choice([{"model": "x"}, {"type": "realtime", "audio": value(rng)}, value(rng)]),
        }
        made |= parts
    for _ in range(rng.choice([0, 0, 1, 3])):
        made[rng.choice(_FIELDS)] = value(rng)
    return made


@fuzzer(seconds=20.0, megabytes=200.0)
def events(folder: Path) -> Attack:
    """Events of every type, in any order, and what is no JSON: a client gets errors, or ends its own conversation, and
    nobody else's."""
    world = _World()

    def make(rng: random.Random) -> Attempt:
        path = rng.choice(list(DOORS))
        sent = [json.dumps(event(rng, path)) for _ in range(rng.choice([0, 1, 5, 50]))]
        if rng.random() < 0.7:
            sent.insert(0, json.dumps({"type": "session.start", "session": {"model": "x"}}))
        for index in range(len(sent)):
            if rng.random() < 0.1:
                sent[index] = mutate(sent[index].encode(), rng).decode("utf-8", "replace")

        async def attempt() -> None:
            await talk(world.served, path, sent)
            await world.served.until_free(3)
            async with world.served.client() as witness:
                await witness.begun()
                assert (await witness.say(tone(1)) == tone(1)).all()
            await world.served.until_free(3)

        return "\n".join([path, *sent]).encode("utf-8", "replace"), lambda: world.run(attempt())

    return make


async def talk(served: Served, path: str, sent: list[str]) -> int:
    """Send all of it, and read what comes until the server answers a ping behind it; how many messages came."""
    came = 0
    async with served.session.ws_connect(served.url + path, autoping=False) as socket:
        with contextlib.suppress(ConnectionError, aiohttp.ClientError, RuntimeError):
            for text in sent:
                await socket.send_str(text)
            await socket.ping(b"all")
            while True:
                received = await socket.receive(timeout=30)
                if received.type == aiohttp.WSMsgType.PING:
                    await socket.pong(received.data)
                elif received.type == aiohttp.WSMsgType.PONG and bytes(received.data) == b"all":
                    break
                elif received.type != aiohttp.WSMsgType.TEXT and received.type != aiohttp.WSMsgType.PONG:
                    break
                came += received.type == aiohttp.WSMsgType.TEXT
    return came
