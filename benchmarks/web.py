"""The server under load, and what those who talk notice of it: ``python -m benchmarks.web`` in the repository's root.

The program ``moshi-mlx-local web`` runs in a process of its own, with the built-in model by default; ``--model parrot``
says back what it hears (all machinery, no computing). Everybody talks the whole time, in step with the clock, with
recorded speech. At first all places are taken by such; then one of them goes, and that place is taken by one more and
one who has to wait, a reader that is too slow, one that never reads, twenty whose connection breaks, and a thousand
that come and go. At last all talk again, the server is stopped for two seconds, and every core is kept busy for two.

For each phase a row: how long the answers took (from the last sample sent to the sound that came back), what was
dropped, and the server's memory, threads, descriptors and processor time. A run has held if in each phase 95 of 100
answers came within a frame, nothing was dropped and nobody thrown out; of a stall, what counts begins two seconds after
its end. A table for each run, then one JSON line. The exit status is 1 if a run has not held.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile

from benchmarks.workers import resident

ROOT = Path(__file__).resolve().parent.parent
FRAME, RATE = 1_920, 24_000
SECONDS = FRAME / RATE
STALL, SETTLED = 2.0, 2.0
UPGRADE = (
    "GET /api/chat?audio=pcm&events={events}&seed={seed} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
    "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def packed(opcode: int, content: bytes) -> bytes:
    """A WebSocket frame of a client's; the mask is zero, so that it can be made once for all."""
    short = len(content) < 126
    length = bytes([0x80 | len(content)]) if short else b"\xfe" + len(content).to_bytes(2, "big")
    return bytes([0x80 | opcode]) + length + bytes(4) + content


