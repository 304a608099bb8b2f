"""``/api/chat``, the protocol of Kyutai's clients: binary messages, the first byte says what the rest is.

Kinds 0 to 6 are Kyutai's (its Rust server, Python server and web client). 0x10 and 0x11 are this project's; they are
sent only to who asks for them in the query, because Kyutai's page stops at kinds that it does not know.
"""

from __future__ import annotations

import asyncio
import enum
import json
import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from aiohttp import WSCloseCode, WSMessage, WSMsgType, web
from numpy.typing import NDArray

from moshi_mlx.engine.text import Word
from moshi_mlx.realtime import Captions, Conversation
from moshi_mlx.tasks.dialogue import SessionFrame
from moshi_mlx_app.captions import TalkCaptions
from moshi_mlx_app.version import program

from ..connection import End, ProtocolError, Talk
from ..roles import ends_turns_by_gaps
from ..settings import BadQuery, Settings, read_settings

if TYPE_CHECKING:
    from ..server import Server

__all__ = [
    "Control",
    "Kind",
    "KyutaiTalk",
    "Opus",
    "Pcm",
    "ProtocolError",
    "Sound",
    "add_routes",
    "message",
    "opus_missing",
    "read_json",
]

Samples = NDArray[np.float32]
_FULL_SCALE = 32768.0
_AUDIBLE = 0.002  # RMS, -54 dBFS: the codec's silence lies below
_KEPT_SILENT = 2  # silent frames that are sent, for a voice to end in


def add_routes(app: web.Application, server: Server) -> None:
    """Let ``app`` answer ``/api/chat`` with conversations on ``server``."""

    async def chat(request: web.Request) -> web.StreamResponse:
        settings: Settings | BadQuery
        try:
            settings = read_settings(request.query, server.generation, server.seed)
        except BadQuery as error:
            settings = error
        else:
            try:
                settings = await _prompted(settings, request, server)
            except BadQuery as error:
                return web.Response(status=400, text=f"{error}\n")
        return await server.talk(request, KyutaiTalk, (settings, server.captions))

    app.router.add_get("/api/chat", chat)


async def _prompted(settings: Settings, request: web.Request, server: Server) -> Settings:
    """The settings with what a connection says about role and voice."""
    if server.roles is None:
        return settings
    opening = await asyncio.to_thread(server.roles.opening, request.query)
    gaps = ends_turns_by_gaps(request.query, request.headers.get("User-Agent", ""))
    return replace(settings, opening=opening, gaps=gaps)


class Kind(enum.IntEnum):
    """First byte of a message."""

    HANDSHAKE = 0x00
    AUDIO = 0x01
    TEXT = 0x02
    CONTROL = 0x03
    METADATA = 0x04
    ERROR = 0x05
    PING = 0x06
    PCM = 0x10
    EVENT = 0x11


class Control(enum.IntEnum):
    """Second byte of a control message, as in Kyutai's page."""

    START = 0
    END_TURN = 1
    PAUSE = 2
    RESTART = 3


def message(kind: Kind, content: bytes | str | dict[str, Any] = b"") -> bytes:
    """One message: text as UTF-8, a dict as JSON."""
    if isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if isinstance(content, str):
        content = content.encode("utf-8", "replace")
    return bytes([kind]) + content


