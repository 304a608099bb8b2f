"""A repository on a model hub: what it holds, and its files brought into the shared cache.

Everything goes through huggingface_hub and its cache. One thing is added: an interrupted download of a large file
goes on where it stopped, also in another run, because losing most of 15 GB to a dropped connection is no small matter.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ..errors import DownloadError
from .files import shown

__all__ = ["HubRepo", "Progress"]

Progress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes of it that are here, and its size."""

RESUMABLE_BYTES = 16 * 2**20
"""Files from this size on are fetched in a way that can be resumed."""
SPARE_BYTES = 256 * 2**20
"""Disk space that a download must leave free."""
_TIMEOUT = 15.0
_NETWORK_PACKAGES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}


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
        Replaces huggingface_hub's progress bars.
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

        self.repo = repo
        self.revision = revision
        self.progress = progress
        environment = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        self.offline = environment if offline is None else offline
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self.cache = Path(cache or constants.HF_HUB_CACHE)
        self._root = self.cache / repo_folder_name(repo_id=repo, repo_type="model")
        self._timeout = _TIMEOUT if timeout is None else timeout
        self._hashes: dict[str, str] = {}  # of large files: the names of their contents in the cache
        self.commit, self.sizes = self._list_cached() if self.offline else self._list()

    # ------------------------------------------------------------------------------------------- listing

    def _list(self) -> tuple[str, dict[str, int | None]]:
        """The commit and the files with their sizes; from the cache if the network fails."""
        from huggingface_hub import HfApi

        try:
            info = HfApi(endpoint=self.endpoint).model_info(
                self.repo, revision=self.revision, files_metadata=True, timeout=self._timeout
            )
        except Exception as error:
            if not _is_network(error) or self._cached_commit() is None:
                raise self._explain(error, None) from error
            self.offline = True
            return self._list_cached()
        if not info.sha:
            raise DownloadError(f"{self.endpoint} does not say which commit {self._label} is at")
        siblings = info.siblings or []
        self._hashes = {file.rfilename: file.lfs.sha256 for file in siblings if file.lfs is not None}
        return info.sha, {file.rfilename: file.size for file in siblings}

    def _cached_commit(self) -> str | None:
        wanted = self.revision or "main"
        if (self._root / "snapshots" / wanted).is_dir():
            return wanted
        reference = self._root / "refs" / wanted
        commit = reference.read_text().strip() if reference.is_file() else None
        return commit if commit and (self._root / "snapshots" / commit).is_dir() else None

    def _list_cached(self) -> tuple[str, dict[str, int | None]]:
        commit = self._cached_commit()
        if commit is None:
            raise DownloadError(
                f"{self._label} is not in the cache ({self.cache}), and the network is switched off (HF_HUB_OFFLINE). "
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
        DownloadError
            Says what failed (network, access, space, a missing file) and what can be done.
        """
        names = list(dict.fromkeys(names))
        folder = self._root / "snapshots" / self.commit
        missing = [name for name in names if not (folder / name).is_file()]
        absent = [name for name in missing if name not in self.sizes]
        if absent:
            hint = "is not in the cache" if self.offline else "has no such file"
            raise DownloadError(f"{self._label} {hint}: {shown(absent)}. It has {shown(self.sizes, 12) or 'no files'}")
        if not self.offline:
            self._check_space(missing)
        with self._bars():
            for name in missing:
                try:
                    self._download(name)
                except DownloadError:
                    raise
                except Exception as error:
                    raise self._explain(error, name) from error
        if missing and self.revision != self.commit:
            reference = self._root / "refs" / (self.revision or "main")  # so that offline use finds the commit
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(self.commit)
        return {name: folder / name for name in names}

    def missing(self, name: str) -> int:
        """Bytes of a file that are not in the cache; an interrupted download counts as far as it came."""
        size = self.sizes[name] or 0
        if (self._root / "snapshots" / self.commit / name).is_file():
            return 0
        blob = self._root / "blobs" / self._hashes.get(name, "unknown")
        if blob.is_file():
            return 0
        partial = blob.with_name(f"{blob.name}.incomplete")
        return max(size - (partial.stat().st_size if partial.is_file() else 0), 0)

    def _check_space(self, names: list[str]) -> None:
        needed = sum(self.missing(name) for name in names)
        place = self.cache
        while not place.exists() and place != place.parent:
            place = place.parent
        free = shutil.disk_usage(place).free
        if needed and needed + SPARE_BYTES > free:
            raise DownloadError(
                f"{self._label} needs {needed / 1e9:.1f} GB more, but {self.cache} has only {free / 1e9:.1f} GB free. "
                "Make room, or set HF_HOME to a folder on a larger disk"
            )

    def _download(self, name: str) -> None:
        from huggingface_hub import hf_hub_download

        if (self.sizes[name] or 0) >= RESUMABLE_BYTES:
            self._download_resumably(name)
        path = hf_hub_download(
            self.repo, name, revision=self.commit, cache_dir=self.cache, endpoint=self.endpoint, etag_timeout=_TIMEOUT
        )
        if self.progress is not None:
            size = Path(path).stat().st_size
            self.progress(name, size, size)

    def _download_resumably(self, name: str) -> None:
        """Put the file's bytes where the cache keeps them (``blobs/<etag>``), going on with what is there already."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        utils = _hub_utils()
        url = hf_hub_url(self.repo, name, revision=self.commit, endpoint=self.endpoint)
        remote = get_hf_file_metadata(url, timeout=_TIMEOUT)
        if not remote.etag or not remote.size or not remote.etag.isalnum():
            return  # hf_hub_download will fetch it in one go, or say what is wrong
        blob = self._root / "blobs" / remote.etag
        partial = blob.with_name(f"{remote.etag}.incomplete")
        locks = self.cache / ".locks" / self._root.name
        for folder in (blob.parent, locks):
            folder.mkdir(parents=True, exist_ok=True)
        headers = utils.build_hf_headers()
        if urlparse(remote.location).netloc != urlparse(url).netloc:
            headers.pop("authorization", None)  # the storage host must not see the token
        with utils.WeakFileLock(locks / f"{remote.etag}.resumable.lock"):
            if blob.exists():
                return
            resumed = partial.stat().st_size if partial.exists() else 0
            if resumed > remote.size:
                resumed = 0
            with partial.open("r+b" if resumed else "wb") as file:
                self._get(remote.location, file, remote.size, name, headers)
            broken = partial.stat().st_size != remote.size or (resumed and not _matches(partial, remote.etag))
            if broken:
                partial.unlink()
                raise DownloadError(f"{name} of {self._label} arrived damaged and was thrown away: start it again")
            os.replace(partial, blob)

    def _get(self, url: str, file: Any, size: int, name: str, headers: dict[str, str]) -> None:
        """Fetch to the end of the file; after a broken connection again, as long as every try brings something."""
        from huggingface_hub.file_download import http_get

        target: Any = file if self.progress is None else _Counted(file, name, size, self.progress)
        while True:
            start = file.seek(0, os.SEEK_END)
            try:
                http_get(
                    url, target, resume_size=start, headers=headers, expected_size=size, displayed_filename=name
                )  # fmt: skip
                return
            except Exception as error:
                if not _is_network(error) or file.seek(0, os.SEEK_END) <= start:
                    raise

    @contextmanager
    def _bars(self) -> Iterator[None]:
        """Silence huggingface_hub's bars while a callback shows progress."""
        utils = _hub_utils()
        quiet = self.progress is not None and not utils.are_progress_bars_disabled()
        if quiet:
            utils.disable_progress_bars()
        try:
            yield
        finally:
            if quiet:
                utils.enable_progress_bars()

    # -------------------------------------------------------------------------------------------- errors

    @property
    def _label(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    def _explain(self, error: Exception, name: str | None) -> DownloadError:
        """The error with the way out."""
        from huggingface_hub import errors

        what = self._label if name is None else f"{name} of {self._label}"
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
        if _is_network(error) or isinstance(error, errors.LocalEntryNotFoundError):
            return DownloadError(
                f"cannot fetch {what}: {self.endpoint} cannot be reached ({_short(error)}). Check the connection and "
                "start again: what is here already will be used. Or use the built-in model small, give a "
                "local folder, or set HF_ENDPOINT to a mirror"
            )
        return DownloadError(f"cannot fetch {what}: {_short(error)}")


def _hub_utils() -> Any:
    """huggingface_hub's helpers, which its type hints do not export."""
    from huggingface_hub import utils

    return utils


class _Counted:
    """A file that tells how far it has come."""

    def __init__(self, file: Any, name: str, size: int, progress: Progress):
        self._file, self._name, self._size, self._progress = file, name, size, progress

    def write(self, data: bytes) -> int:
        written: int = self._file.write(data)
        self._progress(self._name, self._file.tell(), self._size)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _matches(path: Path, etag: str) -> bool:
    """Whether a large file has the hash that is its etag (other etags say nothing about the content)."""
    if len(etag) != 64:
        return True
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest() == etag


def _is_network(error: BaseException) -> bool:
    """Whether the hub could not be reached or did not answer properly, as opposed to having said no."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= 500 or status in (408, 429)
    package = type(error).__module__.partition(".")[0]
    return package in _NETWORK_PACKAGES or isinstance(error, (ConnectionError, TimeoutError))


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
