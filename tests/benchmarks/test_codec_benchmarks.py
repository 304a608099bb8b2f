"""The benchmarks of codec and built-in model, and the Mac on paper."""

from __future__ import annotations

import json

import pytest
from moshi_mlx_app.models.catalog import CATALOG
from moshi_mlx_quantize.plan.recipes import RECIPES, make_plan, modules_of

from benchmarks import codec_batch, mac_on_paper, mimi, small
from moshi_mlx.config import ModelConfig
from moshi_mlx.models.lm import Lm


@pytest.mark.parametrize(("recipe", "name"), [(None, "bf16"), ("q8", "q8"), ("q4", "q4")])
def test_bytes_of_a_step(recipe: str | None, name: str) -> None:
    """The floor of every chip would be wrong: the published files, counted by hand, say otherwise."""
    lm = Lm(ModelConfig.moshi_7b().lm)
    plan = None if recipe is None else make_plan(modules_of(lm), RECIPES[recipe])
    known = next(known for known in CATALOG if known.name == f"kyutai/moshiko-mlx-{name}")
    assert mac_on_paper.step_bytes(lm, plan) == pytest.approx(known.read, rel=0.01)
    assert mac_on_paper.cache_bytes(lm) == pytest.approx(known.cache, rel=0.01)


def test_the_verdict_keeps_a_reserve() -> None:
    """A chip would be promised that has no time left for anything but reading."""
    assert mac_on_paper.verdict(4e9, 0, 100)["holds"] == "yes"
    assert mac_on_paper.verdict(5.7e9, 0, 100)["holds"] == "just"
    row = mac_on_paper.verdict(7e9, 1000, 100)
    assert row["floor_ms"] == 70 and row["expected_ms"] > 80 and row["holds"] == "no"


def test_kernels_of_a_step_are_counted() -> None:
    """A step would seem to cost no launches, as when it is computed in numpy."""
    config = ModelConfig.moshi_7b().lm
    assert 1000 < mac_on_paper.step_kernels(config) < 10_000


def test_what_is_not_there_is_not_planned() -> None:
    """A machine without the peers could not measure ours."""
    assert list(mimi.plan(None, None, rust=False)) == [mimi.OURS, "ours in MLX"]
    assert set(mimi.plan("libopenblas.so.0", "python", rust=True)) > {"rustymimi", "moshi_mlx, OpenBLAS"}


def test_the_built_in_model_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """New weights, or another size of them, would break the benchmark; scripts read its last line."""
    small.main(["--frames", "3", "--paced", "0"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["benchmark"] == "small"
    assert set(figures["ms"]) == {"encode", "step", "decode", "frame"}
    assert 0 < figures["ms"]["frame"]["cpu"]["p95"]


def test_many_streams_of_the_codec_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """What a conversation costs beside others would not be known any more."""
    codec_batch.main(["--frames", "2"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["benchmark"] == "codec_batch" and figures["codec"] in ("numpy", "mlx")
    assert [row["batch"] for row in figures["rows"]] == list(codec_batch.BATCHES)
    assert all(row["encode_ms"] > 0 and row["decode_ms"] > 0 for row in figures["rows"])
