"""The command that runs the benchmarks."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

import benchmarks.__main__ as runner


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Benchmarks a, broken and z instead of the real ones; what was called with what."""
    called: list[tuple[str, list[str]]] = []

    def make(name: str, error: BaseException | None = None) -> None:
        def main(argv: list[str]) -> None:
            called.append((name, argv))
            if error is not None:
                raise error

        module = types.ModuleType(f"benchmarks.{name}")
        module.main = main  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"benchmarks.{name}", module)

    make("a")
    make("broken", ValueError("no such thing"))
    make("stopped", KeyboardInterrupt())
    make("z")
    monkeypatch.setattr(runner, "available", lambda: dict.fromkeys(("a", "broken", "stopped", "z"), "something"))
    return called


def test_every_module_can_be_run() -> None:
    """A benchmark without a docstring or ``main`` would be missing from the list, or break it."""
    names = {path.stem for path in runner.FOLDER.glob("*.py") if not path.name.startswith("_")}
    assert set(runner.available()) == names
    assert all(runner.available().values())


def test_nothing_is_imported_to_list(tmp_path: Path) -> None:
    """``--list`` would fail where one benchmark's packages are missing."""
    (tmp_path / "one.py").write_text(
        '"""Speed of one: ``python -m x``.\n\nMore."""\nimport nowhere\ndef main(a): ...\n'
    )
    (tmp_path / "helper.py").write_text("x = 1\n")
    (tmp_path / "_hidden.py").write_text("def main(a): ...\n")
    assert runner.available(tmp_path) == {"one": "Speed of one"}


def test_one_that_fails_stops_no_other(three: list[tuple[str, list[str]]], capsys: pytest.CaptureFixture[str]) -> None:
    """A peer that is not installed would cost all measurements after it."""
    assert runner.main(["a", "broken", "z"]) == 1
    assert [name for name, _ in three] == ["a", "broken", "z"]
    seen = capsys.readouterr()
    assert "failed: broken" in seen.err and "no such thing" in seen.err
    assert "== z: done" in seen.out


def test_interrupt_ends_the_run(three: list[tuple[str, list[str]]], capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C would print a traceback, or go on with the next one."""
    assert runner.main(["stopped", "z"]) == 130
    assert [name for name, _ in three] == ["stopped"]
    assert "Traceback" not in capsys.readouterr().err


def test_options_reach_the_one_named(three: list[tuple[str, list[str]]]) -> None:
    """The options of a benchmark could not be used through the runner."""
    assert runner.main(["a", "--", "--frames", "3"]) == 0
    assert three == [("a", ["--frames", "3"])]
    with pytest.raises(SystemExit):
        runner.main(["a", "z", "--", "--frames", "3"])
    with pytest.raises(SystemExit):
        runner.main(["nonsense"])
