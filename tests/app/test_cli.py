"""The command line."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
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
    options = "--output --model --codec --seed --trailing-silence --transcript --json --quiet --force --greedy --demo"
    for option in [*options.split(), "--debug"]:
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
        (["--model", "small", "file", "q.wav"], ["file", "--model", "small", "q.wav"]),
        (["--debug", "--json", "check"], ["--debug", "check", "--json"]),
        (["--model=file", "--json"], ["talk", "--model=file", "--json"]),
        (["--json", "nonsense"], ["talk", "--json", "nonsense"]),
    ],
)
def test_without_a_verb_it_talks(given: list[str], taken: list[str]) -> None:
    """If this fails, the bare command does not converse, or options are lost on the way."""
    assert cli._with_verb(given, {"--model", "--seed"}) == taken


# What stands for each verb's own words; a verb that is not here has none.
WORDS = {
    "file": ["question.wav"],
    "translate": ["speech.wav"],
    "voice": ["speech.wav"],
    "completion": ["bash"],
}


def pieces(parser: argparse.ArgumentParser) -> list[list[str]]:
    """Every option of a verb, with a value where it takes one."""
    found = []
    for action in parser._actions:
        if not action.option_strings or isinstance(action, argparse._HelpAction):
            continue
        value = [str(next(iter(action.choices)))] if action.choices else ["-5" if "bonus" in action.dest else "1"]
        if action.dest == "frames":
            value = ["20"]
        found.append([action.option_strings[-1], *(value if action.nargs is None else [])])
    return found


@pytest.mark.parametrize("verb", cli.VERBS)
def test_options_stand_anywhere(verb: str) -> None:
    """If this fails, an option before the command or between its words is an error, or changes its meaning."""
    parser = cli.build_parser()
    options, words = pieces(cli.verbs(parser)[verb]), WORDS.get(verb, [])
    wanted = vars(cli.parse(parser, [verb, *words, *(part for option in options for part in option)]))
    assert len(wanted) > len(options)
    rng = np.random.default_rng(len(verb))
    for _ in range(30):
        order = [*options]
        rng.shuffle(order)
        places = sorted(rng.integers(0, len(order) + 1, 1 + len(words)))
        for place, word in zip(reversed(places), reversed([verb, *words]), strict=True):
            order.insert(place, [word])
        assert vars(cli.parse(parser, [part for one in order for part in one])) == wanted, order


def test_an_option_takes_a_value_everywhere_or_nowhere() -> None:
    """If this fails, `moshi-mlx-local --option word file ...` takes a value for a command, or a command for a value."""
    parser, seen = cli.build_parser(), {}
    for verb in cli.verbs(parser).values():
        for action in verb._actions:
            for name in action.option_strings:
                assert action.nargs in (None, 0), "a value that may be left out cannot stand before a verb"
                assert seen.setdefault(name, action.nargs) == action.nargs, name


@pytest.mark.parametrize(
    "given, said",
    [
        (["--model", "small", "walk"], "moshi-mlx-local talk: error: unrecognized arguments: walk"),
        (["--modell", "check"], "moshi-mlx-local check: error: unrecognized arguments: --modell"),
        (["file", "a.wav", "b\x1b[31m\u202e.wav", "-o", "c.wav"], "unrecognized arguments: b [31m .wav"),
        (["walk\x1b[31m"], "invalid choice: 'walk\\x1b[31m'"),
    ],
)
def test_what_is_wrong_with_the_command_line(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a mistyped command is blamed on something else, or what was typed is obeyed by the terminal."""
    assert main(given) == 2
    shown = capsys.readouterr().err
    assert said in shown and "\x1b" not in shown and "usage: moshi-mlx-local" in shown


def test_a_traceback_is_printable(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, a file's name in a traceback is obeyed by the terminal."""
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    assert main(["--debug", "file", "a\x1b[2J\u202e.wav", "-o", "b.wav"]) == 1
    sys.stderr.flush()
    said = sys.stderr.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert "Traceback" in said and "error: a [2J .wav" in said and "\x1b" not in said and "\u202e" not in said


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
