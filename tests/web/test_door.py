"""Connections that say nothing, too much, or nonsense: they cost the others nothing, and the log a line."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import socket
import ssl
import sys

import psutil
import pytest
from moshi_mlx_app.server import certificates
from moshi_mlx_app.server import listener as door
from moshi_mlx_app.server.faults import Faults
from moshi_mlx_app.server.hosts import household
from yarl import URL

from .serving import SOON, Served, install, serving

Opened = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def silent(served: Served, count: int, address: str = "127.0.0.1", said: bytes = b"") -> list[Opened]:
    """So many connections that say nothing, or no more than this."""
    opened: list[Opened] = []
    for _ in range(count):
        opened.append(await asyncio.open_connection("127.0.0.1", URL(served.url).port, local_addr=(address, 0)))
        opened[-1][1].write(said)
    return opened


async def gone(opened: Opened) -> bool:
    """Whether the server has closed this one already."""
    try:
        return await asyncio.wait_for(opened[0].read(1), 0.05) == b""
    except asyncio.TimeoutError:
        return False
    except ConnectionError:
        return True


async def close(opened: list[Opened]) -> None:
    for _, writer in opened:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.fixture
def tls(tmp_path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Encryption for the server, and what trusts it."""
    context, _ = certificates.own("localhost", tmp_path)
    return context, ssl.create_default_context(cafile=str(tmp_path / "certificate.pem"))


@pytest.mark.parametrize(
    ("encrypted", "said"),
    [(True, b""), (True, b"\x16\x03\x01"), (False, b""), (False, b"GET / HT")],
    ids=["TLS", "TLS, begun", "plain", "plain, begun"],
)
def test_silent_connections_are_bounded_and_end(monkeypatch, tls, encrypted, said):
    """If it fails, a thousand connections that say nothing take every descriptor, and nobody can come in any more: with
    encryption they were not even counted."""
    install(monkeypatch)
    monkeypatch.setattr(door, "_FROM_ONE", 10)
    monkeypatch.setattr(door, "_HANDSHAKE", 1.0)
    monkeypatch.setattr(door, "_FIRST_ANSWER", 1.0)
    told: list[str] = []
    options = {"tls": tls[0], "trust": tls[1]} if encrypted else {}

    async def run() -> None:
        async with serving(on_fault=told.append, **options) as served, served.client() as talker:
            await talker.begun()
            gc.collect()
            before, memory = psutil.Process().num_fds(), psutil.Process().memory_info().rss
            opened = await silent(served, 200, said=said)
            assert (await served.info())["free"] == 1
            assert sum([await gone(each) for each in opened]) >= 190  # all but ten, whoever came last
            while not all([await gone(each) for each in opened]):  # and those, once their time is over
                await asyncio.sleep(0.1)
            await close(opened)
            await talker.socket.send_bytes(b"\x10" + bytes(3840))
            await talker.until(0x10)
            gc.collect()
            assert psutil.Process().num_fds() <= before + 2  # the session keeps a connection for the next request
            assert psutil.Process().memory_info().rss < memory + 25e6
            assert told == []

    asyncio.run(asyncio.wait_for(run(), SOON))


def test_one_address_does_not_push_out_others(monkeypatch):
    """If it fails, one machine that opens connections without end closes those of everybody else."""
    monkeypatch.setattr(door, "_FROM_ONE", 5)
    monkeypatch.setattr(door, "_CONNECTIONS", 12)

    async def run() -> None:
        async with serving() as served:
            try:
                others = await silent(served, 4, "127.0.0.2")
            except OSError:
                pytest.skip("this system has no second address on loopback")
            mine = await silent(served, 60)
            assert not any([await gone(each) for each in others])
            assert sum([await gone(each) for each in mine]) == 55
            await close(others + mine)

    asyncio.run(run())


def test_plain_bytes_at_an_encrypted_door(monkeypatch, tls):
    """If it fails, a scanner of ports fills the log, or ends the server."""
    install(monkeypatch)
    told: list[str] = []

    async def run() -> None:
        async with serving(tls=tls[0], trust=tls[1], on_fault=told.append) as served:
            for said in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\x00" * 100, b""):
                reader, writer = await asyncio.open_connection("127.0.0.1", URL(served.url).port)
                writer.write(said)
                with contextlib.suppress(ConnectionError):
                    writer.write_eof()
                    await asyncio.wait_for(reader.read(), SOON)
                await close([(reader, writer)])
            assert (await served.info())["free"] == 2

    asyncio.run(run())
    assert told == []


