"""Whatever a client does, it ends its own connection, with a reason, and nobody else's."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import socket
import threading
import time
import weakref
from dataclasses import replace

import aiohttp
import numpy as np
import pytest
from moshi_mlx_app.server.connection import Limits, Talk
from yarl import URL

from moshi_mlx.realtime import Conversation

from .serving import LAST, RATE, SOON, install, serving, tone

sphn = pytest.importorskip("sphn")


def opus(index: int = 0) -> bytes:
    """The beginning of a stream."""
    return sphn.OpusStreamWriter(RATE).append_pcm(tone(index).astype(np.float32) / 32768)


def test_bad_messages(monkeypatch):
    """If it fails, a broken client, or one that means harm, ends the server or another's talk, or just hangs."""
    install(monkeypatch)
    good = opus()
    # The same noise each time: a page that begins with the right version may be one that is still to come.
    noise = random.Random(1).randbytes(4000)
    bad: dict[str, tuple[str, list[bytes]]] = {
        "empty": ("audio=pcm", [b""]),
        "unknown kind": ("audio=pcm", [b"\x63hello"]),
        "odd samples": ("audio=pcm", [b"\x10\x00\x00\x00"]),
        "opus where pcm was agreed": ("audio=pcm", [b"\x01" + good]),
        "pcm where opus was agreed": ("", [b"\x10\x00\x00"]),
        "noise for opus": ("", [b"\x01" + noise]),
        "noise in a page": ("", [b"\x01" + good, b"\x01" + b"OggS" + noise]),
        "cut pages": ("", [b"\x01" + good[:-20], b"\x01" + good]),
        "not json": ("audio=pcm", [b"\x11{"]),
        "json of another shape": ("audio=pcm", [b"\x11[1]"]),
        "json too deep": ("audio=pcm", [b"\x11" + b"[" * 50_000]),
        "json number too long": ("audio=pcm", [b"\x11" + b"9" * 50_000]),
        "an unknown event": ("audio=pcm", [b'\x11{"type":"launch"}']),
        "an event of no type": ("audio=pcm", [b'\x11{"type":{}}']),
        "bad metadata": ("audio=pcm", [b"\x04\xff\xff"]),
        "bad utf-8": ("audio=pcm", [b"\x02\xff\xfe"]),
        "bad utf-8 in json": ("audio=pcm", [b'\x11{"type":"\xff"}']),
        "an unknown control": ("audio=pcm", [b"\x03\x09"]),
        "a control of no kind": ("audio=pcm", [b"\x03"]),
        "too large": ("audio=pcm", [b"\x10" + bytes(1 << 18)]),
        "sound faster than time": ("audio=pcm", [b"\x10" + bytes(48_000)] * 12),
    }

    async def run() -> None:
        async with serving(places=2) as served, served.client() as witness:
            await witness.begun()
            for what, (query, messages) in bad.items():
                async with served.client(query) as client:
                    await client.begun()
                    with contextlib.suppress(ConnectionError, aiohttp.ClientError):  # closed before the last of them
                        for message in messages:
                            await client.socket.send_bytes(message)
                    print(what)
                    error, code = await client.end()
                    if what == "too large":
                        assert code == 1009, what  # aiohttp's own answer
                    else:
                        assert error and code == 1008 and len(error) < 300, (what, error, code)
                assert (await witness.say(tone(1)) == tone(1)).all(), what
                await served.until_free(1)

    asyncio.run(run())


def test_text_frames_are_refused(monkeypatch):
    """If it fails, a client that speaks another protocol waits for ever."""
    install(monkeypatch)

    async def run() -> tuple[str, int]:
        async with serving() as served, served.client() as client:
            await client.socket.send_str("hello")
            return await client.end()

    error, code = asyncio.run(run())
    assert "binary" in error and code == 1008


def test_floods(monkeypatch):
    """If it fails, one client can keep the server busy with messages."""
    install(monkeypatch)

    async def run() -> None:
        async with serving() as served, served.client() as witness:
            await witness.begun()
            for message in (b"\x06", b"\x03\x00", b'\x11{"type":"reset"}', b"\x10" + bytes(2)):
                async with served.client() as client:
                    await client.begun()
                    with contextlib.suppress(ConnectionError, aiohttp.ClientError):
                        for _ in range(5000):
                            await client.socket.send_bytes(message)
                    error, code = await client.end()
                    # Where the flood goes on after the end, the last words may not get through it.
                    assert "messages a second" in error or code == 1006
                assert (await witness.say(tone(1)) == tone(1)).all()
                await served.until_free(1)

    asyncio.run(run())


