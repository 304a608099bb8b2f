"""The server under load, and what those who talk notice of it: ``python -m benchmarks.web`` in the repository's root.

The program ``moshi-mlx-local web`` runs in a process of its own, by default with a model that says back what it hears
(all machinery, no computing), with ``--model small`` or another with that. Some people talk the whole time, in step
with the clock, while one place after the other is taken by: nobody, one more talker and one who has to wait, a reader
that is too slow, one that never reads, twenty whose connection breaks, and a thousand that come and go. For each phase
a row: how long the answers of those who talk took (from the last sample sent to the sound that came back), what they
missed, and the server's memory and processor time. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from yarl import URL

from benchmarks.workers import resident

ROOT = Path(__file__).resolve().parent.parent
FRAME, RATE = 1_920, 24_000
SECONDS = FRAME / RATE
UPGRADE = (
    b"GET /api/chat?audio=pcm HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
SOUND = np.rint(8000 * np.sin(np.arange(FRAME) * 0.05)).astype("<i2").tobytes()


@dataclass
class Talker:
    """One who keeps to the clock, from the handshake until :meth:`stop`."""

    sent: list[float] = field(default_factory=list)
    came: list[tuple[int, float]] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    broke: str = ""
    _task: asyncio.Task[None] | None = None
    _ready: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, session: aiohttp.ClientSession, url: str) -> None:
        self._task = asyncio.create_task(self._talk(session, url))
        waiting = asyncio.create_task(self._ready.wait())
        await asyncio.wait([self._task, waiting], return_when=asyncio.FIRST_COMPLETED, timeout=60)
        waiting.cancel()
        if not self._ready.is_set():
            raise SystemExit(f"a talker was not let in: {self.broke or 'no answer within a minute'}")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _talk(self, session: aiohttp.ClientSession, url: str) -> None:
        async with session.ws_connect(f"{url}/api/chat?audio=pcm&events=1") as socket:

            async def speak() -> None:
                began = time.monotonic()
                for index in range(10**9):
                    await asyncio.sleep(max(0.0, began + index * SECONDS - time.monotonic()))
                    self.sent.append(time.monotonic())
                    await socket.send_bytes(b"\x10" + SOUND)

            speaking = None
            try:
                async for received in socket:
                    kind = received.data[0] if received.type == aiohttp.WSMsgType.BINARY else -1
                    if kind == 0x00:
                        speaking = asyncio.create_task(speak())
                        self._ready.set()
                    elif kind == 0x10:
                        # Each frame has its answer, but for those that the server dropped and told of.
                        number = len(self.came) + self.stats.get("dropped_samples", 0) // FRAME
                        self.came.append((number, time.monotonic() - self.sent[min(number, len(self.sent) - 1)]))
                    elif kind == 0x05:
                        self.broke = received.data[1:].decode()
                    elif kind == 0x11 and (event := json.loads(received.data[1:]))["type"] == "stats":
                        self.stats = event
                self.broke = self.broke or f"closed with {socket.close_code}"
            finally:
                if speaking is not None:
                    speaking.cancel()

    def answers(self, since: int, until: int) -> list[float]:
        """Seconds that the answers to frames ``since`` to ``until`` took."""
        return [seconds for number, seconds in self.came if since <= number < until]


class Program:
    """The server's process."""

    def __init__(self, model: str, places: int | None):
        command = [sys.executable, "-m"]
        command += ["tests.helpers.parrot", "web"] if model == "parrot" else ["moshi_mlx_app", "web", "--model", model]
        command += ["--port", "0", "--no-browser", "--quiet"] + ([] if places is None else ["--places", str(places)])
        path = os.pathsep.join(str(ROOT / folder) for folder in ("", "app", "quantize"))
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip().rstrip("/")
        if not self.url:
            raise SystemExit("the server did not start")

    def memory(self) -> float:
        """MB that are resident."""
        return resident(self.process.pid) / 1e6

    def held(self) -> tuple[int, int]:
        """Threads of the system's, and descriptors."""
        process = psutil.Process(self.process.pid)
        return process.num_threads(), process.num_fds()

    def spent(self) -> float:
        """Seconds of processor time."""
        spent = psutil.Process(self.process.pid).cpu_times()
        return float(spent.user + spent.system)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise SystemExit("the server does not end") from None


