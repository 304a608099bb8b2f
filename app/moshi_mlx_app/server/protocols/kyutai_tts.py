"""``/api/tts_streaming``, the protocol of Kyutai's text-to-speech server.

A WebSocket: the client sends MessagePack maps ``Text{text}`` and ``Eos``, or text messages and a zero byte for the end.
The server answers ``Ready``, ``Audio{pcm}`` or ``OggOpus{data}``, ``Text{text, start_s, stop_s}`` and
``Error{message}`` in the formats with MessagePack, and sound alone in the others; it closes at the end. A POST with
``{"text", "voice"}`` is answered with a wav as it is spoken. Query: ``format``, ``voice``, ``seed``, ``cfg_alpha``. An
unknown voice is an error; Kyutai's server takes another one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
from aiohttp import WSMsgType, web
from numpy.typing import NDArray

from moshi_mlx.engine.text import Word
from moshi_mlx.errors import MoshiError
from moshi_mlx.tasks.speak import DEFAULT_VOICE, Manner, Spoken
from moshi_mlx_app.recording.wav import header

from ..connection import ProtocolError
from ..speech import SpeechService, SpokenText
from .kyutai import Opus, opus_missing

if TYPE_CHECKING:
    from ..server import Server

__all__ = ["FORMATS", "add_routes"]

FORMATS = ("OggOpus", "OggOpusMessagePack", "Pcm", "PcmMessagePack")
CODEBOOKS = 24
"""Of Kyutai's server."""
_LONGEST_BODY = 1 << 20
_MOST_WORDS = 20_000  # of a client, waiting
_SILENT = 120.0  # seconds without text; then the client has gone


def add_routes(app: web.Application, server: Server) -> None:
    """Let ``app`` answer ``/api/tts_streaming``, if ``server`` has a text-to-speech model."""
    service = server.tts
    if service is None:
        return
    talks: set[_Talk] = set()

    async def socket(request: web.Request) -> web.StreamResponse:
        found = web.WebSocketResponse(timeout=0.5, heartbeat=10, compress=False, max_msg_size=1 << 16)
        if not found.can_prepare(request):
            return web.Response(status=426, headers={"Upgrade": "websocket"}, text="this is a WebSocket\n")
        await found.prepare(request)
        talk = _Talk(service, found, request.query)
        talks.add(talk)
        try:
            await talk.run()
        finally:
            talks.discard(talk)
        return found

    async def post(request: web.Request) -> web.StreamResponse:
        return await _wav(service, request)

    async def stop(app: web.Application) -> None:
        for talk in tuple(talks):
            await talk.fail("the server stops")

    app.router.add_get("/api/tts_streaming", socket)
    app.router.add_post("/api/tts_streaming", post)
    app.on_shutdown.append(stop)


def _manner(service: SpeechService, given: Mapping[str, Any]) -> Manner:
    """How a client wants to be spoken to. May fetch a voice.

    Raises
    ------
    MoshiError
        If there is no such voice, or a value makes no sense.
    """
    model = service.model
    try:
        seed, cfg = int(given.get("seed") or 0), float(given.get("cfg_alpha") or 2.0)
    except (TypeError, ValueError):
        raise ProtocolError("seed and cfg_alpha are numbers") from None
    name = str(given.get("voice") or "") or (DEFAULT_VOICE if model.has_speakers else "")
    voice = model.voice(*([name] * 2 if name else []), source=service.voices)  # of both speakers, as in Kyutai's
    return model.manner(voice=voice, seed=seed, cfg=cfg, codebooks=min(CODEBOOKS, model.lm.config.own_q))


