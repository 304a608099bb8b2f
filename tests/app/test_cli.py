"""The command line around the verbs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from moshi_mlx_app import cli
from moshi_mlx_app.cli import main

from tests.app.conftest import FakeModel

ROOT = Path(__file__).resolve().parents[2]


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "app")])
    return subprocess.run(
        [sys.executable, "-m", "moshi_mlx_app", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, the help promises what is not built, or hides what is."""
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "moshi-mlx-local file question.wav -o answer.wav" in said
    for verb in cli.VERBS:
        assert main([verb, "--help"]) == 0
        said = capsys.readouterr().out
        assert f"usage: moshi-mlx-local {verb}" in said and "examples:" in said
    assert main(["file", "--help"]) == 0
    said = capsys.readouterr().out
    options = "--output --model --codec --seed --tail --transcript --json --quiet --force --greedy --debug --demo"
    for option in options.split():
        assert option in said


@pytest.mark.parametrize(
    "given, taken",
    [
        ([], ["talk"]),
        (["--seed", "3"], ["talk", "--seed", "3"]),
        (["--debug", "--model", "file"], ["--debug", "talk", "--model", "file"]),
        (["file", "q.wav"], ["file", "q.wav"]),
        (["--debug", "file"], ["--debug", "file"]),
        (["--help"], ["--help"]),
        (["--version"], ["--version"]),
        (["nonsense"], ["nonsense"]),
    ],
)
def test_without_a_verb_it_talks(given: list[str], taken: list[str]) -> None:
    """If this fails, the bare command does not converse, or options are lost on the way."""
    assert cli._with_verb(given) == taken


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a bug report cannot say what it is about."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("moshi-mlx-local ")


def test_python_dash_m() -> None:
    """If this fails, `python -m moshi_mlx_app` is not the program, or colours leak into pipes."""
    done = run_module("--help", COLUMNS="100")
    assert done.returncode == 0 and "usage: moshi-mlx-local" in done.stdout and "\x1b" not in done.stdout
    done = run_module("file", "nothing.wav", "-o", "a.wav", PYTHONIOENCODING="ascii")
    assert done.returncode == 1 and done.stderr == "error: nothing.wav: No such file or directory\n"
    done = run_module("walk")
    assert done.returncode == 2 and "invalid choice: 'walk'" in done.stderr


def test_nothing_heavy_is_imported_before_main() -> None:
    """If this fails, Ctrl-C in the program's first second shows a traceback."""
    heavy = {"mlx", "moshi_mlx", "numpy", "rich", "soundfile"}
    code = f"import sys, moshi_mlx_app.cli; print(sorted({heavy} & set(sys.modules)))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "app")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout == "[]\n"


def test_a_fault_of_our_own_asks_to_be_reported(
    here: Path, model: FakeModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, a bug looks like the user's mistake, or like a page of Python."""
    import moshi_mlx

    def broken(*_: object, **__: object) -> None:
        raise KeyError("missing")

    monkeypatch.setattr(moshi_mlx, "load", broken)
    assert main(["file", "--demo", "-o", "a.wav"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: something unexpected") and "KeyError" in said and "--debug" in said
    assert "Traceback" not in said and said.count("\n") == 1
    assert not list(here.iterdir())
