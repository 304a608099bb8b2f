"""A server in the test's own loop, with a model that says back what it hears, and clients that speak the protocol."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from moshi_mlx_app.server.access import Guard
from moshi_mlx_app.server.connection import Limits
from moshi_mlx_app.server.engine import Engine
from moshi_mlx_app.server.queue import Line
from moshi_mlx_app.server.server import STATIC, Server, Service, listening

from moshi_mlx.engine.generator import GenerationConfig
from tests.helpers import parrot as birds

FRAME, RATE = birds.FRAME, birds.RATE
SOON = 60.0  # seconds: far more than anything here takes, even on a machine that does other things
LAST = (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.ERROR)


def install(monkeypatch: Any, made: list[dict[str, Any]] | None = None, reader: Any = None) -> None:
    """What parrots' conversations begin with is appended to ``made``; what they say comes from a ``reader``."""
    monkeypatch.setattr(birds.Parrot, "begun", made)
    monkeypatch.setattr(birds.Parrot, "reader", reader)


class Client:
    """One connection. What comes is read as it comes, also while a test does other things: so the server's pings are
    answered, and a test that takes its time is not taken for a client that fell silent.

    Parameters
    ----------
    socket : aiohttp.ClientWebSocketResponse
    reading : bool
        False: nothing is read but what a test reads itself, from ``socket``.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, reading: bool = True):
        self.socket = socket
        self.ended = False
        self._came: asyncio.Queue[aiohttp.WSMessage] = asyncio.Queue()
        self._reading = asyncio.ensure_future(self._read()) if reading else None

    async def _read(self) -> None:
        received = None
        while received is None or received.type not in LAST:
            received = await self.socket.receive()
            self._came.put_nowait(received)

    async def next(self) -> tuple[int, bytes]:
        """Kind and content of the next message; kind -1: closed, and the code. After that there is no next one."""
        assert not self.ended, "the connection was closed before what was waited for"
        assert self._reading is not None
        while True:
            received = await asyncio.wait_for(self._came.get(), SOON)
            if received.type == aiohttp.WSMsgType.BINARY:
                return received.data[0], received.data[1:]
            self.ended = received.type in LAST
            if received.type == aiohttp.WSMsgType.CLOSE:
                return -1, str(received.data).encode()
            assert received.type not in (aiohttp.WSMsgType.ERROR, aiohttp.WSMsgType.TEXT), received
            if self.ended:
                return -1, str(self.socket.close_code).encode()

    async def close(self) -> None:
        with contextlib.suppress(ConnectionError, aiohttp.ClientError):  # where the test has cut it off
            await self.socket.close()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

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
        deadline = asyncio.get_running_loop().time() + SOON
        while asyncio.get_running_loop().time() < deadline:
            kind, content = await self.next()
            if kind == 0x05:
                error = content.decode()
            elif kind == -1:
                return error, int(content)
        raise AssertionError("it does not end")

    async def say(self, frame: np.ndarray) -> np.ndarray:
        """Send one frame, int16; wait for one."""
        await self.socket.send_bytes(b"\x10" + frame.astype("<i2").tobytes())
        return await self.heard()

    async def heard(self) -> np.ndarray:
        """The next sound that comes, int16."""
        return np.frombuffer(await self.until(0x10), "<i2")


@dataclass
class Served:
    """A running server."""

    server: Server
    url: str
    session: aiohttp.ClientSession

    @contextlib.asynccontextmanager
    async def client(self, query: str = "audio=pcm", *, reading: bool = True, **options: Any) -> AsyncIterator[Client]:
        client = Client(await self.session.ws_connect(f"{self.url}/api/chat?{query}", **options), reading)
        try:
            yield client
        finally:
            await client.close()

    async def info(self) -> dict[str, Any]:
        async with self.session.get(f"{self.url}/api/info") as answer:
            return await answer.json()  # type: ignore[no-any-return]

    async def until_free(self, places: int) -> float:
        """Seconds until so many places are free."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while self.server.line.free != places:
            assert loop.time() - began < SOON, f"{self.server.line.free} places are free, not {places}"
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
    on_talk: Callable[[str], None] = lambda text: None,
    on_fault: Callable[[str], None] = lambda text: None,
    link: str = "",
    stt: Any = None,
    **engine: Any,
) -> AsyncIterator[Served]:
    server = Server(
        Engine(model or birds.Parrot(), **engine),
        Guard(host, token),
        Line(places, longest),
        GenerationConfig(),
        limits=limits or Limits(),
        static=static,
        link=link,
        stt=None if stt is None else Service(Engine(stt), Line(places)),
        on_talk=on_talk,
        on_fault=on_fault,
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
