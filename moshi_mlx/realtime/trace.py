"""Chrome traces: open the file in https://ui.perfetto.dev or chrome://tracing.

::

    trace = Trace()
    with Conversation(model, trace=trace) as conversation:
        ...
    trace.write("talk.trace.json")

The format is the JSON object of the Trace Event Format (Google, 2016): complete events "X" with a beginning and a
duration, instants "i", counters "C" and names of threads "M"; times in microseconds.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Trace"]

_LIMIT = 200_000
_AT_ONCE = 5_000


class Trace:
    """The last events of a program, from any thread.

    Recording an event appends to a ring of fixed length: nothing blocks, nothing is written before :meth:`write`.

    Parameters
    ----------
    limit : int
        Events to keep; the oldest are discarded first, and counted. A conversation makes about 400 a second, so
        the default covers the last eight minutes: some 60 MB of memory, and 25 MB on disk.
    clock : callable
        Seconds, monotonic: the clock of all given times.

    Attributes
    ----------
    taken : int
        Events so far, kept or not (a thread may be overlooked now and then).
    """

    def __init__(self, limit: int = _LIMIT, clock: Callable[[], float] = time.monotonic):
        if limit < 1:
            raise ValueError(f"a trace needs room for at least one event, not {limit}")
        self._events: deque[tuple[str, str, int, float, float, Mapping[str, Any] | None]] = deque(maxlen=limit)
        self._threads: dict[int, str] = {}
        self._clock = clock
        self._began = clock()
        self.taken = 0

    def span(self, name: str, began: float, ended: float, values: Mapping[str, Any] | None = None) -> None:
        """This thread did ``name`` from ``began`` to ``ended``, in the clock's seconds."""
        self._take("X", name, began, ended - began, values)

    def instant(self, name: str, values: Mapping[str, Any] | None = None) -> None:
        """In this thread ``name`` happened just now."""
        self._take("i", name, self._clock(), 0.0, values)

    def counter(self, name: str, values: Mapping[str, float]) -> None:
        """Record the current ``values`` of the counter ``name``."""
        self._take("C", name, self._clock(), 0.0, values)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``function`` so that every call is recorded as a span."""

        def traced(*args: Any, **options: Any) -> Any:
            began = self._clock()
            try:
                return function(*args, **options)
            finally:
                self.span(name, began, self._clock())

        return traced

    def _take(self, kind: str, name: str, at: float, lasted: float, values: Mapping[str, Any] | None) -> None:
        thread = threading.get_ident()
        if thread not in self._threads:
            # A sound system's thread has no name in Python: use its first event.
            called = threading.current_thread().name
            self._threads[thread] = f"{name} callback" if called.startswith("Dummy") else called
        self._events.append((kind, name, thread, at, lasted, values))
        self.taken += 1

    @property
    def kept(self) -> int:
        """Events that :meth:`write` would write."""
        return len(self._events)

    @property
    def forgotten(self) -> int:
        """Events that were discarded."""
        return max(self.taken - self.kept, 0)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the kept events, atomically.

        Raises
        ------
        OSError
            If it cannot be written; an existing file is kept.
        """
        target = Path(path)
        partial = target.with_name(f"{target.name}.partial")
        try:
            with open(partial, "w", encoding="utf-8") as file:
                for piece in self._json():
                    file.write(piece)
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _json(self) -> Iterator[str]:
        events = list(self._events)
        process = os.getpid()
        about = {
            "events": len(events),
            "forgotten": self.forgotten,
            "seconds": round(self._clock() - self._began, 3),
        }
        yield f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(about)}, "traceEvents": [\n'
        lines = [
            json.dumps({"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": name}})
            for thread, name in list(self._threads.items())
        ]
        for kind, name, thread, at, lasted, values in events:
            event = {"ph": kind, "name": name, "pid": process, "tid": thread, "ts": round((at - self._began) * 1e6, 1)}
            if kind == "X":
                event["dur"] = round(lasted * 1e6, 1)
            elif kind == "i":
                event["s"] = "t"
            if values:
                event["args"] = dict(values)
            lines.append(json.dumps(event))
            if len(lines) >= _AT_ONCE:
                yield ",\n".join(lines)
                lines = [""]  # the next piece begins with a comma
        yield ",\n".join(lines) + "\n]}\n"
