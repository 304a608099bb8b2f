"""A folder that appears whole or not at all: written inside ``NAME.partial``, then moved into place."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from moshi_mlx.errors import CheckpointError

from .targets import check_target
from .writer import explain

__all__ = ["Staging"]

_MARK = ".moshi-mlx-quantize"


class Staging:
    """Use it with ``with``; :meth:`commit` moves the folder into place, leaving without it removes everything.

    What a killed run left behind is removed by the next one, which also puts a folder back that was being replaced; one
    that is being written is not touched.

    Parameters
    ----------
    target : path
        What the folder shall be called; from :func:`~.targets.as_path`.
    force : bool
        Replace a checkpoint of that name, which stays whole until the new one is.

    Attributes
    ----------
    folder : path
        What becomes the target.
    scratch : path
        For files that are not needed afterwards.
    done : bool
        Whether the target is in place.
    """

    def __init__(self, target: Path, *, force: bool = False):
        self.target, self._force = target, force
        self.room = target.with_name(f"{target.name}.partial")
        self.folder, self.scratch, self._old = (self.room / name for name in ("result", "scratch", "replaced"))
        self._lock: int | None = None
        self._made: list[Path] = []
        self._kept = self.done = False

    def __enter__(self) -> Staging:
        check_target(self.target, self._force)
        mark = self.room / _MARK
        if self.room.is_symlink() or (self.room.exists() and not mark.exists()):
            raise CheckpointError(f"{self.room} exists and was not created by this program: move it")
        self._made = [path for path in self.target.parents if not path.exists()]
        try:
            self.room.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(mark)
            self._restore()
            check_target(self.target, self._force)  # now that what a killed run moved away is back
            for path in (self.folder, self.scratch, self._old):
                shutil.rmtree(path, ignore_errors=True)
            self.folder.mkdir()
            self.scratch.mkdir()
        except BlockingIOError:
            raise CheckpointError(f"another run is writing {self.target} at this moment") from None
        except OSError as error:
            self._leave()
            raise explain(self.room, error) from error
        except BaseException:
            self._leave()
            raise
        return self

    def commit(self) -> None:
        """Move the folder into place.

        Raises
        ------
        CheckpointError
            If that cannot be done. The target is as it was then, and the result is kept where the message says.
        """
        try:
            check_target(self.target, self._force)
            for path in (*self.folder.iterdir(), self.folder):
                _sync(path)
            if self.target.exists():
                os.rename(self.target, self._old)
            os.rename(self.folder, self.target)
        except (OSError, CheckpointError) as error:
            self._restore()
            self._kept = True
            reason = explain(self.target, error) if isinstance(error, OSError) else error
            raise CheckpointError(f"{reason}. The result is whole, and kept in {self.folder}") from error
        self.done = True
        with suppress(OSError):
            _sync(self.target.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _restore(self) -> None:
        """Put back what was being replaced."""
        if self._old.exists() and not self.target.exists():
            os.rename(self._old, self.target)

    def _leave(self) -> None:
        """Remove what is not needed any more, and give the lock back."""
        try:
            if self._lock is not None:
                self._restore()
                if self._kept:
                    (self.room / _MARK).unlink()  # from now on it is the user's
                else:
                    shutil.rmtree(self.room, ignore_errors=True)
            else:
                self.room.rmdir()  # if it is empty
            for path in self._made:
                path.rmdir()
        except OSError:
            pass  # what cannot be put back stays where it is; folders that are not empty stay
        finally:
            if self._lock is not None:
                os.close(self._lock)


def _locked(path: Path) -> int:
    """A file that no other process has locked; BlockingIOError if one has."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(lock).st_nlink:  # whoever had it has just removed it
            raise BlockingIOError
    except BaseException:
        os.close(lock)
        raise
    return lock


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
