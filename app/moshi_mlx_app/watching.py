"""Which microphone and loudspeaker the system would choose, asked again and again while others are in use.

PortAudio answers that only once, as it is started, and starting it anew ends every stream of the process. So another
process asks: this file, run as a program. It writes a line of JSON when the answer changes, and ends when its standard
input does. If it cannot be had, nothing is noticed, and everything else goes on.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import threading
from collections.abc import Mapping

__all__ = ["Defaults"]

_EVERY = 2.0  # seconds


class Defaults:
    """The system's choice.

    Parameters
    ----------
    every : float
        Seconds between two looks.
    """

    def __init__(self, every: float = _EVERY):
        self._every = every
        self._process: subprocess.Popen[str] | None = None
        self._news: dict[str, str | None] | None = None

    def start(self) -> None:
        """Begin to look."""
        if not sys.executable:
            return
        try:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(self._every)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C is not for it
            )
        except OSError:  # no process to be had
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
        news, self._news = self._news, None
        return news

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None and process.stdin is not None
        with process.stdin, process.stdout:
            for line in process.stdout:
                try:
                    names = json.loads(line)
                    self._news = {kind: names[kind] for kind in ("input", "output")}
                except (ValueError, TypeError, KeyError):  # a library had something to say
                    continue


def _main(every: float) -> None:
    import sounddevice

    before = ""
    while True:
        host = (sounddevice.query_hostapis() or [{}])[0]
        known = sounddevice.query_devices()
        names = {}
        for kind in ("input", "output"):
            index = host.get(f"default_{kind}_device", -1)
            names[kind] = str(known[index]["name"]) if 0 <= index < len(known) else None
        line = json.dumps(names)
        if line != before:
            before = line
            print(line, flush=True)
        if select.select([sys.stdin], [], [], every)[0] and not sys.stdin.read(1):
            return
        sounddevice._terminate()  # there is no public way
        sounddevice._initialize()


if __name__ == "__main__":
    _main(float(sys.argv[1]))
