"""A server in the test's own loop, with a model that says back what it hears, and clients that speak the protocol."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from moshi_mlx_app.web.guard import Guard
from moshi_mlx_app.web.line import Line
from moshi_mlx_app.web.server import STATIC, Server, listening
from moshi_mlx_app.web.talk import Limits

from moshi_mlx.generate import GenerationConfig
from moshi_mlx.realtime import conversation
from tests.helpers import parrot as birds

FRAME, RATE = birds.FRAME, birds.RATE
SOON = 20.0  # seconds: far more than anything here takes, even on a machine that does other things


def install(monkeypatch: Any, made: list[dict[str, Any]] | None = None) -> None:
    """Conversations are a parrot's; what their generators were made with is appended to ``made``."""

    def make(model: Any, **settings: Any) -> Any:
        if made is not None:
            made.append(settings)
        return birds._Mind(model)

    monkeypatch.setattr(conversation, "make_generator", make)


@dataclass
class Client:
    """One connection."""

    socket: aiohttp.ClientWebSocketResponse
    ended: bool = False

    async def next(self) -> tuple[int, bytes]:
        """Kind and content of the next message; kind -1: closed, and the code. After that there is no next one."""
        assert not self.ended, "the connection was closed before what was waited for"
        while True:
            received = await self.socket.receive(timeout=SOON)
            if received.type == aiohttp.WSMsgType.BINARY:
                return received.data[0], received.data[1:]
            self.ended = received.type in (
                aiohttp.WSMsgType.CLOSE,
                aiohttp.WSMsgType.CLOSED,
                aiohttp.WSMsgType.CLOSING,
            )
            if received.type == aiohttp.WSMsgType.CLOSE:
                return -1, str(received.data).encode()
            if self.ended:
                return -1, str(self.socket.close_code).encode()
            assert received.type not in (aiohttp.WSMsgType.ERROR, aiohttp.WSMsgType.TEXT), received

    async def until(self, kind: int, what: str = "") -> bytes:
        """Content of the next message of this kind; of kind 0x11, of this type."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            assert loop.time() - began < SOON, f"no message of kind {kind:#x} {what}"  # others may go on coming
            found, content = await self.next()
            if found == kind and (not what or json.loads(content)["type"] == what):
                return content
            assert found != -1, f"closed with {content.decode()} before a message of kind {kind:#x}"

    async def begun(self) -> dict[str, Any]:
        """Wait for the handshake; returns the metadata behind it."""
        assert await self.until(0x00) == b""
        kind, content = await self.next()
        assert kind == 0x04
        return json.loads(content)  # type: ignore[no-any-return]

    async def end(self) -> tuple[str, int]:
        """Wait for the end: the error that was told, and the closing code."""
        error = ""
        while True:
            kind, content = await self.next()
            if kind == 0x05:
                error = content.decode()
            elif kind == -1:
                return error, int(content)

    async def say(self, frame: np.ndarray) -> np.ndarray:
        """Send one frame, int16; wait for one."""
        await self.socket.send_bytes(b"\x10" + frame.astype("<i2").tobytes())
        return np.frombuffer(await self.until(0x10), "<i2")


@dataclass
class Served:
    """A running server."""

    server: Server
    url: str
    session: aiohttp.ClientSession

    @contextlib.asynccontextmanager
    async def client(self, query: str = "audio=pcm", **options: Any) -> AsyncIterator[Client]:
        socket = await self.session.ws_connect(f"{self.url}/api/chat?{query}", **options)
        try:
            yield Client(socket)
        finally:
            with contextlib.suppress(ConnectionError, aiohttp.ClientError):  # where the test has cut it off
                await socket.close()

    async def info(self) -> dict[str, Any]:
        async with self.session.get(f"{self.url}/api/info") as answer:
            return await answer.json()  # type: ignore[no-any-return]

    async def until_free(self, places: int) -> float:
        """Seconds until so many places are free."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while self.server.line.free != places:
            assert loop.time() - began < SOON
            await asyncio.sleep(0.01)
        return loop.time() - began


@contextlib.asynccontextmanager
async def serving(
    model: Any = None,
    *,
    places: int = 2,
    longest: int = 16,
    token: str = "",
    host: str = "127.0.0.1",
    limits: Limits | None = None,
    static: Path = STATIC,
    tls: ssl.SSLContext | None = None,
    trust: ssl.SSLContext | None = None,
) -> AsyncIterator[Served]:
    server = Server(
        model or birds.Parrot(),
        Guard(host, token),
        Line(places, longest),
        GenerationConfig(),
        limits=limits or Limits(),
        static=static,
    )
    connector = aiohttp.TCPConnector(ssl=trust) if trust else None
    async with (
        listening(server, "127.0.0.1", 0, tls) as port,
        aiohttp.ClientSession(connector=connector) as session,
    ):
        yield Served(server, f"{'https' if tls else 'http'}://{'localhost' if tls else '127.0.0.1'}:{port}", session)


def tone(index: int, count: int = FRAME) -> np.ndarray:
    """A frame, int16, that differs from its neighbours."""
    return np.rint(8000 * np.sin(np.arange(count) * (0.02 + 0.003 * (index % 20)))).astype(np.int16)
