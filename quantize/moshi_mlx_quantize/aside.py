"""A folder that appears whole or not at all: written aside as ``NAME.partial``, then moved into place."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from moshi_mlx.errors import CheckpointError

from .writer import explain

__all__ = ["Aside"]

_MARK = ".moshi-mlx-quantize"


class Aside:
    """Use it with ``with``; :meth:`commit` moves the folder into place, leaving without it removes everything.

    A folder that a killed run left behind is removed by the next one; one that is being written is not touched.

    Parameters
    ----------
    target : path
        What the folder shall be called.
    force : bool
        Replace a folder of that name, which stays whole until the new one is.
    """

    def __init__(self, target: Path, *, force: bool = False):
        self.target, self._force = target, force
        self.folder = target.with_name(f"{target.name}.partial")
        self._lock: int | None = None

    def __enter__(self) -> Aside:
        check_target(self.target, self._force)
        mark = self.folder / _MARK
        if self.folder.exists() and not mark.exists():
            raise CheckpointError(f"{self.folder} is in the way, and not by this program: move it")
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._lock = os.open(mark, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise explain(self.folder, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = None
            raise CheckpointError(f"another run is writing {self.target} at this moment") from None
        for path in self.folder.iterdir():
            if path.name != _MARK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self

    def commit(self) -> None:
        """Move the folder into place."""
        check_target(self.target, self._force)
        old = self.target.with_name(f"{self.target.name}.replaced")
        try:
            (self.folder / _MARK).unlink()
            _sync(self.folder)
            if self.target.exists():
                if old.exists():
                    raise CheckpointError(f"{old} is in the way: move it")
                os.rename(self.target, old)
                try:
                    os.rename(self.folder, self.target)
                except BaseException:
                    os.rename(old, self.target)
                    raise
                shutil.rmtree(old)
            else:
                os.rename(self.folder, self.target)
            _sync(self.target.parent)
        except OSError as error:
            raise explain(self.target, error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)


def check_target(target: Path, force: bool) -> None:
    """Refuse to write over what is there.

    Raises
    ------
    CheckpointError
        If the target exists and is not to be replaced, or is not a folder.
    """
    if not target.name:
        raise CheckpointError(f"{target} is no name for a new folder")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{target} exists and is no folder: choose another name")
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists: choose another name, or replace it with --force")


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
