"""Display and keys of a live conversation. It processes no sound: it shows the figures that it is given.

On a terminal Moshi's lines scroll above a panel of levels, figures and keys, as wide as the terminal; elsewhere
only the lines are printed, with no colour and no control characters. Words go to standard output, everything else to
standard error, as in the command ``file``.
"""

from __future__ import annotations

import math
import os
import select
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from moshi_mlx_app.screen.terminal import Lines, is_terminal, say_line, warn, wrapped

__all__ = ["Keys", "Panel", "State", "decibels", "own_errors"]

_BAR = 12
_QUIETEST = -60.0
_PATIENCE = 0.25  # seconds that a notice waits for the end of a word


@dataclass
class State:
    """What the panel shows.

    Attributes
    ----------
    seconds : float
        Time since the conversation began.
    user, moshi : float
        Levels: root mean square, 0 to 1.
    latency : float
        Seconds from the end of a frame until its answer is ready: the median of the last thousand.
    queue : float
        Seconds of sound waiting inside the program: to be processed, and to be played.
    late : int
        Frames whose answer was ready more than two frames after their end.
    dropped : float
        Seconds of the user's sound that were dropped.
    underruns : int
        Reads of the loudspeaker that ran out of samples.
    recording : float or None
        Seconds recorded, None if nothing is being recorded.
    """

    seconds: float = 0.0
    user: float = 0.0
    moshi: float = 0.0
    latency: float = 0.0
    queue: float = 0.0
    late: int = 0
    dropped: float = 0.0
    underruns: int = 0
    recording: float | None = None
    muted: bool = False
    sound: bool = True


def decibels(level: float) -> float:
    """Decibels of a root mean square, relative to full scale; not below -99."""
    return max(20 * math.log10(level), -99.0) if level > 0 else -99.0


