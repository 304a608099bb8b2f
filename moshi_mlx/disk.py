"""Files that appear whole or not at all, and the space that is left for them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["free_bytes", "replacing"]


@contextmanager
def replacing(path: str | os.PathLike[str], suffix: str = ".tmp") -> Iterator[Path]:
    """A name beside ``path`` to write to: it takes its place at the end, or is removed if there was an error."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}{suffix}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def free_bytes(path: Path) -> int:
    """Space on the disk that a file or folder is on, or would be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
