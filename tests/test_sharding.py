"""One model on several processes: the same results, what it sends, and what happens when a process fares ill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import psutil
import pytest

from moshi_mlx.config import ModelConfig
from moshi_mlx.errors import ConfigError
from moshi_mlx.models.lm import Lm
from moshi_mlx.sharding import step_traffic
from moshi_mlx.sharding.identity import Place, place_here
from moshi_mlx.sharding.split import _divisible, check_split
from tests.helpers.checkpoints import conditioned_config, small_config, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
STEPS = int(os.environ.get("MOSHI_TEST_SHARDED_STEPS", "126"))  # of 4 tokens
LONG = "MOSHI_TEST_SHARDED_STEPS" in os.environ
CONFIG = small_config(num_heads=4, hidden_scale=3.75)  # 320 feed-forward columns: five groups of 64
PATIENT = {"silence": 10, "late": 20}  # for tests of results, on machines with other work
LATE = (
    "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: time.sleep(60)); "
    "from moshi_mlx.sharding.__main__ import main; sys.exit(main())"
)


def lead(folder: Path, ranks: int = 2, **job: Any) -> dict[str, Any]:
    """What the leader of a group prints; see :mod:`tests.helpers.sharded`."""
    job = {"folder": str(folder), "ranks": ranks, **job}
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'app'}"}
    command = [sys.executable, "-m", "tests.helpers.sharded", json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip(), done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for pid in result.get("pids", []):
        try:
            psutil.Process(pid).wait(5)
        except psutil.NoSuchProcess:
            pass
    return {**result, "status": done.returncode, "stderr": done.stderr}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of one model, dense and quantized; the groups of ``q4`` cannot be divided as they are."""
    folder = tmp_path_factory.mktemp("sharded")
    return {
        "dense": write_checkpoint(folder / "dense", CONFIG, mimi=True),
        "q4": write_checkpoint(folder / "q4", CONFIG, quantize={"bits": 4, "group_size": 64}, mimi=True),
        "q8, grouped keys": write_checkpoint(
            folder / "q8", {**CONFIG, "kv_repeat": 2}, quantize={"bits": 8, "group_size": 32}, mimi=True
        ),
        "conditions": write_checkpoint(
            folder / "conditions", conditioned_config(num_heads=4, n_q=8, delays=[0] * 9), mimi=True
        ),
    }


@pytest.mark.parametrize(
    "weights, ranks, steps, together",
    [
        ("dense", 2, STEPS, True),
        ("q4", 2, STEPS, False),
        ("q8, grouped keys", 2, STEPS, False),
        ("conditions", 2, 12, False),
        ("dense", 4, STEPS if LONG else 24, False),
    ],
)
def test_several_processes_say_what_one_says(
    folders: dict[str, Path], weights: str, ranks: int, steps: int, together: bool
) -> None:
    """If this fails, a model on several machines is another model, or sends more than the documents say."""
    found = lead(folders[weights], ranks, do="same", steps=steps, together=together, **PATIENT)
    assert "error" not in found, found
    assert found["heads"] == 4 // ranks
    sums, streams = (6, 5) if weights == "conditions" else (4, 4)
    assert found["same"] and found["tokens"] == streams * steps
    assert found["off"] < 1e-5
    assert [found["sums"], found["bytes"], found["orders"]] == found["formula"] == [sums, sums * 128 * 4, 1]
    assert found["fingerprints"], "a conversation kept on several machines could not be resumed on one"
    if together:
        assert found["together"], "a join, a leave, a reset or a restore is not done everywhere"
        assert found["schema"] and found["kept"] < 1e-5, "a snapshot lacks the other ranks' heads"


@pytest.mark.parametrize(
    "fate, message, within, limits",
    [
        ("kill", "has gone", 2.0, {"silence": 10, "late": 10}),
        ("stop", "does not respond", 3.0, {}),
        ("late", "is late", 8.0, {"silence": 10}),
    ],
)
def test_a_rank_that_fares_ill_ends_the_talk_with_its_name(
    folders: dict[str, Path], fate: str, message: str, within: float, limits: dict[str, float]
) -> None:
    """If this fails, a talk hangs when another machine dies, sleeps or is busy, or does not say which one."""
    command = [sys.executable, "-c", LATE]
    found = lead(folders["dense"], do=fate, command=command, **limits)
    assert found["error"].startswith("RankError: rank 1 (") and message in found["error"], found
    assert found["took"] < within
    assert not any(map(psutil.pid_exists, found["pids"])), "a process is left over"