class _Talk:
    """One connection."""

    def __init__(self, service: SpeechService, socket: web.WebSocketResponse, query: Mapping[str, str]):
        self._service, self._socket, self._query = service, socket, query
        self._format = query.get("format") or "OggOpus"
        self._packed = self._format.endswith("MessagePack")
        self._opus: Opus | None = None
        self._words = 0

    async def run(self) -> None:
        """Speak until the end."""
        client: SpokenText | None = None
        reading: asyncio.Task[None] | None = None
        try:
            if self._format not in FORMATS:
                raise ProtocolError(f"unknown format {self._format[:40]!r}: it is one of {', '.join(FORMATS)}")
            if self._format.startswith("OggOpus"):
                if opus_missing():
                    raise ProtocolError("this server has no Opus: ask for format=PcmMessagePack")
                self._opus = Opus(self._service.model.sample_rate)
            manner = await asyncio.to_thread(_manner, self._service, self._query)
            client = SpokenText(self._service, manner)
            await self._send("Ready")
            reading = asyncio.ensure_future(self._read(client))
            await self._write(client, reading)
        except (MoshiError, ProtocolError) as error:
            await self.fail(str(error))
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            if client is not None:
                client.utterance.end()
            if reading is not None:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
            await self._socket.close()

    async def fail(self, message: str) -> None:
        """Say why it ends, and end it."""
        if not self._socket.closed:
            try:
                await self._send("Error", message=message)
                await self._socket.close(code=1000 if self._packed else 1011, message=message.encode()[:120])
            except (ConnectionError, RuntimeError):
                pass

    async def _read(self, client: SpokenText) -> None:
        """Take the text, until its end."""
        while True:
            received = await asyncio.wait_for(self._socket.receive(), _SILENT)
            if received.type == WSMsgType.TEXT:
                text: str | None = received.data
            elif received.type == WSMsgType.BINARY:
                text = None if received.data == b"\0" else _text(received.data)
            else:
                raise ConnectionResetError("the client has gone")
            if text is None:
                client.utterance.finish()
                break
            self._words += client.feed(text)
            if self._words > _MOST_WORDS:
                raise ProtocolError(f"more than {_MOST_WORDS:,} words at once: wait for their sound")
        while (await self._socket.receive()).type in (WSMsgType.TEXT, WSMsgType.BINARY):
            pass
        raise ConnectionResetError("the client has gone")

    async def _write(self, client: SpokenText, reading: asyncio.Task[None]) -> None:
        """Send what is spoken, until the end of it or of the client."""
        while True:
            waiting = asyncio.ensure_future(client.spoken.get())
            await asyncio.wait((waiting, reading), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                waiting.cancel()
                try:
                    reading.result()
                except asyncio.TimeoutError:
                    raise ProtocolError(f"no text for {_SILENT:.0f} s") from None
            spoken = await waiting
            if isinstance(spoken, Exception):
                raise spoken if isinstance(spoken, MoshiError) else ProtocolError(f"it failed: {spoken}")
            for word in spoken.words:
                self._words -= 1
                await self._send("Text", **_times(word, self._service.model.frame_rate))
            if spoken.pcm is not None:
                await self._sound(spoken.pcm)
                client.utterance.sent()
            if spoken.last:
                return

    async def _sound(self, pcm: NDArray[np.float32]) -> None:
        if self._opus is not None:
            data = self._opus.encode(pcm)
            if data:
                await (self._send("OggOpus", data=data) if self._packed else self._socket.send_bytes(data))
        elif self._packed:
            await self._send("Audio", pcm=pcm.tolist())
        else:
            await self._socket.send_bytes(pcm.astype("<f4").tobytes())

    async def _send(self, kind: str, **values: Any) -> None:
        """A message of the formats that have messages."""
        if self._packed:
            await self._socket.send_bytes(msgpack.packb({"type": kind, **values}, use_single_float=True))


def _times(word: Word, rate: float) -> dict[str, Any]:
    """A word with its times as in Kyutai's server, which counts positions from 1."""
    return {"text": word.text, "start_s": round(word.start + 1 / rate, 4), "stop_s": round(word.end + 1 / rate, 4)}


def _text(data: bytes) -> str | None:
    """The text of a message; None for the end."""
    try:
        given = msgpack.unpackb(data, max_map_len=8)
    except Exception as error:
        raise ProtocolError(f"not MessagePack: {type(error).__name__}") from None
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "Eos":
        return None
    if kind == "Voice":
        raise ProtocolError("voices are chosen in the query (voice=NAME): embeddings are not taken")
    if kind != "Text" or not isinstance(given.get("text"), str):
        raise ProtocolError(f"unknown type of message: {str(kind)[:40]!r}")
    text: str = given["text"]
    return text


async def _wav(service: SpeechService, request: web.Request) -> web.StreamResponse:
    """Answer a POST with a wav as it is spoken."""
    body = bytearray()
    async for chunk in request.content.iter_chunked(1 << 16):
        body += chunk
        if len(body) > _LONGEST_BODY:
            return web.Response(status=413, text=f"a text has at most {_LONGEST_BODY:,} bytes\n")
    client: SpokenText | None = None
    try:
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            raise ProtocolError("the body is JSON: text, voice") from None
        if not isinstance(given, dict) or not isinstance(given.get("text"), str) or not given["text"].strip():
            raise ProtocolError("the body is JSON with a text that has words")
        client = SpokenText(service, await asyncio.to_thread(_manner, service, given))
        client.feed(given["text"])
        client.utterance.finish()
        first = await client.spoken.get()
        if isinstance(first, Exception):
            raise ProtocolError(str(first))
        rate = service.model.sample_rate
        response = web.StreamResponse(headers={"Content-Type": "audio/wav"})
        await response.prepare(request)
        await response.write(header(rate, 1, None))
        spoken: Spoken | Exception = first
        while not isinstance(spoken, Exception):
            if spoken.pcm is not None:
                await response.write(np.rint(spoken.pcm * 32767).astype("<i2").tobytes())
                client.utterance.sent()
            if spoken.last:
                break
            spoken = await client.spoken.get()
        await response.write_eof()
        return response
    except (MoshiError, ProtocolError) as error:
        return web.Response(status=400, text=f"{error}\n")
    finally:
        if client is not None:
            client.utterance.end()
