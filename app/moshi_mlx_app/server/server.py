"""The application: page, information, conversations; and the loop that serves them until someone stops it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import mimetypes
import signal
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from moshi_mlx.engine.generator import GenerationConfig
from moshi_mlx.realtime import Captions
from moshi_mlx.tasks.transcribe import SpeechToText
from moshi_mlx_app.version import program

from .access import Guard
from .connection import End, Limits, Talk
from .engine import Engine
from .faults import Faults, named
from .links import qr_svg
from .listener import Door, Handler
from .protocols import kyutai, kyutai_asr, kyutai_tts, openai, openai_audio, openai_live, openai_realtime
from .queue import Line
from .roles import Roles
from .settings import read_settings
from .speech import SpeechService

__all__ = ["STATIC", "Server", "Service", "listening", "serve"]

STATIC = Path(__file__).resolve().parent / "static"
PROTOCOLS = (
    kyutai,
    kyutai_asr,
    kyutai_tts,
    openai,
    openai_audio,
    openai_live,
    openai_realtime,
)  # modules with add_routes(app, server)
_TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".html": "text/html",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}


@dataclass(frozen=True)
class Service:
    """A model beside the one that converses, and who may use it at once."""

    engine: Engine
    line: Line


@dataclass
class Server:
    """What the requests share.

    Attributes
    ----------
    engine : Engine
    guard : Guard
    line : Line
    generation : GenerationConfig
        For what a query does not say.
    seed : int
        The same.
    roles : Roles, optional
        Prompts of conversations; without, there are none.
    limits : Limits
    static : Path
        The page's folder.
    link : str
        Where another device of the network finds the page, key and all; empty if it cannot.
    stt : Service, optional
        A speech-to-text model, for ``/api/asr-streaming`` and ``/v1/audio/transcriptions``.
    tts : SpeechService, optional
        A text-to-speech model, for ``/api/tts_streaming`` and ``/v1/audio/speech``.
    on_talk, on_fault : callable, optional
        Told a sentence when a conversation begins or ends, and when something goes wrong in the server.
    """

    engine: Engine
    guard: Guard
    line: Line
    generation: GenerationConfig
    seed: int = 0
    roles: Roles | None = None
    limits: Limits = field(default_factory=Limits)
    static: Path = STATIC
    link: str = ""
    stt: Service | None = None
    tts: SpeechService | None = None
    on_talk: Callable[[str], None] = lambda text: None
    on_fault: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.talks: set[Talk] = set()
        self.captions: Captions | None = None
        if self.stt is not None and isinstance(self.stt.engine.model, SpeechToText):
            self.captions = Captions(self.stt.engine.model)
        self.faults = Faults(self.on_fault)

    def app(self) -> web.Application:
        """The application that answers requests."""
        app = web.Application(middlewares=[self.guard.middleware], client_max_size=1024)
        app.on_response_prepare.append(self.guard.add_headers)
        app.on_response_prepare.append(_answered)
        for protocol in PROTOCOLS:
            protocol.add_routes(app, self)
        app.router.add_get("/api/info", self._info)
        app.router.add_get("/api/link.svg", self._link)
        app.router.add_get("/{name:.*}", self._file)
        app.on_shutdown.append(self._stop)
        return app

    async def talk(
        self,
        request: web.Request,
        make: type[Talk],
        settings: Any,
        *,
        engine: Engine | None = None,
        line: Line | None = None,
    ) -> web.StreamResponse:
        """Answer a request with a WebSocket and a conversation on it, until its end.

        Parameters
        ----------
        request : aiohttp.web.Request
        make : type
            The protocol's :class:`Talk`: made with ``settings`` and what all of them get.
        settings : object
            What the protocol's own part of it needs.
        engine, line
            Other ones than the server's own.
        """
        # No compression: a message unpacks to no more than it weighs. Pongs are read by the talk.
        socket = web.WebSocketResponse(
            timeout=0.5,
            autoping=False,
            compress=False,
            max_msg_size=make.weight * self.limits.message,
            writer_limit=1 << 14,
            protocols=("realtime",),
        )
        if not socket.can_prepare(request):
            return web.Response(status=426, headers={"Upgrade": "websocket"}, text="this is a WebSocket\n")
        await socket.prepare(request)
        service = engine or self.engine, line or self.line
        talk = make(settings, socket, request, *service, self.limits, self.faults.say)
        self.talks.add(talk)
        try:
            self.on_talk(f"{request.remote} came")
            end = await talk.run()
            kept = "".join(f"; recorded: {path}" for path in talk.recorded)
            self.on_talk(f"{request.remote} ended: {end.reason}{kept}")
        finally:
            self.talks.discard(talk)
        return socket

    async def _info(self, request: web.Request) -> web.Response:
        defaults, model = read_settings({}, self.generation, self.seed), self.engine.model
        return web.json_response(
            {
                "model": model.name,
                "trained": model.trained,
                "version": program(),
                "sample_rate": model.sample_rate,
                "frame_samples": model.frame_size,
                "opus": not kyutai.opus_missing(),
                "places": self.line.places,
                "free": max(self.line.free, 0),
                "waiting": self.line.waiting,
                "recorded": self.engine.record is not None,
                "link": self.link,
                "sampling": defaults.sampling(),
                "prompts": None if self.roles is None else self.roles.about(),
            }
        )

    async def _link(self, request: web.Request) -> web.Response:
        """The link as a QR code; like it, only for who has the key already."""
        if not self.link:
            return web.Response(status=404, text="others cannot reach this server\n")
        return web.Response(body=qr_svg(self.link), content_type="image/svg+xml")

    async def _file(self, request: web.Request) -> web.Response:
        # Looked up among the names of what is there, never joined to a path: there is no way out of the folder.
        name = request.match_info["name"] or "index.html"
        there = {path.relative_to(self.static).as_posix(): path for path in self.static.rglob("*") if _servable(path)}
        path = there.get(name)
        if path is None:
            return web.Response(status=404, text="there is no such file here\n")
        kind = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        content = await asyncio.to_thread(path.read_bytes)
        return web.Response(body=content, content_type=kind, charset="utf-8" if kind.startswith("text/") else None)

    async def _stop(self, app: web.Application) -> None:
        for talk in list(self.talks):
            talk.end(End(1001, "the server stops", fault=False))
        for _ in range(40):
            if not self.talks:
                break
            await asyncio.sleep(0.05)


async def _answered(request: web.Request, response: web.StreamResponse) -> None:
    if isinstance(request.protocol, Handler):
        request.protocol.answered = True


def _servable(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and not path.name.startswith(".")


@contextlib.asynccontextmanager
async def listening(server: Server, host: str, port: int, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Answer requests while the ``with`` lasts; gives the port. At its end every conversation is told and closed.

    Raises
    ------
    ConfigError
        If it cannot listen there.
    """
    runner = web.AppRunner(server.app(), shutdown_timeout=1.0, handle_signals=False)
    await runner.setup()
    web_server, faults = runner.server, server.faults
    assert web_server is not None
    loop, loggers = asyncio.get_running_loop(), [logging.getLogger(name) for name in ("aiohttp", "asyncio")]
    for logger in loggers:
        logger.addHandler(faults)
    loop.set_exception_handler(lambda _, context: _loop_fault(faults, context))
    door = Door(lambda: Handler(web_server, server.guard, faults), tls, faults)
    try:
        yield await door.open(host, port)
    finally:
        await door.shut()
        await runner.cleanup()
        await door.clear()
        await asyncio.to_thread(server.engine.stop)
        if server.stt is not None:
            await asyncio.to_thread(server.stt.engine.stop)
        if server.captions is not None:
            await asyncio.to_thread(server.captions.stop)
        if server.tts is not None:
            await asyncio.to_thread(server.tts.stop)
        loop.set_exception_handler(None)
        for logger in loggers:
            logger.removeHandler(faults)


def _loop_fault(faults: Faults, context: dict[str, Any]) -> None:
    error = context.get("exception")
    if not isinstance(error, ConnectionError):  # clients break off as they like
        faults.say(f"{context['message']}{'' if error is None else f': {named(error)}'}")


async def serve(
    server: Server, host: str, port: int, *, tls: ssl.SSLContext | None = None, ready: Callable[[int], None]
) -> int:
    """Serve until Ctrl-C or its like.

    Parameters
    ----------
    ready : callable
        Told the port once requests are answered.

    Returns
    -------
    int
        The signal that ended it.
    """
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def stop(number: int) -> None:
        for each in numbers:  # pressed again, it interrupts at once
            loop.remove_signal_handler(each)
        stopped.set_result(number)

    async with listening(server, host, port, tls) as port:
        for number in numbers:
            loop.add_signal_handler(number, stop, number)
        # What is there stays: looking through all of it again and again would hold every conversation up.
        gc.collect()
        gc.freeze()
        ready(port)
        return await stopped
