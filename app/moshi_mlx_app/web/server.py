"""The application: page, information, conversations; and the loop that serves them until someone stops it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mimetypes
import signal
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from moshi_mlx.errors import ConfigError
from moshi_mlx.generate import GenerationConfig
from moshi_mlx.model import Moshi
from moshi_mlx_app.version import program

from .guard import Guard
from .line import Line
from .settings import BadQuery, Settings, read_settings
from .talk import End, Limits, Talk
from .wire import opus_missing

__all__ = ["STATIC", "Server", "listening", "serve"]

_CONNECTIONS = 200
STATIC = Path(__file__).resolve().parent / "static"
_TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".html": "text/html",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}


@dataclass
class Server:
    """What the requests share.

    Attributes
    ----------
    model : Moshi
    guard : Guard
    line : Line
    generation : GenerationConfig
        For what a query does not say.
    seed : int
        The same.
    limits : Limits
    static : Path
        The page's folder.
    on_talk : callable, optional
        Told a sentence when a conversation begins or ends.
    """

    model: Moshi
    guard: Guard
    line: Line
    generation: GenerationConfig
    seed: int = 0
    limits: Limits = field(default_factory=Limits)
    static: Path = STATIC
    on_talk: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.talks: set[Talk] = set()

    def app(self) -> web.Application:
        """The application that answers requests."""
        app = web.Application(middlewares=[self.guard.middleware], client_max_size=1024)
        app.on_response_prepare.append(self.guard.add_headers)
        app.router.add_get("/api/chat", self._chat)
        app.router.add_get("/api/info", self._info)
        app.router.add_get("/{name:.*}", self._file)
        app.on_shutdown.append(self._stop)
        return app

    def door(self, runner: web.AppRunner) -> Callable[[], asyncio.Protocol]:
        """Makes what answers on a new connection. Beyond :data:`_CONNECTIONS` of them the oldest that is no talk has to
        go: nobody can take all by opening many and saying nothing."""
        server = runner.server
        assert server is not None

        def open_one() -> asyncio.Protocol:
            if len(server.connections) >= _CONNECTIONS:
                talking = {talk.protocol for talk in self.talks}
                idle = next((each for each in server.connections if each not in talking), None)
                if idle is not None:
                    idle.force_close()
            return server()

        return open_one

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        # No compression: a message unpacks to no more than it weighs. Pongs are read by the talk.
        socket = web.WebSocketResponse(
            timeout=0.5, autoping=False, compress=False, max_msg_size=self.limits.message, writer_limit=1 << 14
        )
        if not socket.can_prepare(request):
            return web.Response(status=426, headers={"Upgrade": "websocket"}, text="this is a WebSocket\n")
        settings: Settings | BadQuery
        try:
            settings = read_settings(request.query, self.generation, self.seed)
        except BadQuery as error:
            settings = error
        await socket.prepare(request)
        talk = Talk(socket, request, self.model, self.line, settings, self.limits)
        self.talks.add(talk)
        try:
            self.on_talk(f"{request.remote} came")
            end = await talk.run()
            self.on_talk(f"{request.remote} ended: {end.reason}")
        finally:
            self.talks.discard(talk)
        return socket

    async def _info(self, request: web.Request) -> web.Response:
        defaults = read_settings({}, self.generation, self.seed)
        return web.json_response(
            {
                "model": self.model.name,
                "trained": self.model.trained,
                "version": program(),
                "sample_rate": self.model.sample_rate,
                "frame_samples": self.model.frame_size,
                "opus": not opus_missing(),
                "places": self.line.places,
                "free": max(self.line.free, 0),
                "waiting": self.line.waiting,
                "sampling": defaults.sampling(),
            }
        )

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
    runner = web.AppRunner(
        server.app(), access_log=None, shutdown_timeout=1.0, keepalive_timeout=15.0, handle_signals=False
    )
    await runner.setup()
    door = None
    try:
        loop = asyncio.get_running_loop()
        make = server.door(runner)
        try:
            try:
                door = await loop.create_server(make, host or None, port, ssl=tls, backlog=128)
            except OSError as error:
                # Containers often know localhost as ::1 as well, and have no IPv6.
                if host != "localhost" or error.errno != errno.EADDRNOTAVAIL:
                    raise
                door = await loop.create_server(make, "127.0.0.1", port, ssl=tls, backlog=128)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
        yield door.sockets[0].getsockname()[1]
    finally:
        if door is not None:
            door.close()
        await runner.cleanup()


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
        ready(port)
        return await stopped
