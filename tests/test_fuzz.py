"""The fuzzers in a small form, and that one which finds something says so. Those of files: test_hostile_files.py."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .fuzz import FUZZERS, ROOT, Attack, Attempt, attack, fuzzer, load


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("hubs", 25),
        ("paths", 200),
        ("opus", 150),
        ("conversations", 60),
        ("kills", 6),
        ("messages", 60),
        ("requests", 150),
    ],
)
def test_fuzzed(name: str, inputs: int) -> None:
    """If this fails, what somebody sends, or does at the wrong moment, ends in a fault of the program's own."""
    if FUZZERS[name] in ("sound", "server", "events"):
        pytest.importorskip("sphn")
    outcome = attack(name, 1, inputs=inputs)
    assert not outcome.findings and outcome.inputs == inputs


def test_every_fuzzer_is_there() -> None:
    """If this fails, a name that `python -m tests.fuzz` offers has nothing behind it."""
    pytest.importorskip("sphn")
    for name in FUZZERS:
        assert load(name).seconds > 0


# What a fuzzer must notice: each is harmless but for one input in ten.


@fuzzer()
def raises(folder: Path) -> Attack:
    return _now_and_then(lambda: [][1])


@fuzzer()
def crashes(folder: Path) -> Attack:
    return _now_and_then(os.abort)


@fuzzer(seconds=0.05)
def hangs(folder: Path) -> Attack:
    return _now_and_then(lambda: time.sleep(60))


@fuzzer(megabytes=50.0)
def grows(folder: Path) -> Attack:
    return _now_and_then(lambda: b"x" * 100_000_000)


@fuzzer(seconds=0.2)
def dawdles(folder: Path) -> Attack:
    return _now_and_then(lambda: sum(range(30_000_000)))


def _now_and_then(harm: object) -> Attack:
    def make(rng: random.Random) -> Attempt:
        number = rng.randrange(10)
        return str(number).encode(), harm if number == 7 else lambda: None  # type: ignore[return-value]

    return make


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "IndexError"),
        ("crashes", "ended with -6"),
        ("hangs", r"Timeout \(0:00:01\)!"),
        ("grows", r"grew by \d+ MB"),
        ("dawdles", "s of processor time"),
    ],
)
def test_what_a_fuzzer_finds(tmp_path: Path, name: str, message: str) -> None:
    """If this fails, hours of fuzzing without a finding mean nothing."""
    command = [sys.executable, "-m", "tests.fuzz", f"tests.test_fuzz:{name}", "--seed", "3", "--inputs", "30"]
    run = subprocess.run([*command, "--keep", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and re.search(message, run.stdout), run.stdout + run.stderr
    assert re.search(rf"^{name} .* [1-9]$", run.stdout, re.MULTILINE) and "(seed 3)" in run.stdout
    (first, *_) = sorted(tmp_path.glob("*[0-9]"))
    assert first.read_bytes() == b"7"
    assert f"--seed 3 --first {first.name.split('-')[2]}" in Path(f"{first}.txt").read_text()


def test_without_a_finding() -> None:
    """If this fails, nobody can use the fuzzers as a gate."""
    command = [sys.executable, "-m", "tests.fuzz", "safetensors", "--inputs", "20", "--seed", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and re.search(r"^safetensors +20 ", run.stdout, re.MULTILINE), run.stdout + run.stderr
    assert "20 inputs, 0 findings (seed 1)" in run.stdout
