"""A repository on a model hub: what it holds, and its files brought into the shared cache.

The cache is huggingface_hub's. A hub, or a mirror named by ``HF_ENDPOINT``, is not trusted: huggingface_hub names a
file of the cache after whatever ETag it is sent. Here nothing is named after an answer that is not a plain hash, and
every file is hashed before it gets its name. An interrupted download goes on where it stopped, also in another run,
because losing most of 15 GB to a dropped connection is no small matter.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urljoin

from ..disk import free_bytes
from ..errors import CheckpointError, DownloadError
from ..printable import printable
from . import transfer
from .readers import inner_path, parse_object, shown
from .transfer import ask, hub_utils, is_network, receive

__all__ = ["HubRepo", "Progress"]

Progress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes of it that are here, and its size."""

SPARE_BYTES = 256 * 2**20
"""Disk space that a download must leave free."""
MAX_LISTING = 4 * 2**20
"""Longest list of files, in bytes; a model's has a few thousand."""
_REMEMBERED = 60.0  # seconds for which a hub that did not answer is not asked again, if the cache will do
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_silent: dict[str, float] = {}  # by endpoint: when it did not answer


class HubRepo:
    """Files of a repository at one commit.

    Parameters
    ----------
    repo : str
        ``organisation/name``.
    revision : str, optional
        Branch, tag or commit; the default branch without one. All files come from the commit that it meant when the
        repository was first asked.
    cache : path, optional
        Cache folder; huggingface_hub's by default.
    offline : bool, optional
        Never ask the network. By default as ``HF_HUB_OFFLINE`` says.
    progress : callable, optional
        Without it huggingface_hub's progress bars are shown.
    timeout : float, optional
        Seconds to wait for the hub's list of files.
    """

    def __init__(
        self,
        repo: str,
        revision: str | None = None,
        *,
        cache: str | os.PathLike[str] | None = None,
        offline: bool | None = None,
        progress: Progress | None = None,
        timeout: float | None = None,
    ):
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        if revision is not None and (revision.startswith("/") or ".." in PurePosixPath(revision).parts):
            raise DownloadError(f"{revision!r} is not a revision of {repo}")
        try:
            folder = repo_folder_name(repo_id=repo, repo_type="model")
        except ValueError as error:
            raise DownloadError(f"{repo[:100]!r} is not the name of a repository: {error}") from error
        self.repo = repo
        self.revision = revision
        self.label = repo if revision is None else f"{repo}@{revision}"
        self.progress = progress
        environment = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        self.offline = environment if offline is None else offline
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self.cache = Path(cache or constants.HF_HUB_CACHE)
        self._root = self.cache / folder
        self._timeout = transfer.TIMEOUT if timeout is None else timeout
        self._hashes: dict[str, str] = {}  # of large files: the names of their contents in the cache
        self.commit, self.sizes = self._list_cached() if self.offline else self._list()

    # ------------------------------------------------------------------------------------------- listing

    def _list(self) -> tuple[str, dict[str, int | None]]:
        """The commit and the files with their sizes; from the cache if the network fails."""
        cached = self._cached_commit()
        if cached is not None and time.monotonic() < _silent.get(self.endpoint, -_REMEMBERED) + _REMEMBERED:
            self.offline = True
            return self._list_cached()
        try:
            return self._read_listing(self._describe())
        except DownloadError:
            raise
        except CheckpointError as error:  # not JSON
            raise DownloadError(f"cannot fetch {self.label}: {error}") from error
        except Exception as error:
            if not is_network(error) or cached is None:
                raise self._explain(error, None) from error
            _silent[self.endpoint] = time.monotonic()
            self.offline = True
            return self._list_cached()

    def _describe(self) -> dict[str, Any]:
        """The hub's description of the repository."""
        path = f"/revision/{quote(self.revision, safe='')}" if self.revision else ""
        data = bytearray()
        with ask(self.endpoint, f"{self.endpoint}/api/models/{self.repo}{path}?blobs=true", self._timeout) as response:
            until = time.monotonic() + self._timeout
            for chunk in response.iter_raw():
                data += chunk
                if len(data) > MAX_LISTING:
                    raise DownloadError(f"{self.endpoint} sends a list of files without end for {self.label}")
                if time.monotonic() > until:
                    raise TimeoutError(f"the list of files has not come within {self._timeout:g} s")
        return parse_object(bytes(data), f"the answer of {self.endpoint}")

    def _read_listing(self, info: Mapping[str, Any]) -> tuple[str, dict[str, int | None]]:
        """Commit, sizes and hashes from the hub's answer: whatever becomes a path is checked."""
        commit, listed = info.get("sha"), info.get("siblings") or []
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise DownloadError(f"{self.endpoint} does not say which commit {self.label} is at: {str(commit)[:80]!r}")
        sizes: dict[str, int | None] = {}
        for file in listed if isinstance(listed, list) else [listed]:
            file = file if isinstance(file, dict) else {"rfilename": None}
            name, size = file.get("rfilename"), file.get("size")
            if not isinstance(name, str) or (size is not None and (type(size) is not int or size < 0)):
                raise DownloadError(
                    f"{self.endpoint} sends a list of files for {self.label} that cannot be read: {str(file)[:100]!r}"
                )
            sizes[name] = size
            large = file.get("lfs")
            digest = large.get("sha256") if isinstance(large, dict) else file.get("blobId")
            if isinstance(digest, str) and _HASH.fullmatch(digest):
                self._hashes[name] = digest
        return commit, sizes

    def _cached_commit(self) -> str | None:
        commit = self.revision or "main"
        if not _COMMIT.fullmatch(commit):
            try:
                with (self._root / "refs" / commit).open("rb") as file:
                    commit = file.read(100).decode("ascii", "replace").strip()
            except OSError:
                return None
        return commit if _COMMIT.fullmatch(commit) and (self._root / "snapshots" / commit).is_dir() else None

    def _list_cached(self) -> tuple[str, dict[str, int | None]]:
        commit = self._cached_commit()
        if commit is None:
            raise DownloadError(
                f"{self.label} is not in the cache ({self.cache}), and the network is switched off (HF_HUB_OFFLINE). "
                "Unset it once to fetch the model, use the built-in model small, or give a local folder"
            )
        folder = self._root / "snapshots" / commit
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return commit, {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}

    # ------------------------------------------------------------------------------------------ fetching

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        """Bring files into the cache, after checking that they exist and fit on the disk.

        Raises
        ------
        CheckpointError
            If a name leads out of the repository.
        DownloadError
            Says what failed (network, access, space, a missing or a damaged file) and what can be done.
        """
        places = {name: self._pointer(name) for name in names}
        missing = [name for name, path in places.items() if not os.path.isfile(path)]
        absent = [name for name in missing if name not in self.sizes]
        if absent:
            hint = "is not in the cache" if self.offline else "has no such file"
            raise DownloadError(f"{self.label} {hint}: {shown(absent)}. It has {shown(self.sizes, 12) or 'no files'}")
        if not self.offline:
            self._check_space(missing)
        for name in missing:
            try:
                self._download(name)
            except DownloadError:
                raise
            except Exception as error:
                raise self._explain(error, name) from error
        if missing and self.revision != self.commit:
            reference = self._root / "refs" / (self.revision or "main")  # so that offline use finds the commit
            try:
                reference.parent.mkdir(parents=True, exist_ok=True)
                reference.write_text(self.commit)
            except OSError as error:
                raise self._explain(error, None) from error
        return places

    def has(self, name: str) -> bool:
        """Whether there is a file of this name, which must not lead out of the repository."""
        inner_path(Path(), name, self.label)
        return name in self.sizes

    def names(self) -> list[str]:
        """All files."""
        return sorted(self.sizes)

    def amount(self, name: str) -> tuple[int, int]:
        """Bytes of a file, and how many are not in the cache; an interrupted download counts as far as it came."""
        if name not in self.sizes:
            raise DownloadError(f"{self.label} has no {name[:100]}")
        size = self.sizes[name] or 0
        blob = self._root / "blobs" / self._hashes.get(name, "unknown")
        if os.path.isfile(self._pointer(name)) or blob.is_file():
            return size, 0
        return size, max(size - _length(_partial(blob)), 0)

    def _pointer(self, name: str) -> Path:
        """Where the cache shows a file by its name."""
        return inner_path(self._root / "snapshots" / self.commit, name, self.label)

    def _check_space(self, names: list[str]) -> None:
        needed = sum(self.amount(name)[1] for name in names)
        free = free_bytes(self.cache)
        if needed and needed + SPARE_BYTES > free:
            raise DownloadError(
                f"{self.label} needs {needed / 1e9:.1f} GB more, but {self.cache} has only {free / 1e9:.1f} GB free. "
                "Make room, or set HF_HOME to a folder on a larger disk"
            )

    def _download(self, name: str) -> None:
        """Put a file's bytes where the cache keeps them (``blobs/<hash>``), and a link to them under its name."""
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.repo, name, revision=self.commit, endpoint=self.endpoint)
        with ask(self.endpoint, url, method="HEAD") as response:  # sent on to where the bytes are, or the file's own
            told, url = response.headers, str(response.request.url)
        etag = (told.get("x-linked-etag") or told.get("etag") or "").removeprefix("W/").strip('"')
        length = told.get("x-linked-size") or ("" if "location" in told else told.get("content-length", ""))
        size = self.sizes[name]
        if size is None and not length.isdecimal():
            raise DownloadError(f"{self.endpoint} does not say how large {name} of {self.label} is")
        size = int(length) if size is None else size
        if not _HASH.fullmatch(etag):
            raise DownloadError(
                f"{self.endpoint} gives {name} of {self.label} the ETag {etag[:80]!r}, which is not the hash that "
                "a hub gives: refused. Unset HF_ENDPOINT, or set it to another mirror"
            )
        digest = self._hashes.get(name, etag)
        blob = self._root / "blobs" / digest
        locks = self.cache / ".locks" / self._root.name
        for folder in (blob.parent, locks):
            folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            tell = stack.enter_context(self._telling(name, _length(_partial(blob)), size))
            stack.enter_context(_locked(locks / f"{digest}.lock", lambda: tell(_length(_partial(blob)))))
            if not blob.is_file():
                place = urljoin(url, told.get("location", ""))
                receive(self.endpoint, place, _partial(blob), size, digest, f"{name} of {self.label}", tell)
                os.replace(_partial(blob), blob)
            _link(self._pointer(name), blob)
            tell(size)

    @contextmanager
    def _telling(self, name: str, here: int, size: int) -> Iterator[Callable[[int], None]]:
        """What takes a file's bytes that are here: the caller's progress, or a bar."""
        progress = self.progress
        if progress is not None:
            yield lambda at: progress(name, at, size)
            return
        with hub_utils().tqdm(desc=printable(name), total=size, initial=here, unit="B", unit_scale=True) as bar:
            yield lambda at: bar.update(at - bar.n)

    # -------------------------------------------------------------------------------------------- errors

    def _explain(self, error: Exception, name: str | None) -> DownloadError:
        """The error with the way out."""
        from huggingface_hub import errors

        what = self.label if name is None else f"{name} of {self.label}"
        status = getattr(getattr(error, "response", None), "status_code", None)
        page = f"{self.endpoint}/{self.repo}"
        login = "then log in with `hf auth login` (or `huggingface-cli login`), or set HF_TOKEN"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DownloadError(
                f"the disk is full: {what} does not fit into {self.cache}. Make room, or set HF_HOME to a folder on a "
                "larger disk; what is here already will be used"
            )
        if isinstance(error, errors.GatedRepoError):
            return DownloadError(f"{what} is gated: accept its licence at {page}, {login}")
        if isinstance(error, errors.RevisionNotFoundError):
            return DownloadError(f"{self.repo} has no revision {self.revision!r}: see {page}")
        if isinstance(error, errors.RepositoryNotFoundError):
            return DownloadError(
                f"{self.endpoint} shows no repository {self.repo}. Check the name; if it is private, {login[5:]}"
            )
        if isinstance(error, errors.EntryNotFoundError) and status == 404:
            return DownloadError(f"{what} does not exist: see {page}")
        if status in (401, 403):
            return DownloadError(f"{self.endpoint} refuses {what}: ask for access at {page}, {login}")
        if is_network(error) or isinstance(error, errors.LocalEntryNotFoundError):
            return DownloadError(
                f"cannot fetch {what}: {self.endpoint} cannot be reached ({_short(error)}). Check the connection and "
                "start again: what is here already will be used. Or use the built-in model small, give a "
                "local folder, or set HF_ENDPOINT to a mirror"
            )
        return DownloadError(f"cannot fetch {what}: {_short(error)}")


@contextmanager
def _locked(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a file's download; ``wait`` is called while another process downloads it."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hub_utils().WeakFileLock(path, timeout=1.0))
                break
            except TimeoutError:
                wait()
        yield


def _link(pointer: Path, blob: Path) -> None:
    """Make the name point at its contents, as huggingface_hub does; without symbolic links the contents move there."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=pointer.parent, prefix=".link.") as folder:
        made = Path(folder, "link")
        try:
            made.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError:
            made = blob
        os.replace(made, pointer)


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
