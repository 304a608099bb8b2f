"""What clients send to the server: messages of the protocol, and requests that are hardly HTTP."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import random
import re
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from moshi_mlx_app.server.connection import Limits
from moshi_mlx_app.server.protocols.kyutai import Opus
from yarl import URL

from tests.helpers import parrot
from tests.web.serving import FRAME, RATE, SOON, Served, serving, tone

from . import Attack, Attempt, fuzzer
from .files import mutate

_TOKEN = "right-token"
_until_the_end = AsyncExitStack()


class _World:
    """A running server, and all that it complained of."""

    def __init__(self, **options: Any):
        parrot.install(parrot.Parrot())
        self.faults: list[str] = []
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.loop.set_exception_handler(lambda loop, context: self.faults.append(f"the loop: {context}"))
        handler = logging.Handler(logging.ERROR)
        handler.emit = lambda record: self.faults.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)
        limits = replace(Limits(), gone=3.0)
        made = serving(places=3, limits=limits, on_talk=self._told, **options)
        self.served: Served = self.loop.run_until_complete(_until_the_end.enter_async_context(made))

    def _told(self, text: str) -> None:
        if "a fault in" in text:
            self.faults.append(text)

    def run(self, attempt: Coroutine[Any, Any, None]) -> None:
        self.faults.clear()
        self.loop.run_until_complete(asyncio.wait_for(attempt, 2 * SOON))
        assert not self.faults, "; ".join(self.faults)


def _json(rng: random.Random) -> bytes:
    good = {"type": rng.choice(["mute", "unmute", "pause", "resume", "reset", "launch", "", None, 3])}
    text = json.dumps(good | {rng.choice(["type", "x", "\u202e"]): rng.choice([1e308, [], {}, "x" * 999, None])})
    broken = [mutate(text.encode(), rng), b"[" * 9999, b"9" * 9999, b'{"type":"\xff"}', b"null"]
    return rng.choice([text.encode(), *broken])


@fuzzer(seconds=20.0, megabytes=200.0)
def messages(folder: Path) -> Attack:
    """Messages of every kind, in any order: a client ends its own talk at most, and nobody else's."""
    world = _World()
    pages = (writer := Opus(RATE)).encode(np.zeros(FRAME, np.float32)) + writer.encode(np.ones(FRAME, np.float32) / 9)

    def make(rng: random.Random) -> Attempt:
        query = rng.choice(["audio=pcm", "audio=pcm&events=1", "", "audio=opus", "audio=%00", "text_temperature=x"])
        sent = []
        for _ in range(rng.choice([0, 1, 3, 20])):
            kind = rng.choice([0, 1, 2, 3, 4, 5, 6, 16, 16, 16, 17, 17, 18, 255, rng.randrange(256)])
            contents = [b"", b"\x00", rng.randbytes(rng.choice([1, 7, 3000])), _json(rng), tone(1).tobytes(), pages]
            contents += [mutate(pages, rng), bytes([rng.randrange(6)]), b"\xff\xfe", bytes(rng.choice([2**16, 2**18]))]
            sent.append(bytes([kind]) + rng.choice(contents))

        async def attempt() -> None:
            async with world.served.client(query) as client:
                with contextlib.suppress(ConnectionError, aiohttp.ClientError, RuntimeError):
                    for message in sent:
                        await client.socket.send_bytes(message)
            await world.served.until_free(3)
            async with world.served.client() as witness:
                await witness.begun()
                assert (await witness.say(tone(1)) == tone(1)).all()
            await world.served.until_free(3)

        return b"\n".join([query.encode(), *sent]), lambda: world.run(attempt())

    return make


