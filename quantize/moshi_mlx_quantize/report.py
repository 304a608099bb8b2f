"""What recipes cost: a table for people, JSON for programs, and one HTML page with pictures and no other file."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moshi_mlx.checkpoint.files import read_json
from moshi_mlx.errors import MoshiError

from .evaluate import Cost
from .recipes import PARTS, Module, Plan, describe
from .terminal import table
from .writer import explain

__all__ = ["REPORT_FILES", "Entry", "Report", "is_report"]

REPORT_FILES = ("report.json", "report.html")
_KEYS = {"source", "calibration", "recipes"}
_BEGIN = '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Quantizing'


def is_report(path: Path) -> bool:
    """Whether a file is one of those that :meth:`Report.write` writes, by what it holds."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        if path.suffix == ".json":
            return _KEYS <= read_json(path).keys()
        with path.open(encoding="utf-8") as file:
            return file.read(len(_BEGIN)) == _BEGIN
    except (MoshiError, OSError, ValueError):
        return False


@dataclass
class Entry:
    """One recipe.

    Attributes
    ----------
    plan : Plan
    size : int
        Bytes of all modules that can be quantized.
    bits_per_weight : float
        Their average.
    cost : Cost
    errors : mapping of str to float
        Relative weight error by module.
    said : str or None
        What the model says in a free run.
    same_text : float or None
        Share of that run's text tokens that the source chooses as well.
    """

    plan: Plan
    size: int
    bits_per_weight: float
    cost: Cost
    errors: Mapping[str, float]
    said: str | None = None
    same_text: float | None = None


