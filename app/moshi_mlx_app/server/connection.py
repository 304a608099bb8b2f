"""One connection, of any protocol: from the queue to a conversation and to its end.

Four tasks on the event loop: ``_receive`` reads messages, ``_send`` writes them, ``_watch`` looks at the time, and
``run`` waits for the first reason to end. The thread that computes for all hands over what the model says by
:meth:`Talk._tap` and goes on: sound is compressed on the loop, since Opus holds the interpreter wherever it runs.

Queue, limits, signs of life and ends are the same for every client. A protocol is a subclass of :class:`Talk` in
``protocols/``: it knows bytes and events only.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import WSCloseCode, WSMessage, WSMsgType, web
from numpy.typing import NDArray

from moshi_mlx.errors import MoshiError
from moshi_mlx.realtime import Conversation
from moshi_mlx.tasks.dialogue import SessionFrame
from moshi_mlx_app.version import program

from .access import Bucket
from .engine import Engine, Running
from .hosts import household
from .listener import Handler
from .queue import Full, Line
from .settings import Settings

__all__ = ["End", "Limits", "ProtocolError", "Talk"]

_TICK = 0.2  # seconds
_OPENING_STEPS = 8  # from one message about prompts to the next
_STOOD_STILL = 1.0  # seconds without a tick: then this program was held up
_LAST_WORDS = 0.5  # seconds for the reason and the closing, each


class ProtocolError(Exception):
    """The other side sent something that its protocol has no place for: the connection ends, and is told why."""


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

    A protocol implements ``_settled``, ``_queued``, ``_begin``, ``_take``, ``_say`` and ``_last_words``, and may extend
    ``_open``, ``_accompany``, ``_news`` and ``_quiet_line``.

    Parameters
    ----------
    settings : object
        What the protocol's own part needs.
    socket : aiohttp.web.WebSocketResponse
        Prepared, for ``request``.
    request : aiohttp.web.Request
    engine : Engine
    line : Line
    limits : Limits
    on_notice : callable
        Told what the owner of the server should know.

    Attributes
    ----------
    backlog : float
        Seconds of the user's sound that may wait to be heard.
    weight : int
        A message may be so many times as long as the limits say, and sound so many times as far ahead.
    recorded : list of Path
        Files of the recording, once it has ended.
    """

    backlog = 0.32
    weight = 1

    def __init__(
        self,
        settings: Any,
        socket: web.WebSocketResponse,
        request: web.Request,
        engine: Engine,
        line: Line,
        limits: Limits,
        on_notice: Callable[[str], object],
    ):
        self._settings = settings
        self._socket, self._transport, self._limits = socket, request.transport, limits
        self._handler, self._who = request.protocol, household(request.remote or "")
        self._engine, self._model, self._line = engine, engine.model, line
        self._on_notice = on_notice
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[End] = self._loop.create_future()
        self._conversation: Conversation | None = None
        self._running: Running | None = None
        self.recorded: list[Path] = []
        # Messages, and whether each is a frame's sound; numbers are the WebSocket's own pings.
        self._out: deque[tuple[bytes | str | int, bool]] = deque()
        self._out_news = asyncio.Event()
        self._unsent = 0
        self._frame_seconds = self._model.frame_size / self._model.sample_rate
        self._messages = Bucket(limits.messages, 4 * limits.messages)
        self._bytes = Bucket(limits.bytes, 4 * limits.bytes)
        self._seconds = Bucket(1.02, self.weight * limits.ahead)
        # Ticks since there was a sign of life, a message, sound. Counted, not measured: if this program stood still,
        # that was not the client's silence.
        self._quiet = self._wordless = self._soundless = 0
        self._pings: deque[tuple[int, float]] = deque()  # those that are not answered yet, and when they were sent
        self._pinged = 0
        self._began = self._sent = self._ticked = time.monotonic()

    # ------------------------------------------------------------------------------------------- the protocol's

    def _open(self) -> None:
        """Before the first message is read: clients send at once."""

    def _queued(self, place: int) -> None:
        """It waits in line, at this place from 1 on."""
        raise NotImplementedError

    async def _settled(self) -> Settings:
        """It has a place: what the conversation is to begin with, once that is known."""
        raise NotImplementedError

    def _begin(self, conversation: Conversation, settings: Settings) -> None:
        """The conversation has begun, and will hear what it is fed."""
        raise NotImplementedError

    def _take(self, received: WSMessage) -> None:
        """Do what a message, text or binary, says; raises ProtocolError."""
        raise NotImplementedError

    def _say(self, frame: SessionFrame) -> None:
        """Post a frame's messages, the one with its sound with ``sound=True``."""
        raise NotImplementedError

    async def _accompany(self) -> None:
        """Beside the other tasks, for as long as it wants."""

    def _news(self, conversation: Conversation) -> None:
        """Five times a second."""

    def _quiet_line(self) -> None:
        """Nothing was sent for two seconds."""

    def _last_words(self, end: End) -> list[bytes | str]:
        """Messages before the connection is closed."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------- from outside

    def end(self, end: End) -> None:
        """Let it end for this reason, if there is none yet."""
        if not self._over.done():
            self._over.set_result(end)

    async def run(self) -> End:
        """Everything, until the end."""
        self._open()
        parts = (self._receive, self._send, self._watch, self._converse, self._accompany)
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
        if self._over.done():
            return
        try:
            ticket = self._line.join(self._who, self._is_gone, self._dismiss)
        except Full as error:
            self.end(End(WSCloseCode.TRY_AGAIN_LATER, f"busy: {error}"))
            return
        self._keep_open(True)
        try:
            while ticket.place:
                self._queued(ticket.place)
                await ticket.changed()
            await self._with_engine(await self._settled())
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
        told = None if settings.opening is None else self._opened
        running = self._running = Running(self._engine, settings, self._tap, self.backlog, told)
        starting = asyncio.ensure_future(running.start())
        try:
            await asyncio.shield(starting)
            self._began = time.monotonic()
            self._soundless = 0
            self._begin(running.conversation, settings)
            self._conversation = running.conversation
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
            else:
                self._take(received)

    def _hear(self, samples: NDArray[np.float32]) -> None:
        """Sound [n] of the user's, at the model's rate."""
        self._soundless = 0 if len(samples) else self._soundless
        if not self._seconds.take(len(samples) / self._model.sample_rate):
            raise ProtocolError("sound came faster than time passes")
        if self._conversation is not None and len(samples):
            self._conversation.feed(samples)

    async def _send(self) -> None:
        while True:
            while not self._out:
                self._out_news.clear()
                await self._out_news.wait()
            data, sound = self._out.popleft()
            if isinstance(data, int):
                await self._socket.ping(str(data).encode())
                continue
            await self._write(data)
            self._sent = time.monotonic()
            self._unsent -= sound

    async def _write(self, data: bytes | str) -> None:
        await (self._socket.send_str(data) if isinstance(data, str) else self._socket.send_bytes(data))

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
            if now - self._sent >= 2.0:
                self._quiet_line()
            if conversation is None:
                continue
            if conversation.error is not None:
                self.end(End(WSCloseCode.INTERNAL_ERROR, str(conversation.error)))
            self._news(conversation)
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

    # -------------------------------------------------------------------------------------------- what goes out

    def _tap(self, heard: NDArray[np.float32], frame: SessionFrame) -> None:
        """In the thread that computes for all: hand the frame over."""
        self._engine.tell(self._loop, lambda: self._speak(frame))

    def _opened(self, done: int, total: int) -> None:
        """In the thread that computes for all: the prompts go on."""
        if not done % _OPENING_STEPS or done == total:
            self._engine.tell(self._loop, lambda: None if self._over.done() else self._opening(done, total))

    def _opening(self, done: int, total: int) -> None:
        """So many of the steps before the first frame have run."""

    def _speak(self, frame: SessionFrame) -> None:
        """A frame's messages."""
        if self._over.done():
            return
        try:
            self._say(frame)
        except Exception as error:
            self.end(End(WSCloseCode.INTERNAL_ERROR, f"a fault in {program()}: {type(error).__name__}: {error}"))

    def _post(self, data: bytes | str | int, *, sound: bool = False) -> None:
        """Send a message when those before it are gone."""
        self._unsent += sound
        if len(self._out) >= 1000 or self._unsent * self._frame_seconds > self._limits.unsent:
            self.end(End(WSCloseCode.POLICY_VIOLATION, "the client reads too slowly"))
            return
        self._out.append((data, sound))
        self._out_news.set()

    async def _say_goodbye(self, end: End) -> None:
        """Tell why, close, and do not wait long for an answer."""

        async def close() -> None:
            for data in self._last_words(end):
                await self._write(data)
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


def _clipped(text: str, most: int) -> bytes:
    """UTF-8 of at most so many bytes, whole letters: a closing frame holds no more."""
    return text.encode()[:most].decode("utf-8", "ignore").encode()
