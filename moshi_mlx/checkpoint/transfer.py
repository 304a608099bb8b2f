"""Requests to a hub that is not trusted, bounded in bytes and in time, and files received and hashed.

huggingface_hub gives the session, the token and the errors. What it does with an answer is done here: it reads bodies,
lists and the text of errors to their end, and waits for as long as a byte comes now and then.
"""

from __future__ import annotations

import hashlib
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from ..errors import DownloadError

__all__ = ["TIMEOUT", "ask", "hub_utils", "is_network", "receive"]

TIMEOUT = 15.0
"""Seconds for which a hub may be silent."""
SLOWEST = 1000
"""Bytes a second below which a download is given up."""
_WINDOW = 60.0  # seconds over which that is measured
_TRIES, _PAUSE = 5, 1.0  # connections that may bring next to nothing, one after the other; seconds between them
_ADVANCE = 2**20  # bytes that a connection must bring to be more than that
_REDIRECTS = 10
_NETWORK_PACKAGES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}

T = TypeVar("T")


@contextmanager
def ask(endpoint: str, url: str, timeout: float | None = None, method: str = "GET", **headers: str) -> Iterator[Any]:
    """The answer to a request, its body unread: one whose end is not in sight must not be read at once.

    The token goes to the hub, ``endpoint``, only. httpx takes it out of what is redirected to another scheme, host or
    port. A HEAD is not sent on from the hub: what is asked is in its own answer.

    Raises
    ------
    huggingface_hub.errors.HfHubHTTPError, httpx.HTTPError, ConnectionError, TimeoutError
        See :func:`is_network`.
    """
    import huggingface_hub

    timeout = TIMEOUT if timeout is None else timeout
    ours = _origin(endpoint)
    request = huggingface_hub.get_session().build_request(
        method, url, headers=_headers(with_token=_origin(url) == ours) | headers, timeout=timeout
    )

    def follow() -> Any:
        following = request
        for _ in range(_REDIRECTS):
            response = huggingface_hub.get_session().send(following, stream=True, follow_redirects=False)
            onward = response.next_request
            if onward is None or (method == "HEAD" and _origin(str(onward.url)) != ours):
                return response
            response.close()
            following = onward
        raise ConnectionError(f"{url} is redirected again and again")

    response = _within(2 * timeout, follow)
    try:
        # As huggingface_hub explains it, but without the body, which it would read to the end.
        told = {key: value for key, value in response.headers.items() if key.startswith("x-error")}
        bare = type(response)(response.status_code, headers=told, request=response.request)
        hub_utils().hf_raise_for_status(bare)
        good = response.status_code in (200, 206) or method == "HEAD"
        if not good or "content-encoding" in response.headers:
            raise ConnectionError(f"{urlsplit(url).hostname} does not send what was asked for")
        yield response
    finally:
        response.close()


def receive(
    endpoint: str, url: str, partial: Path, size: int, digest: str, what: str, tell: Callable[[int], None]
) -> None:
    """Fetch a file to its end, going on with what is here of it; after a broken connection again.

    Parameters
    ----------
    endpoint, url : str
    partial : Path
        The file, and what is here of it. It is gone if it is not what was announced.
    size, digest
        Its bytes, and their SHA-256, or Git's hash of a blob with them.
    what : str
        Its name in messages.
    tell : callable
        Called with the bytes that are here.

    Raises
    ------
    DownloadError
        If it is another file, or comes too slowly; otherwise as :func:`ask`.
    """
    hashed = _Hashed(size, digest)
    tries, farthest, pace = _TRIES, 0, _Pace(what)
    here = partial.stat().st_size if partial.exists() else 0
    try:
        with partial.open("r+b" if 0 < here <= size else "w+b") as file:
            while block := file.read(2**22):
                hashed.update(block)
            while file.tell() < size:
                try:
                    _receive_on(endpoint, url, file, size, hashed, pace, tell)
                except Exception as error:
                    tries = _TRIES if file.tell() >= farthest + _ADVANCE else tries - 1
                    if not is_network(error) or not tries:
                        raise
                    farthest = max(farthest, file.tell())
                    time.sleep(_PAUSE)
            good = file.tell() == size and hashed.matches()
    finally:
        if size and partial.exists() and not partial.stat().st_size:  # nothing came
            partial.unlink()
    if not good:
        partial.unlink(missing_ok=True)
        raise DownloadError(f"{what} arrived damaged and was thrown away: start it again")


