"""The report's page: what it shows at any width, read back in a browser where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from moshi_mlx_quantize.measure.evaluate import Cost
from moshi_mlx_quantize.measure.report import Entry, Report, is_report, log_ticks, ticks
from moshi_mlx_quantize.plan.recipes import RECIPES, Module, make_plan

from ..web.browser import chromium, unavailable


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (2.844, 4.983, ["3.0", "3.5", "4.0", "4.5"]),
        (3.57, 8.17, ["4", "5", "6", "7", "8"]),
        (5690, 10689, ["6,000", "7,000", "8,000", "9,000", "10,000"]),
        (0.95, 1.07, ["0.95", "1.00", "1.05"]),
        (0.119, 0.2534, ["0.15", "0.20", "0.25"]),
    ],
)
def test_round_ticks(low: float, high: float, labels: list[str]) -> None:
    """If this fails, an axis is labelled with numbers that nobody can read off, or with none."""
    found = ticks(low, high)
    assert [label for _, label in found] == labels
    assert all(low <= value <= high and float(label.replace(",", "")) == pytest.approx(value) for value, label in found)


def test_logarithmic_ticks() -> None:
    """If this fails, the axis of costs is crowded, empty, or labelled with odd numbers."""
    assert [label for _, label in log_ticks(-1.3, 0.1)] == ["0.1", "0.2", "0.5", "1"]
    assert [label for _, label in log_ticks(-4.2, 0.8)] == ["0.0001", "0.001", "0.01", "0.1", "1"]
    assert log_ticks(-2.0, -1.6)  # a single recipe


def report(source: str = "somebody/some-model", kls: tuple[float, ...] = (0.0, 0.0217, 2.4952)) -> Report:
    """Recipes on two made-up modules."""
    modules = [Module("transformer.layers.0.gating.linear_in", 4096, 4096), Module("text_linear", 32000, 4096)]
    made = Report(source, "the recorded questions, 125 frames", modules, 168_000_000, 336_000_000, listened=True)
    made.said = "Hello, I am Moshi."
    for name, kl in zip(("q8", "q4", "mixed_2_6"), kls):
        plan = make_plan(modules, RECIPES[name])
        errors = dict.fromkeys(plan.choices, 0.08)
        sizes = plan.bytes(modules), plan.bits_per_weight(modules)
        entry = Entry(plan, *sizes, Cost(kl / 2, kl / 2, kl, 1.0, 0.9), errors)
        entry.said, entry.same_text = ("", None) if name == "mixed_2_6" else ("Hello, I am Moshi.", 1.0)
        made.entries.append(entry)
    return made


def test_the_page_says_what_the_table_says(tmp_path: Path) -> None:
    """If this fails, the page lacks a recipe, its size, its cost or what it says, or believes a name to be markup."""
    page = report(source="<b>x & y").html()
    assert "&lt;b&gt;x &amp; y" in page and "<b>" not in page
    for text in ("q8", "0.0217", "nothing said", "Says nothing.", "168.00 MB", "“Hello, I am Moshi.”", "0.0800"):
        assert text in page, text
    report().write(tmp_path)
    assert all(map(is_report, tmp_path.iterdir()))


@pytest.fixture(scope="module")
def browser() -> Any:
    if reason := unavailable():
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.mark.parametrize("kls", [(0.0, 0.0217, 2.4952), (0.0,), (0.02, 0.021)], ids=str)
def test_on_a_phone(kls: tuple[float, ...], browser: Any, tmp_path: Path) -> None:
    """If this fails, the report is wider than a phone, or its picture's text too small to read there."""
    name = "/home/somebody/a-folder-with-a-long-name/" * 3
    report(name, kls).write(tmp_path)
    context = browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page = context.new_page()
    page.goto(f"file://{tmp_path / 'report.html'}")
    assert page.evaluate("document.documentElement.scrollWidth") == page.evaluate("innerWidth") == 390

    def boxes(selector: str) -> Any:
        return page.eval_on_selector_all(selector, "all => all.map((one) => one.getBoundingClientRect().toJSON())")

    texts, dots, (plot,) = boxes("svg text"), boxes("circle"), boxes("body > svg")
    assert len(texts) >= len(kls) + 3
    assert all(box["left"] >= 0 and box["right"] <= 390 and box["height"] >= 12 for box in texts), texts
    assert len(dots) == len(kls) and all(plot["top"] <= dot["top"] <= dot["bottom"] <= plot["bottom"] for dot in dots)
    context.close()
