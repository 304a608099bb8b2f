"""A model hub on this machine, as much of it as downloads need, with faults on request."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    """

    files: dict[str, bytes]
    sha: str = "a" * 40
    tags: tuple[str, ...] = ()
    gate: str = ""
    break_after: int = 0
    breaks: int = 0
    status: int = 0
    delay: float = 0.0


@dataclass
class FakeHub:
    """A running hub.

    Attributes
    ----------
    url : str
    repos : dict of str to FakeRepo
    requests : list of (method, path, range)
        What was asked for, in order.
    """

    url: str
    repos: dict[str, FakeRepo] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)

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
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        repo = self.hub.repos.get(name)
        if repo is None or repo.gate == "private":
            self._send(401, error="RepoNotFound")
            return
        if repo.delay:
            time.sleep(repo.delay)
        if repo.status:
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
        info = {"id": name, "modelId": name, "sha": repo.sha, "siblings": siblings, "tags": [], "downloads": 0}
        self._send(200, json.dumps(info).encode())

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
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            cut = None
            if self.command == "GET" and repo.breaks and 0 < repo.break_after < len(data) - start:
                repo.breaks -= 1
                cut = repo.break_after
            self._send(206 if start else 200, data[start:], headers=headers, cut=cut)

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
