"""The system's default microphone and loudspeaker, polled while devices are in use.

PortAudio looks them up only when it is initialized, and initializing it again ends every stream of the process. So
another process does it: this file, run as a program. It writes a line of JSON when the defaults change, and ends when
its standard input is closed. If it cannot be started, changes are not noticed, and everything else works.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

__all__ = ["Defaults"]

_EVERY = 2.0  # seconds


class Defaults:
    """The system's default devices.

    Parameters
    ----------
    every : float
        Seconds between two queries.
    """

    def __init__(self, every: float = _EVERY):
        self._every = every
        self._process: subprocess.Popen[str] | None = None
        self._news: deque[dict[str, str | None]] = deque(maxlen=1)

    def start(self) -> None:
        """Start to poll."""
        if not sys.executable:
            return
        try:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(self._every)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # must not receive Ctrl-C
            )
        except OSError:  # no process could be started
            return
        threading.Thread(target=self._read, args=(self._process,), name="moshi defaults", daemon=True).start()

    def stop(self) -> None:
        """End the process; returns at once."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def changed(self) -> Mapping[str, str | None] | None:
        """Names of the system's ``input`` and ``output`` if they were found, or changed, since the last call."""
        return self._news.pop() if self._news else None

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None and process.stdin is not None
        with process.stdin, process.stdout:
            for line in process.stdout:
                try:
                    names = json.loads(line)
                    self._news.append({kind: names[kind] for kind in ("input", "output")})
                except (ValueError, TypeError, KeyError):  # output of a library
                    continue


def _main(every: float) -> None:
    import sounddevice

    before = ""
    while True:
        with contextlib.suppress(Exception):  # the devices are changing, or the sound server restarts
            line = json.dumps(_default_names(sounddevice))
            if line != before:
                before = line
                print(line, flush=True)
        if select.select([sys.stdin], [], [], every)[0] and not sys.stdin.read(1):
            return
        for look_again in (sounddevice._terminate, sounddevice._initialize):  # there is no public way
            with contextlib.suppress(Exception):
                look_again()


def _default_names(sounddevice: Any) -> dict[str, str | None]:
    host = (sounddevice.query_hostapis() or [{}])[0]
    known = sounddevice.query_devices()
    names = {}
    for kind in ("input", "output"):
        index = host.get(f"default_{kind}_device", -1)
        names[kind] = str(known[index]["name"]) if 0 <= index < len(known) else None
    return names


if __name__ == "__main__":
    _main(float(sys.argv[1]))