def read_json(content: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises
    ------
    ProtocolError
        If it is anything else.
    """
    try:
        value = json.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {' '.join(str(error).split())[:100]}") from None
    if not isinstance(value, dict):
        raise ProtocolError("not a JSON object")
    return value


class Sound(Protocol):
    """One connection's sound, both ways. Each direction belongs to one thread at a time.

    Attributes
    ----------
    name : str
        As in the query and the metadata.
    kind : Kind
        Of its messages.
    """

    name: str
    kind: Kind

    def decode(self, content: bytes) -> Samples:
        """Samples [n], float32, of one message; raises ProtocolError."""

    def encode(self, frame: Samples) -> bytes:
        """Content of the message for one frame [frame_size], float32."""


class Pcm:
    """Little-endian 16-bit samples as they are."""

    name, kind = "pcm", Kind.PCM

    def decode(self, content: bytes) -> Samples:
        if len(content) % 2:
            raise ProtocolError(f"{len(content)} bytes are no whole number of 16-bit samples")
        return np.frombuffer(content, "<i2").astype(np.float32) / _FULL_SCALE

    def encode(self, frame: Samples) -> bytes:
        return bytes(np.clip(np.rint(frame * _FULL_SCALE), -_FULL_SCALE, _FULL_SCALE - 1).astype("<i2").tobytes())


def opus_missing() -> str:
    """Why there is no Opus here; empty if there is."""
    try:
        import sphn  # noqa: F401
    except ImportError as error:
        return f"this server has no Opus ({error}): ask for uncompressed sound with audio=pcm"
    return ""


class Opus:
    """A stream of Ogg/Opus pages, by Kyutai's sphn.

    Parameters
    ----------
    sample_rate : int
        Hertz; one of Opus's.
    """

    name, kind = "opus", Kind.AUDIO

    def __init__(self, sample_rate: int):
        import sphn

        self._reader = sphn.OpusStreamReader(sample_rate)
        self._writer = sphn.OpusStreamWriter(sample_rate)

    def decode(self, content: bytes) -> Samples:
        try:
            return np.asarray(self._reader.append_bytes(content), np.float32).reshape(-1)
        except Exception as error:  # pyo3 has no common class for what Rust returns
            raise ProtocolError(f"not Ogg/Opus: {' '.join(str(error).split())[:100]}") from None

    def encode(self, frame: Samples) -> bytes:
        return bytes(self._writer.append_pcm(np.ascontiguousarray(frame, np.float32)))


class KyutaiTalk(Talk):
    """A client of Kyutai's protocol.

    Parameters
    ----------
    wishes : tuple of (Settings or BadQuery, Captions or None)
        What it asks for in its query, and the recogniser beside the conversations: who asks for events gets the
        user's words.
    *shared
        As for :class:`Talk`.
    """

    def __init__(self, wishes: tuple[Settings | BadQuery, Captions | None], *shared: Any):
        super().__init__(wishes[0], *shared)
        self._captions: TalkCaptions | None = None
        if self._events and wishes[1] is not None and wishes[1].model.sample_rate == self._model.sample_rate:
            self._captions = TalkCaptions(wishes[1], self._heard)
        self._sound: Sound = Pcm()
        self._silent = _KEPT_SILENT  # no turn begins with silence

    async def run(self) -> End:
        try:
            return await super().run()
        finally:
            if self._captions is not None:
                self._captions.close()

    def _tap(self, heard: NDArray[np.float32], frame: SessionFrame) -> None:
        if self._captions is not None:
            self._captions.tap(heard, frame)
        super()._tap(heard, frame)

    def _heard(self, words: tuple[Word, ...]) -> None:
        """In the recogniser's thread: words of the user."""
        told = [{"text": word.text.strip(), "start": round(word.start, 3), "end": round(word.end, 3)} for word in words]
        self._engine.tell(
            self._loop, lambda: None if self._over.done() else self._tell({"type": "user", "words": told})
        )

    def _open(self) -> None:
        if isinstance(self._settings, BadQuery):
            self.end(End(WSCloseCode.POLICY_VIOLATION, str(self._settings)))
        elif self._settings.audio == "opus":
            if opus_missing():
                self.end(End(WSCloseCode.POLICY_VIOLATION, opus_missing()))
            else:
                self._sound = Opus(self._model.sample_rate)

    @property
    def _events(self) -> bool:
        """Whether it wants kind 0x11."""
        return isinstance(self._settings, Settings) and self._settings.events

    def _queued(self, place: int) -> None:
        if self._events:
            self._post(message(Kind.EVENT, {"type": "queue", "place": place}))
        else:
            self._post(message(Kind.TEXT, f"[busy: {place} in line] "))

    async def _settled(self) -> Settings:
        assert isinstance(self._settings, Settings)
        return self._settings

    def _begin(self, conversation: Conversation, settings: Settings) -> None:
        transcript = self._engine.transcript(settings)
        self._post(message(Kind.HANDSHAKE))
        self._post(
            message(
                Kind.METADATA,
                {
                    "model": self._model.name,
                    "sample_rate": self._model.sample_rate,
                    "frame_samples": self._model.frame_size,
                    "audio": self._sound.name,
                    "sampling": settings.sampling(),
                    "recorded": self._engine.record is not None,
                    "transcript": {**transcript.head(), "speaker": transcript.speaker},
                    "version": program(),
                },
            )
        )

    def _take(self, received: WSMessage) -> None:
        if received.type != WSMsgType.BINARY:
            raise ProtocolError("messages here are binary: the first byte is their kind")
        data: bytes = received.data
        if not data:
            raise ProtocolError("an empty message")
        kind, content = data[0], data[1:]
        if kind != Kind.PING:
            self._wordless = 0
        if kind == self._sound.kind:
            self._hear(self._sound.decode(content))
        elif kind in (Kind.AUDIO, Kind.PCM):
            raise ProtocolError(
                f"sound of kind {kind:#04x}, but this connection was opened with audio={self._sound.name}"
            )
        elif kind == Kind.CONTROL:
            self._control(content)
        elif kind == Kind.EVENT:
            self._event(read_json(content))
        elif kind == Kind.METADATA:
            read_json(content)
        elif kind in (Kind.TEXT, Kind.ERROR):
            try:
                content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ProtocolError(f"text that is not UTF-8: {error.reason}") from None
        elif kind not in (Kind.HANDSHAKE, Kind.PING):
            raise ProtocolError(f"unknown kind of message: {kind:#04x}")

    def _control(self, content: bytes) -> None:
        if len(content) != 1 or content[0] not in set(Control):
            raise ProtocolError(f"unknown control message: {content[:8].hex() or 'empty'}")
        if self._conversation is None:
            return
        action = Control(content[0])
        if action == Control.START:
            self._conversation.resume()
        elif action == Control.PAUSE:
            self._conversation.pause()
        elif action == Control.RESTART:
            self._conversation.reset()
        elif action == Control.END_TURN and self._model.purpose == "translation":
            self._conversation.end()

    def _event(self, event: dict[str, Any]) -> None:
        what = event.get("type")
        if what not in ("mute", "unmute", "pause", "resume", "reset", "present"):
            raise ProtocolError(f"unknown event: {str(what)[:40]!r}")
        if self._conversation is None or what == "present":
            return
        if what in ("mute", "unmute"):
            self._conversation.mute(what == "mute")
        else:
            getattr(self._conversation, what)()

    def _opening(self, done: int, total: int) -> None:
        self._tell({"type": "opening", "done": done, "total": total})

    def _speak(self, frame: SessionFrame) -> None:
        if not (isinstance(self._settings, Settings) and self._settings.gaps and self._is_pause(frame)):
            super()._speak(frame)

    def _is_pause(self, frame: SessionFrame) -> bool:
        """Whether nobody would miss this frame: it and those before it are silent, and no word begins."""
        level = float(np.sqrt(np.mean(np.square(frame.pcm))))
        self._silent = 0 if level > _AUDIBLE or frame.text else self._silent + 1
        return self._silent > _KEPT_SILENT

    def _say(self, frame: SessionFrame) -> None:
        self._post(message(self._sound.kind, self._sound.encode(frame.pcm)), sound=True)
        if frame.text:
            self._post(message(Kind.TEXT, frame.text))
            self._tell({"type": "text", "text": frame.text, "time_s": round(frame.index * self._frame_seconds, 3)})

    def _quiet_line(self) -> None:
        self._post(message(Kind.PING))  # Kyutai's page leaves after ten seconds without a message

    def _news(self, conversation: Conversation) -> None:
        for event in conversation.events():
            if event.kind == "reset":
                self._tell({"type": "reset"})
        stats = conversation.stats
        self._tell(
            {
                "type": "stats",
                "late_frames": stats.late,
                "dropped_samples": stats.dropped_in,
                "latency_ms": round(stats.latency.last * 1e3, 1),
                "elapsed_s": round(time.monotonic() - self._began, 2),
                "user_level_db": _decibels(stats.level_in),
                "moshi_level_db": _decibels(stats.level_out),
                "backlog_ms": round(conversation.backlog * 1e3, 1),
            }
        )

    def _tell(self, event: dict[str, Any]) -> None:
        if self._events:
            self._post(message(Kind.EVENT, event))

    def _last_words(self, end: End) -> list[bytes | str]:
        last: list[bytes | str] = [message(Kind.ERROR, end.reason)] if end.fault else []
        if self._events:
            last.append(message(Kind.EVENT, {"type": "end", "reason": end.reason}))
        return last


def _decibels(level: float) -> float:
    return round(20 * math.log10(max(level, 1e-5)), 1)