def test_pings_of_the_client_are_answered(monkeypatch):
    """If it fails, a client that looks whether the server lives gives up."""
    install(monkeypatch)

    async def run() -> None:
        async with serving() as served, served.client(reading=False, autoping=False) as client:
            await client.socket.ping(b"there?")
            received = None
            while received is None or received.type != aiohttp.WSMsgType.PONG:
                received = await client.socket.receive(timeout=SOON)
                assert received.type not in LAST, received
                await client.socket.pong(received.data if received.type == aiohttp.WSMsgType.PING else b"")
            assert bytes(received.data) == b"there?"

    asyncio.run(run())


def test_a_client_may_answer_the_latest_ping_only(monkeypatch):
    """If it fails, a client that does what RFC 6455, section 5.5.3, allows is taken for one that does not read."""
    install(monkeypatch)

    monkeypatch.setattr("moshi_mlx_app.server.connection._TICK", 0.05)

    async def run() -> None:
        limits = replace(Limits(), gone=1.5)
        async with serving(limits=limits) as served, served.client(reading=False, autoping=False) as client:
            pings = 0
            while pings < 60:  # twice as long as a client may not read
                received = await client.socket.receive(timeout=SOON)
                assert received.type not in LAST, received
                if received.type == aiohttp.WSMsgType.PING:
                    pings += 1
                    await client.socket.pong(b"1")  # of no use, but no harm
                    if pings % 3 == 0:
                        await client.socket.pong(received.data)
            assert served.server.line.free == 1

    asyncio.run(run())


def test_sound_at_once(monkeypatch):
    """If it fails, Kyutai's Python client, which sends before it reads anything, is taken for one that speaks PCM."""
    install(monkeypatch)

    async def run() -> None:
        async with serving() as served:
            for _ in range(10):
                async with served.client("") as client:
                    await client.socket.send_bytes(b"\x01" + opus())
                    await client.begun()

    asyncio.run(run())


def test_an_opus_bomb_is_cheap(monkeypatch):
    """If it fails, a small message that unpacks to hours of sound takes time and memory from everyone."""
    install(monkeypatch)
    # Pages of 255 packets of one byte: 20 ms each. sphn gives back 5 s at most, and reads no checksum.
    pages = opus()
    bomb = pages[: pages.rindex(b"OggS")]
    while len(bomb) < 100_000:
        bomb += b"OggS" + bytes(22) + bytes([255]) + bytes([1]) * 255 + bytes([0x08]) * 255

    async def run() -> None:
        async with serving() as served, served.client() as witness, served.client("") as client:
            await witness.begun()
            await client.begun()
            began = time.process_time()
            await client.socket.send_bytes(b"\x01" + bomb)
            error, code = await client.end()
            print(f"{len(bomb)} bytes: {time.process_time() - began:.2f} s of processor time: {error}")
            assert error and code == 1008
            assert (await witness.say(tone(1)) == tone(1)).all()

    asyncio.run(run())


