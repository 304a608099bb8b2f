"""What a person sees and presses during a live conversation. Knows no sound: it is told numbers and shows them.

On a terminal Moshi's lines scroll above a panel of three lines; anywhere else only the lines come, with no colour and
no control characters. Words go to standard output, everything else to standard error, as in the verb ``file``.
"""

from __future__ import annotations

import math
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from moshi_mlx.printable import printable
from moshi_mlx_app.terminal import Lines, is_terminal, say, warn

__all__ = ["Keys", "Panel", "State", "decibels", "own_errors"]

_BAR = 12
_QUIETEST = -60.0


@dataclass
class State:
    """What the panel shows.

    Attributes
    ----------
    seconds : float
        Since the conversation began.
    user, moshi : float
        Levels: root mean square, 0 to 1.
    answer : float
        Seconds from the end of a frame to its answer being ready: the middle of the last thousand.
    waiting : float
        Seconds of sound on their way inside the program.
    late : int
        Frames that were late.
    dropped : float
        Seconds of the user's sound that were dropped.
    gaps : int
        Times that the loudspeaker found nothing to play.
    recording : float or None
        Seconds recorded, None if nothing is being recorded.
    """

    seconds: float = 0.0
    user: float = 0.0
    moshi: float = 0.0
    answer: float = 0.0
    waiting: float = 0.0
    late: int = 0
    dropped: float = 0.0
    gaps: int = 0
    recording: float | None = None
    muted: bool = False
    sound: bool = True


def decibels(level: float) -> float:
    """Of a root mean square, relative to full scale; not below -99."""
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
        Whether keys are read, so that they are worth showing.
    """

    def __init__(self, *, panel: bool = True, text: bool = True, keys: bool = True):
        self._text, self._keys = text, keys
        self._lines = Lines()
        self._live: Live | None = None
        if panel and is_terminal(sys.stderr):
            self._live = Live(
                console=Console(stderr=True, highlight=False),
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
        # Both on one terminal: lines must go through the panel, or they would be written over it.
        self._together = self._live is not None and is_terminal(sys.stdout)

    def __enter__(self) -> Panel:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._print(self._lines.flush())
        if self._live is not None:
            self._live.stop()

    def say(self, seconds: float, text: str) -> None:
        """Moshi said ``text`` at this time of the conversation; call it with ``""`` as time goes on."""
        self._print(self._lines.feed(seconds, text))

    def anew(self) -> None:
        """A new conversation begins, and its time counts from zero."""
        self._print(self._lines.flush())
        self._lines = Lines()

    def notice(self, text: str, label: str = "notice") -> None:
        """A sentence about the devices, the recording and the like."""
        if self._live is not None:
            self._live.console.print(Text(f"{label}: {printable(text)}"))
        else:
            warn(text, label)

    def show(self, state: State) -> None:
        """Draw the panel anew."""
        if self._live is not None:
            width = max(self._live.console.width - 1, 20)
            lines = [self._lines.current, *_panel(state, self._keys)] if self._text else _panel(state, self._keys)
            self._live.update(Group(*(Text(line[:width]) for line in lines)), refresh=True)

    def _print(self, lines: list[str]) -> None:
        if not self._text:
            return
        for line in lines:
            if self._together and self._live is not None:
                self._live.console.print(Text(line))
            else:
                say(line)


def _panel(state: State, keys: bool) -> list[str]:
    """The panel's lines."""
    minutes, seconds = divmod(int(state.seconds), 60)
    you = "muted" if state.muted else f"{decibels(state.user):4.0f} dB"
    marks = ["" if state.sound else "waiting for the sound devices"]
    if state.recording is not None:
        marks.append(f"recording {state.recording:.0f} s")
    lines = [
        f"you {_bar(0.0 if state.muted else state.user)} {you:7}   Moshi {_bar(state.moshi)} "
        f"{decibels(state.moshi):4.0f} dB   {minutes}:{seconds:02}   {'   '.join(filter(None, marks))}".rstrip(),
        f"answer after {state.answer * 1e3:.0f} ms   on the way {state.waiting * 1e3:.0f} ms   late {state.late}   "
        f"dropped {state.dropped:.1f} s   gaps {state.gaps}",
    ]
    if keys:
        lines.append("m mute   r record   n new conversation   d devices again   q quit")
    return lines


def _bar(level: float) -> str:
    share = 1 - max(decibels(level), _QUIETEST) / _QUIETEST
    full = round(share * _BAR)
    return "█" * full + "·" * (_BAR - full)


class Keys:
    """Single keys from the terminal, without waiting for Return. Use it with ``with``; nothing where there is none."""

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
        except (ImportError, OSError, ValueError):  # no terminal after all
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
    """Keep standard error for this program: PortAudio and its friends write there when a device goes away."""
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
