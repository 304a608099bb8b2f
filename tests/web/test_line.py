"""More people than places: who waits, where, and when a place becomes free."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import replace

import aiohttp
import pytest
from moshi_mlx_app.server.connection import Limits
from moshi_mlx_app.server.queue import Full, Line

from .serving import SOON, Client, install, serving, tone

EVENTS = "audio=pcm&events=1"


async def place(client: Client) -> int:
    return int(json.loads(await client.until(0x11, "queue"))["place"])


def test_the_line_moves_up(monkeypatch):
    """If it fails, somebody waits for ever, or is let in before another who came earlier."""
    install(monkeypatch)

    async def run() -> None:
        async with serving(places=1) as served, served.client(EVENTS) as first:
            await first.begun()
            async with served.client(EVENTS) as second, served.client(EVENTS) as third:
                assert await place(second) == 1 and await place(third) == 2
                info = await served.info()
                assert (info["places"], info["free"], info["waiting"]) == (1, 0, 2)
                await first.socket.close()
                await second.begun()
                assert await place(third) == 1
                await second.say(tone(0))
                await second.socket.close()
                await third.begun()

    asyncio.run(run())


def test_who_waits_in_kyutais_client_is_told(monkeypatch):
    """If it fails, Kyutai's clients, which know no line, show nothing while they wait."""
    install(monkeypatch)

    async def run() -> None:
        async with serving(places=1) as served, served.client() as client:
            await client.begun()
            async with served.client() as other:
                assert "busy: 1 in line" in (await other.until(0x02)).decode()
                await client.socket.close()
                await other.begun()

    asyncio.run(run())


def test_sound_before_the_handshake_is_not_heard_later(monkeypatch):
    """If it fails, Kyutai's Python client, which sends at once, is answered to what it said while it waited."""
    install(monkeypatch)

    async def run() -> None:
        async with serving(places=1) as served, served.client() as client:
            await client.begun()
            async with served.client() as other:
                await other.until(0x02)
                await other.socket.send_bytes(b"\x10" + tone(3).tobytes())
                await client.socket.close()
                await other.begun()
                assert (await other.say(tone(5)) == tone(5)).all()

    asyncio.run(run())


def test_a_full_line_says_so(monkeypatch):
    """If it fails, a crowd makes the server hold connections without bound."""
    install(monkeypatch)

    async def run() -> None:
        async with serving(places=1, longest=1) as served, served.client() as client:
            await client.begun()
            async with served.client() as second, served.client() as third:
                await second.until(0x02)
                error, code = await third.end()
                assert error.startswith("busy") and code == 1013

    asyncio.run(run())


@pytest.mark.parametrize("how", ["closed", "aborted"])
def test_a_dropped_connection_frees_its_place_at_once(monkeypatch, how):
    """If it fails, a closed tab or a lost connection keeps the next one waiting. The place becomes free by the end of
    the connection, not because a limit on silence runs out; how soon is a figure of benchmarks/web.py."""
    install(monkeypatch)
    patient = replace(Limits(), quiet=1e9, gone=1e9)

    async def run() -> None:
        async with serving(places=1, limits=patient) as served, served.client() as client:
            await client.begun()
            await client.say(tone(0))
            connection = client.socket._response.connection
            assert connection is not None and connection.transport is not None
            if how == "closed":
                await client.socket.close()
            else:
                connection.transport.abort()
            print(f"{how}: free after {await served.until_free(1) * 1e3:.0f} ms")
            async with served.client() as other:
                await other.begun()

    asyncio.run(run())


def test_the_place_of_one_who_vanished_goes_to_the_next(monkeypatch):
    """If it fails, a laptop that was closed, which says no goodbye, keeps its place while others wait."""
    install(monkeypatch)

    assert Limits().quiet <= 0.8  # counted in steps of 0.2 s: within a second

    async def run() -> None:
        patient = replace(Limits(), gone=1e9)
        async with serving(places=1, limits=patient) as served:
            # Nothing reads, so nothing answers the server's pings, as if the cable had been pulled.
            async with served.client(reading=False, autoping=False) as client:
                await client.socket.receive(timeout=SOON)
                await served.until_free(1)
                async with served.client() as other:
                    await other.begun()
                    last = b""
                    while (received := await client.socket.receive(timeout=SOON)).type != aiohttp.WSMsgType.CLOSE:
                        last = received.data if received.type == aiohttp.WSMsgType.BINARY else last
                    assert last[:1] == b"\x05" and b"another was waiting" in last
                    assert (await other.say(tone(1)) == tone(1)).all()

    asyncio.run(run())


def test_one_who_vanished_may_come_back_while_nobody_waits(monkeypatch):
    """If it fails, a second without network ends a conversation that nobody else wanted the place of."""
    install(monkeypatch)

    async def run() -> None:
        async with serving(places=1) as served, served.client(autoping=False) as client:
            await client.begun()
            await served.until_free(1)
            await client.socket.send_bytes(b"\x10" + tone(0).tobytes())
            await served.until_free(0)
            assert (await client.heard() == tone(0)).all()

    asyncio.run(run())


