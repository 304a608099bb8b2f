"""One thread for all that may have to wait for other ranks, and callers who do not wait for ever."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import MoshiError, RankError

if TYPE_CHECKING:
    from .leader import Leader

__all__ = ["Bounded", "Proxy"]

_POLL = 0.05

T = TypeVar("T")


class Bounded:
    """One thread in which everything runs that may have to wait for other ranks."""

    def __init__(self, leader: Leader):
        self._leader = leader
        self._calls: queue.Queue[_Call] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._current: _Call | None = None

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function there and wait for it; see :meth:`Leader.call`."""
        if threading.current_thread() is self._thread:
            return function(*args)
        self._leader.check()
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="moshi sharded", daemon=True)
            self._thread.start()
        call = _Call(function, args)
        self._current = call
        self._calls.put(call)
        while not call.done.wait(_POLL):
            self._leader.check()
        if call.error is not None:
            if isinstance(call.error, RuntimeError) and not isinstance(call.error, MoshiError):
                self._who_has_gone(call.error)
            raise call.error
        result: T = call.result
        return result

    def stuck(self, within: float) -> bool:
        """Whether a call is still running after some seconds."""
        return self._current is not None and not self._current.done.wait(within)

    def _who_has_gone(self, error: RuntimeError) -> None:
        """MLX's connection has ended: say which rank it was."""
        if "peer" not in str(error) and "[ring]" not in str(error):
            return
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            self._leader.check()
            time.sleep(_POLL)
        raise RankError(f"the connection between the machines has failed: {error}") from error

    def _serve(self) -> None:
        while True:
            call = self._calls.get()
            try:
                call.result = call.function(*call.args)
            except BaseException as error:  # handed to who waits for it
                call.error = error
            call.done.set()


class _Call:
    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]):
        self.function, self.args = function, args
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None


class Proxy:
    """An object whose methods run in another thread."""

    def __init__(self, bounded: Bounded, inner: Any):
        self._bounded, self._inner = bounded, inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value
        return lambda *args, **kwargs: self._bounded.call(lambda: value(*args, **kwargs))
