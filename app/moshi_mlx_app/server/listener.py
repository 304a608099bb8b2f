"""Where connections come in: the listening sockets, encryption, and how many may be here at once.

A connection counts from the moment it is accepted, before anything was read from it: what only connects and says
nothing must not cost the others their descriptors, encrypted or not. Who talks, or waits in line, is never sent away.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from moshi_mlx.errors import ConfigError

from .access import Guard
from .faults import Faults, named
from .hosts import household

__all__ = ["Door", "Handler"]

_CONNECTIONS = 128  # of those who neither talk nor wait in line
_FROM_ONE = 32  # of them from one address
_HANDSHAKE = 5.0  # seconds
_FIRST_ANSWER = 10.0  # seconds until a request must have come whole
_KEEPALIVE = 15.0
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # containers often know ::1 by name and have no IPv6


class Handler(web.RequestHandler):
    """aiohttp's side of one connection, with this server's headers on what aiohttp says by itself as well."""

    def __init__(self, server: web.Server, guard: Guard, faults: Faults):
        super().__init__(server, loop=asyncio.get_running_loop(), keepalive_timeout=_KEEPALIVE)
        self._guard, self._faults = guard, faults
        self.answered = self.talking = False
        self.over = asyncio.Event()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self.over.set()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status >= 500 and exc is not None:
            self._faults.say(f"a request failed: {named(exc)}")
        if request.writer.output_size > 0:
            raise ConnectionError("the answer had begun")
        text = "this server has a fault\n" if status >= 500 else "this is not a request that can be read\n"
        response = web.Response(status=status, text=text, headers=self._guard.headers(""))
        response.force_close()
        return response

    def log_exception(self, *args: Any, **options: Any) -> None:
        error = options.get("exc_info")
        self._faults.say(f"a request failed: {named(error)}" if isinstance(error, BaseException) else str(args[0]))


@dataclass(eq=False)
class _Guest:
    """One connection. ``handler`` is None until the encryption stands."""

    connection: socket.socket
    household: str
    task: asyncio.Task[None] | None = None
    handler: Handler | None = None

    def send_away(self) -> None:
        if self.handler is not None and self.handler.transport is not None:
            self.handler.transport.abort()
        else:  # as if the other side had: asyncio forgets a connection that is cancelled as its handshake begins
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)


class Door:
    """Listens and lets in.

    Parameters
    ----------
    make : callable
        Makes what answers on a connection.
    tls : ssl.SSLContext or None
    faults : Faults
    """

    def __init__(self, make: Callable[[], Handler], tls: ssl.SSLContext | None, faults: Faults):
        self._make, self._tls, self._faults = make, tls, faults
        self._guests: list[_Guest] = []  # oldest first
        self._broken = 0
        self._listeners: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []

    async def open(self, host: str, port: int) -> int:
        """Listen on a name or address, empty for all, and a port, 0 for any; gives the port.

        Raises
        ------
        ConfigError
            If it cannot listen there.
        """
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self._listeners = _listen([(family, address) for family, _, _, _, address in dict.fromkeys(found)], port)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host} port {port}: {error.strerror or error}{_way_out(error)}"
            ) from error
        self._accepting = [asyncio.ensure_future(self._accept(listener)) for listener in self._listeners]
        return int(self._listeners[0].getsockname()[1])

    async def shut(self) -> None:
        """Let nobody in any more."""
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        for listener in self._listeners:
            listener.close()

    async def clear(self) -> None:
        """Send everybody away who is still here."""
        guests, self._guests = self._guests, []
        for guest in guests:
            guest.send_away()
        await asyncio.gather(*(guest.task for guest in guests if guest.task is not None), return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        """Let in whoever comes, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno in _FULL:
                    self._faults.say(f"no more connections can be taken: {error.strerror}")
                    self._send_away(self._idle())
                await asyncio.sleep(0.1)
                continue
            guest = _Guest(connection, household(str(address[0])))
            idle = self._idle()
            near = [each for each in idle if each.household == guest.household]
            if len(near) >= _FROM_ONE:
                self._send_away(near)
            elif len(idle) >= _CONNECTIONS:
                self._send_away(idle)
            self._guests.append(guest)
            guest.task = asyncio.ensure_future(self._serve(guest))
            await asyncio.sleep(0)  # where many wait, accepting the next takes no turn of the loop

    def _idle(self) -> list[_Guest]:
        return [guest for guest in self._guests if guest.handler is None or not guest.handler.talking]

    def _send_away(self, guests: list[_Guest]) -> None:
        """The oldest of them."""
        if guests:
            self._guests.remove(guests[0])
            guests[0].send_away()

    async def _serve(self, guest: _Guest) -> None:
        """From the first byte to the end of a connection."""
        loop = asyncio.get_running_loop()
        bounds = {} if self._tls is None else {"ssl_handshake_timeout": _HANDSHAKE}
        try:
            # Encryption has buffers of 256 kB for each connection: who says nothing gets none.
            if not await _spoken(guest.connection) or guest not in self._guests:
                guest.connection.close()
                return
            _, guest.handler = await loop.connect_accepted_socket(self._make, guest.connection, ssl=self._tls, **bounds)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(guest.handler.over.wait(), _FIRST_ANSWER)
            if not guest.handler.answered:
                guest.send_away()
            await guest.handler.over.wait()
        except OSError:  # ssl's errors among them: a handshake that failed, or took too long, is the client's affair
            self._broken += 1
            if self._broken % _FROM_ONE == 0:  # asyncio leaves it in a cycle, buffers and all
                gc.collect()
        finally:
            if guest in self._guests:
                self._guests.remove(guest)


async def _spoken(connection: socket.socket) -> bool:
    """Wait until something comes; False if the other side closes it instead, or lets too much time pass."""
    loop = asyncio.get_running_loop()
    came = asyncio.Event()
    loop.add_reader(connection, came.set)
    try:
        await asyncio.wait_for(came.wait(), _HANDSHAKE)
        return connection.recv(1, socket.MSG_PEEK) != b""
    except (asyncio.TimeoutError, OSError):
        return False
    finally:
        loop.remove_reader(connection)


def _listen(places: list[tuple[int, Any]], port: int) -> list[socket.socket]:
    """A socket for each of these addresses, on one port; those that this machine does not have are left out."""
    listeners: list[socket.socket] = []
    refused: OSError | None = None
    with contextlib.ExitStack() as opened:
        for family, address in places:
            try:
                listener = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind((address[0], port, *address[2:]))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                refused = error
                continue
            listener.listen(128)
            listener.setblocking(False)
            listeners.append(listener)
            port = port or listener.getsockname()[1]
        if not listeners and refused is not None:
            raise refused
        opened.pop_all()
    return listeners


def _way_out(error: OSError) -> str:
    if isinstance(error, socket.gaierror) or error.errno in _NOT_HERE:
        return ". --host takes a name or an address of this machine"
    return ". --port N takes another" if error.errno in (errno.EADDRINUSE, errno.EACCES) else ""
