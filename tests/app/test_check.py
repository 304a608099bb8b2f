"""The commands check and bench, with the built-in model and devices made of Python."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from moshi_mlx_app.cli import main
from moshi_mlx_app.commands import check
from moshi_mlx_app.models import measure
from moshi_mlx_app.models.catalog import CATALOG
from moshi_mlx_app.models.measure import speeds
from moshi_mlx_app.screen.picture import draw

from moshi_mlx.tasks import TASKS
from tests.app.test_talk import card  # noqa: F401
from tests.helpers.checkpoints import small_config, write_checkpoint


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
    assert report["sound"]["ok"] and report["sound"]["heard_seconds"] > 0 and report["sound"]["loudest"] > 0.05
    assert report["stages"]["silent"] and report["stages"]["spoken"] and report["stages"]["frames"] == 4
    assert report["machine"]["memory"] > 1e9 and report["machine"]["packages"]["mlx"]
    assert [entry["keeps_up"] for entry in report["verdicts"]] == [False] * len(CATALOG)
    assert report["default"]["model"] == "small" and "would take about" in report["default"]["why"]
    assert report["ok"] is (status == 0) and report["ok"] is report["keeps_up"]
    card.list = []
    assert main(["check", "--frames", "4"]) == 1
    said = capsys.readouterr().out
    assert "has no microphone" in said and "not possible as it is" in said and "too slow" in said


def test_models_for_other_purposes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a model is offered for a conversation that is for something else, or without its command."""
    monkeypatch.setattr(measure, "speeds", lambda: dict.fromkeys((4, 8, 16), 1e13))
    monkeypatch.setattr("moshi_mlx_app.models.select.room", lambda machine: 10**12)
    assert main(["check", "--no-sound", "--frames", "4"]) in (0, 1)
    lines = capsys.readouterr().out.splitlines()
    heads = {line.partition(":")[0].strip(): index for index, line in enumerate(lines) if ": moshi-mlx-local " in line}
    commands = {task.purpose: task.command for task in TASKS.values()}
    assert set(heads) == set(commands) == {published.purpose for published in CATALOG}
    for published in CATALOG:
        (index,) = [at for at, line in enumerate(lines) if line[7:].startswith(f"{published.name} ")]
        line = lines[index]
        assert line.startswith("  yes")
        head = max(at for at in heads.values() if at < index)
        assert lines[head] == f" {published.purpose}: moshi-mlx-local {commands[published.purpose]}"
        assert ("asks for an agreement" in line) is published.gated


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small models that do not converse, by what they are for."""
    folder = tmp_path_factory.mktemp("checkpoints")
    transcriber = small_config(model_type="stt", n_q=3, dep_q=0, delays=[0] * 4)
    speaker = small_config(model_type="tts")
    return {
        "stt": str(write_checkpoint(folder / "stt", transcriber, mimi=True)),
        "tts": str(write_checkpoint(folder / "tts", speaker, mimi=True)),
        "text": str(write_checkpoint(folder / "text", layout="helium")),
    }


def test_models_that_do_not_converse(
    checkpoints: dict[str, str],
    card: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """If this fails, a model that cannot converse ends in a fault, or in a talk that nobody answers."""
    for verb in (["talk"], ["check", "--no-sound"], ["bench"]):
        for kind, said in (("text", "is a text model"), ("tts", "turns text into speech")):
            assert main([*verb, "--model", checkpoints[kind]]) == 1
            error = capsys.readouterr().err.strip()
            assert re.fullmatch(rf"error: {kind} {said}: it does not hear; .* models for dialogue", error), error
    assert main(["talk", "--no-aec", "--seconds", "0.5", "--json", "--model", checkpoints["stt"]]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("moshi-mlx-local transcribe --model ") == 1
    assert "stt is for speech-to-text: it writes down what it hears and does not answer" in shown.err
    assert json.loads(shown.out)["frames"] >= 0
    assert main(["check", "--no-sound", "--frames", "4", "--model", checkpoints["stt"]]) == 1
    said = capsys.readouterr().out
    assert "not possible as it is: " in said and "stt is for speech-to-text: use moshi-mlx-local transcribe" in said


def test_speeds_are_measured() -> None:
    """If this fails, the verdicts rest on nothing."""
    speed = speeds()
    assert set(speed) == {4, 8, 16} and all(1e6 < value < 1e14 for value in speed.values())


def test_bench(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """If this fails, the benchmark's last line is not the JSON that scripts read, or a stage is missing."""
    picture = tmp_path / "bench.svg"
    assert main(["bench", "--frames", "6", "--picture", str(picture)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert figures["unpaced"]["frames"] == 6 and 0 < figures["paced"]["frames"] <= 6  # a busy machine drops some
    for name in ("encode", "step", "decode"):
        assert any(line.startswith(name) for line in table)
        assert 0 < figures["unpaced"][name]["p50"] <= figures["unpaced"][name]["max"]
        assert 0 < figures["paced"][name]["p50"] <= figures["paced"][name]["max"]
    assert figures["unpaced"]["rtf"] > 0 and figures["memory_used"] > 1e7
    drawn = ElementTree.parse(picture).getroot()
    assert drawn.tag.endswith("svg") and len(list(drawn.iter("{http://www.w3.org/2000/svg}polyline"))) == 2
    assert main(["bench", "--frames", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unpaced"]["frames"] == 4
    assert main(["bench", "--picture", "bench.png"]) == 2
    assert main(["bench", "--picture", str(tmp_path / "none" / "bench.svg")]) == 1
    assert "no such folder for the picture" in capsys.readouterr().err


@pytest.mark.parametrize("frames", [1, 5, 3000])
def test_the_picture(frames: int) -> None:
    """If this fails, the picture of a short or long benchmark is broken, or leaves its frame."""
    rng = np.random.default_rng(frames)
    times = {name: rng.gamma(4, 5, frames).tolist() for name in ("encode", "step", "decode", "latency")}
    times["step"][frames // 2] = 2500.0
    drawn = ElementTree.fromstring(draw("a <title> & more", "about", times, times, 80.0))
    rects = [rect.attrib for rect in drawn.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert len(rects) < 2000
    for rect in rects:
        assert 0 <= float(rect["x"]) and float(rect["x"]) + float(rect["width"]) <= 960
        assert 60 <= float(rect["y"]) + 0.01 and float(rect["y"]) + float(rect["height"]) <= 820
    assert "<title>" in str(drawn[1].text or "") + "".join(drawn.itertext())
    assert draw("no voice", "", {"encode": [1.0], "step": [2.0], "decode": []}, {"step": [2.0], "latency": []}, 80.0)


def test_whether_there_is_time_for_captions(
    checkpoints: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """If this fails, nobody knows before a conversation whether its captions can keep up."""
    main(["check", "--no-sound", "--frames", "4", "--captions", checkpoints["stt"], "--json"])
    report = json.loads(capsys.readouterr().out)
    slowest = max(report["stages"][name]["p95"] for name in ("encode", "step", "decode"))
    assert report["captions"]["ms"] > slowest
    assert report["captions"]["keeps_up"] is (report["captions"]["ms"] <= 72)
    assert main(["check", "--no-sound", "--frames", "4", "--captions", "small"]) == 1
    assert "is a model for dialogue: name a speech-to-text model" in capsys.readouterr().err