_HOSTS = [
    "localhost", "127.0.0.1", "127.0.0.1:80", "[::1]", "evil.example", "localhost.evil.example", "", "a;b", "x" * 300,
]  # fmt: skip
_PIECES = list("@: \t,'\"[]/\\?#ü\x7f.") + [";script-src *", "%00"]
_TOKENS = [
    _TOKEN, "", "wrong", _TOKEN.upper(), _TOKEN[:-1], _TOKEN + "x", _TOKEN + "%00", "%72" + _TOKEN[1:], "ü", "%ff%fe",
]  # fmt: skip
_PATHS = [
    "/", "/api/info", "/api/chat", "/api/../api/info", "//api/info", "/API/info", "/static/app.js", "/../../etc/passwd",
    "/static/%2e%2e/%2e%2e/x", "/%00", "/" + "y" * 9000, "*", "http://evil.example/api/info", "/app.js", "/index.html",
]  # fmt: skip
_ODD = ["Content-Length: -1", "Content-Length: 9" + "9" * 30, "Transfer-Encoding: x", "X" * 9999, ":"]
_DIRECTIVE = re.compile(
    r"(default|script|style|img|font|media|worker|manifest|connect)-src|(base-uri|form-action|frame-.*)"
)


def _host(rng: random.Random) -> str:
    host = rng.choice(_HOSTS)
    for _ in range(rng.choice([0, 0, 1, 2])):
        at = rng.randrange(len(host) + 1)
        host = host[:at] + rng.choice([*_PIECES, *_HOSTS]) + host[at:]
    return host


@fuzzer(seconds=20.0, megabytes=200.0)
def requests(folder: Path) -> Attack:
    """Requests with hosts, origins, tokens and paths of every form, and damaged ones: nothing is given away, no answer
    carries what a client wrote into its policy, and none is the server's own failure."""
    world = _World(token=_TOKEN)
    port = URL(world.served.url).port

    def make(rng: random.Random) -> Attempt:
        host, token, path = _host(rng), rng.choice(_TOKENS), rng.choice(_PATHS)
        lines = [f"Host: {host}"] * rng.choice([1, 1, 1, 1, 0, 2])
        where = rng.choice(["query", "bearer", "basic", "nowhere"])
        if where == "query":
            path += f"?token={token}"
        elif where == "bearer":
            lines.append(f"Authorization: Bearer {token}")
        elif where == "basic":
            encoded = base64.b64encode(f"u:{token}".encode()).decode()
            lines.append(f"Authorization: Basic {encoded}{rng.choice(['', '=', 'é'])}")
        if rng.random() < 0.3:
            lines.append(f"Origin: {rng.choice(['http://', 'https://', 'null', ''])}{_host(rng)}")
        if rng.random() < 0.2:
            lines.append(f"Sec-Fetch-Site: {rng.choice(['none', 'same-origin', 'cross-site', 'x'])}")
        if rng.random() < 0.2:
            lines += ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
            lines.append(f"Sec-WebSocket-Key: {rng.choice(['dGhlIHNhbXBsZSBub25jZQ==', 'x', ''])}")
        if rng.random() < 0.2:
            lines += rng.sample(_ODD, 2)
        method = rng.choice(["GET", "GET", "GET", "HEAD", "POST", "OPTIONS", "get", "\x16\x03"])
        text = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "Connection: close", "", ""])
        data = text.encode("utf-8", "replace")
        intact = rng.random() < 0.7
        data = data if intact else mutate(data, rng)

        async def attempt() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            answer = b""
            with contextlib.suppress(ConnectionError):
                writer.write(data)
                writer.write_eof()
                answer = await asyncio.wait_for(reader.read(1 << 20), SOON)
            writer.close()
            head = answer.partition(b"\r\n\r\n")[0].decode("latin-1")
            assert not re.match(r"HTTP/1\.\d 5", head), head
            for policy in re.findall(r"(?i)^content-security-policy: (.*)$", head, re.MULTILINE):
                for directive in policy.strip().split(";"):
                    name, *values = directive.split()
                    assert _DIRECTIVE.fullmatch(name), policy
                    assert name != "script-src" or values == ["'self'"], policy
            if intact and "frame_size" in answer.decode("utf-8", "replace"):  # what /api/info says
                assert where != "nowhere" and token in (_TOKEN, "%72" + _TOKEN[1:]), head
            async with world.served.session.get(f"{world.served.url}/api/info?token={_TOKEN}") as info:
                assert info.status == 200

        return data, lambda: world.run(attempt())

    return make
