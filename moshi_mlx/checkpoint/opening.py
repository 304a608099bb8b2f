"""Files that others made, opened: whatever is in the way is a :class:`CheckpointError` that names the file."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

from ..errors import CheckpointError

__all__ = ["open_file"]


def open_file(path: str | os.PathLike[str]) -> tuple[BinaryIO, int]:
    """A file, open for reading, and its size in bytes. Only a regular one: a pipe or a device might never end.

    Raises
    ------
    CheckpointError
        If there is no such file, or it cannot be read.
    """
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            return open(path, "rb"), status.st_size
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # no permission, a name that is too long, one with a zero in it
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{os.fspath(path)[:300]} cannot be read: {reason}") from error
    raise CheckpointError(f"{os.fspath(path)}: no such file")
