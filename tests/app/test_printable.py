"""Names of models, files and devices with control characters or rich markup, through every command."""

from __future__ import annotations

import ast
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import soundfile
from moshi_mlx_app.audio import device
from moshi_mlx_app.cli import VERBS, main
from moshi_mlx_app.commands import check
from moshi_mlx_app.screen import picture

from moshi_mlx.printable import printable
from tests.app.test_device import until
from tests.app.test_talk import QUESTIONS, card  # noqa: F401
from tests.helpers.checkpoints import small_config, write_checkpoint
from tests.helpers.screen import Terminal

# A title, colours, a cleared screen, C1 controls, bidirectional marks, line breaks; and markup that opens and closes.
EVIL = "a[bold]b\x1b]0;owned\x07\x1b[31m\x9b2J\u202egpj\u2066\r\nerror: x\u2069\u200f"
SEEN = "a[bold]b"
CLOSED = "m[/red]x"  # a folder in a folder


def harmless(text: str) -> str:
    """The text, in which no line holds anything that a terminal obeys."""
    for line in text.split("\n"):
        assert line == printable(line)
    return text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model in a folder with such a name, without its line break: a test looks for lines."""
    folder = tmp_path_factory.mktemp("models") / CLOSED / EVIL
    return str(write_checkpoint(folder, small_config(), mimi=True))


@pytest.fixture
def evil_card(card: Any, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: F811
    """Devices with such names."""
    for number, entry in enumerate(card.list):
        entry["name"] = f"{CLOSED} {EVIL}{number}"
    hosts = [{**card.query_hostapis()[0], "name": EVIL}]
    monkeypatch.setattr(card, "query_hostapis", lambda: hosts)
    monkeypatch.setattr(device, "_RETRY", 0.05)
    monkeypatch.setattr(check, "_LISTEN", 0.2)
    return card


Run = Callable[..., tuple[int, str]]


@pytest.fixture(params=["terminal", "pipe"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the program; its status, and everything that it printed, which is harmless."""

    def begin(*arguments: str) -> tuple[int, str]:
        if request.param == "pipe":
            status = main([*arguments])
            said = capsys.readouterr()
            return status, harmless(said.out + said.err)
        with monkeypatch.context() as patch:
            stream = Terminal()
            patch.setenv("TERM", "xterm")
            patch.setenv("COLUMNS", "300")
            patch.setattr("sys.stdout", stream)
            patch.setattr("sys.stderr", stream)
            status = main([*arguments])
        return status, harmless("\n".join(stream.screen(300).lines))

    return begin


def test_devices(run: Run, evil_card: Any) -> None:
    """If this fails, a device's name can control the terminal."""
    status, said = run("devices")
    assert status == 0 and said.count(f"{CLOSED} {SEEN}") == 4 and len(said.strip().splitlines()) == 4
    status, said = run("devices", "--json")
    assert [entry["name"] for entry in json.loads(said.replace("\n", ""))] == [
        entry["name"] for entry in evil_card.list
    ]


def test_check(run: Run, evil_card: Any, checkpoint: str) -> None:
    """If this fails, what a bug report asks for can be made to say something else."""
    status, said = run("check", "--frames", "4", "--model", checkpoint)
    assert f"microphone  {CLOSED} {SEEN}" in said and f"model       {SEEN}" in said and status in (0, 1)
    status, said = run("check", "--frames", "4", "--model", checkpoint, "--json")
    assert json.loads(said.replace("\n", ""))["model"]["name"] == EVIL
    status, said = run("check", "--frames", "4", "--model", checkpoint, "--input-device", EVIL)
    assert "has no microphone" in said or SEEN in said


def test_bench(run: Run, checkpoint: str, here: Path) -> None:
    """If this fails, a measurement prints what a model's folder says to a terminal, or draws a broken picture."""
    status, said = run("bench", "--frames", "4", "--model", checkpoint, "--picture", f"{EVIL}.svg")
    assert status == 0 and f"picture: {SEEN}" in said and f": {SEEN}" in said
    drawn = ElementTree.parse(here / f"{EVIL}.svg")
    harmless("".join(drawn.getroot().itertext()).replace("\n", ""))
    ElementTree.fromstring(picture.draw(f"{EVIL}\ud800\uffff", EVIL, {"step": [1.0]}, {}, 80.0))
    status, said = run("bench", "--picture", f"{EVIL}/a.svg")
    assert status == 1 and f"error: {SEEN}" in said