def speech() -> list[bytes]:
    """The questions that come with the program, as messages of a frame each."""
    pcm = soundfile.read(ROOT / "moshi_mlx" / "assets" / "questions.wav", dtype="int16")[0]
    frames = pcm[: len(pcm) // FRAME * FRAME].reshape(-1, FRAME).astype("<i2")
    return [packed(2, b"\x10" + frame.tobytes()) for frame in frames]


SPEECH = speech()


class Client(asyncio.Protocol):
    """One connection, as cheap as can be: the server has to share the machine with all of them."""

    transport: asyncio.Transport

    def __init__(self, seed: int = 0, events: bool = False):
        loop = asyncio.get_running_loop()
        self.began: asyncio.Future[float] = loop.create_future()
        self.queued: asyncio.Future[int] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.said = ""  # by the server, why it ends
        self._seed, self._events = seed, events
        self._bytes = bytearray()
        self._upgraded = False

    async def connect(self, port: int) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", port)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(UPGRADE.format(events=int(self._events), seed=self._seed).encode())

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        held = self._bytes
        held += data
        if not self._upgraded:
            head, found, rest = bytes(held).partition(b"\r\n\r\n")
            if not found:
                return
            if b" 101 " not in head:
                self.said = head.decode()
                return self.transport.abort()
            self._upgraded, self._bytes = True, (held := bytearray(rest))
        start = 0
        while len(held) - start >= 2:
            length, at = held[start + 1], start + 2
            if length == 126:
                length, at = int.from_bytes(held[at : at + 2], "big"), at + 2
            if len(held) < at + length:
                break
            content = bytes(held[at : at + length])
            opcode, start = held[start] & 15, at + length
            if opcode == 9:
                self.transport.write(packed(10, content))
            elif opcode == 8:
                self.said = self.said or content[2:].decode() or "closed"
            else:
                self.message(content[0], content[1:])
        del held[:start]

    def message(self, kind: int, content: bytes) -> None:
        if kind == 0x00 and not self.began.done():
            self.began.set_result(time.monotonic())
        elif kind == 0x05:
            self.said = content.decode()
        elif kind == 0x11:
            self.event(json.loads(content))

    def event(self, event: dict[str, Any]) -> None:
        if event["type"] == "queue" and not self.queued.done():
            self.queued.set_result(event["place"])

    async def begin(self, timeout: float = 60.0) -> float:
        """Wait until the server says that the conversation begins; when it did."""
        await asyncio.wait([self.began, self.closed], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not self.began.done():
            raise SystemExit(f"a client was not let in: {self.said or 'no answer'}")
        return self.began.result()

    async def leave(self) -> None:
        """Say goodbye, and wait for the answer."""
        self.transport.write(packed(8, b"\x03\xe8"))
        await asyncio.wait([self.closed], timeout=10)
        self.transport.abort()

    def break_off(self) -> None:
        """End the connection without a word."""
        self.transport.abort()


class Talker(Client):
    """One who keeps to the clock, from the handshake until the end."""

    def __init__(self, seed: int):
        super().__init__(seed, events=True)
        self.sent: list[float] = []
        self.came: list[tuple[int, float]] = []
        self.stats: dict[str, Any] = {}
        self._speech = cycle(SPEECH[7 * seed % len(SPEECH) :] + SPEECH[: 7 * seed % len(SPEECH)])
        self._next: asyncio.TimerHandle | None = None

    @property
    def dropped(self) -> int:
        """Frames."""
        return int(self.stats.get("dropped_samples", 0)) // FRAME

    async def start(self, port: int) -> None:
        await self.connect(port)
        await self.begin()
        loop = asyncio.get_running_loop()
        self._speak(loop, loop.time() + random.random() * SECONDS)

    def _speak(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        if when <= loop.time() and not self.closed.done():
            self.sent.append(time.monotonic())
            self.transport.write(next(self._speech))
            when += SECONDS
        self._next = loop.call_at(when, self._speak, loop, when)

    async def stop(self) -> None:
        if self._next is not None:
            self._next.cancel()
        await self.leave()

    def message(self, kind: int, content: bytes) -> None:
        if kind == 0x10:
            # Each frame has its answer, but for those that the server dropped and told of.
            number = len(self.came) + self.dropped
            self.came.append((number, time.monotonic() - self.sent[min(number, len(self.sent) - 1)]))
        else:
            super().message(kind, content)

    def event(self, event: dict[str, Any]) -> None:
        if event["type"] == "stats":
            self.stats = event

    def answers(self, since: float, until: float) -> list[float]:
        """Seconds that the answers to frames sent in this time took."""
        sent = self.sent
        return [seconds for number, seconds in self.came if number < len(sent) and since <= sent[number] < until]


class Program:
    """The server's process."""

    def __init__(self, model: str, sessions: int | None):
        command = [sys.executable, "-m"]
        command += ["tests.helpers.parrot", "web"] if model == "parrot" else ["moshi_mlx_app", "web", "--model", model]
        command += ["--port", "0", "--no-browser", "--quiet"]
        command += [] if sessions is None else ["--max-sessions", str(sessions)]
        path = os.pathsep.join(str(ROOT / folder) for folder in ("", "app", "quantize"))
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        assert self.process.stdout is not None
        url = self.process.stdout.readline().strip().rstrip("/")
        if not url:
            raise SystemExit("the server did not start")
        self.port = int(url.rpartition(":")[2])

    async def info(self) -> dict[str, Any]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /api/info HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return json.loads(answer.partition(b"\r\n\r\n")[2])  # type: ignore[no-any-return]

    def held(self) -> tuple[float, int, int]:
        """MB that are resident, threads of the system's, and descriptors."""
        process = psutil.Process(self.process.pid)
        return resident(self.process.pid) / 1e6, process.num_threads(), process.num_fds()

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


class Load:
    """The phases of one run."""

    def __init__(self, program: Program, seconds: float, connections: int):
        self.program, self.seconds, self.connections = program, seconds, connections
        self.talkers: list[Talker] = []
        self.rows: list[dict[str, Any]] = []

    async def join(self) -> None:
        """One more who talks from now on."""
        self.talkers.append(Talker(len(self.talkers)))
        await self.talkers[-1].start(self.program.port)

    async def until_free(self) -> float:
        began = time.monotonic()
        while (await self.program.info())["free"] < 1:
            if time.monotonic() - began > 60:
                raise SystemExit("a place does not become free")
            await asyncio.sleep(0.02)
        return time.monotonic() - began

    async def phase(self, name: str, what: Callable[[], Coroutine[Any, Any, str]], stalled: bool = False) -> None:
        """Do ``what``, and see how those who talk fared meanwhile, or after it if it is a stall."""
        dropped = sum(talker.dropped for talker in self.talkers)
        began, spent = time.monotonic(), self.program.spent()
        said = await what()
        if stalled:
            await asyncio.sleep(SETTLED)
            lost, began = sum(talker.dropped for talker in self.talkers) - dropped, time.monotonic()
            dropped, said = dropped + lost, f"{said}{lost} frames dropped in the stall and the two seconds after it"
            spent = self.program.spent()
            await asyncio.sleep(self.seconds)
        until = time.monotonic()
        cores = (self.program.spent() - spent) / (until - began)
        await asyncio.sleep(0.5)  # the last answers, and the last figures
        answers = [seconds for talker in self.talkers for seconds in talker.answers(began, until)]
        sent = sum(began <= when < until for talker in self.talkers for when in talker.sent)
        memory, threads, descriptors = self.program.held()
        p50, p95, longest = (float(np.percentile(answers or [60.0], each)) * 1e3 for each in (50, 95, 100))
        row = {
            "phase": name,
            "seconds": round(until - began, 1),
            "talkers": len(self.talkers),
            "frames": sent,
            "answered": len(answers),
            "p50_ms": round(p50, 1),
            "p95_ms": round(p95, 1),
            "max_ms": round(longest, 1),
            "dropped_frames": sum(talker.dropped for talker in self.talkers) - dropped,
            "thrown_out": sum(talker.closed.done() for talker in self.talkers),
            "memory_mb": round(memory, 1),
            "threads": threads,
            "descriptors": descriptors,
            "cores": round(cores, 2),
            "said": said,
        }
        row["held"] = p95 < 1e3 * SECONDS and not row["dropped_frames"] and not row["thrown_out"]
        self.rows.append(row)
        print(
            f"{name:21} {len(self.talkers):5d} {sent:6d} {p50:7.1f} {p95:7.1f} {longest:7.1f} "
            f"{row['dropped_frames']:7d} {row['thrown_out']:6d} {memory:7.1f} {threads:7d} {descriptors:5d} "
            f"{cores:5.2f} {'' if row['held'] else 'NOT HELD '} {said}",
            flush=True,
        )

    async def alone(self) -> str:
        await asyncio.sleep(self.seconds)
        return ""

    async def one_more(self) -> str:
        """The last place is taken; the next is told its place in line, and let in when the place becomes free."""
        last, waiting = Talker(len(self.talkers)), Client(events=True)
        await last.start(self.program.port)
        began = time.monotonic()
        await waiting.connect(self.program.port)
        assert await asyncio.wait_for(waiting.queued, 10) == 1
        took = time.monotonic() - began
        await asyncio.sleep(min(self.seconds, 8.0))
        began = time.monotonic()
        await last.stop()
        let_in = await waiting.begin() - began
        await waiting.leave()
        await self.until_free()
        return f"told its place after {took * 1e3:.0f} ms, let in {let_in * 1e3:.0f} ms after one had left"

    async def slow(self, bytes_at_once: int) -> str:
        """Takes ``bytes_at_once`` for each frame that it asks for; 0: never reads."""
        loop = asyncio.get_running_loop()
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", self.program.port))
        raw.setblocking(False)
        await loop.sock_sendall(raw, UPGRADE.format(events=0, seed=0).encode())
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 60:
                await loop.sock_sendall(raw, SPEECH[0])
                if bytes_at_once:
                    await asyncio.wait_for(loop.sock_recv(raw, bytes_at_once), 10)
                await asyncio.sleep(SECONDS)
        took = time.monotonic() - began
        raw.close()
        await self.until_free()
        return f"dropped after {took:.1f} s"

    async def broken_off(self) -> str:
        """Twenty begin to talk and are cut off, without a goodbye."""
        took = []
        for _ in range(20):
            guest = Client()
            await guest.connect(self.program.port)
            await guest.begin()
            for message in SPEECH[:3]:
                guest.transport.write(message)
                await asyncio.sleep(SECONDS)
            guest.break_off()
            took.append(await self.until_free())
        return f"free after {np.median(took) * 1e3:.0f} ms, {max(took) * 1e3:.0f} ms at most"

    async def come_and_go(self) -> str:
        """Everybody who comes is let in, and goes: with a goodbye, without one, or before the conversation began."""
        held = [self.program.held()]
        began = time.monotonic()
        for index in range(self.connections):
            guest = Client()
            await guest.connect(self.program.port)
            if index % 3:
                await guest.begin()
            if index % 3 == 2:
                guest.break_off()
            else:
                await guest.leave()
            if index % max(self.connections // 10, 1) == max(self.connections // 10, 1) - 1:
                held.append(self.program.held())
        rate = self.connections / (time.monotonic() - began)
        await self.until_free()
        half = [memory for memory, _, _ in held[len(held) // 2 :]]
        return (
            f"{rate:.0f} a second; memory {held[0][0]:.0f} MB, {min(half):.0f} to {max(half):.0f} in the second half; "
            f"threads {held[0][1]} before, {held[-1][1]} after; descriptors {held[0][2]} and {held[-1][2]}"
        )

    async def suspended(self) -> str:
        """The server gets no processor at all."""
        self.program.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(STALL)
        self.program.process.send_signal(signal.SIGCONT)
        return ""

    async def crowded(self) -> str:
        """Every core is busy with something else."""
        busy = f"import time; until = time.monotonic() + {STALL}\nwhile time.monotonic() < until: pass"
        others = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(os.cpu_count() or 1)]
        while any(other.poll() is None for other in others):
            await asyncio.sleep(0.05)
        return ""


@contextlib.asynccontextmanager
async def loaded(args: argparse.Namespace, program: Program) -> AsyncIterator[Load]:
    load = Load(program, args.seconds, args.connections)
    try:
        yield load
    finally:
        for talker in load.talkers:
            await talker.stop()


async def run(args: argparse.Namespace, program: Program) -> dict[str, Any]:
    async with loaded(args, program) as load:
        places = int((await program.info())["places"])
        print(
            f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
            f"{platform.python_version()}, model {args.model}: {places} places"
            f"{'' if args.sessions else ', measured by the server'}"
        )
        print(
            f"{'':21} {'talk':>5} {'frames':>6} {'p50 ms':>7} {'p95 ms':>7} {'max ms':>7} {'dropped':>7} {'thrown':>6} "
            f"{'MB':>7} {'threads':>7} {'desc.':>5} {'cores':>5}"
        )
        for _ in range(places):
            await load.join()
        await asyncio.sleep(0.5)
        await load.phase("all talk", load.alone)
        load.seconds = min(load.seconds, 8.0)
        if places > 1 and not args.only_talk:
            await load.talkers.pop().stop()
            await load.until_free()
            await load.phase("one more, one waits", load.one_more)
            await load.phase("one reads too slowly", lambda: load.slow(400))
            await load.phase("one never reads", lambda: load.slow(0))
            await load.phase("20 are cut off", load.broken_off)
            await load.phase(f"{args.connections} come and go", load.come_and_go)
            await load.join()
        if not args.only_talk:
            await load.phase("stopped for 2 s", load.suspended, stalled=True)
            await load.phase("cores busy for 2 s", load.crowded, stalled=True)
            await load.phase("all talk", load.alone)
        held = all(row["held"] for row in load.rows)
        return {"places": places, "held": held, "phases": load.rows}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="parrot, or what --model of web takes")
    parser.add_argument(
        "--sessions", type=int, default=12, help="places, all taken by talkers; 0: what the server measures"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="for which all talk at first")
    parser.add_argument("--connections", type=int, default=1000, help="how many come and go")
    parser.add_argument("--only-talk", action="store_true", help="the first phase alone")
    parser.add_argument("--runs", type=int, default=1, help="how often, each time with a server of its own")
    args = parser.parse_args(argv)
    runs = []
    for index in range(args.runs):
        random.seed(index)
        program = Program(args.model, args.sessions or None)
        try:
            runs.append(asyncio.run(run(args, program)))
        finally:
            program.stop()
    held = sum(one["held"] for one in runs)
    print(f"{held} of {len(runs)} runs held")
    print(json.dumps({"benchmark": "web", "model": args.model, "held": held, "runs": runs}))
    return 0 if held == len(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