def test_a_rank_with_other_files_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """If this fails, two versions of a model are mixed, and what they say together is noise."""
    other = write_checkpoint(tmp_path / "other", CONFIG, mimi=True, seed=1)
    code = (
        "import sys; from moshi_mlx.sharding import follower, __main__ as program; real = follower.resolve; "
        f"follower.resolve = lambda source, **how: real({str(other)!r}, **how); sys.exit(program.main())"
    )
    found = lead(folders["dense"], do="kill", command=[sys.executable, "-c", code])
    assert "rank 1" in found["error"] and "has other files" in found["error"] and "weights 0" in found["error"], found


def test_a_rank_with_another_version_is_refused(folders: dict[str, Path]) -> None:
    """If this fails, machines that do not understand each other begin to talk."""
    code = (
        "import sys; from moshi_mlx.sharding import follower, __main__ as program; "
        "follower.versions = lambda: {'moshi-mlx-local': '0.0.1', 'mlx': '0.1'}; sys.exit(program.main())"
    )
    found = lead(folders["dense"], do="kill", command=[sys.executable, "-c", code])
    assert "has other versions" in found["error"] and "0.0.1 there" in found["error"], found


def test_a_rank_that_cannot_start_says_why(folders: dict[str, Path]) -> None:
    """If this fails, a wrong path on another machine costs a minute of waiting and says nothing."""
    found = lead(folders["dense"], do="kill", command=[sys.executable, "-c", "raise SystemExit('no such thing here')"])
    assert "rank 1 did not start: no such thing here" in found["error"], found


def test_what_a_step_of_moshi_sends() -> None:
    """If this fails, the calculation in docs/several-macs.md is of another model."""
    moshi = ModelConfig.moshi_7b().lm
    traffic = step_traffic(moshi)
    assert (traffic.sums, traffic.sum_bytes, traffic.orders) == (64, 64 * 8192, 1)
    crossed = ModelConfig.from_dict(conditioned_config()).lm
    assert step_traffic(crossed, rows=2, itemsize=4).sums == 3 * crossed.num_layers


@pytest.mark.parametrize("size, kind", [(2, nn.QuantizedLinear), (4, nn.Linear)])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_that_cannot_be_divided_keep_their_values(bits: int, size: int, kind: type[nn.Module]) -> None:
    """If this fails, a quantized model says something else on several machines, or cannot be divided at all."""
    mx.random.seed(0)
    linear = nn.Linear(320, 16, bias=False).to_quantized(64, bits)
    x = mx.random.normal((3, 320))
    before = np.array(linear(x))
    divisible = _divisible(linear, size)
    assert type(divisible) is kind and 320 // size % getattr(divisible, "group_size", 1) == 0
    assert np.abs(np.array(divisible(x)) - before).max() < 1e-5


def test_a_model_that_does_not_divide_is_refused() -> None:
    """If this fails, a number of machines that a model cannot have ends in MLX's error of shapes."""
    lm = Lm(ModelConfig.from_dict(small_config()).lm)
    check_split(lm, 2)
    with pytest.raises(ConfigError, match="2 heads, which 3 machines cannot divide"):
        check_split(lm, 3)


def test_where_a_process_is_among_the_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If this fails, a rank that mlx.launch has started does not find rank 0, or a plain process looks for one."""
    for name in ("MLX_RANK", "MLX_HOSTFILE", "MLX_IBV_DEVICES", "MOSHI_MLX_LEADER", "MOSHI_MLX_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert place_here() is None
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["10.0.0.1:5000"], ["10.0.0.2:5001"]]')
    monkeypatch.setenv("MLX_RANK", "1")
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    assert place_here() == Place(1, 2, "10.0.0.1", 5002)
    monkeypatch.setenv("MOSHI_MLX_LEADER", "10.0.0.9:77")
    assert place_here() == Place(1, 2, "10.0.0.9", 77)
    monkeypatch.setenv("MOSHI_MLX_TOKEN", "secret")
    monkeypatch.setenv("MOSHI_MLX_RANKS", "3")
    assert place_here() == Place(2, 3, "10.0.0.9", 77, "secret")
    monkeypatch.setenv("MLX_RANK", "x")
    with pytest.raises(ConfigError, match="do not say which rank"):
        place_here()


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    """If this fails, fine-tuning on several machines learns something else than on one."""
    command = [sys.executable, "-m", "tests.helpers.trains"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    alone = subprocess.run([*command, "8"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring", "-p", "43110", "--"]
    both = subprocess.run(
        [*launch, *command, "8"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    one, two = (json.loads(done.stdout.splitlines()[-1]) for done in (alone, both))
    assert (one["size"], two["size"]) == (1, 2)
    assert len(one["losses"]) == 8 and one["losses"][-1] < one["losses"][0]
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-6)
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-5)
    assert two["empty"] == pytest.approx(one["empty"], abs=1e-6), "a rank whose part has nothing spoils the others"