def _receive_on(
    endpoint: str,
    url: str,
    file: BinaryIO,
    size: int,
    hashed: _Hashed,
    pace: _Pace,
    tell: Callable[[int], None],
) -> None:
    """One connection's part of a file; one byte more than ``size`` at most is taken."""
    here = file.tell()
    with ask(endpoint, url, **({"Range": f"bytes={here}-"} if here else {})) as response:  # type: ignore[arg-type]
        if response.status_code != 206 and here:  # the server cannot go on in the middle
            file.seek(0)
            file.truncate()
            hashed.restart()
        for chunk in response.iter_raw():
            pace(len(chunk))
            file.write(chunk[: size + 1 - file.tell()])
            hashed.update(chunk)
            tell(min(file.tell(), size))
            if file.tell() > size:
                return
    if file.tell() < size:
        raise ConnectionError(f"the connection ended after {file.tell()} of {size} bytes")


def is_network(error: BaseException) -> bool:
    """Whether the hub could not be reached or did not answer properly, as opposed to having said no."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    package = type(error).__module__.partition(".")[0]
    return package in _NETWORK_PACKAGES or isinstance(error, (ConnectionError, TimeoutError))


def _headers(with_token: bool) -> dict[str, str]:
    """Of a request. huggingface_hub's own would first ask the hub which programs to tell it of, without a bound."""
    import huggingface_hub
    from huggingface_hub import constants

    headers = {"User-Agent": f"moshi-mlx-local; hf_hub/{huggingface_hub.__version__}", "Accept-Encoding": "identity"}
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else huggingface_hub.get_token()
    if not token or not with_token:
        return headers
    if not re.fullmatch(r"[!-~]+", token):
        raise DownloadError("the token (HF_TOKEN, or of `hf auth login`) has characters that no token has: set it anew")
    return headers | {"Authorization": f"Bearer {token}"}


def hub_utils() -> Any:
    """huggingface_hub's helpers, which its type hints do not export."""
    from huggingface_hub import utils

    return utils


class _Hashed:
    """A file's hash as it comes: SHA-256, or Git's hash of a blob, which is what a hub calls small files by."""

    def __init__(self, size: int, wanted: str):
        self._size, self._wanted = size, wanted
        self.restart()

    def restart(self) -> None:
        git = hashlib.sha1(b"blob %d\0" % self._size, usedforsecurity=False)
        self._hash = hashlib.sha256() if len(self._wanted) == 64 else git

    def update(self, data: bytes) -> None:
        self._hash.update(data)

    def matches(self) -> bool:
        return self._hash.hexdigest() == self._wanted


class _Pace:
    """Ends a transfer that hardly moves: a byte now and then would keep it open for ever."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._since, self._came = time.monotonic(), 0

    def __call__(self, count: int) -> None:
        self._came += count
        now = time.monotonic()
        if now - self._since < _WINDOW:
            return
        if self._came < SLOWEST * _WINDOW:
            raise DownloadError(
                f"cannot fetch {self._what}: only {self._came / _WINDOW:.0f} bytes a second come. Start it again when "
                "the connection is better: what is here already will be used"
            )
        self._since, self._came = now, 0


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What ``call`` returns, or a TimeoutError: a server that sends a byte now and then is never late for a socket."""
    answer: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((call(), None))
        except BaseException as error:
            answer.put((None, error))

    threading.Thread(target=run, name="moshi hub", daemon=True).start()
    try:
        value, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
