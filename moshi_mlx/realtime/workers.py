"""Reusable worker threads.

MLX starts an internal thread for each thread that computes with it, and never ends it: computing in a new
thread each time would leak one each time. So a thread whose work is done waits here for the next work.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable

import mlx.core as mx

from .ring import Signal

__all__ = ["Work", "end_idle", "run"]

_lock = threading.Lock()
_idle: dict[str, list[_Worker]] = {}


class Work:
    """A function that runs in a kept thread. ``thread`` is that thread, which outlives the work."""

    def __init__(self, thread: threading.Thread, function: Callable[[], object]):
        self.thread = thread
        self._function: Callable[[], object] | None = function
        self._done = threading.Event()

    @property
    def alive(self) -> bool:
        """Whether it is still running."""
        return not self._done.is_set()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end, at most ``timeout`` seconds."""
        self._done.wait(timeout)


class _Worker:
    def __init__(self, name: str):
        self.name = name
        self.bell = Signal()
        self.next: Work | None = None
        self.thread = threading.Thread(target=self._work, name=f"idle {name}", daemon=True)

    def _work(self) -> None:
        while self._one():
            pass
        # Left alone, MLX's own threads may abort the process as it ends ("terminate called without an active
        # exception").
        if hasattr(mx, "clear_streams"):
            mx.clear_streams()

    def _one(self) -> bool:
        """Wait for work and do it; False if the thread should end."""
        while not self.bell.wait(-1):
            pass
        work, self.next = self.next, None
        if work is None or work._function is None:
            return False
        self.thread.name = self.name
        try:
            work._function()
            self.thread.name = f"idle {self.name}"
            with _lock:  # before signalling the end, so that a waiter finds this thread idle
                _idle.setdefault(self.name, []).append(self)
        finally:
            work._function = None  # release its references
            work._done.set()
        return True


def run(name: str, function: Callable[[], object]) -> Work:
    """Run ``function`` in a thread named ``name``: an idle one, or a new one.

    Raises
    ------
    RuntimeError
        If the system has no more threads.
    """
    with _lock:
        kept = _idle.get(name)
        worker = kept.pop() if kept else None
    if worker is None:
        worker = _Worker(name)
        worker.thread.start()
    worker.next = work = Work(worker.thread, function)
    worker.bell.ring()
    return work


def end_idle() -> None:
    """End the idle threads; waits for each at most a second."""
    with _lock:
        workers = [worker for kept in _idle.values() for worker in kept]
        _idle.clear()
    for worker in workers:
        worker.bell.ring()
    for worker in workers:
        worker.thread.join(1.0)


atexit.register(end_idle)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # threads do not survive a fork
