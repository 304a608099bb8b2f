"""What recipes cost: a table for people, JSON for programs, and one HTML page with pictures and no other file."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

from moshi_mlx.checkpoint.readers import read_json
from moshi_mlx.disk import replacing
from moshi_mlx.errors import MoshiError

from ..plan.recipes import PARTS, Module, Plan, describe
from ..terminal import table
from ..write.writer import explain
from .evaluate import SAME_FRAMES, Cost

__all__ = ["REPORT_FILES", "Entry", "Report", "is_report"]

REPORT_FILES = ("report.json", "report.html")
LEAST_KL = 1e-4
"""A smaller divergence, 0.0000 in tables, is drawn there."""
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
        How much of that is what the source says, a second sooner or later; None if both say nothing.
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
    source_bytes : int
        Size of the source's files of weights.
    dense_bytes : int
        Size of the modules when nothing is quantized.
    entries : list of Entry
    listened : bool
        Whether free runs were made.
    said : str or None
        What the source says in one.
    sensitivity : list
        From the measured recipe.
    """

    source: str
    calibration: str
    modules: Sequence[Module]
    source_bytes: int
    dense_bytes: int
    entries: list[Entry] = field(default_factory=list)
    listened: bool = False
    said: str | None = None
    sensitivity: list[dict[str, object]] = field(default_factory=list)

    def legend(self) -> str:
        """What the table's columns are."""
        text = (
            "MB: matrices and tables. KL: divergence from the source's predictions in nats, of a whole frame (the text "
            "token and all codes), of the text token, of one code. top-1: how often the likeliest token is the same."
        )
        same = (
            " same text: how much of what the model says in a free run the source says as well, at most "
            f"{SAME_FRAMES * 0.08:.0f} s sooner or later."
        )
        return text + same if self.listened else text

    def rows(self) -> list[list[str]]:
        """The head of a table, and one line a recipe."""
        head = ["recipe", "MB", "bits/weight", "KL frame", "KL text", "KL code", "top-1 text", "top-1 code"]
        rows = [[*head, "same text"] if self.listened else head]
        for e in self.entries:
            c = e.cost
            row = [e.plan.name, f"{e.size / 1e6:,.2f}", f"{e.bits_per_weight:.2f}"]
            row += [f"{value:.4f}" for value in (c.frame_kl, c.text_kl, c.audio_kl)]
            row += [f"{100 * value:.1f} %" for value in (c.text_top1, c.audio_top1)]
            if self.listened:
                row.append("nothing said" if e.same_text is None else f"{100 * e.same_text:.0f} %")
            rows.append(row)
        return rows

    def table(self) -> str:
        """The rows for a terminal."""
        head, *rows = self.rows()
        return table(head, rows)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "source": self.source,
            "calibration": self.calibration,
            "source_bytes": self.source_bytes,
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
        data = json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n"
        for name, text in zip(REPORT_FILES, (data, self.html()), strict=True):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with replacing(folder / name) as partial:
                    partial.write_text(text, encoding="utf-8")
            except OSError as error:
                raise explain(folder / name, error) from error

    # -------------------------------------------------------------------------------------------------- HTML

    def html(self) -> str:
        """A page that needs nothing else, for any width."""
        text = html.escape
        sections = [
            f"<h1>Quantizing {text(self.source)}</h1>",
            f"<p>Measured on {text(self.calibration)}. The source's weights take {self.source_bytes / 1e6:,.2f} MB. "
            f"{text(self.legend())}</p>",
            "<h2>Size against cost</h2>" + self._plot(),
            "<h2>Recipes</h2>" + _html_table(self.rows()),
        ]
        for e in self.entries:
            rows = [["part", "bits:group", "MB", "bits/weight", "mean error"]]
            for part, p in self._parts(e).items():
                sizes = [f"{p['bytes'] / 1e6:,.2f}", f"{p['bits_per_weight']:.2f}", f"{p['mean_error']:.4f}"]
                rows.append([part, ", ".join(p["choices"]), *sizes])
            sections.append(f"<h3>{text(e.plan.name)}</h3>" + _html_table(rows))
            sections += _quoted("Says", e.said)
        sections += _quoted("The source says", self.said)
        return f'{_BEGIN}</title><meta name="viewport" content="width=device-width">{_STYLE}\n' + "\n".join(sections)

    def _plot(self) -> str:
        """Cost (logarithmic) over size, one dot a recipe. Positions are percentages: text keeps its size on a phone."""
        if not self.entries:
            return ""
        sizes = [e.size / 1e6 for e in self.entries]
        costs = [log10(max(e.cost.frame_kl, LEAST_KL)) for e in self.entries]
        left, right, low, high = 0.95 * min(sizes), 1.05 * max(sizes), min(costs) - 0.2, max(costs) + 0.4
        parts = [f'<svg role="img" aria-label="divergence over size"><text y="-12" x="-4em">{_AXES}</text>']
        for value, label in log_ticks(low, high):
            place = f'y="{100 * (high - value) / (high - low):.1f}%"'
            parts.append(f'<svg {place}><line x2="100%"/><text dx="-6" dy="4" class="end">{label}</text></svg>')
        for value, label in ticks(left, right):
            place = f'x="{100 * (value - left) / (right - left):.1f}%"'
            parts.append(f'<svg {place}><line y2="100%"/><text y="100%" dy="18" class="mid">{label}</text></svg>')
        for e, size, cost in zip(self.entries, sizes, costs, strict=True):
            across, down = 100 * (size - left) / (right - left), 100 * (high - cost) / (high - low)
            side = 'dx="8"' if across < 60 else 'dx="-8" class="end"'
            parts.append(f'<svg x="{across:.1f}%" y="{down:.1f}%"><circle r="5"/>')
            parts.append(f'<text dy="-6" {side}>{html.escape(e.plan.name)}</text></svg>')
        return "".join(parts) + "</svg>"


