"""The picture of ``bench --picture``: the time of each stage, as SVG.

Three panels: the frames one after the other at full speed, stages stacked; step and latency at the pace of a
conversation; and a histogram of each stage. Written by hand: a plotting
library would be one of the largest dependencies of this program.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.printable import printable

__all__ = ["draw"]

_COLORS = {"encode": "#0072b2", "step": "#e69f00", "decode": "#009e73", "latency": "#b8508f"}
_WIDTH, _LEFT, _RIGHT, _HIGH = 960, 64, 24, 190
_MOST = 420  # frames that fit side by side
_BINS = 40

Series = Mapping[str, Sequence[float] | NDArray[np.float64]]


def draw(title: str, about: str, fast: Series, paced: Series, frame: float) -> str:
    """The whole picture.

    Parameters
    ----------
    title, about : str
        Two lines at the top.
    fast, paced : mapping of str to sequence of float
        Milliseconds of each frame, by stage: ``encode``, ``step``, ``decode``; ``paced`` has ``latency`` too.
    frame : float
        Milliseconds between two frames of a conversation.

    Returns
    -------
    str
        An SVG document.
    """
    stages = [name for name in ("encode", "step", "decode") if len(fast.get(name, ()))]
    grouped, each = _grouped([np.asarray(fast[name], float) for name in stages])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} 820" width="{_WIDTH}" height="820" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#222">',
        f"<title>{_escaped(title)}</title>",
        f'<rect width="{_WIDTH}" height="820" fill="#fff"/>',
        _text(_LEFT, 30, title, size=18),
        _text(_LEFT, 50, about, color="#666"),
        *_legend([*stages, *(["latency"] if len(paced.get("latency", ())) else [])]),
        *_bars(110, f"At full speed{each}", dict(zip(stages, grouped, strict=True)), frame),
        *_lines(370, "At the pace of a conversation: from a frame's last sample to its answer", paced, frame),
        *_histograms(630, "Distribution of the time of each stage, at full speed", {n: fast[n] for n in stages}),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _grouped(series: list[NDArray[np.float64]]) -> tuple[list[NDArray[np.float64]], str]:
    """At most :data:`_MOST` frames: of each group the one that was slowest in all."""
    count = min((len(one) for one in series), default=0)
    if count <= _MOST:
        return [one[:count] for one in series], ""
    total = np.sum([one[:count] for one in series], axis=0)
    edges = np.linspace(0, count, _MOST + 1).astype(int)
    slowest = [start + int(np.argmax(total[start:stop])) for start, stop in zip(edges, edges[1:], strict=False)]
    return [one[slowest] for one in series], f"; each bar the slowest of {count / _MOST:.1f} frames"


def _bars(top: int, title: str, series: Series, frame: float) -> list[str]:
    heights = np.array([list(one) for one in series.values()]).reshape(len(series), -1)
    highest = _round_up(max(float(heights.sum(axis=0).max(initial=0.0)), 1.1 * frame))
    parts, scale = _axes(top, title, highest), _HIGH / highest
    count = heights.shape[1]
    wide = (_WIDTH - _LEFT - _RIGHT) / max(count, 1)
    for index in range(count):
        base = float(top + _HIGH)
        for name, milliseconds in zip(series, heights[:, index], strict=True):
            high = float(milliseconds) * scale
            base -= high
            parts.append(
                f'<rect x="{_LEFT + index * wide:.2f}" y="{base:.2f}" width="{max(0.85 * wide, 0.5):.2f}" '
                f'height="{high:.2f}" fill="{_COLORS[name]}"/>'
            )
    return parts + _limit(top, highest, frame)


def _lines(top: int, title: str, series: Series, frame: float) -> list[str]:
    shown = {name: np.asarray(series[name], float) for name in ("latency", "step") if len(series.get(name, ()))}
    longest = max((float(one.max()) for one in shown.values()), default=0.0)
    highest = _round_up(max(longest, 1.1 * frame))
    parts = _axes(top, title, highest)
    for name, values in shown.items():
        ((values,), _) = _grouped([values])
        x = _LEFT + (np.arange(len(values)) + 0.5) * (_WIDTH - _LEFT - _RIGHT) / len(values)
        y = top + _HIGH - values * _HIGH / highest
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{_COLORS[name]}" stroke-width="1.5"/>')
    return parts + _limit(top, highest, frame)


def _histograms(top: int, title: str, series: Series) -> list[str]:
    parts = [_text(_LEFT, top - 10, title, size=14)]
    wide = (_WIDTH - _LEFT - _RIGHT) / max(len(series), 1)
    for place, (name, values) in enumerate(series.items()):
        times = np.asarray(values, float)
        # A few outliers would leave all others in one bar: they are counted in the last bar.
        last = max(float(np.percentile(times, 99)) * 1.1, 1e-3)
        counts, edges = np.histogram(np.minimum(times, last), bins=_BINS, range=(0.0, last))
        left, inner, high = _LEFT + place * wide, wide - 30, 130
        base = top + high
        for index, count in enumerate(counts):
            tall = count * high / max(int(counts.max()), 1)
            parts.append(
                f'<rect x="{left + index * inner / _BINS:.2f}" y="{base - tall:.2f}" '
                f'width="{0.9 * inner / _BINS:.2f}" height="{tall:.2f}" fill="{_COLORS[name]}"/>'
            )
        parts.append(f'<line x1="{left}" y1="{base}" x2="{left + inner}" y2="{base}" stroke="#999"/>')
        for edge in (0, _BINS // 2, _BINS):
            anchor = "start" if edge == 0 else "end" if edge == _BINS else "middle"
            more = "+ ms" if edge == _BINS else ""
            parts.append(_text(left + edge * inner / _BINS, base + 16, f"{edges[edge]:.3g}{more}", anchor=anchor))
        parts.append(
            _text(left, base + 34, f"{name}: p50 {np.median(times):.1f}, p95 {np.percentile(times, 95):.1f} ms")
        )
    return parts


def _axes(top: int, title: str, highest: float) -> list[str]:
    """Title, and scale in milliseconds."""
    parts = [_text(_LEFT, top - 10, title, size=14)]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = top + _HIGH * (1 - share)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        unit = " ms" if share == 1.0 else ""
        parts.append(_text(_LEFT - 6, y + 4, f"{highest * share:.3g}{unit}", anchor="end", color="#666"))
    return parts


def _limit(top: int, highest: float, frame: float) -> list[str]:
    """A line at the duration of a frame, on top of the plot."""
    y, right = top + _HIGH * (1 - frame / highest), _WIDTH - _RIGHT
    return [
        f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#c00" stroke-dasharray="5 4"/>',
        _text(right, top - 10, f"- - -  a frame: {frame:.3g} ms", anchor="end", color="#c00"),
    ]


def _legend(names: list[str]) -> list[str]:
    parts = []
    for place, name in enumerate(names):
        x = _LEFT + place * 90
        parts.append(f'<rect x="{x}" y="64" width="12" height="12" fill="{_COLORS[name]}"/>')
        parts.append(_text(x + 18, 74, name))
    return parts


def _round_up(value: float) -> float:
    """The next larger round number."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(step * power for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if step * power >= value))


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", color: str = "#222") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="{color}">{_escaped(text)}</text>'


def _escaped(text: str) -> str:
    """Escape text for XML, which allows neither control characters nor noncharacters, escaped or not."""
    return escape(re.sub("[\ufffe\uffff]", " ", printable(text)))
