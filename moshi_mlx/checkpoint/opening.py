"""Files that others made, opened: whatever is in the way is a :class:`CheckpointError` that names the file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from ..errors import CheckpointError

__all__ = ["open_file"]


@contextmanager
def open_file(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, int]]:
    """A file, open for reading, and its size in bytes. Only a regular one: a pipe or a device might never end.

    Raises
    ------
    CheckpointError
        If there is no such file, or it cannot be opened, or not be read while the context lasts.
    """
    name = os.fspath(path)[:300]
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise CheckpointError(f"{name}: no such file") from None
    except (OSError, ValueError) as error:  # no permission, too long a name, one with a zero in it
        raise CheckpointError(f"{name} cannot be read: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{name}: no such file")
    try:
        with open(path, "rb") as file:
            yield file, status.st_size
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error
