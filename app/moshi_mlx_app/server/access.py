"""Who may come in, and how much at a time.

A page of another site can send requests to this machine from the browser of whoever looks at it. Three things stand
against that: the Host that the browser believes to talk to must be a name of this machine or an address (DNS rebinding
gives a foreign name this machine's address), the Origin of the page must be this server itself, and where others than
this machine can connect, a token is asked for.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import math
import re
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from moshi_mlx_app.version import DISTRIBUTION

from .hosts import is_loopback, own_names

__all__ = ["Bucket", "Guard"]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# A name or IPv4 address, or an IPv6 address in brackets; and a port. Nothing else may reach the policy below.
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9._-]{1,253}))(?::[0-9]{1,5})?", re.ASCII)

_GUARDED = ("/api/", "/v1/")  # paths for which a token is asked
_TOKEN_IN_PROTOCOL = "openai-insecure-api-key."  # how OpenAI's clients in a browser send it

_HEADERS = {
    # Scripts, styles, worklets and the socket come from here alone, and nothing is written into the page as code. The
    # page plays and saves what it made itself, so blob: is sound and pictures only. Safari before 15.4 does not count
    # a WebSocket to the same host as 'self', so connect-src names it.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
        "media-src 'self' blob:; worker-src 'self'; manifest-src 'self'; connect-src 'self'{socket}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Permissions-Policy": (
        "microphone=(self), speaker-selection=(self), screen-wake-lock=(self), camera=(), geolocation=(), "
        "display-capture=(), payment=(), usb=()"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": DISTRIBUTION,
}


class Guard:
    """Decides about each request before anything else sees it.

    Parameters
    ----------
    host : str
        What the server listens on.
    token : str
        What a request must know; empty: nothing.
    names : iterable of str
        Further names that this machine goes by.
    """

    def __init__(self, host: str, token: str = "", names: tuple[str, ...] = ()):
        self._local = is_loopback(host)
        self._token = token.encode()
        self._names = {*own_names(host), *(name.lower() for name in names)}

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """For :class:`aiohttp.web.Application`."""
        complaint = self.complaint(request)
        if complaint:
            return web.Response(status=403, text=complaint + "\n")
        return await handler(request)

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """For ``on_response_prepare``: every response has them, errors as well."""
        response.headers.update(self.headers(request.headers.get("Host", "")))

    def headers(self, host: str) -> dict[str, str]:
        """The headers of a response to who asked for ``host``."""
        socket_source = "" if self._host_complaint(host) else f" ws://{host} wss://{host}"
        return {name: value.replace("{socket}", socket_source) for name, value in _HEADERS.items()}

    def complaint(self, request: web.Request) -> str:
        """Why this request is turned away; empty if it is not."""
        host = request.headers.get("Host", "")
        complaint = self._host_complaint(host)
        if complaint:
            return complaint
        if len(request.headers.getall("Host")) > 1:
            return "a request has one Host"
        origin = request.headers.get("Origin")
        if origin is not None and origin.lower() != f"{request.scheme}://{host}".lower():
            return f"a page of {origin[:100]!r} may not use this server"
        if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and (
            request.path.startswith(_GUARDED)
        ):
            return "a page of another site may not use this server"
        if self._token and request.path.startswith(_GUARDED) and not self._knows_token(request):
            return "this server asks for a token: use the link that it printed when it started"
        return ""

    def _host_complaint(self, host: str) -> str:
        found = _HOST.fullmatch(host)
        name = (found[1] or found[2]).lower() if found else ""
        complaint = f"this server does not go by the name {host[:100]!r}"
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return "" if name in self._names else complaint
        # Whoever typed an address came here on purpose: rebinding needs a name.
        return "" if address.is_loopback or not self._local else complaint

    def _knows_token(self, request: web.Request) -> bool:
        # The last two are Kyutai's speech clients'.
        offered = [request.query.get("token", ""), request.query.get("auth_id", "")]
        offered.append(request.headers.get("kyutai-api-key", ""))
        kind, _, rest = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer":
            offered.append(rest.strip())
        elif kind.lower() == "basic":  # Kyutai's Python client sends what stands before the @ of its --url
            try:
                offered.append(base64.b64decode(rest, validate=True).decode("utf-8", "replace").partition(":")[2])
            except (binascii.Error, ValueError):
                pass
        for name in request.headers.get("Sec-WebSocket-Protocol", "").split(","):
            if name.strip().startswith(_TOKEN_IN_PROTOCOL):
                offered.append(name.strip()[len(_TOKEN_IN_PROTOCOL) :])
        # Every one is compared, in a time that does not depend on where it differs.
        return max(hmac.compare_digest(text.encode("utf-8", "surrogateescape"), self._token) for text in offered)


class Bucket:
    """Allows an amount a second, and some at once.

    Parameters
    ----------
    rate : float
        What runs out of it in a second.
    size : float
        What it holds.
    clock : callable
        Seconds, monotonic.
    """

    def __init__(self, rate: float, size: float, clock: Callable[[], float] = time.monotonic):
        self._rate, self._size, self._clock = rate, size, clock
        self._level, self._then = 0.0, clock()

    def take(self, amount: float) -> bool:
        """Pour ``amount`` in; False if it would flow over."""
        now = self._clock()
        left = (now - self._then) * self._rate
        self._level = math.copysign(max(abs(self._level) - left, 0.0), self._level)
        self._then = now
        if self._level + amount > self._size:
            return False
        self._level += amount
        return True

    def forgive(self, seconds: float) -> None:
        """Nobody took anything out for so long: as much more may come at once, soon."""
        self.take(0.0)
        self._level -= seconds * self._rate
