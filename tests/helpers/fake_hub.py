"""A model hub on this machine, as much of it as downloads need, with faults on request."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse


@dataclass
class FakeRepo:
    """Files of a repository, and what goes wrong with it.

    Attributes
    ----------
    files : dict of str to bytes
    sha : str
        Its only commit; the branch ``main`` and every name in ``tags`` mean it.
    gate : {"", "gated", "private"}
    break_after : int
        Cut the connection after so many bytes of a file, ``breaks`` times.
    info, headers : dict
        What it says otherwise of itself, and of each file; None: not at all.
    location : str
        Where a request for a file is sent on to.
    body : callable, optional
        Makes, from a file's bytes, what is sent instead. Only the end of the connection ends it.
    lie : callable, optional
        Called with the handler before anything else; True: it has answered.
    """

    files: dict[str, bytes]
    sha: str = "a" * 40
    tags: tuple[str, ...] = ()
    gate: str = ""
    break_after: int = 0
    breaks: int = 0
    status: int = 0
    delay: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str | None] = field(default_factory=dict)
    location: str = ""
    body: Callable[[bytes], Iterable[bytes]] | None = None
    lie: Callable[[BaseHTTPRequestHandler], bool] | None = None


@dataclass
class FakeHub:
    """A running hub.

    Attributes
    ----------
    url : str
    repos : dict of str to FakeRepo
    requests : list of (method, path, range)
        What was asked for, in order.
    tokens : list of str
        The tokens that came with it.
    """

    url: str
    repos: dict[str, FakeRepo] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)

    def add_folder(self, name: str, folder: Path, **options: Any) -> FakeRepo:
        """Publish a folder's files."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.repos[name] = FakeRepo(files, **options)
        return self.repos[name]

    def fetched(self) -> list[str]:
        """Names of the files whose contents were asked for, in order."""
        return [
            p.split("/resolve/", 1)[1].split("/", 1)[1] for m, p, _ in self.requests if m == "GET" and "/resolve/" in p
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        self.hub.tokens += filter(None, [self.headers.get("Authorization")])
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        repo = self.hub.repos.get(name)
        if repo is None or repo.gate == "private":
            self._send(401, error="RepoNotFound")
            return
        if repo.delay:
            time.sleep(repo.delay)
        if repo.lie is not None and repo.lie(self):
            self.close_connection = True
        elif repo.status:
            self._send(repo.status)
        elif parts[0] == "api":
            self._info(name, repo, parts[5] if len(parts) > 5 else "main")
        elif parts[2] == "resolve":
            self._file(repo, parts[3], "/".join(parts[4:]))

    def _info(self, name: str, repo: FakeRepo, revision: str) -> None:
        if revision not in ("main", repo.sha, *repo.tags):
            self._send(404, error="RevisionNotFound")
            return
        siblings = [{"rfilename": file, "size": len(data), **_lfs(data)} for file, data in repo.files.items()]
        info = {
            "id": name,
            "modelId": name,
            "sha": repo.sha,
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
            **repo.info,
        }
        self._send(200, json.dumps(info | repo.info).encode())

    def _file(self, repo: FakeRepo, revision: str, file: str) -> None:
        if revision not in ("main", repo.sha, *repo.tags):
            self._send(404, error="RevisionNotFound")
        elif repo.gate == "gated":
            self._send(403, error="GatedRepo")
        elif file not in repo.files:
            self._send(404, error="EntryNotFound")
        else:
            data = repo.files[file]
            headers = {
                "X-Repo-Commit": repo.sha,
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "Accept-Ranges": "bytes",
            }
            if repo.location:
                linked = {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(data))}
                self._send(302, headers={**headers, **linked, "Location": repo.location})
                return
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            cut = None
            if self.command == "GET" and repo.breaks and 0 < repo.break_after < len(data) - start:
                repo.breaks -= 1
                cut = repo.break_after
            told = {key: value for key, value in {**headers, **repo.headers}.items() if value is not None}
            if repo.body is not None and self.command == "GET":
                self.pour(repo.body(data), **told)
            else:
                self._send(206 if start else 200, data[start:], headers=told, cut=cut)

    def pour(self, pieces: Iterable[bytes], status: int = 200, **headers: str) -> None:
        """Send pieces until there are none left, or nobody takes them."""
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.close_connection = True
        with suppress(OSError):
            for piece in pieces:
                self.wfile.write(piece)
                self.wfile.flush()

    def _send(
        self,
        status: int,
        body: bytes = b"",
        error: str = "",
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if error:
            self.send_header("X-Error-Code", error)
            self.send_header("X-Error-Message", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()


def _lfs(data: bytes) -> dict[str, Any]:
    """What a hub says about a file that it keeps beside the repository: the large ones."""
    if len(data) < 1000:
        return {}
    return {"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Clients that went away are part of the tests."""


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """Serve on a free port of the loopback device while the context lasts."""
    handler = type("Handler", (_Handler,), {})
    server = _Server(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    handler.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
