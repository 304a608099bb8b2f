"""The command on two processes: the same update as one with twice the batch, stopped together, written once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import psutil
import pytest

from moshi_mlx.checkpoint.readers import read_safetensors

from .helpers import checkpoint, recordings
from .test_command import SHORT, train

ROOT = Path(__file__).parents[2]
LAUNCH = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring", "-p", "43150", "--"]


def on_two(model: Path, data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    told = [sys.executable, "-m", "moshi_mlx_finetune", "train", str(model), str(data), str(out), *SHORT, *more]
    folders = os.pathsep.join(str(ROOT / name) for name in ("", "finetune"))
    return subprocess.Popen(
        [*LAUNCH, *told], cwd=ROOT, env={**os.environ, "PYTHONPATH": folders}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=200)
    return said


def update(folder: Path) -> dict[str, np.ndarray]:
    arrays, _ = read_safetensors(folder / "lora.safetensors")
    return {name: np.array(value.astype(mx.float32)) for name, value in arrays.items()}


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    """If this fails, several machines learn something else than one, or write over each other's files."""
    model, data = checkpoint(tmp_path / "model"), recordings(tmp_path / "data")
    assert train(model, data, tmp_path / "one", "--steps", "3", "--accumulate", "2") == 0
    said = ended(on_two(model, data, tmp_path / "two", "--steps", "3"))
    assert "3 of 3 steps" in said and said.count("try it:") == 1, said
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for one, two in zip(*([json.loads(line) for line in log] for log in logs), strict=True):
        assert {name: value for name, value in two.items() if name != "clock"} == pytest.approx(
            {name: value for name, value in one.items() if name != "clock"}, rel=1e-3
        )
    one, two = update(tmp_path / "one"), update(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=2e-3, err_msg=name)


def test_processes_stop_and_go_on_together(tmp_path: Path) -> None:
    """If this fails, Ctrl-C that one process sees a step earlier leaves the other waiting forever, or loses work."""
    model, data, out = checkpoint(tmp_path / "model"), recordings(tmp_path / "data"), tmp_path / "out"
    process = on_two(model, data, out, "--steps", "400")
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        if "moshi_mlx_finetune" in child.cmdline():
            ranks[child.environ().get("MLX_RANK")] = child
    ranks["1"].send_signal(signal.SIGTERM)
    said = ended(process)
    assert "steps are kept in" in said, said
    before = len((out / "log.jsonl").read_text().splitlines())
    assert 0 < before < 400
    process = on_two(model, data, out, "--steps", "400")
    while len((out / "log.jsonl").read_text().splitlines()) <= before and process.poll() is None:
        assert time.monotonic() < deadline + 60
        time.sleep(0.05)
    process.terminate()
    said = ended(process)
    assert f"going on from step {before}" in said, said
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines() if "norm" in line]
    assert steps[: before + 1] == list(range(1, before + 2))
