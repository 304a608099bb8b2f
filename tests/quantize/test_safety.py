"""Nothing half made, nothing lost: interruptions, full disks, targets that exist, sources that are broken."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import mlx.core as mx
import pytest
from moshi_mlx_quantize.cli import main
from moshi_mlx_quantize.write import convert, writer
from moshi_mlx_quantize.write.writer import Entry, StreamingWriter

from moshi_mlx.checkpoint.readers import read_safetensors
from moshi_mlx.errors import CheckpointError

from ..helpers.checkpoints import conditioned_config, small_config, write_checkpoint
from .helpers import error_of
from .memory import ROOT, config_of_size, measure, write_random


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source"), small_config(num_layers=1))


def is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Broken: quantizing holds the model in memory. The 3 GB version of this is ``python -m tests.quantize.memory``."""
    small = measure(tmp_path / "a", 40, "--recipe", "q4")
    large = measure(tmp_path / "b", 160, "--recipe", "q4")
    assert large["source"] - small["source"] > 100
    # A model 120 MB larger, with the same largest tensor of 8 MB, takes hardly more.
    assert large["peak"] - small["peak"] < 35, (small, large)


def test_an_existing_target_is_left_alone(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken: a folder, a file or a link that is in the way is written over without being asked to."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine").write_text("kept")
    assert "exists: choose another name, or replace it with --force" in error_of(capsys, source, folder)
    assert (folder / "mine").read_text() == "kept"
    file = tmp_path / "file"
    file.write_text("kept")
    assert "exists and is no folder" in error_of(capsys, source, file, "--force")
    assert file.read_text() == "kept"
    assert "not part of a checkpoint (mine)" in error_of(capsys, source, folder, "--force")
    assert (folder / "mine").read_text() == "kept"
    (folder / "mine").unlink()
    assert main([str(source), str(folder), "--force", "--quiet"]) == 0
    assert (folder / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_the_source_is_no_target(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken: --force lets a run delete the checkpoint that it reads."""
    before = sorted(path.name for path in source.iterdir())
    assert "holds the source itself" in error_of(capsys, source, source, "--force")
    assert "holds the source itself" in error_of(capsys, source, source.parent, "--force")
    assert sorted(path.name for path in source.iterdir()) == before


def test_a_disk_that_is_too_small(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken: lack of space is noticed after an hour, and leaves a fragment."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 2**20))
    assert "GB are needed: make room" in error_of(capsys, source, tmp_path / "out")
    assert is_empty(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fills_up(
    code: int, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken: a write that fails in the middle leaves a folder that looks like a checkpoint, or hurts the old one."""
    assert main([str(source), str(tmp_path / "out"), "--quiet"]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    real, left = os.pwrite, [100_000]

    def failing(file: int, data: memoryview, position: int) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return real(file, data, position)

    monkeypatch.setattr(writer.os, "pwrite", failing)
    message = error_of(capsys, source, tmp_path / "out", "--force", "--recipe", "q8")
    assert ("disk is full" if code == errno.ENOSPC else "cannot write") in message
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interruptions(number: signal.Signals, status: int, tmp_path: Path) -> None:
    """Broken: Ctrl-C leaves a fragment under the final name, or what a killed run leaves stops the next one."""
    write_random(tmp_path / "source", config_of_size(40))
    code = (
        "import os, sys, time; from moshi_mlx_quantize.write import writer; from moshi_mlx_quantize.cli import main\n"
        "real = os.pwrite\n"
        "def slow(*a): time.sleep(0.02); return real(*a)\n"
        "writer.os.pwrite = slow; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "source"), str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in (".", "app", "quantize"))},
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial/**/*.safetensors")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == (["out.partial", "source"] if number == signal.SIGKILL else ["source"])
    assert main([str(tmp_path / "source"), str(tmp_path / "out"), "--quiet"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_two_runs_at_once(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken: two runs write into the same folder, or a foreign folder of that name is deleted."""
    from moshi_mlx_quantize.write.staging import Staging

    with Staging(tmp_path / "out"):
        assert "another run is writing" in error_of(capsys, source, tmp_path / "out")
        assert (tmp_path / "out.partial").is_dir()
    assert is_empty(tmp_path)
    (tmp_path / "out.partial").mkdir()
    assert "was not created by this program" in error_of(capsys, source, tmp_path / "out")
    assert (tmp_path / "out.partial").is_dir()


def test_broken_sources(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken: an unreadable source ends in a traceback, or in a result."""
    out = tmp_path / "results" / "out"
    assert "is neither a folder" in error_of(capsys, tmp_path / "nowhere", out)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no weights" in error_of(capsys, empty, out)
    cut = write_checkpoint(tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-1000])
    assert "incomplete or damaged" in error_of(capsys, cut, out)
    tensors = read_safetensors(source / "model.safetensors")[0]
    tensors.pop("text_linear.weight")
    other = tmp_path / "other"
    other.mkdir()
    mx.save_safetensors(str(other / "model.safetensors"), tensors)
    (other / "config.json").write_bytes((source / "config.json").read_bytes())
    assert "text_linear.weight" in error_of(capsys, other, out)
    assert not out.parent.exists() or is_empty(out.parent)


def test_fuzzed_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int = 0, rounds: int = 60) -> None:
    """If this fails, a damaged file of a source (or a recording) ends in a traceback, or leaves something behind."""
    import soundfile

    rng = random.Random(seed)
    good = [
        write_checkpoint(tmp_path / "a", small_config(num_layers=1), mimi=True),
        write_checkpoint(tmp_path / "b", conditioned_config(num_layers=1), "torch", lora="new"),
        write_checkpoint(tmp_path / "c", layout="gguf"),
    ]
    statuses = {0: 0, 1: 0}
    for index in range(rounds):
        folder = shutil.copytree(rng.choice(good), tmp_path / "m")
        soundfile.write(folder / "speech.wav", [0.1, -0.1] * 1000, 24000)
        path = rng.choice([path for path in folder.iterdir() if path.is_file()])
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 3, 30])):
            data[rng.randrange(min(len(data), rng.choice([100, 5000, len(data)])))] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
        arguments = [str(folder), str(tmp_path / "out"), "--recipe", "q4", "--quiet", "--frames", "2"]
        if rng.random() < 0.3:
            arguments += ["--report", str(tmp_path / "r"), "--calibration", str(folder / "speech.wav")]
        status = main(arguments)
        error = capsys.readouterr().err
        assert status in statuses and "unexpected" not in error, f"seed {seed}, round {index}, {path.name}: {error}"
        statuses[status] += 1
        assert (tmp_path / "out").exists() == (status == 0), f"seed {seed}, round {index}"
        for name in ("m", "out", "r"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"], f"seed {seed}, round {index}"
    assert min(statuses.values()) > rounds // 10, statuses


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(
    value: float, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken: a damaged tensor becomes a checkpoint that says nothing but noise."""
    tensors = dict(read_safetensors(source / "model.safetensors")[0])
    row = mx.full((1, 128), value, mx.bfloat16)
    table = tensors["transformer.layers.0.self_attn.out_proj.weight"]
    tensors["transformer.layers.0.self_attn.out_proj.weight"] = mx.concatenate([row, table[1:]])
    folder = tmp_path / "bad"
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    assert "self_attn.out_proj holds values that are not finite" in error_of(capsys, folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_result_that_does_not_load_is_thrown_away(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken: the check at the end sees nothing."""
    real = convert.make_config

    def wrong(*args: object) -> dict[str, object]:
        made = real(*args)  # type: ignore[arg-type]
        made["quantization"]["bits"] = 8
        return made

    monkeypatch.setattr(convert, "make_config", wrong)
    assert "does not load, and was thrown away" in error_of(capsys, source, tmp_path / "out")
    assert is_empty(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a"],
        ["a", "b", "c"],
        ["a", "b", "--hf-path", "c"],
        ["a", "b", "--mlx-path", "c"],
        ["a", "b", "--q-mode", "int4"],
        ["a", "b", "--q-bits", "four"],
        ["a", "b", "--recipe", "q4", "--q-bits", "4"],
        ["a", "b", "--dequantize", "--q-bits", "4"],
        ["a", "b", "--unknown"],
        ["a", "--recipe", "q4"],
        ["a", "b", "--target-bpw", "4", "--q-bits", "4"],
        ["a", "b", "--target-bpw", "4", "--target-size", "4"],
        ["a", "b", "--target-bpw", "nan"],
        ["a", "b", "--frames", "0"],
        ["a", "b", "--distill", "5", "--dequantize"],
        ["a", "--compare", "q4", "--upload-repo", "c/d"],
    ],
    ids=" ".join,
)
def test_bad_command_lines(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Broken: a contradiction is settled silently, or ends with another status than 2."""
    error_of(capsys, *arguments, status=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--q-bits", "7"], "7 bits in groups of 64 (affine) do not exist"),
        (["--q-group-size", "48"], "groups of 48"),
        (["--q-mode", "nvfp4", "--q-group-size", "32"], "groups of 32 (nvfp4)"),
        (["--recipe", "best"], "there is no recipe 'best'"),
        (["--compare", "q4,best"], "there is no recipe 'best'"),
        (["--rule", "decoder=4"], "matches no module"),
        (["--rule", "text_emb=4:128:mxfp4"], "do not exist"),
        (["--weights", "other.safetensors"], "has no other.safetensors"),
        (["--lora", "nowhere.safetensors"], "no such file"),
    ],
)
def test_bad_values(
    arguments: list[str], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken: a value that cannot be ends in a traceback, or is replaced by another."""
    assert message in error_of(capsys, source, tmp_path / "out", *arguments)
    assert is_empty(tmp_path)


def test_mlx_lm_habits(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken: flags that people know from mlx_lm.convert mean something else."""
    target = str(tmp_path / "out")
    assert main(["--hf-path", str(source), "--mlx-path", target, "-q", "--q-bits", "6"]) == 0
    printed = capsys.readouterr()
    assert "bits per weight" in printed.out and "text embedding" in printed.out
    assert "\x1b" not in printed.out + printed.err
    assert main(["--list-recipes"]) == 0
    assert "mixed_3_6" in capsys.readouterr().out


def test_the_writer_notices_gaps(tmp_path: Path) -> None:
    """Broken: a tensor that nobody wrote becomes zeros in the file."""
    entries = {"a": Entry((4, 2), mx.bfloat16), "b": Entry((3,), mx.uint8)}
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="b was not written whole"), StreamingWriter(path, entries) as file:
        file.write("a", mx.ones((4, 2), mx.bfloat16))
    path.unlink()
    with StreamingWriter(path, entries, {"k": "v"}) as file:
        file.write("a", mx.ones((2, 2), mx.bfloat16), 2)
        file.write("b", mx.array([1, 2, 3], mx.uint8))
        file.write("a", mx.zeros((2, 2), mx.bfloat16))
        with pytest.raises(CheckpointError, match="instead of"):
            file.write("b", mx.array([1, 2, 3]))
    tensors, metadata = read_safetensors(path)
    assert metadata == {"format": "mlx", "k": "v"}
    assert tensors["a"].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]] and tensors["b"].tolist() == [1, 2, 3]