@pytest.mark.parametrize("how", ["never reads", "reads slowly"])
def test_a_slow_reader_is_dropped(monkeypatch, how):
    """If it fails, a client that does not take what it asked for fills the server's memory, or holds others up."""
    install(monkeypatch)
    limits = replace(Limits(), unsent=1.0, gone=1.5, ahead=1e9, bytes=1e9, messages=1e9)
    told: list[str] = []

    async def run() -> None:
        async with serving(limits=limits, on_talk=told.append) as served, served.client() as good:
            await good.begun()
            raw = socket.socket()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(("127.0.0.1", URL(served.url).port))
            raw.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(
                raw,
                b"GET /api/chat?audio=pcm HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            )
            frame = b"\x82\xfe" + (3841).to_bytes(2, "big") + bytes(4) + b"\x10" + bytes(3840)

            async def pour() -> None:
                with contextlib.suppress(ConnectionError):
                    while True:
                        await loop.sock_sendall(raw, frame)
                        if how == "reads slowly":
                            await loop.sock_recv(raw, 500)
                        await asyncio.sleep(0.02)

            pouring = asyncio.create_task(pour())
            await served.until_free(0)
            began, longest, index = time.monotonic(), 0.0, 0
            while served.server.line.free == 0 or index < 25:
                asked = time.monotonic()
                assert asked - began < SOON, "it is not dropped"
                assert (await good.say(tone(index)) == tone(index)).all()
                longest, index = max(longest, time.monotonic() - asked), index + 1
                await asyncio.sleep(0.02)
            await asyncio.wait_for(pouring, SOON)
            while not (ends := [line for line in told if "ended" in line]):
                assert time.monotonic() - began < SOON
                await asyncio.sleep(0.01)
            assert len(ends) == 1 and ("reads too slowly" in ends[0] or "does not read" in ends[0]), told
            print(f"{how}: {ends[0]}; the other's {index} answers took {longest * 1e3:.0f} ms at most")
            raw.close()

    asyncio.run(run())


def test_broken_frames(monkeypatch):
    """If it fails, bytes that are no WebSocket end more than their own connection."""
    install(monkeypatch)
    rng = random.Random(0)
    head = (
        b"GET /api/chat?audio=pcm HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    streams = [head + rng.randbytes(300) for _ in range(20)]
    streams += [rng.randbytes(300), b"GET / HTTP/1.1\r\nHost: " + b"a" * 70_000, b"GET /api/chat HTTP/9.9\r\n\r\n"]
    streams += [head + b"\x82\x05hello", head + b"\x82\xff" + b"\xff" * 8, head + b"\xf2\x80" + bytes(4)]

    async def run() -> None:
        async with serving(places=3) as served, served.client() as witness:
            await witness.begun()
            for stream in streams:
                reader, writer = await asyncio.open_connection("127.0.0.1", URL(served.url).port)
                writer.write(stream)
                writer.write_eof()
                with contextlib.suppress(ConnectionError):
                    await asyncio.wait_for(reader.read(), SOON)
                writer.close()
            assert (await witness.say(tone(1)) == tone(1)).all()
            await served.until_free(2)
            assert json.dumps(await served.info())

    asyncio.run(run())


def test_nothing_is_left_of_many_connections(monkeypatch):
    """If it fails, a server that stays open grows with everyone who comes by."""
    install(monkeypatch)

    def left() -> tuple[int, int, int]:
        gc.collect()
        kept = [each for each in gc.get_objects() if isinstance(each, (Conversation, Talk))]
        stages = [thread for thread in threading.enumerate() if thread.name.startswith("moshi ")]
        return len(kept), len(stages), len(asyncio.all_tasks())

    async def run() -> None:
        async with serving(places=2) as served, served.client() as witness:
            await witness.begun()
            await witness.say(tone(0))
            before = left()
            for index in range(60):
                async with served.client("audio=pcm" if index % 2 else "") as client:
                    if index % 3:
                        await client.begun()
                    if index % 3 == 2:
                        connection = client.socket._response.connection
                        assert connection is not None and connection.transport is not None
                        connection.transport.abort()
            await served.until_free(1)
            assert (await witness.say(tone(1)) == tone(1)).all()
            until = time.monotonic() + SOON  # what ends in threads of its own may take a moment
            while any(now > then for now, then in zip(left(), before)):
                assert time.monotonic() < until, (left(), before)
                await asyncio.sleep(0.1)

    asyncio.run(run())


def test_a_conversation_is_gone_when_it_ends(monkeypatch):
    """If it fails, the rings of a conversation, a megabyte, wait for Python's search for cycles: a server that many
    come to needs that much more memory for good."""
    install(monkeypatch)

    async def run() -> None:
        async with serving(places=1) as served:
            kept = []
            for _ in range(3):
                async with served.client() as client:
                    await client.begun()
                    await client.say(tone(0))
                    talk = next(iter(served.server.talks))
                    kept.append(weakref.ref(talk._running.conversation))
                    del talk
                await served.until_free(1)
            until = time.monotonic() + SOON
            while any(each() is not None for each in kept):
                assert time.monotonic() < until, "it is held by something"
                await asyncio.sleep(0.05)

    gc.collect()
    gc.disable()
    try:
        asyncio.run(run())
    finally:
        gc.enable()
