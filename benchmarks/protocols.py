"""Conversations over every protocol of the server at once: ``python -m benchmarks.protocols`` in the repository's root.

The program ``moshi-mlx-local web`` runs in a process of its own, with the built-in model by default; ``--model parrot``
says back what it hears (all machinery, no computing). Clients of ``/api/chat`` (PCM and Opus) and of OpenAI's Live
and Realtime protocols talk the whole time, in step with the clock, with recorded speech; ten in all by default.

For each protocol a row: how long the answers took, from the last sample sent to the sound that came back. Where every
frame has its answer it is counted which one it is; Realtime sends sound within responses only, so there it is the time
since the latest frame was sent, which is right up to 80 ms. One JSON line last. The exit status is 1 if 95 of 100
answers of a protocol took longer than a frame. ``--protocols chat live --sessions 2`` shows what Live's protocol
itself costs beside the program's own.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import time
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import aiohttp
import numpy as np
import soundfile
import sphn

from benchmarks.web import FRAME, RATE, ROOT, SECONDS, Program

PATHS = {
    "chat": "/api/chat?audio=pcm",
    "chat opus": "/api/chat",
    "live": "/v1/live/sessions",
    "realtime": "/v1/realtime",
}


class Talker:
    """One conversation."""

    def __init__(self, protocol: str, number: int):
        self.protocol = protocol
        self.sent: list[float] = []
        self.took: list[float] = []
        self._begun = asyncio.Event()
        pcm = soundfile.read(ROOT / "moshi_mlx" / "assets" / "questions.wav", dtype="int16")[0]
        frames = pcm[: len(pcm) // FRAME * FRAME].reshape(-1, FRAME)
        self._frames = cycle(np.roll(frames, -7 * number, axis=0))
        self._encoder, self._decoder = sphn.OpusStreamWriter(RATE), sphn.OpusStreamReader(RATE)
        self._opus = 0  # samples that came

    def _message(self) -> str | bytes:
        frame = next(self._frames)
        if self.protocol == "chat":
            return b"\x10" + bytes(frame.astype("<i2").tobytes())
        if self.protocol == "chat opus":
            return b"\x01" + bytes(self._encoder.append_pcm(frame.astype(np.float32) / 32768))
        kind = "session.input_audio.append" if self.protocol == "live" else "input_audio_buffer.append"
        return json.dumps({"type": kind, "audio": base64.b64encode(frame.astype("<i2").tobytes()).decode()})

    async def run(self, port: int, seconds: float) -> None:
        """Talk for so long."""
        url = f"http://127.0.0.1:{port}{PATHS[self.protocol]}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            if self.protocol == "live":
                await socket.send_str(json.dumps({"type": "session.start", "session": {"model": "any"}}))
            reading = asyncio.ensure_future(self._read(socket))
            await asyncio.wait_for(self._begun.wait(), 60)
            when = time.monotonic() + random.random() * SECONDS
            until = when + seconds
            while when < until:
                await asyncio.sleep(max(0.0, when - time.monotonic()))
                message = self._message()
                self.sent.append(time.monotonic())
                await (socket.send_str(message) if isinstance(message, str) else socket.send_bytes(message))
                when += SECONDS
            await asyncio.sleep(0.5)
            reading.cancel()

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for received in socket:
            now = time.monotonic()
            if received.type == aiohttp.WSMsgType.BINARY:
                kind, content = received.data[0], received.data[1:]
                if kind == 0x10:
                    self._answered(now)
                elif kind == 0x01:
                    before = self._opus // FRAME
                    self._opus += len(self._decoder.append_bytes(content))
                    for _ in range(self._opus // FRAME - before):
                        self._answered(now)
                elif kind == 0x04:
                    self._begun.set()
                elif kind == 0x05:
                    print(f"{self.protocol}: {content.decode()}", flush=True)
                continue
            event: dict[str, Any] = json.loads(received.data)
            if event["type"] in ("session.started", "session.created"):
                self._begun.set()
            elif event["type"] == "session.output_audio.delta":
                self._answered(now)
            elif event["type"] == "response.output_audio.delta":
                self.took.append(now - self.sent[-1])
            elif event["type"] == "error":
                print(f"{self.protocol}: {event['error']['message']}", flush=True)

    def _answered(self, now: float) -> None:
        """The next frame's answer came."""
        if len(self.took) < len(self.sent):
            self.took.append(now - self.sent[len(self.took)])


async def measure(port: int, talkers: list[Talker], seconds: float) -> list[dict[str, Any]]:
    await asyncio.gather(*(talker.run(port, seconds) for talker in talkers))
    rows = []
    print(f"{'protocol':10} {'talk':>4} {'answers':>8} {'p50 ms':>7} {'p95 ms':>7} {'max ms':>7}")
    for protocol in PATHS:
        mine = [talker for talker in talkers if talker.protocol == protocol]
        if not mine:
            continue
        took = [seconds for talker in mine for seconds in talker.took] or [60.0]
        p50, p95, longest = (float(np.percentile(took, each)) * 1e3 for each in (50, 95, 100))
        print(f"{protocol:10} {len(mine):4d} {len(took):8d} {p50:7.1f} {p95:7.1f} {longest:7.1f}", flush=True)
        row = {"protocol": protocol, "talk": len(mine), "answers": len(took)}
        rows.append({**row, "p50_ms": round(p50, 1), "p95_ms": round(p95, 1), "max_ms": round(longest, 1)})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="small", help="default: %(default)s")
    parser.add_argument("--sessions", type=int, default=10, metavar="N", help="in all (default: %(default)s)")
    parser.add_argument(
        "--protocols", nargs="+", choices=PATHS, default=list(PATHS), help="which of them take turns (default: all)"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="how long they talk (default: %(default)s)")
    args = parser.parse_args(argv)
    names = cycle(args.protocols)
    program = Program(args.model, args.sessions)

    async def run() -> list[dict[str, Any]]:
        talkers = [Talker(next(names), number) for number in range(args.sessions)]
        return await measure(program.port, talkers, args.seconds)

    try:
        rows = asyncio.run(run())
    finally:
        program.stop()
    print(json.dumps({"benchmark": "protocols", "model": args.model, "seconds": args.seconds, "rows": rows}))
    return int(any(row["talk"] and row["p95_ms"] > 1e3 * SECONDS for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
