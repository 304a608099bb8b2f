"""The verbs check and bench, with the built-in model and devices made of Python."""

from __future__ import annotations

import json
from typing import Any

import pytest
from moshi_mlx_app import measure
from moshi_mlx_app.cli import main
from moshi_mlx_app.measure import KNOWN, Known, verdict
from moshi_mlx_app.verbs import check

from tests.app.test_talk import card  # noqa: F401


def test_verdicts() -> None:
    """If this fails, people download 15 GB that do not fit, or are kept from a model that would do."""
    fast = {4: 100e9, 8: 100e9, 16: 100e9}
    small = verdict(Known("a", 4_800_000_000, 4), 16_000_000_000, fast)
    assert small["fits"] and small["keeps_up"] and small["step_ms"] == 60.0
    large = verdict(Known("b", 15_400_000_000, 16), 16_000_000_000, fast)
    assert not large["fits"] and not large["keeps_up"] and "16.6 GB of 12.0" in large["why"]
    slow = verdict(Known("c", 4_800_000_000, 4), 64_000_000_000, {**fast, 4: 10e9})
    assert slow["fits"] and not slow["keeps_up"] and "600 ms of 80" in slow["why"]
    assert len({known.name for known in KNOWN}) == len(KNOWN)


def test_check(
    card: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If this fails, a bug report says nothing about the machine, or its verdict contradicts its figures."""
    monkeypatch.setattr(check, "_LISTEN", 0.3)
    monkeypatch.setattr(measure, "speeds", lambda: {4: 1e9, 8: 1e9, 16: 1e9})
    status = main(["check", "--json", "--frames", "4"])
    report = json.loads(capsys.readouterr().out)
    assert report["sound"]["ok"] and report["sound"]["heard_seconds"] > 0.1 and report["sound"]["loudest"] > 0.05
    assert report["stages"]["silent"] and report["stages"]["spoken"] and report["stages"]["frames"] == 4
    assert report["machine"]["memory"] > 1e9 and report["machine"]["packages"]["mlx"]
    assert [entry["keeps_up"] for entry in report["verdicts"]] == [False] * len(KNOWN)
    assert report["ok"] is (status == 0) and report["ok"] is report["keeps_up"]
    card.list = []
    assert main(["check", "--frames", "4"]) == 1
    said = capsys.readouterr().out
    assert "shows no microphone" in said and "not possible as it is" in said and "too slow" in said


def test_speeds_are_measured() -> None:
    """If this fails, the verdicts rest on nothing."""
    speed = measure.speeds()
    assert set(speed) == {4, 8, 16} and all(1e6 < value < 1e14 for value in speed.values())


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, the benchmark's last line is not the JSON that scripts read, or a stage is missing."""
    assert main(["bench", "--frames", "6"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert figures["unpaced"]["frames"] == 6 and figures["paced"]["frames"] == 6
    for name in ("encode", "step", "decode"):
        assert any(line.startswith(name) for line in table)
        assert 0 < figures["unpaced"][name]["p50"] <= figures["unpaced"][name]["max"]
        assert 0 < figures["paced"][name]["p50"] <= figures["paced"][name]["max"]
    assert figures["unpaced"]["rtf"] > 0 and figures["memory_used"] > 1e7