async def begin(client: aiohttp.ClientWebSocketResponse, timeout: float) -> float:
    """Wait until the server says that the conversation begins; when it did."""
    while (await client.receive(timeout=timeout)).data[:1] != b"\x00":
        pass
    return time.monotonic()


def cut_off(client: aiohttp.ClientWebSocketResponse) -> None:
    """Break the connection, without a goodbye."""
    connection = client._response.connection
    assert connection is not None and connection.transport is not None
    connection.transport.abort()


class Load:
    """The phases."""

    def __init__(self, program: Program, session: aiohttp.ClientSession, seconds: float, connections: int):
        self.program, self.session = program, session
        self.seconds, self.connections = seconds, connections
        self.talkers: list[Talker] = []
        self.rows: list[dict[str, Any]] = []

    async def info(self) -> dict[str, Any]:
        async with self.session.get(f"{self.program.url}/api/info") as answer:
            return await answer.json()  # type: ignore[no-any-return]

    async def until_free(self, places: int = 1) -> float:
        began = time.monotonic()
        while (await self.info())["free"] < places:
            if time.monotonic() - began > 60:
                raise SystemExit("a place does not become free")
            await asyncio.sleep(0.02)
        return time.monotonic() - began

    async def phase(self, name: str, what: Callable[[], Coroutine[Any, Any, str]]) -> None:
        """Do ``what``, and see how those who talk fared meanwhile."""
        before = [len(talker.sent) for talker in self.talkers]
        dropped = sum(talker.stats.get("dropped_samples", 0) for talker in self.talkers)
        began, spent = time.monotonic(), self.program.spent()
        said = await what()
        seconds = time.monotonic() - began
        until = [len(talker.sent) for talker in self.talkers]
        await asyncio.sleep(0.5)  # the last answers, and the last figures
        answers = [
            answer
            for talker, since, end in zip(self.talkers, before, until, strict=True)
            for answer in talker.answers(since, end)
        ]
        broken = [talker.broke for talker in self.talkers if talker.broke]
        row = {
            "phase": name,
            "seconds": round(seconds, 1),
            "frames": len(answers),
            **{f"p{p}_ms": round(float(np.percentile(answers, p)) * 1e3, 1) for p in (50, 95)},
            "max_ms": round(max(answers) * 1e3, 1),
            "dropped_frames": (sum(t.stats.get("dropped_samples", 0) for t in self.talkers) - dropped) // FRAME,
            "broken": len(broken),
            "memory_mb": round(self.program.memory(), 1),
            "cpu": round((self.program.spent() - spent) / (time.monotonic() - began), 2),
            "said": said,
        }
        self.rows.append(row)
        print(
            f"{name:22} {row['frames']:6d} {row['p50_ms']:8.1f} {row['p95_ms']:8.1f} {row['max_ms']:8.1f} "
            f"{row['dropped_frames']:8d} {len(broken):7d} {row['memory_mb']:9.1f} {row['cpu']:6.2f}  {said}",
            flush=True,
        )

    async def alone(self) -> str:
        await asyncio.sleep(self.seconds)
        return ""

    async def one_more(self) -> str:
        """The last place is taken; the next is told its place in line, and let in when the place becomes free."""
        last = Talker()
        await last.start(self.session, self.program.url)
        async with self.session.ws_connect(f"{self.program.url}/api/chat?audio=pcm&events=1") as waiting:
            began = time.monotonic()
            told = await waiting.receive(timeout=10)
            event = json.loads(told.data[1:])
            took = time.monotonic() - began
            assert told.data[0] == 0x11 and event == {"type": "queue", "place": 1}, told

            beginning = asyncio.create_task(begin(waiting, 60))
            await asyncio.sleep(self.seconds)
            began = time.monotonic()
            await last.stop()
            let_in = await beginning - began
        await self.until_free()
        return f"told its place after {took * 1e3:.0f} ms, let in {let_in * 1e3:.0f} ms after one had left"

    async def slow(self, bytes_at_once: int) -> str:
        """Takes ``bytes_at_once`` for each frame that it asks for; 0: never reads."""
        loop = asyncio.get_running_loop()
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", URL(self.program.url).port))
        raw.setblocking(False)
        await loop.sock_sendall(raw, UPGRADE)
        frame = b"\x82\xfe" + (1 + len(SOUND)).to_bytes(2, "big") + bytes(4) + b"\x10" + SOUND
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 60:
                await loop.sock_sendall(raw, frame)
                if bytes_at_once:
                    await asyncio.wait_for(loop.sock_recv(raw, bytes_at_once), 10)
                await asyncio.sleep(SECONDS)
        took = time.monotonic() - began
        raw.close()
        await self.until_free()
        return f"dropped after {took:.1f} s"

    async def break_off(self) -> str:
        """Twenty begin to talk and are cut off, without a goodbye."""
        took = []
        for _ in range(20):
            guest = await self.session.ws_connect(f"{self.program.url}/api/chat?audio=pcm")
            await begin(guest, 30)
            for _ in range(3):
                await guest.send_bytes(b"\x10" + SOUND)
                await asyncio.sleep(SECONDS)
            cut_off(guest)
            took.append(await self.until_free())
            with contextlib.suppress(ConnectionError, aiohttp.ClientError):
                await guest.close()
        return f"free after {np.median(took) * 1e3:.0f} ms, {max(took) * 1e3:.0f} ms at most"

    async def come_and_go(self) -> str:
        """Everybody who comes is let in, and goes: with a goodbye, without one, or before the conversation began."""
        memory: list[float] = []
        few = self.program.held()
        began = time.monotonic()
        for index in range(self.connections):
            if index == 20:
                few = self.program.held()
            socket = await self.session.ws_connect(f"{self.program.url}/api/chat?audio=pcm")
            if index % 3:
                await begin(socket, 30)
            if index % 3 == 2 and socket._response.connection is not None:
                cut_off(socket)
            with contextlib.suppress(ConnectionError, aiohttp.ClientError):  # where it was cut off
                await socket.close()
            if index % max(self.connections // 10, 1) == 0:
                memory.append(self.program.memory())
        memory.append(self.program.memory())
        rate = self.connections / (time.monotonic() - began)
        await self.until_free()
        self.growth = memory
        many = self.program.held()
        half = memory[len(memory) // 2 :]
        return (
            f"{rate:.0f} a second; memory {memory[0]:.0f} MB, {min(half):.0f} to {max(half):.0f} in the second half; "
            f"threads {few[0]} after 20, {many[0]} after all; descriptors {few[1]} and {many[1]}"
        )


@contextlib.asynccontextmanager
async def loaded(args: argparse.Namespace, program: Program) -> AsyncIterator[Load]:
    async with aiohttp.ClientSession() as session:
        load = Load(program, session, args.seconds, args.connections)
        try:
            yield load
        finally:
            for talker in load.talkers:
                await talker.stop()


async def run(args: argparse.Namespace, program: Program) -> dict[str, Any]:
    async with loaded(args, program) as load:
        places = int((await load.info())["places"])
        count = max(places - 1, 1)
        print(
            f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"model {args.model}: {places} places, {count} talk the whole time"
        )
        print(f"{'':22} {'frames':>6} {'p50 ms':>8} {'p95 ms':>8} {'max ms':>8} {'dropped':>8} {'broken':>7} ", end="")
        print(f"{'memory MB':>9} {'cores':>6}")
        for _ in range(count):
            load.talkers.append(Talker())
            await load.talkers[-1].start(load.session, program.url)
        await load.phase("nobody else", load.alone)
        if places > 1:
            await load.phase("one more, one waits", load.one_more)
            await load.phase("one reads too slowly", lambda: load.slow(400))
            await load.phase("one never reads", lambda: load.slow(0))
            await load.phase("20 are cut off", load.break_off)
            await load.phase(f"{args.connections} come and go", load.come_and_go)
        await load.phase("nobody else", load.alone)
        figures = {"benchmark": "web", "model": args.model, "places": places, "talkers": count, "phases": load.rows}
        return {**figures, "memory_mb": [round(value, 1) for value in getattr(load, "growth", [])]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="parrot", help="parrot says back what it hears; or what --model of web takes"
    )
    parser.add_argument("--places", type=int, help="default: 4 with the parrot, else what the server measures")
    parser.add_argument("--seconds", type=float, default=8.0, help="of the phases in which nothing else ends them")
    parser.add_argument("--connections", type=int, default=1000, help="how many come and go")
    args = parser.parse_args(argv)
    program = Program(args.model, args.places or (4 if args.model == "parrot" else None))
    try:
        figures = asyncio.run(run(args, program))
    finally:
        program.stop()
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
