"""``python -m moshi_mlx``, and what people type who come from Kyutai's package of the same name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moshi_mlx import __main__


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=60)


def test_the_package_is_the_command(tmp_path: Path) -> None:
    """If this fails, `python -m moshi_mlx` ends with "cannot be directly executed"."""
    mine, its = (run("-m", name, "--version", cwd=tmp_path) for name in ("moshi_mlx", "moshi_mlx_app"))
    assert mine.returncode == 0 and mine.stdout == its.stdout != "", mine.stderr
    wrong = run("-m", "moshi_mlx", "file", cwd=tmp_path)
    assert wrong.returncode == 2 and "usage: moshi-mlx-local file" in wrong.stderr


def test_kyutais_name_of_the_program(tmp_path: Path) -> None:
    """If this fails, users of Kyutai's moshi_mlx only see that there is no module of that name."""
    done = run("-m", "moshi_mlx.local", "-q", "4", "--hf-repo", "kyutai/moshiko-mlx-q4", cwd=tmp_path)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count("\n") == 1 and "`moshi-mlx-local` (or `python -m moshi_mlx`)" in done.stderr


def test_without_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a bundle that ships the library alone answers with a traceback."""
    monkeypatch.setattr(__main__, "entry_points", lambda **_: ())
    assert __main__.main() == 2
    assert "moshi-mlx-local is not installed" in capsys.readouterr().err