class Panel:
    """The conversation on the terminal. Use it with ``with``.

    Parameters
    ----------
    panel : bool
        Draw the panel where standard error is a terminal.
    text : bool
        Print Moshi's words.
    keys : bool
        Whether keys are read, and therefore shown.
    """

    def __init__(self, *, panel: bool = True, text: bool = True, keys: bool = True):
        self._text, self._keys = text, keys
        self._lines = Lines()
        self._waiting: list[tuple[str, str]] = []  # notices that arrived within a word, and the time of the first
        self._since = 0.0
        self._live: Live | None = None
        if panel and is_terminal(sys.stderr):
            self._live = Live(
                console=Console(stderr=True, highlight=False),
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
        # Both on one terminal: lines must go through the panel, or they would overwrite it.
        self._above = self._live.console if self._live is not None and is_terminal(sys.stdout) else None

    def __enter__(self) -> Panel:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        if self._live is not None:
            self._live.stop()

    def say(self, seconds: float, text: str) -> None:
        """Moshi said ``text`` at this time of the conversation; call it with ``""`` as time passes."""
        if self._waiting and (text[:1].isspace() or time.monotonic() - self._since >= _PATIENCE):
            self._flush()
        self._print(self._lines.feed(seconds, text))
        if self._waiting and not self._lines.current:
            self._flush()

    def restart(self) -> None:
        """A new conversation begins; its time starts at zero."""
        self._flush()
        self._lines = Lines()

    def notice(self, text: str, label: str = "notice") -> None:
        """Print a notice about the devices, the recording and the like.

        It appears below the words that came before it: the current line is ended first, after a whole word.
        """
        self._since = self._since if self._waiting else time.monotonic()
        self._waiting.append((text, label))
        if not (self._text and self._lines.current):
            self._flush()

    def show(self, state: State) -> None:
        """Redraw the panel."""
        if self._live is None:
            return
        width = max(self._live.console.width - 1, 20)
        lines = wrapped(self._lines.current, sys.stderr, Lines.INDENT) if self._text else []
        self._live.update(Text("\n".join([*lines, *_panel(state, self._keys, width)])), refresh=True)

    def _flush(self) -> None:
        """End the current line, and print the pending notices."""
        self._print(self._lines.flush())
        waiting, self._waiting = self._waiting, []
        for text, label in waiting:
            warn(text, label, self._live.console if self._live is not None else None)

    def _print(self, lines: list[str]) -> None:
        for line in lines if self._text else ():
            say_line(line, self._above)


def _panel(state: State, keys: bool, width: int) -> list[str]:
    """The panel's lines, none wider than ``width``."""
    minutes, seconds = divmod(int(state.seconds), 60)
    you = "muted" if state.muted else f"{decibels(state.user):4.0f} dB"
    fields = [
        f"you {_bar(0.0 if state.muted else state.user)} {you:7}",
        f"Moshi {_bar(state.moshi)} {decibels(state.moshi):4.0f} dB",
        f"{minutes}:{seconds:02}",
    ]
    if not state.sound:
        fields.append("waiting for the sound devices")
    if state.recording is not None:
        fields.append(f"recording {state.recording:.0f} s")
    lines = _flow(fields, width)
    lines += _flow(
        [
            f"latency {state.latency * 1e3:.0f} ms",
            f"queue {state.queue * 1e3:.0f} ms",
            f"late {state.late}",
            f"dropped {state.dropped:.1f} s",
            f"underruns {state.underruns}",
        ],
        width,
    )
    if keys:
        lines += _flow(["m mute", "r record", "k keep", "n new conversation", "d devices", "? help", "q quit"], width)
    return lines


def _flow(fields: Sequence[str], width: int) -> list[str]:
    """Fields next to each other, in as many lines as needed."""
    lines = [fields[0]]
    for field in fields[1:]:
        if len(lines[-1]) + 3 + len(field) <= width:
            lines[-1] += f"   {field}"
        else:
            lines.append(field)
    return lines


def _bar(level: float) -> str:
    share = 1 - max(decibels(level), _QUIETEST) / _QUIETEST
    full = round(share * _BAR)
    return "█" * full + "·" * (_BAR - full)


class Keys:
    """Single keys from the terminal, without waiting for Return. Use it with ``with``; inactive without a terminal."""

    def __init__(self) -> None:
        self._file = -1
        self._before: list[Any] = []

    @property
    def available(self) -> bool:
        """Whether there is a keyboard."""
        return self._file >= 0

    def __enter__(self) -> Keys:
        try:
            import termios
            import tty

            if sys.stdin is not None and sys.stdin.isatty() and os.getpgrp() == os.tcgetpgrp(sys.stdin.fileno()):
                self._before = termios.tcgetattr(sys.stdin.fileno())
                self._file = sys.stdin.fileno()
                tty.setcbreak(self._file)
        except (ImportError, OSError, ValueError):  # not a terminal after all
            self._file = -1
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            import termios

            try:
                termios.tcsetattr(self._file, termios.TCSANOW, self._before)
            except (OSError, termios.error):  # the terminal is gone
                pass
            self._file = -1

    def pressed(self) -> str:
        """Keys that were pressed since the last call."""
        if self._file < 0 or not select.select([self._file], [], [], 0)[0]:
            return ""
        try:
            keys = os.read(self._file, 100)
        except OSError:
            keys = b""
        if not keys:  # the terminal is gone
            self._file = -1
        return keys.decode("utf-8", "replace")


@contextmanager
def own_errors() -> Iterator[None]:
    """Reserve standard error for this program: PortAudio and its libraries write there when a device goes away."""
    try:
        kept = sys.stderr
        if sys.platform != "linux" or kept.fileno() != 2:
            yield
            return
        mine = os.dup(2)
    except (AttributeError, OSError, ValueError):  # closed, or not a file (tests, embedding)
        yield
        return
    kept.flush()
    sys.stderr = open(mine, "w", encoding=kept.encoding, errors="replace", buffering=1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(mine, 2)
        sys.stderr.close()
        sys.stderr = kept
