"""What a person sees: results on standard output, progress and warnings on standard error, losses as a picture."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from moshi_mlx.disk import replacing
from moshi_mlx.printable import printable

__all__ = ["Bar", "draw", "say", "warn"]

Curve = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT, _LEFT, _BELOW = 720, 360, 56, 36
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def warn(text: str, label: str = "warning") -> None:
    """A line on standard error."""
    print(f"{label}: {printable(text)}", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Lines on standard output."""
    print("\n".join(map(printable, text.split("\n"))), flush=True)


class Bar:
    """Progress of one stage after the other; on a terminal a bar with the time that is left, elsewhere lines.

    Parameters
    ----------
    shown : bool
        Draw nothing if false.
    """

    def __init__(self, *, shown: bool = True):
        self._shown = shown
        self._bar: Progress | None = None
        if shown and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
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

    def stage(self, doing: str, total: float | None = None, done: int = 0) -> None:
        """Begin something that has ``total`` steps, or no known number of them."""
        if self._bar is not None:
            self._bar.remove_task(self._task)
            self._task = self._bar.add_task(printable(doing), total=total, completed=done)
        elif self._shown:
            print(printable(doing), file=sys.stderr, flush=True)

    def advance(self, steps: float = 1, doing: str | None = None) -> None:
        """Some steps are done."""
        if self._bar is not None:
            self._bar.advance(self._task, steps)
            if doing is not None:
                self._bar.update(self._task, description=printable(doing))

    def line(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._bar is not None:
            self._bar.console.print(printable(text), markup=False)
        elif self._shown:
            print(printable(text), file=sys.stderr, flush=True)


def draw(path: Path, curves: dict[str, Curve], title: str) -> None:
    """Write curves over steps as an SVG, which every browser shows.

    Parameters
    ----------
    path : path
    curves : dict of str to sequence of (step, value)
    title : str
    """
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return
    last, top = max(x for x, _ in points) or 1, max(y for _, y in points) or 1
    wide, high = _WIDTH - _LEFT - 150, _HEIGHT - _BELOW - 40

    def place(x: float, y: float) -> str:
        return f"{_LEFT + wide * x / last:.1f},{40 + high * (1 - y / top):.1f}"

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{_LEFT}" y="22">{_escaped(title)}</text>'
    ]
    for part in range(5):
        y, x = top * part / 4, last * part / 4
        here, below = place(0, y), place(x, 0)
        level = float(here.split(",")[1])
        out.append(f'<path d="M{here} H{_LEFT + wide}" stroke="#ddd"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{level + 4:.1f}" text-anchor="end">{y:.2f}</text>')
        column = below.split(",")[0]
        out.append(f'<text x="{column}" y="{_HEIGHT - 14}" text-anchor="middle">{x:.0f}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        if curve:
            line = " ".join(place(x, y) for x, y in curve)
            out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        at = 60 + 18 * number
        out.append(f'<text x="{_LEFT + wide + 12}" y="{at}" fill="{colour}">{_escaped(name)}</text>')
    with replacing(path) as partial:
        partial.write_text("\n".join([*out, "</svg>\n"]), encoding="utf-8")


def _escaped(text: str) -> str:
    return printable(text).replace("&", "&amp;").replace("<", "&lt;")
