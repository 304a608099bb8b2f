"""The default model, on simulated machines."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from moshi_mlx_app.models import measure
from moshi_mlx_app.models import select as choice
from moshi_mlx_app.models.catalog import BUILTIN, CATALOG, PublishedModel, room, verdict
from moshi_mlx_app.models.select import Measured, Selection, select

from moshi_mlx.checkpoint.resolve import DownloadPlan
from moshi_mlx.errors import DownloadError

GB = 2**30
Q4, Q8, BF16 = (f"kyutai/moshiko-mlx-{name}" for name in ("q4", "q8", "bf16"))


def machine(gigabytes: int, bandwidth: float, gpu: bool = True, **steps: float) -> Measured:
    """Memory in GB, and GB of weights a second; a Mac lets the GPU have two thirds to three quarters."""
    described = {"memory": gigabytes * GB, "gpu_memory": int(gigabytes * GB * 0.7) if gpu else None}
    speeds = dict.fromkeys((4, 8, 16), bandwidth * 1e9)
    return Measured(room(described), speeds, {name.replace("_", "-"): value for name, value in steps.items()})


def hub(*here: str, reachable: bool = True, begun: int = 0) -> Callable[[str, bool], DownloadPlan]:
    """A hub, and what was fetched from it before."""

    def plan_download(name: str, offline: bool) -> DownloadPlan:
        size = next(known.size for known in CATALOG if known.name == name)
        if name in here:
            return DownloadPlan(name, {"model": (size, 0)}, Path("/cache"))
        if offline or not reachable:
            raise DownloadError(f"cannot fetch {name}: https://huggingface.co cannot be reached (timed out). Check it")
        return DownloadPlan(name, {"model": (size, size - begun)}, Path("/cache"))

    return plan_download


def taken(here: Measured, plan_download: Callable[[str, bool], DownloadPlan], free: float = 1e12) -> Selection:
    chosen = select(here, plan_download, lambda place: int(free))
    assert "\n" not in chosen.line and len(chosen.line) < 320 and chosen.model in chosen.line
    assert "--model" in chosen.line
    return chosen


M1, M2, M4_MAX, LINUX = machine(8, 60), machine(16, 95), machine(64, 480), machine(16, 1, gpu=False)


@pytest.mark.parametrize(
    "here, model, why",
    [
        (M1, BUILTIN, "needs 7.2 GB of 6.0"),
        (M2, Q4, "needs 7.2 GB of 12.0; a step would take about 70 ms and may take 80 ms"),
        (M4_MAX, BF16, "needs 17.7 GB of 48.1; a step would take about 39 ms and may take 80 ms"),
        (LINUX, BUILTIN, "no published model runs here; the closest, kyutai/"),
        (machine(32, 145), Q8, "about 70 ms"),
    ],
    ids=["8 GB M1", "16 GB M2", "64 GB M4 Max", "Linux CPU", "32 GB M4 Pro, slower"],
)
def test_the_best_that_fits_and_keeps_up(here: Measured, model: str, why: str) -> None:
    """If this fails, the first run fetches gigabytes that do not fit or keep up, or offers less than would do."""
    chosen = taken(here, hub())
    assert chosen.model == model and why in chosen.line
    assert (chosen.missing > 0) is (model != BUILTIN)


def test_only_dialogue_models_are_taken() -> None:
    """If this fails, somebody talks to a model that only writes down, or is asked for an account out of the blue."""
    size = 10**9
    for_dialogue = PublishedModel("a/dialogue", size, 16, size, 0)
    others = (
        PublishedModel("a/gated", size, 16, size, 0, gated=True),
        PublishedModel("a/transcriber", size, 16, size, 0, "speech-to-text"),
    )

    def plan_download(name: str, offline: bool) -> DownloadPlan:
        return DownloadPlan(name, {"model": (size, 0)}, Path("/cache"))

    assert select(M4_MAX, plan_download, catalog=(*others, for_dialogue)).model == "a/dialogue"


def test_nothing_can_be_reached() -> None:
    """If this fails, a machine without network cannot talk at all, or nobody learns why it talks with a toy."""
    chosen = taken(M4_MAX, hub(reachable=False))
    assert chosen == Selection(BUILTIN, chosen.line) and f"{BF16} would run here, but" in chosen.line
    assert "cannot be reached" in chosen.line
    assert taken(M4_MAX, hub(Q4, reachable=False)).model == Q4


def test_what_is_here_comes_first() -> None:
    """If this fails, a better model is fetched unasked, or nobody learns that there is one."""
    asked: list[bool] = []

    def plan_download(name: str, offline: bool) -> DownloadPlan:
        asked.append(offline)
        return hub("kyutai/moshika-mlx-q4")(name, offline)

    chosen = taken(M4_MAX, plan_download)
    assert chosen.model == "kyutai/moshika-mlx-q4" and f"{BF16} would run too" in chosen.line and chosen.missing == 0
    assert all(asked), "the network was asked although nothing has to be fetched"
    assert "would run too" not in taken(M2, plan_download).line, "the other voice is no better"
    assert taken(M4_MAX, hub("kyutai/moshika-mlx-q4", Q8)).model == Q8
    assert taken(M1, hub(Q4)).model == BUILTIN, "here, but too large"


def test_a_disk_without_room() -> None:
    """If this fails, a download fails that could have been smaller, or one that has begun is not finished."""
    assert taken(M4_MAX, hub(), free=10e9).model == Q8
    chosen = taken(M4_MAX, hub(), free=1e9)
    assert chosen.model == BUILTIN and "has no space for" in chosen.line
    assert taken(M4_MAX, hub(begun=8_000_000_000), free=8e9).model == BF16


def test_what_a_step_took_beats_what_was_estimated() -> None:
    """If this fails, a model that stuttered yesterday is taken again today."""
    steps = {Q4: 85.0}
    assert taken(Measured(M2.room, M2.speeds, steps), hub()).model == BUILTIN, "the other voice is no faster"
    assert "took 66 ms and may" in taken(Measured(M2.room, {4: 1e9, 8: 1e9, 16: 1e9}, {Q4: 66.0}), hub()).line


def test_verdicts() -> None:
    """If this fails, people download 15 GB that do not fit, or are kept from a model that would do."""
    fast = {4: 100e9, 8: 100e9, 16: 100e9}
    small = verdict(PublishedModel("a", 4_800_000_000, 4, 4_500_000_000, 1_500_000_000), 12_000_000_000, fast)
    assert small["fits"] and small["keeps_up"] and small["step_ms"] == 65.0
    large = verdict(PublishedModel("b", 15_400_000_000, 16, 15_000_000_000, 1_500_000_000), 12_000_000_000, fast)
    assert not large["fits"] and not large["keeps_up"] and "17.7 GB of 12.0" in large["why"]
    slow = verdict(PublishedModel("c", 4_800_000_000, 4, 4_500_000_000, 0), 48_000_000_000, {**fast, 4: 7.5e9})
    assert slow["fits"] and not slow["keeps_up"] and "605 ms and may" in slow["why"]
    assert len({known.name for known in CATALOG}) == len(CATALOG)
    for known in CATALOG:
        assert 0.8 * known.size < known.read < known.size


def test_measured_once_per_machine_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, every start takes a second longer, or an old measurement outlives its machine."""
    count = 0

    def speeds() -> dict[int, float]:
        nonlocal count
        count += 1
        return {4: 1e9 * count, 8: 2e9, 16: 3e9}

    monkeypatch.setattr(measure, "speeds", speeds)
    monkeypatch.setattr(choice, "cache_folder", lambda: tmp_path / "a" / "b")
    first = choice.measured()
    assert choice.measured() == first and count == 1 and first.speeds[4] == 1e9
    choice.remember_step("kyutai/moshika-mlx-q4", 71.234)
    choice.remember_step("a folder of mine", 1.0)
    assert choice.measured().steps == {Q4: 71.2}
    assert choice.measured(again=True).steps == {Q4: 71.2} and count == 2
    file = tmp_path / "a" / "b" / "machine.json"
    kept = json.loads(file.read_text())
    damages: list[Any] = ["{", "[]", '{"speeds": 3}', json.dumps({**kept, "machine": {**kept["machine"], "mlx": "0"}})]
    for damaged in damages:
        file.write_text(damaged)
        before = count
        choice.measured()
        assert count == before + 1, damaged
    monkeypatch.setattr(choice, "cache_folder", lambda: file / "no folder")
    choice.measured()
    choice.remember_step(Q4, 1.0)


def test_a_hub_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a network that swallows everything keeps people from talking."""
    answers = threading.Event()
    monkeypatch.setattr(choice, "_PATIENCE", 0.05)
    monkeypatch.setattr("moshi_mlx.checkpoint.resolve.plan_download", lambda name, **_: answers.wait(60))
    began = time.monotonic()
    try:
        chosen = select(M2, lambda name, offline: hub()(name, True) if offline else choice._survey(name, False))
        spent = time.monotonic() - began
    finally:  # its thread must not be found by the tests that come next
        answers.set()
        for thread in threading.enumerate():
            if thread.name == "moshi hub":
                thread.join(10)
    assert spent < 30 and chosen.model == BUILTIN and "does not answer within" in chosen.line


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the program leaves files where a system's user does not look for them."""
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr("sys.platform", "darwin")
        assert choice.cache_folder() == Path.home() / "Library" / "Caches" / "moshi-mlx-local"
        patch.setattr("sys.platform", "linux")
        patch.setenv("XDG_CACHE_HOME", "/x")
        assert choice.cache_folder() == Path("/x/moshi-mlx-local")
        patch.setenv("XDG_CACHE_HOME", "")
        assert choice.cache_folder() == Path.home() / ".cache" / "moshi-mlx-local"
