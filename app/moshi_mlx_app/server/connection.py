"""One connection: from the line to a conversation and to its end.

Four tasks on the event loop: ``_receive`` reads messages, ``_send`` writes them, ``_watch`` looks at the time, and
``run`` waits for the first reason to end. The thread that computes for all hands over what the model says by
:meth:`Talk._tap` and goes on: sound is compressed on the loop, since Opus holds the interpreter wherever it runs.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import WSCloseCode, WSMsgType, web
from numpy.typing import NDArray

from moshi_mlx.errors import MoshiError
from moshi_mlx.realtime import Conversation
from moshi_mlx.tasks.dialogue import SessionFrame
from moshi_mlx_app.version import program

from .access import Bucket
from .engine import Engine, Running
from .hosts import household
from .listener import Handler
from .protocols.kyutai import Control, Kind, Opus, Pcm, ProtocolError, Sound, message, opus_missing, read_json
from .queue import Full, Line
from .settings import BadQuery, Settings

__all__ = ["End", "Limits", "Talk"]

_TICK = 0.2  # seconds
_STOOD_STILL = 1.0  # seconds without a tick: then this program was held up
_LAST_WORDS = 0.5  # seconds for the reason and the closing, each


@dataclass(frozen=True)
class Limits:
    """What one connection may ask of the server.

    Attributes
    ----------
    message : int
        Bytes of a message.
    messages, bytes : float
        A second; four times as much at once.
    ahead : float
        Seconds of sound beyond what a clock allows.
    unsent : float
        Seconds of sound that may wait for a slow reader.
    quiet : float
        Seconds without a sign of life after which the place can be given to another, if one waits.
    sound : float
        Seconds without sound, for one who talks: the same.
    person : float
        Seconds without any message, for one who waits, after which others go first.
    gone : float
        Seconds without a sign of life after which it ends anyway; also for a reader that is so far behind.
    """

    message: int = 1 << 17
    messages: float = 400.0
    bytes: float = 256_000.0
    ahead: float = 6.0
    unsent: float = 3.0
    quiet: float = 0.8
    sound: float = 5.0
    person: float = 10.0
    gone: float = 6.0


@dataclass(frozen=True)
class End:
    """Why a connection ends. ``fault``: it is told as an error."""

    code: int
    reason: str
    fault: bool = True


class Talk:
    """One client.

    Parameters
    ----------
    socket : aiohttp.web.WebSocketResponse
        Prepared, for ``request``.
    engine : Engine
    line : Line
    settings : Settings or BadQuery
    limits : Limits
    on_notice : callable
        Told what the owner of the server should know.
    """

    def __init__(
        self,
        socket: web.WebSocketResponse,
        request: web.Request,
        engine: Engine,
        line: Line,
        settings: Settings | BadQuery,
        limits: Limits,
        on_notice: Callable[[str], object],
    ):
        self._socket, self._transport, self._limits = socket, request.transport, limits
        self._handler, self._who = request.protocol, household(request.remote or "")
        self._engine, self._model, self._line, self._settings = engine, engine.model, line, settings
        self._on_notice = on_notice
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[End] = self._loop.create_future()
        self._conversation: Conversation | None = None
        self._running: Running | None = None
        self.recorded: list[Path] = []
        self._sound: Sound = Pcm()
        self._out: deque[bytes | int] = deque()  # messages, and numbers of the WebSocket's own pings
        self._out_news = asyncio.Event()
        self._unsent = 0
        self._frame_seconds = self._model.frame_size / self._model.sample_rate
        self._messages = Bucket(limits.messages, 4 * limits.messages)
        self._bytes = Bucket(limits.bytes, 4 * limits.bytes)
        self._seconds = Bucket(1.02, limits.ahead)
        # Ticks since there was a sign of life, a message, sound. Counted, not measured: if this program stood still,
        # that was not the client's silence.
        self._quiet = self._wordless = self._soundless = 0
        self._pings: deque[tuple[int, float]] = deque()  # those that are not answered yet, and when they were sent
        self._pinged = 0
        self._began = self._sent = self._ticked = time.monotonic()

    # -------------------------------------------------------------------------------------------- from outside

    def end(self, end: End) -> None:
        """Let it end for this reason, if there is none yet."""
        if not self._over.done():
            self._over.set_result(end)

    async def run(self) -> End:
        """Everything, until the end."""
        # Before the first message is read: Kyutai's Python client sends sound at once.
        if isinstance(self._settings, BadQuery):
            self.end(End(WSCloseCode.POLICY_VIOLATION, str(self._settings)))
        elif self._settings.audio == "opus":
            if opus_missing():
                self.end(End(WSCloseCode.POLICY_VIOLATION, opus_missing()))
            else:
                self._sound = Opus(self._model.sample_rate)
        parts = (self._receive, self._send, self._watch, self._converse)
        tasks = [asyncio.ensure_future(self._guarded(part)) for part in parts]
        try:
            end = await asyncio.shield(self._over)
        except asyncio.CancelledError:
            end = End(WSCloseCode.GOING_AWAY, "the server stops")
        # Once only, since the conversation's task gives its place back then; none of them may swallow it, as wait_for
        # does before Python 3.12 when what it waits for is done at the same moment.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._say_goodbye(end)
        return end

    async def _guarded(self, part: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await part()
        except ProtocolError as error:
            self.end(End(WSCloseCode.POLICY_VIOLATION, str(error)))
        except (ConnectionError, RuntimeError) as error:
            # aiohttp raises RuntimeError where a message is written to a socket that is closing.
            if isinstance(error, RuntimeError) and not self._socket.closed:
                self.end(End(WSCloseCode.INTERNAL_ERROR, f"a fault in {program()}: {error}"))
            self.end(End(WSCloseCode.ABNORMAL_CLOSURE, "the connection broke", fault=False))
        except Exception as error:
            self.end(End(WSCloseCode.INTERNAL_ERROR, f"a fault in {program()}: {type(error).__name__}: {error}"))

    # ------------------------------------------------------------------------------------------------ the parts

    async def _converse(self) -> None:
        """Wait in line, begin, and keep the place until the end."""
        settings = self._settings
        if self._over.done() or isinstance(settings, BadQuery):
            return
        try:
            ticket = self._line.join(self._who, self._is_gone, self._dismiss)
        except Full as error:
            self.end(End(WSCloseCode.TRY_AGAIN_LATER, f"busy: {error}"))
            return
        self._keep_open(True)
        try:
            while ticket.place:
                if settings.events:
                    self._post(message(Kind.EVENT, {"type": "queue", "place": ticket.place}))
                else:
                    self._post(message(Kind.TEXT, f"[busy: {ticket.place} in line] "))
                await ticket.changed()
            await self._with_engine(settings)
        except MoshiError as error:
            self.end(End(WSCloseCode.INTERNAL_ERROR, str(error)))
        except OSError as error:  # the path is the owner's affair
            self._on_notice(f"a conversation could not be recorded: {error}")
            self.end(End(WSCloseCode.INTERNAL_ERROR, "this conversation cannot be recorded"))
        finally:
            self._line.leave(ticket)
            self._keep_open(False)

    def _keep_open(self, on: bool) -> None:
        """Whether the connection may not be closed to make room for others."""
        if isinstance(self._handler, Handler):
            self._handler.talking = on

    async def _with_engine(self, settings: Settings) -> None:
        """Begin to talk; returns only when this task is cancelled and everything has been given back."""
        running = self._running = Running(self._engine, settings, self._tap)
        starting = asyncio.ensure_future(running.start())
        try:
            await asyncio.shield(starting)
            self._begin(running.conversation, settings)
            await asyncio.Future()
        finally:
            self._conversation = None
            if running.waits:
                await asyncio.wait([starting])  # what is half started cannot be stopped
            starting.cancel()
            await running.stop()
            self._notices()
            self.recorded = [] if running.recorder is None else running.recorder.files
            self._running = None  # else each would hold the other until Python looks for such cycles

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
        self._began = time.monotonic()
        self._soundless = 0
        self._conversation = conversation

    async def _receive(self) -> None:
        while True:
            received = await self._socket.receive()
            self._quiet = 0
            self._make_good(time.monotonic())
            if received.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED):
                self.end(End(WSCloseCode.OK, "the client left", fault=False))
                return
            if received.type == WSMsgType.ERROR:
                raise ProtocolError(f"not a WebSocket message: {received.data}")
            if not self._messages.take(1):
                raise ProtocolError(f"more than {self._limits.messages:g} messages a second")
            if received.type == WSMsgType.PONG:
                self._ponged(received.data)
                continue
            if not self._bytes.take(len(received.data)):
                raise ProtocolError(f"more than {self._limits.bytes:g} bytes a second")
            if received.type == WSMsgType.PING:
                await self._socket.pong(received.data)
            elif received.type == WSMsgType.BINARY:
                self._take(received.data)
            else:
                raise ProtocolError("messages here are binary: the first byte is their kind")

    def _take(self, data: bytes) -> None:
        """Do what a message says."""
        if not data:
            raise ProtocolError("an empty message")
        kind, content = data[0], data[1:]
        if kind != Kind.PING:
            self._wordless = 0
        if kind == self._sound.kind:
            samples = self._sound.decode(content)
            self._soundless = 0 if len(samples) else self._soundless
            if not self._seconds.take(len(samples) / self._model.sample_rate):
                raise ProtocolError("sound came faster than time passes")
            if self._conversation is not None and len(samples):
                self._conversation.feed(samples)
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

    async def _send(self) -> None:
        while True:
            while not self._out:
                self._out_news.clear()
                await self._out_news.wait()
            data = self._out.popleft()
            if isinstance(data, int):
                await self._socket.ping(str(data).encode())
                continue
            await self._socket.send_bytes(data)
            self._sent = time.monotonic()
            if data[0] in (Kind.AUDIO, Kind.PCM):
                self._unsent -= 1

    async def _watch(self) -> None:
        """Signs of life, figures, and what happened in the conversation."""
        while True:
            await asyncio.sleep(_TICK)
            self._quiet, self._wordless, self._soundless = self._quiet + 1, self._wordless + 1, self._soundless + 1
            now = time.monotonic()
            self._make_good(now)
            self._ticked = now
            if self._quiet * _TICK >= self._limits.gone:
                self.end(End(WSCloseCode.POLICY_VIOLATION, "nothing was heard of the client any more"))
            if self._pings and now - self._pings[0][1] >= self._limits.gone:
                self.end(End(WSCloseCode.POLICY_VIOLATION, "the client does not read what it is sent"))
            if len(self._pings) < self._limits.gone / _TICK:
                self._pinged += 1
                self._pings.append((self._pinged, now))
                self._post(self._pinged)
            self._line.settle()
            conversation = self._conversation
            if now - self._sent >= 2.0:  # Kyutai's page leaves after ten seconds without a message
                self._post(message(Kind.PING))
            if conversation is None:
                continue
            for event in conversation.events():
                if event.kind == "reset":
                    self._tell({"type": "reset"})
            if conversation.error is not None:
                self.end(End(WSCloseCode.INTERNAL_ERROR, str(conversation.error)))
            self._stats(conversation)
            self._notices()

    def _make_good(self, now: float) -> None:
        """If this program stood still (suspended, or held up), what came meanwhile came in time, and no answer is late.

        To be called before anything is judged by the clock."""
        stood = now - self._ticked - _TICK
        if stood < _STOOD_STILL:
            return
        self._ticked = now
        for bucket in (self._messages, self._bytes, self._seconds):
            bucket.forgive(stood)
        self._pings = deque((number, then + stood) for number, then in self._pings)

    def _notices(self) -> None:
        for notice in [] if self._running is None else self._running.notices():
            self._on_notice(notice)

    def _ponged(self, data: bytes | bytearray) -> None:
        """A ping came back; a client may leave out those before it."""
        number = int(data) if data.isdigit() and len(data) < 10 else -1
        while self._pings and self._pings[0][0] <= number:
            self._pings.popleft()

    def _stats(self, conversation: Conversation) -> None:
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

    # -------------------------------------------------------------------------------------------- what goes out

    def _tap(self, heard: NDArray[np.float32], frame: SessionFrame) -> None:
        """In the thread that computes for all: hand the frame over."""
        self._engine.tell(self._loop, lambda: self._speak(frame))

    def _speak(self, frame: SessionFrame) -> None:
        """A frame's messages."""
        if self._over.done():
            return
        self._unsent += 1
        if self._unsent * self._frame_seconds > self._limits.unsent:
            self.end(End(WSCloseCode.POLICY_VIOLATION, "the client reads too slowly"))
            return
        try:
            self._post(message(self._sound.kind, self._sound.encode(frame.pcm)))
        except Exception as error:
            self.end(End(WSCloseCode.INTERNAL_ERROR, f"a fault in {program()}: {type(error).__name__}: {error}"))
            return
        if frame.text:
            self._post(message(Kind.TEXT, frame.text))
            self._tell({"type": "text", "text": frame.text, "time_s": round(frame.index * self._frame_seconds, 3)})

    def _tell(self, event: dict[str, Any]) -> None:
        if isinstance(self._settings, Settings) and self._settings.events:
            self._post(message(Kind.EVENT, event))

    def _post(self, data: bytes | int) -> None:
        if len(self._out) >= 1000:
            self.end(End(WSCloseCode.POLICY_VIOLATION, "the client reads too slowly"))
            return
        self._out.append(data)
        self._out_news.set()

    async def _say_goodbye(self, end: End) -> None:
        """Tell why, close, and do not wait long for an answer."""
        last = [message(Kind.ERROR, end.reason)] if end.fault else []
        if isinstance(self._settings, Settings) and self._settings.events:
            last.append(message(Kind.EVENT, {"type": "end", "reason": end.reason}))

        async def close() -> None:
            for data in last:
                await self._socket.send_bytes(data)
            code = WSCloseCode.OK if end.code == WSCloseCode.ABNORMAL_CLOSURE else end.code
            await self._socket.close(code=code, message=_clipped(end.reason, 120), drain=False)

        try:
            await asyncio.wait_for(close(), 2 * _LAST_WORDS)
        except (asyncio.TimeoutError, ConnectionError, RuntimeError):
            if self._transport is not None:
                self._transport.abort()

    def _is_gone(self) -> bool:
        """Whether the place may be given to another."""
        limits, waits = self._limits, self._conversation is None
        silent = self._wordless * _TICK >= limits.person if waits else self._soundless * _TICK >= limits.sound
        return self._over.done() or silent or self._quiet * _TICK >= limits.quiet

    def _dismiss(self) -> None:
        self.end(End(WSCloseCode.POLICY_VIOLATION, "nothing was heard of you, and another was waiting"))


def _decibels(level: float) -> float:
    return round(20 * math.log10(max(level, 1e-5)), 1)


def _clipped(text: str, most: int) -> bytes:
    """UTF-8 of at most so many bytes, whole letters: a closing frame holds no more."""
    return text.encode()[:most].decode("utf-8", "ignore").encode()