def test_no_descriptors_left_is_said_once(monkeypatch):
    """If it fails, a server without descriptors fills the disk with tracebacks, or never takes a connection again."""
    told: list[str] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        accept, refused = loop.sock_accept, [0]

        async def refuse(listener: socket.socket):
            if refused[0] < 3:
                refused[0] += 1
                raise OSError(errno.EMFILE, "Too many open files")
            return await accept(listener)

        monkeypatch.setattr(loop, "sock_accept", refuse)
        async with serving(on_fault=told.append) as served:
            assert (await served.info())["free"] == 2
            assert refused == [3]

    asyncio.run(run())
    assert told == ["no more connections can be taken: Too many open files"]


def test_faults_are_said_once_a_minute():
    """If it fails, a fault that comes with every message fills the log, or one is never said at all."""
    now, told = [0.0], []
    faults = Faults(told.append, clock=lambda: now[0])
    for _ in range(1000):
        faults.say("broken")
        now[0] += 0.01
    faults.say("another")
    assert told == ["broken", "another"]
    now[0] = 61.0
    faults.say("broken")
    assert told[2:] == ["broken (999 times more since it was last said)"]
    for index in range(10_000):
        faults.say(f"kind {index}")
    assert len(told) < 30
    now[0] = 10_000.0
    faults.say("kind 9999")
    assert told[-1] == "kind 9999"
    try:
        raise ValueError("two\nlines")
    except ValueError:
        faults.emit(logging.LogRecord("aiohttp", logging.ERROR, "", 0, "at %s\nmore", ("home",), sys.exc_info()))
    assert told[-1] == "at home: ValueError: two lines"


def test_what_counts_as_one_address():
    """If it fails, somebody with IPv6, who has 2^64 addresses, is as many clients; or two neighbours are one."""
    assert household("192.168.1.5") == household("::ffff:192.168.1.5") == "192.168.1.5"
    assert household("2001:db8:1:2::1") == household("2001:db8:1:2:ffff::9%en0") != household("2001:db8:1:3::1")
    assert household("") == ""


LONG = b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
UNREADABLE = [
    LONG,
    b"\x16\x03hello\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: " + b"a" * 70_000 + b"\r\n\r\n",
    b"POST /api/info HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
]


def test_what_cannot_be_read_is_refused_in_a_line(capfd):
    """If it fails, an address above 8 kB prints a traceback, or an answer of the HTTP library's own goes out without
    the policy, and with the versions of everything."""
    told: list[str] = []

    async def run() -> None:
        async with serving(on_fault=told.append) as served:
            for request in UNREADABLE:
                reader, writer = await asyncio.open_connection("127.0.0.1", URL(served.url).port)
                writer.write(request)
                head, _, body = (await asyncio.wait_for(reader.read(), SOON)).decode().partition("\r\n\r\n")
                await close([(reader, writer)])
                assert head.startswith("HTTP/1.0 400"), (request[:40], head)
                assert "\r\nContent-Security-Policy: default-src 'none'" in head and "nosniff" in head
                assert "\r\nServer: moshi-mlx-local\r\n" in head + "\r\n" and "aiohttp" not in head
                assert body == "this is not a request that can be read\n"
            assert (await served.info())["free"] == 2

    asyncio.run(run())
    assert told == [] and capfd.readouterr().err == ""


def test_a_fault_in_a_request_is_a_line(monkeypatch, capfd):
    """If it fails, a fault of the server's own prints a traceback for each request, or is told to nobody."""
    told: list[str] = []

    async def run() -> None:
        async with serving(on_fault=told.append) as served:
            monkeypatch.setattr(served.server, "line", None)
            for _ in range(3):
                async with served.session.get(f"{served.url}/api/info") as answer:
                    assert answer.status == 500 and "default-src 'none'" in answer.headers["Content-Security-Policy"]
                    assert await answer.text() == "this server has a fault\n"

    asyncio.run(run())
    assert len(told) == 1 and told[0].startswith("a request failed: AttributeError")
    assert capfd.readouterr().err == ""