def test_talk(run: Run, evil_card: Any, checkpoint: str, here: Path) -> None:
    """If this fails, a name in a notice of the panel, or in the list of what was recorded, commands the terminal."""

    def pull() -> None:
        assert until(lambda: evil_card.streams and evil_card.streams[-1].active)
        evil_card.streams[0].active = False

    thread = threading.Thread(target=pull)
    thread.start()
    status, said = run("talk", "--no-aec", "--seconds", "2", "--model", checkpoint, "--record", EVIL)
    thread.join()
    assert status == 0, said
    assert f"recorded: {SEEN}" in said and f"the microphone '{CLOSED} {SEEN}" in said and "has stopped" in said
    assert f"sound again: {CLOSED} {SEEN}" in said
    status, said = run("talk", "--input-device", f"{EVIL}?", "--model", checkpoint)
    assert status == 1 and f"no microphone is called '{SEEN}" in said
    status, said = run("talk", "--input-device", EVIL, "--model", checkpoint)
    assert status == 1 and "several microphones are called" in said and f"2: {CLOSED} {SEEN}" in said


def test_file(run: Run, checkpoint: str, here: Path) -> None:
    """If this fails, a recording's or an answer's name commands the terminal."""
    pcm, rate = soundfile.read(QUESTIONS, frames=24_000)
    question, answer = here / f"q{EVIL}.wav", f"{EVIL}.wav"
    soundfile.write(question, pcm, rate)
    arguments = ["file", str(question), "-o", answer, "--model", checkpoint, "--trace", f"trace{EVIL}.json"]
    status, said = run(*arguments)
    assert status == 0 and SEEN in said, said
    status, said = run(*arguments)
    assert status == 1 and f"error: {SEEN}" in said


@pytest.mark.parametrize("verb", ["talk", "file", "web", "check", "bench"])
def test_a_model_that_is_not_there(run: Run, evil_card: Any, verb: str, here: Path) -> None:
    """If this fails, a mistyped or malicious name of a model commands the terminal."""
    more = ["--demo", "-o", "a.wav"] if verb == "file" else []
    (here / CLOSED / EVIL).mkdir(parents=True)
    for model in (EVIL, f"./{CLOSED}/{EVIL}"):
        status, said = run(verb, "--model", model, *more)
        assert status == 1 and SEEN in said and "something unexpected" not in said, said
    assert CLOSED in said
    status, said = run(verb, *more, f"--{EVIL}".replace(" ", ""))
    assert status == 2 and f"unrecognized arguments: --{SEEN}" in said
    status, said = run(verb, "--codec", EVIL, *more)
    assert status == 2 and "invalid choice" in said


def test_completion_and_help(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a script for a shell, the help or an error about either holds what a terminal obeys."""
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "USER"):
        monkeypatch.setenv(name, f"/{EVIL}")
    for verb in VERBS:
        assert run(verb, "--help")[0] == 0
    for shell in ("bash", "zsh", "fish"):
        assert run("completion", shell)[0] == 0
    for words in (("completion", EVIL), (EVIL,), ("--debug", EVIL)):
        status, said = run(*words)
        assert status == 2 and "invalid choice" in said


def test_nothing_else_prints() -> None:
    """If this fails, text reaches a terminal without having been made printable."""
    app = Path(device.__file__).parent
    for path in app.rglob("*.py"):
        if path.name in ("terminal.py", "default_device.py"):  # what prints for all; a process that writes to a pipe
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                first = node.args[0]
                safe = isinstance(first, ast.Constant) or ast.unparse(first).startswith("printable(")
                assert safe, (path.name, ast.unparse(node))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "write":
                assert not ast.unparse(node.func).startswith("sys."), (path.name, ast.unparse(node))
