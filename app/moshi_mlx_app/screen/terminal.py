"""Everything that the program prints: text on standard output, messages on standard error, progress on a terminal.

Text is the result, so it goes to standard output; everything else goes to standard error. On a terminal a
bar stays at the bottom and finished lines scroll above it, wrapped between words; elsewhere the same lines are
plain, with no bar, no colour and no control characters. If standard output closes (``| head -1``), the text stops and
the work continues. Names of files, devices and models are made printable here, and rich's markup is never interpreted.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

from moshi_mlx.printable import printable

__all__ = ["AnswerProgress", "Lines", "Loading", "is_terminal", "say", "say_line", "silence_output", "warn", "wrapped"]


def is_terminal(stream: TextIO) -> bool:
    """True if a bar can be drawn and updated."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _is_pipe(stream: TextIO) -> bool:
    """True if the text may end up on the same terminal, as with ``| tee``."""
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False


def wrapped(text: str, stream: TextIO, indent: int = 0) -> list[str]:
    """``text`` wrapped between words to fit a terminal, with ``indent`` spaces before all lines but the first.

    It is one line if ``stream`` is not a terminal. A word that is longer than a line, such as a path, is not
    broken: the terminal wraps it, and it can be copied.
    """
    if not is_terminal(stream):
        return [text]
    width = max(Console(file=stream).width - 1, indent + 20)  # some terminals break a line after a full last column
    lines, space = [text[:indent]], ""
    for word in text[indent:].split(" "):
        if word and space and cell_len(lines[-1]) + 1 + cell_len(word) > width:
            lines, space = [*lines, " " * indent], ""
        lines[-1] += space + word
        space = " "
    return [line.rstrip() for line in lines]


def say(*lines: str) -> None:
    """Print lines on standard output, unless the reader has gone; line breaks within a line are replaced."""
    try:
        print(*map(printable, lines), sep="\n", flush=True)
    except BrokenPipeError:
        silence_output()


def say_line(line: str, console: Console | None = None) -> None:
    """Print a line of :class:`Lines` on standard output, or through the ``console`` of a display on the terminal."""
    if console is None:
        say(*wrapped(line, sys.stdout, Lines.INDENT))
    else:
        console.print(Text("\n".join(wrapped(line, sys.stderr, Lines.INDENT))), soft_wrap=True)


def silence_output() -> None:
    """Redirect standard output to nothing: its reader has gone, and the interpreter would complain at exit."""
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
    except (OSError, ValueError):  # no descriptor behind it (tests, embedding)
        pass


def warn(text: str, label: str = "warning", console: Console | None = None) -> None:
    """Print a message on standard error, with a ``label`` if it is not empty, or through a display's ``console``."""
    label = f"{label}: " if label else ""
    lines = "\n".join(wrapped(label + printable(text), sys.stderr, len(label)))
    if console is None:
        print(lines, file=sys.stderr, flush=True)
    else:
        console.print(Text(lines), soft_wrap=True)


class Loading:
    """A status line while a model loads; only on a terminal. Call it with a message."""

    def __init__(self, *, shown: bool = True):
        self._status: Status | None = None
        if shown and is_terminal(sys.stderr):
            self._status = Status("", console=Console(stderr=True, highlight=False))

    def __call__(self, doing: str) -> None:
        if self._status is not None:
            self._status.update(Text(printable(doing)))

    def __enter__(self) -> Loading:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()


class Lines:
    """Splits streamed text into lines: at the end of a sentence, at a pause, or when a line is long.

    ``current`` is the unfinished line, preceded by the time of its first piece.
    """

    PAUSE = 1.2
    LONG, LONGEST = 60, 160
    INDENT = 11  # characters before the text

    def __init__(self) -> None:
        self._text = ""
        self._start = self._last = 0.0

    def feed(self, seconds: float, text: str) -> list[str]:
        """Add the text of one frame, often ``""``; returns the lines that are finished."""
        done: list[str] = []
        text = printable(text)
        if not self._text:
            text = text.lstrip()
        starts_word = text[:1].isspace()
        ended = self._text.rstrip().endswith((".", "?", "!", "…", "。", "？", "！"))
        long = len(self._text) >= (self.LONG if starts_word else self.LONGEST)
        paused = seconds - self._last >= self.PAUSE
        if self._text and (paused or (text and ((ended and starts_word) or long))):
            done.append(self.current)
            self._text, text = "", text.lstrip()
        if text:
            if not self._text:
                self._start = seconds
            self._text += text
            self._last = seconds
        return done

    def flush(self) -> list[str]:
        """Finish the current line, if any."""
        line, self._text = self.current, ""
        return [line] if line else []

    @property
    def current(self) -> str:
        """The unfinished line, ``""`` if there is none."""
        return f"{self._start:7.1f} s  {self._text.rstrip()}" if self._text else ""


class _FactorColumn(ProgressColumn):
    """The real-time factor: seconds computed by seconds of sound."""

    def render(self, task: Task) -> Text:
        factor = task.fields["factor"]
        return Text("RTF -.--" if factor is None else f"RTF {factor:.2f}")


class _Bar(Progress):
    """A progress bar with the unfinished line of text above it."""

    current = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.current:
            yield Text("\n".join(wrapped(self.current, sys.stderr, Lines.INDENT)))
        yield from super().get_renderables()


class AnswerProgress:
    """Shows the progress of an answer. Use it with ``with``: leaving it clears the bar and prints what is pending.

    Parameters
    ----------
    total : float
        Seconds of sound to compute.
    text : bool
        Print the text.
    bar : bool
        Draw a bar if standard error is a terminal.
    """

    def __init__(self, total: float, *, text: bool = True, bar: bool = True):
        self._total, self._text = total, text
        self._lines = Lines()
        self._began = time.perf_counter()
        self._bar: _Bar | None = None
        if bar and is_terminal(sys.stderr) and not (text and _is_pipe(sys.stdout)):
            self._bar = _Bar(
                # Narrower than the terminal: the echo of ^C would wrap and shift everything by a line.
                BarColumn(bar_width=20),
                TextColumn("{task.completed:.1f} of {task.total:.1f} s"),
                _FactorColumn(),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=Console(stderr=True, highlight=False),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task("", total=total, factor=None)
        # Both on one terminal: finished lines must go through the bar, or they would overwrite it.
        self._together = self._bar is not None and text and is_terminal(sys.stdout)

    def __enter__(self) -> AnswerProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._print(self._lines.flush())
        if self._bar is not None:
            self._bar.current = ""
            self._bar.stop()

    def frame(self, seconds: float, text: str) -> None:
        """The answer has reached ``seconds``, and this text came with it."""
        done = self._lines.feed(seconds, text)
        if self._bar is not None:
            if self._text:
                self._bar.current = self._lines.current
            spent = time.perf_counter() - self._began
            self._bar.update(self._task, completed=seconds, factor=spent / seconds if seconds else None)
        self._print(done)

    def _print(self, lines: list[str]) -> None:
        console = self._bar.console if self._together and self._bar is not None else None
        for line in lines if self._text else ():
            say_line(line, console)