_AXES = "KL of a frame in nats, over MB"
_STYLE = """<style>
:root { color-scheme: light dark; --line: #8886; --dot: #2a78c8 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em }
h1, p { overflow-wrap: anywhere } div { overflow-x: auto } table { border-collapse: collapse; white-space: nowrap }
td, th { padding: .15em .5em; text-align: right; border-bottom: 1px solid var(--line) }
th { white-space: normal; vertical-align: bottom }
td:first-child, th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: Canvas }
body > svg { display: block; width: calc(100% - 5em); height: 20em; margin: 2.5em 1em 3em 4em }
svg { overflow: visible; font-size: 12px; fill: currentColor } circle { fill: var(--dot) } line { stroke: var(--line) }
.end { text-anchor: end } .mid { text-anchor: middle }
</style>"""


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Two to six round numbers between two numbers, with their labels."""
    step = 10.0 ** floor(log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    digits = max(0, -floor(log10(step) + 1e-9))
    return [(n * step, f"{n * step:,.{digits}f}") for n in range(ceil(low / step), floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten between two of them, and their doubles and fives where the two are near, with labels."""
    factors = (1, 2, 5) if high - low < 2 else (1,)
    values = [factor * 10.0**power for power in range(floor(low), ceil(high)) for factor in factors]
    return [(log10(value), f"{value:g}") for value in values if low <= log10(value) <= high]


def _quoted(who: str, said: str | None) -> list[str]:
    """A paragraph, if there is a text or silence."""
    return [] if said is None else [f"<p>{who}: “{html.escape(said)}”</p>" if said else f"<p>{who} nothing.</p>"]


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where the page is narrow; the first row is its head."""
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    lines[0] = lines[0].replace("td>", "th>")
    return f"<div><table><tr>{'</tr><tr>'.join(lines)}</tr></table></div>"