@dataclass
class Report:
    """Several recipes on the same tokens.

    Attributes
    ----------
    source, calibration : str
        What was measured, and on what.
    modules : sequence of Module
    dense_bytes : int
        Size of the modules when nothing is quantized.
    entries : list of Entry
    said : str or None
        What the source says.
    sensitivity : list
        From the measured recipe.
    """

    source: str
    calibration: str
    modules: Sequence[Module]
    dense_bytes: int
    entries: list[Entry] = field(default_factory=list)
    said: str | None = None
    sensitivity: list[dict[str, object]] = field(default_factory=list)

    def table(self) -> str:
        """One line a recipe."""
        head = ["recipe", "MB", "bits/weight", "KL frame", "KL text", "KL code", "top-1 text", "top-1 code"]
        texts = any(entry.same_text is not None for entry in self.entries)
        rows = []
        for e in self.entries:
            c = e.cost
            row = [e.plan.name, f"{e.size / 1e6:,.2f}", f"{e.bits_per_weight:.2f}"]
            row += [f"{value:.4f}" for value in (c.frame_kl, c.text_kl, c.audio_kl)]
            row += [f"{100 * value:.1f} %" for value in (c.text_top1, c.audio_top1)]
            if texts:
                row.append("-" if e.same_text is None else f"{100 * e.same_text:.0f} %")
            rows.append(row)
        return table([*head, "same text"] if texts else head, rows)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "source": self.source,
            "calibration": self.calibration,
            "dense_bytes": self.dense_bytes,
            "says": self.said,
            "recipes": [
                {
                    "name": e.plan.name,
                    "bytes": e.size,
                    "bits_per_weight": e.bits_per_weight,
                    "cost": asdict(e.cost),
                    "says": e.said,
                    "same_text": e.same_text,
                    "parts": self._parts(e),
                    "modules": {
                        m.name: {"choice": describe(e.plan.choices.get(m.name)), "error": e.errors.get(m.name, 0.0)}
                        for m in self.modules
                    },
                }
                for e in self.entries
            ],
            "sensitivity": self.sensitivity,
        }

    def _parts(self, entry: Entry) -> dict[str, dict[str, Any]]:
        result: dict[str, dict[str, Any]] = {}
        for part in PARTS:
            members = [m for m in self.modules if m.part == part]
            if members:
                size = entry.plan.bytes(members)
                kinds = sorted({describe(entry.plan.choices.get(m.name)) for m in members})
                errors = [entry.errors.get(m.name, 0.0) for m in members]
                result[part] = {
                    "bytes": size,
                    "bits_per_weight": entry.plan.bits_per_weight(members),
                    "choices": kinds,
                    "mean_error": sum(errors) / len(errors),
                }
        return result

    def write(self, folder: Path) -> None:
        """Write ``report.json`` and ``report.html``.

        Raises
        ------
        CheckpointError
            If they cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "report.json").write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n")
            (folder / "report.html").write_text(self.html(), encoding="utf-8")
        except OSError as error:
            raise explain(folder, error) from error

    # -------------------------------------------------------------------------------------------------- HTML

    def html(self) -> str:
        """A page that needs nothing else."""
        text = html.escape
        sections = [
            f"<h1>Quantizing {text(self.source)}</h1>",
            f"<p>Measured on {text(self.calibration)}. KL: divergence from the source's predictions in nats; a frame "
            "is one text token and all its codes. Sizes are those of matrices and tables.</p>",
            "<h2>Size against cost</h2>" + self._plot(),
            "<h2>Recipes</h2>" + _html_table(self.table()),
        ]
        for e in self.entries:
            rows = [
                [part, ", ".join(p["choices"]), f"{p['bytes'] / 1e6:,.2f}", f"{p['bits_per_weight']:.2f}"]
                for part, p in self._parts(e).items()
            ]
            head = ["part", "bits:group", "MB", "bits/weight"]
            sections.append(
                f"<h3>{text(e.plan.name)}</h3>" + _rows(head, rows) + self._errors(e)
                + (f"<p>Says: “{text(e.said)}”</p>" if e.said else "")
            )  # fmt: skip
        if self.said:
            sections.append(f"<h2>The source says</h2><p>“{text(self.said)}”</p>")
        body = "\n".join(sections)
        meta = f'<meta charset="utf-8"><title>Quantizing</title>{_STYLE}'
        return f'<!doctype html>\n<html lang="en">{meta}\n{body}\n</html>\n'

    def _plot(self) -> str:
        """Cost (logarithmic) over size, one dot a recipe."""
        if not self.entries:
            return ""
        width, height, left, bottom = 760, 380, 70, 45
        xs = [e.size / 1e6 for e in self.entries]
        costs = [max(e.cost.frame_kl, 1e-9) for e in self.entries]
        low, high = _log10(min(costs)) - 0.2, _log10(max(costs)) + 0.2
        x0, x1 = min(xs) * 0.95, max(xs) * 1.12

        def at(x: float, cost: float) -> tuple[float, float]:
            across = left + (x - x0) / max(1e-12, x1 - x0) * (width - left - 20)
            return across, 15 + (high - _log10(cost)) / (high - low) * (height - bottom - 15)

        parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="divergence over size">']
        floor = height - bottom
        parts.append(f'<path class="axis" d="M{left} 15V{floor}H{width - 20}"/>')
        for power in range(int(low) - 1, int(high) + 2):
            for factor in (1, 2, 5):
                value = factor * 10.0**power
                if low <= _log10(value) <= high:
                    y = at(x0, value)[1]
                    parts.append(f'<path class="grid" d="M{left} {y:.1f}H{width - 20}"/>')
                    parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        for i in range(5):
            x = x0 + (x1 - x0) * i / 4
            parts.append(f'<text x="{at(x, costs[0])[0]:.1f}" y="{floor + 18}" text-anchor="middle">{x:,.4g}</text>')
        parts.append(f'<text x="{(left + width) / 2}" y="{height - 6}" text-anchor="middle">MB</text>')
        parts.append(f'<text x="14" y="{height / 2}" transform="rotate(-90 14 {height / 2})" '
                     'text-anchor="middle">KL of a frame, nats</text>')  # fmt: skip
        for e, x, cost in zip(self.entries, xs, costs, strict=True):
            across, down = at(x, cost)
            parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="5"/>')
            parts.append(f'<text x="{across + 8:.1f}" y="{down - 6:.1f}">{html.escape(e.plan.name)}</text>')
        return "".join(parts) + "</svg>"

    def _errors(self, entry: Entry) -> str:
        """Relative weight error of every module as a bar."""
        found = [(m.name, entry.errors.get(m.name, 0.0)) for m in self.modules if entry.errors.get(m.name)]
        if not found:
            return ""
        top, step = max(error for _, error in found), max(1.0, 700 / len(found))
        bars = "".join(
            f'<rect x="{40 + i * step:.1f}" y="{100 - 90 * error / top:.1f}" width="{max(0.7, step - 1):.1f}" '
            f'height="{90 * error / top:.1f}"><title>{html.escape(name)}: {error:.4f}</title></rect>'
            for i, (name, error) in enumerate(found)
        )
        return (
            f'<svg viewBox="0 0 760 105" role="img" aria-label="relative weight error by module">'
            f'<text x="36" y="16" text-anchor="end">{top:.3f}</text>{bars}</svg>'
            "<p>Relative weight error, module by module (point at a bar for its name).</p>"
        )


_STYLE = """<style>
:root { color-scheme: light dark; --line: #8886; --dot: #2a78c8 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 800px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse }
td, th { padding: .15em .7em; text-align: right; border-bottom: 1px solid var(--line) }
td:first-child, th:first-child { text-align: left }
svg { width: 100%; font-size: 12px; fill: currentColor } circle, rect { fill: var(--dot) }
.axis { stroke: currentColor; fill: none } .grid { stroke: var(--line); fill: none }
</style>"""


def _log10(value: float) -> float:
    from math import log10

    return log10(value)


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _html_table(text: str) -> str:
    """A table that was set for a terminal: columns are two spaces or more apart."""
    import re

    head, *rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return _rows(head, rows)
