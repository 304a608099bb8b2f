"""A hub that lies: about commits, names, sizes and hashes, and in how it sends what it sends."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from moshi_mlx.checkpoint import transfer
from moshi_mlx.checkpoint.download import _silent
from moshi_mlx.checkpoint.resolve import plan_download, resolve
from moshi_mlx.errors import DownloadError
from tests.helpers.fake_hub import FakeRepo, running_hub

from . import Attack, Attempt, fuzzer

_until_the_end = ExitStack()
NAME = "someone/model"
FILES = {
    "config.json": json.dumps({"moshi_name": "weights.safetensors"}).encode(),
    "weights.safetensors": bytes(range(256)) * 1200,
    "tokenizer-e351c8d8-checkpoint125.safetensors": b"m" * 1500,
    "tokenizer_spm_32k_3.model": b"t" * 50,
}
_TEXTS = ["", "../../../evil", "..", "/etc", "a" * 40, "0" * 64, "A" * 40, "a\tb", "x" * 5000, "é", "W/", '"', "main"]
_VALUES: list[Any] = [None, True, -1, 0, 1, 2**40, 10**30, 1.5, 1e300, [], {}, "5", ["x"], {"a": 1}, *_TEXTS]


def _statuses(rng: random.Random) -> bytes:
    """The head of an answer that is hardly HTTP."""
    headers = [
        b"Content-Length: 5", b"Content-Length: -5", b"Content-Length: 99999999999999999999", b"Content-Encoding: gzip",
        b"Transfer-Encoding: chunked", b"Location: ../../x", b"Location: file:///etc/passwd", b"Location: http://[::bad",
        b"Location: //127.0.0.1:9/x", b"Location: http://127.0.0.1:9/" + b"y" * 5000, b"X-Error-Code: GatedRepo",
        b"X-Error-Message: \xc2\x9b31m\xe2\x80\xae", b"X-Repo-Commit: ../..", b"ETag: ../../../evil",
        b"X-Linked-Size: -1",
        b"X-Linked-Size: many", b"Content-Range: bytes 0-1/x", b"X: \x1b[31m", b"no colon", b"X" * 70_000 + b": 1", b"",
    ]  # fmt: skip
    status = rng.choice(
        [b"200 OK", b"206 Part", b"302 Found", b"307 T", b"404 N", b"429 R", b"500 S", b"999 ?", b"abc"]
    )
    lines = [b"HTTP/1.1 " + status, *rng.sample(headers, rng.randint(0, 4)), b"", b""]
    return b"\r\n".join(lines)


def _body(rng: random.Random, kind: str, ended: threading.Event) -> Callable[[bytes], Iterator[bytes]]:
    noise = rng.randbytes(1000)
    cut = rng.random()

    def pieces(data: bytes) -> Iterator[bytes]:
        if kind == "drips":
            while not ended.wait(0.05):
                yield b"x"
        elif kind == "endless":
            for _ in range(500):
                yield bytes(100_000)
        elif kind == "short":
            yield data[: int(cut * len(data))]
        elif kind == "wrong":
            yield (noise * (len(data) // len(noise) + 1))[: len(data)]
        elif kind == "long":
            yield data + noise
        else:
            yield data

    return pieces


@fuzzer(seconds=5.0, megabytes=100.0)
def hubs(folder: Path) -> Attack:
    """Whatever a hub says: nothing is written outside the cache, every file in it has the hash that it is called by,
    and when the hub is honest again the model comes."""
    os.environ |= {"HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = False
    transfer.TIMEOUT, transfer._WINDOW, transfer._PAUSE = 0.3, 0.3, 0.0
    hub = _until_the_end.enter_context(running_hub())
    os.environ["HF_ENDPOINT"] = hub.url
    cache = folder / "a" / "b" / "c" / "cache"
    witness = folder / "a" / "witness"
    witness.parent.mkdir()
    witness.write_text("here")

    def make(rng: random.Random) -> Attempt:
        lies: dict[str, Any] = {}
        repo, ended = FakeRepo(dict(FILES)), threading.Event()
        for kind in rng.sample(
            ["info", "siblings", "headers", "location", "body", "raw", "breaks"], rng.choice([1, 1, 2])
        ):
            if kind == "info":
                lies[kind] = repo.info = {rng.choice(["sha", "siblings", "id", "x"]): rng.choice(_VALUES)}
            elif kind == "siblings":
                lies[kind] = repo.info["siblings"] = _siblings(rng)
            elif kind == "headers":
                names = ["ETag", "X-Repo-Commit", "Content-Range", "X-Linked-ETag", "X-Linked-Size", "Content-Length"]
                texts = [text for text in _TEXTS if text.isascii()] + ["-1", "10", "999999999999"]
                lies[kind] = repo.headers = {rng.choice(names): rng.choice([None, *texts])}
            elif kind == "location":
                lies[kind] = repo.location = rng.choice(
                    ["../../x", "/", hub.url, "http://127.0.0.1:9/", "ftp://x", "//", "http://[::1", "x" * 9000, "\x7f"]
                )
            elif kind == "body":
                lies[kind] = rng.choice(["drips", "endless", "short", "wrong", "long", "right"])
                repo.body = _body(rng, lies[kind], ended)
            elif kind == "breaks":
                lies[kind] = repo.break_after, repo.breaks = rng.choice([0, 1, 1000, 10**5]), rng.choice([1, 3, 50])
            else:
                lies[kind] = [where := rng.choice(["/api/", "HEAD", "GET"]), raw := _statuses(rng)]
                tail = rng.choice([b"", b"{}", b'{"sha":', b"5\r\nabcde\r\n", b"[" * 5000, rng.randbytes(300)])
                repo.lie = _lie(where, raw + tail)

        def call() -> None:
            hub.repos[NAME] = repo
            _silent.clear()
            shutil.rmtree(cache, ignore_errors=True)
            try:
                plan_download(NAME, cache=cache)
                resolve(NAME, cache=cache, progress=lambda *_: None)
            finally:
                ended.set()
                _check(folder, cache)
                hub.repos[NAME] = FakeRepo(dict(FILES), sha="b" * 40)
                _silent.clear()
                try:
                    files = resolve(NAME, cache=cache, progress=lambda *_: None)
                except DownloadError as error:  # what was begun was wrong
                    assert "thrown away" in str(error), error
                    files = resolve(NAME, cache=cache, progress=lambda *_: None)
                assert files.weights[0].read_bytes() == FILES["weights.safetensors"]

        return repr(lies).encode(), call

    return make


def _siblings(rng: random.Random) -> list[Any]:
    siblings: list[Any] = []
    for name, data in FILES.items():
        entry: dict[str, Any] = {"rfilename": name, "size": len(data)}
        if rng.random() < 0.5:
            entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest()}
        if rng.random() < 0.3:
            entry[rng.choice(["rfilename", "size", "lfs", "blobId"])] = rng.choice(_VALUES)
        if rng.random() < 0.1:
            entry["lfs"] = {"sha256": rng.choice(_VALUES)}
        siblings.append(entry if rng.random() < 0.95 else rng.choice(_VALUES))
    return siblings


def _lie(where: str, raw: bytes) -> Callable[[Any], bool]:
    def lie(handler: Any) -> bool:
        if where not in f"{handler.command} {handler.path}" or (where == "GET" and "/api/" in handler.path):
            return False
        with suppress(OSError):
            handler.wfile.write(raw)
        return True

    return lie


def _check(folder: Path, cache: Path) -> None:
    outside = [path for path in folder.rglob("*") if path.is_file() and cache not in path.parents]
    assert outside == [folder / "a" / "witness"], outside
    for path in cache.rglob("blobs/*"):
        name, data = path.name, path.read_bytes()
        if not name.endswith(".incomplete"):
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            assert name in (hashlib.sha256(data).hexdigest(), git), f"{name} holds something else"
    for path in cache.rglob("snapshots/*/*"):
        assert cache.resolve() in path.resolve().parents, path
