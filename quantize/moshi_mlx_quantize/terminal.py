"""What a person sees: a bar with the remaining time on a terminal, lines anywhere else, tables at the end.

Results go to standard output, everything about the work to standard error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from moshi_mlx.printable import printable

__all__ = ["Bar", "is_terminal", "say", "table", "warn"]


def is_terminal(stream: TextIO) -> bool:
    """True where a bar can be drawn and moved."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def warn(text: str, label: str = "warning") -> None:
    """A line on standard error."""
    print(f"{label}: {printable(text)}", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Lines on standard output."""
    print("\n".join(map(printable, text.split("\n"))), flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under a head: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


class Bar:
    """Progress of one stage after the other; use it with ``with``.

    Parameters
    ----------
    shown : bool
        Draw nothing if false.
    """

    def __init__(self, *, shown: bool = True):
        self._shown = shown
        self._bar: Progress | None = None
        if shown and is_terminal(sys.stderr):
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.percentage:3.0f} %"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=Console(stderr=True, highlight=False),
                transient=True,
            )
            self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, doing: str, total: float | None = None) -> None:
        """Begin something that has ``total`` steps, or no known number of them."""
        doing = printable(doing)
        if self._bar is not None:
            self._bar.remove_task(self._task)  # a task that had a total cannot lose it
            self._task = self._bar.add_task(doing, total=total)
        elif self._shown:
            print(doing, file=sys.stderr, flush=True)

    def advance(self, steps: float = 1) -> None:
        """Some steps are done."""
        if self._bar is not None:
            self._bar.advance(self._task, steps)