def test_line_alone():
    """If it fails, places are given twice, or never."""

    async def run() -> None:
        line, dismissed = Line(2, longest=3), []
        gone = set()

        def join(name: str):
            return line.join(name, lambda: name in gone, lambda: dismissed.append(name))

        tickets = [join(name) for name in "abcde"]
        assert [ticket.place for ticket in tickets] == [0, 0, 1, 2, 3]
        with pytest.raises(Full):
            join("f")
        line.leave(tickets[3])
        assert [ticket.place for ticket in tickets] == [0, 0, 1, 2, 2]
        gone.update("ab")
        line.settle()
        assert dismissed == ["a", "b"] and line.free == 2
        line.leave(tickets[0])
        assert tickets[2].place == 0 and tickets[4].place == 1
        line.leave(tickets[1])
        assert tickets[4].place == 0 and line.waiting == 0 and line.free == 0
        line.leave(tickets[1])  # twice does no harm
        assert line.free == 0

    asyncio.run(run())


def test_one_address_has_one_share():
    """If it fails, one client takes the whole line, or every place that becomes free."""

    async def run() -> None:
        line = Line(2, longest=8)
        gone: set[str] = set()
        dismissed: list[str] = []

        def join(who: str, name: str):
            return line.join(who, lambda: name in gone, lambda: dismissed.append(name))

        many = [join("many", f"many {index}") for index in range(6)]
        assert [ticket.place for ticket in many] == [0, 0, 1, 2, 3, 4]
        with pytest.raises(Full, match="4 of your address"):
            join("many", "many 6")
        one = [join("one", f"one {index}") for index in range(2)]
        other = join("other", "other")
        # A first turn for everybody, before anybody's second; else who came first.
        assert (one[0].place, other.place) == (1, 2) and (many[2].place, one[1].place) == (4, 3)
        line.leave(many[0])
        assert one[0].place == 0 and other.place == 1 and many[2].place == 2 and one[1].place == 3
        line.leave(many[1])
        assert many[2].place == 0 and other.place == 1
        join("many", "many 6")
        gone.add("many 3")  # shows no sign of a person: everybody else goes first, and it is the one to go
        line.settle()
        assert many[3].place == line.waiting
        new = join("many", "many 7")
        assert dismissed == ["many 3"] and new.place > 0
        line.leave(many[3])
        while line.waiting < 8:
            join(f"more {line.waiting}", "more")
        with pytest.raises(Full, match="all 2 places"):
            join("last", "last")
        gone.add("one 1")
        join("last", "last")
        assert dismissed[1:] == ["one 1"] and line.waiting == 8

    asyncio.run(run())


def test_sockets_that_only_answer_pings_make_room(monkeypatch):
    """If it fails, one client holds every place and the whole line with connections that do nothing."""
    install(monkeypatch)
    monkeypatch.setattr("moshi_mlx_app.server.connection._TICK", 0.05)
    limits = replace(Limits(), sound=1.0, person=1.0, quiet=10.0)

    async def run() -> None:
        async with serving(limits=limits, longest=8) as served, contextlib.AsyncExitStack() as opened:
            idle = [await opened.enter_async_context(served.client(EVENTS)) for _ in range(12)]
            for client in idle[:2]:
                await client.begun()
            # The line has half of its room for one address; whoever comes too much is told at once.
            ends = [await client.end() for client in idle[6:]]
            assert all(code == 1013 and "4 of your address" in error for error, code in ends)
            await asyncio.sleep(2.0)
            async with served.client(EVENTS) as person:
                began = asyncio.get_running_loop().time()
                await person.begun()
                assert asyncio.get_running_loop().time() - began < 5
                assert (await person.say(tone(1)) == tone(1)).all()

    asyncio.run(run())


@pytest.mark.parametrize(
    "sign", [b'\x11{"type":"present"}', b"\x10" + bytes(960)], ids=["the page", "Kyutai's clients"]
)
def test_who_waits_and_shows_it_keeps_the_place(monkeypatch, sign):
    """If it fails, a person who waits for long is passed by others, or thrown out of the line."""
    install(monkeypatch)
    monkeypatch.setattr("moshi_mlx_app.server.connection._TICK", 0.05)
    limits = replace(Limits(), person=0.5, quiet=10.0)

    async def run() -> None:
        async with serving(places=1, longest=2, limits=limits) as served, served.client(EVENTS) as first:
            await first.begun()
            async with served.client(EVENTS) as waiting, served.client(EVENTS) as third:
                assert await place(waiting) == 1
                for _ in range(20):
                    await first.socket.send_bytes(b"\x10" + bytes(960))
                    await waiting.socket.send_bytes(sign)
                    await asyncio.sleep(0.05)
                error, code = await third.end()
                assert code == 1013 and "1 of your address" in error
                await first.socket.close()
                await waiting.begun()

    asyncio.run(run())


def test_a_place_needs_sound(monkeypatch):
    """If it fails, who began to talk and sends no sound keeps the place from those who wait; or loses it to nobody."""
    install(monkeypatch)
    monkeypatch.setattr("moshi_mlx_app.server.connection._TICK", 0.05)
    limits = replace(Limits(), sound=0.6, quiet=10.0)

    async def run() -> None:
        async with serving(places=1, limits=limits) as served, served.client() as client:
            await client.begun()
            await served.until_free(1)
            assert (await client.say(tone(1)) == tone(1)).all()  # nobody else wanted it
            await served.until_free(0)
            async with served.client() as other:
                await other.begun()
                error, code = await client.end()
                assert "another was waiting" in error and code == 1008

    asyncio.run(run())
