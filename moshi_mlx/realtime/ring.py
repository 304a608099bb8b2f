"""A ring between one writing and one reading thread, over memory that is allocated once.

Both sides count what they have written and read; only the writer changes one count and only the reader the other, so
neither ever waits for a lock of the ring. It is no more than that: a Python thread still needs the interpreter's lock
to run, and several writers, or several readers, would corrupt the counts.
"""

from __future__ import annotations

import _thread
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["Ring", "Signal"]


class Ring:
    """Items of one type and shape in the order they came.

    Parameters
    ----------
    capacity : int
        Items that fit.
    shape : tuple of int
        Shape of one item.
    dtype : dtype
    """

    def __init__(self, capacity: int, shape: tuple[int, ...] = (), dtype: DTypeLike = np.float32):
        if capacity < 1:
            raise ValueError(f"a ring needs room for at least one item, not {capacity}")
        self._items: NDArray[Any] = np.zeros((capacity, *shape), dtype)
        self.capacity = capacity
        self.dtype = self._items.dtype
        self._written = 0
        self._read = 0

    @property
    def written(self) -> int:
        """Items written so far, read or not."""
        return self._written

    @property
    def available(self) -> int:
        """Items that can be read. Exact for the reader, a lower bound for the writer."""
        return self._written - self._read

    @property
    def free(self) -> int:
        """Items that can be written. Exact for the writer, a lower bound for the reader."""
        return self.capacity - (self._written - self._read)

    def write(self, items: NDArray[Any]) -> int:
        """Writer's side: append as many of ``items`` [n, *shape] as fit; returns how many."""
        count = min(len(items), self.free)
        start = self._written % self.capacity
        head = min(count, self.capacity - start)
        self._items[start : start + head] = items[:head]
        if head < count:
            self._items[: count - head] = items[head:count]
        self._written += count  # last: the reader must not see the count before the items
        return count

    def read_into(self, out: NDArray[Any]) -> int:
        """Reader's side: fill ``out`` [n, *shape] from the oldest items; returns how many."""
        count = self.peek_into(out)
        self._read += count
        return count

    def peek_into(self, out: NDArray[Any]) -> int:
        """Reader's side: like :meth:`read_into`, without removing the items."""
        count = min(len(out), self.available)
        start = self._read % self.capacity
        head = min(count, self.capacity - start)
        out[:head] = self._items[start : start + head]
        if head < count:
            out[head:count] = self._items[: count - head]
        return count

    def skip_to(self, written: int) -> None:
        """Reader's side: discard everything written before :attr:`written` had this value."""
        self.skip(written - self._read)

    def skip(self, count: int) -> int:
        """Reader's side: discard the oldest items; returns how many."""
        count = max(0, min(count, self.available))
        self._read += count
        return count


class Signal:
    """Wakes one waiting thread. Setting it never blocks, so an audio callback may do it.

    A plain lock used in reverse: it is held while nothing has happened, and released by the signal.
    """

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._lock.acquire()

    def ring(self) -> None:
        """Wake the waiting thread, or the next one that waits."""
        if self._lock.locked():
            try:
                self._lock.release()
            except RuntimeError:  # another thread did it in between
                pass

    def wait(self, timeout: float) -> bool:
        """Wait for the signal, at most ``timeout`` seconds; False on timeout."""
        return self._lock.acquire(timeout=timeout)
