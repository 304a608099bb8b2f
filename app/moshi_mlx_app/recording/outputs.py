"""The files that a command writes: checked before any work, and locked while it runs.

:func:`reserved` is for files named on the command line. A :class:`Claim` locks one file.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shlex
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Claim", "Output", "check_folder", "named", "partial_name", "replace_text", "reserved", "unused_name"]

_FORCE = "--force"  # an option of every command that calls `reserved`


@dataclass(frozen=True)
class Output:
    """A file that a command will write.

    Attributes
    ----------
    what : str
        What it holds, with an article.
    option : str
        How it was named on the command line.
    path : Path
    partial : Path
        Its name until it is complete.
    """

    what: str
    option: str
    path: Path
    partial: Path


def partial_name(target: Path) -> Path:
    """The name of a file until it is complete: ``answer.wav`` -> ``answer.partial.wav``, in the same folder."""
    return target.parent / f"{target.stem}.partial{target.suffix}"  # works for "." and "/", too


@contextlib.contextmanager
def reserved(
    parser: argparse.ArgumentParser, outputs: Sequence[Output], *, others: Mapping[str, str | int | Path], force: bool
) -> Iterator[None]:
    """Check that files may be written, and lock them against other runs until the end of the ``with``.

    Parameters
    ----------
    parser : ArgumentParser
        Ends the program if two outputs are the same file.
    outputs : sequence of Output
    others : mapping
        Other files that the command reads or writes, by their description: paths, or open descriptors.
    force : bool
        Existing files may be replaced.

    Raises
    ------
    OSError
        The message names the file and what to do.
    """
    for output in outputs:
        folder = output.path.parent
        if not folder.is_dir():
            way = shlex.quote(str(folder))
            raise FileNotFoundError(
                f"{folder}: there is no such folder for {output.what}; make it with 'mkdir -p {way}'"
            )
        if output.path.is_dir():
            raise IsADirectoryError(f"{output.path} is a folder; name a file for {output.what}")
        if output.path.exists() and not output.path.is_file():
            raise FileExistsError(f"{output.path} is a device or a pipe; name a file for {output.what}")
    for place, output in enumerate(outputs):
        for name in (output.path, output.partial):
            for earlier in outputs[:place]:
                if _same(name, earlier.path) or _same(name, earlier.partial):
                    parser.error(f"{output.option} {output.path}: that is where {earlier.what} goes")
            for what, other in others.items():
                if _same(name, other):
                    raise FileExistsError(f"{name}: {output.what} would be written over {what}; choose another name")
        if not os.access(output.path.parent, os.W_OK | os.X_OK):
            raise PermissionError(
                f"{output.path.parent}: {output.what} cannot be written there; choose a folder that you may write to"
            )
    with contextlib.ExitStack() as stack:
        for output in outputs:
            try:
                claim = Claim(output.path)
            except BlockingIOError:
                raise FileExistsError(
                    f"{output.path}: another run is writing it; wait until it ends, or choose another name "
                    f"for {output.what}"
                ) from None
            stack.callback(claim.release)
        for output in outputs:  # only now: a run that held the lock may just have written it
            if os.path.lexists(output.path) and not force:
                raise FileExistsError(
                    f"{output.path} exists; replace it with {_FORCE}, or choose another name for {output.what}"
                )
        yield


def check_folder(folder: Path, option: str) -> None:
    """Check that files can be written into a folder, or that it can be created.

    Raises
    ------
    OSError
        The message names the problem.
    """
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise NotADirectoryError(f"{option} {folder}: {there} is a file; name a folder, which is made if it is missing")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {folder}: nothing can be written into {there}; choose another folder")


def unused_name(folder: Path, suffix: str) -> Path:
    """An unused file name made from the current time."""
    stem = time.strftime("%Y-%m-%d_%H-%M-%S")
    names = (folder / f"{stem}{'' if count == 1 else f'-{count}'}{suffix}" for count in range(1, 1000))
    return next(name for name in names if not os.path.lexists(name))


class Claim:
    """An exclusive lock for writing one file.

    It is a lock on ``.NAME.lock`` in the file's folder. The system releases it when the process
    ends, even if it is killed, so a leftover lock file blocks nobody.

    Attributes
    ----------
    sure : bool
        False if the file system has no locks: then other runs are not kept out.

    Raises
    ------
    BlockingIOError
        Another run holds it.
    OSError
        The lock file cannot be created.
    """

    def __init__(self, path: Path):
        self._lock = path.with_name(f".{path.name}.lock")
        while True:
            self._file = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                self.sure = _locked(self._file)
                # The previous holder may have removed the file between these lines.
                if os.path.samestat(os.fstat(self._file), os.stat(self._lock)):
                    return
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(self._file)
                raise
            os.close(self._file)

    def release(self, *, keep: bool = False) -> None:
        """Release it; with ``keep`` the lock file stays, to mark an unfinished recording."""
        if not keep:
            with contextlib.suppress(OSError):
                self._lock.unlink()
        os.close(self._file)


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _same(one: Path, other: str | int | Path) -> bool:
    """Whether two names are the same file, or would be if it existed."""
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    if isinstance(other, int) or os.path.exists(one) or os.path.exists(other):
        return False  # on a file system that treats both names as one, both would exist
    return _folded(one) == _folded(Path(other))


def _folded(path: Path) -> str:
    """Fold a name: many file systems, macOS's among them, ignore case and Unicode normalization."""
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Add ``path`` to OSErrors: those from writing to an open file name no file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def replace_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically, replacing an existing one. One writer at a time: see Claim.

    Raises
    ------
    OSError
        With the name of the file; the previous file is kept.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with named(path):
            temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
