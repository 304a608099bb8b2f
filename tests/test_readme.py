"""Every block of code in the README and in docs/ is run as written, so that it cannot rot, or is listed with a reason.

Python is executed, commands are given to a shell, in a folder with a recorded question. What cannot be run here (it
needs a network, a microphone, hours) is in ``NOT_RUN``: a new block that is in neither makes a test fail.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
from markdown_it import MarkdownIt

import moshi_mlx
from tests.helpers.tiny import tiny_model

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = DOCUMENTS[0].read_text(encoding="utf-8")
QUESTIONS = ROOT / "moshi_mlx" / "assets" / "questions.wav"

# Commands, by how they begin or what is in them.
NOT_RUN = {
    r"^(uv tool|pip|apt) install ": "asks a package index; `make wheel-check` installs the wheel",
    r"^git clone ": "asks a forge",
    r"^make (talk|bench)$": "needs the environment of a clone: a workflow runs it",
    r"--(model|captions) kyutai/": "downloads a model",
    r"^moshi-mlx-local (translate|complete)\b": "downloads a model: tests/app/test_translate.py runs small ones",
    r"--model nvidia/": "downloads a model, and asks for an account",
    r"moshi-mlx-local speak\b": "downloads a model: tests/app/test_speak.py runs a small one",
    r"^moshi-mlx-local web\b": "serves until it is stopped: tests/web does",
    r"^python -m moshi\.client ": "Kyutai's program: tests/web/test_kyutai_clients.py runs it",
    r"^\.venv/bin/python -m benchmarks mimi small": "minutes: tests/benchmarks runs smaller ones",
    r"-m benchmarks paired ": "minutes, and needs another checkout",
    r"-m tests\.quantize\.memory 3200": "minutes, and 3 GB: tests/quantize runs it with less",
    r"^python examples/embedding\.py ": "tests/test_embedding.py runs it, with less silence",
    r" --target-bpw ": "a minute: tests/quantize/test_report.py runs it on a smaller model",
    r" --distill ": "minutes: tests/quantize/test_distill.py runs it on a smaller model",
    r"-m moshi_mlx_training\.": "hours",
    r"^mlx\.launch --hostfile ": "needs other machines: tests/test_sharding.py starts processes on this one",
    r"^moshi-mlx-finetune train kyutai/": "downloads a model",
    r"-m benchmarks\.finetune": "a quarter of an hour: tests/finetune trains smaller models",
}
# What stands for the reader's own.
PLACEHOLDERS = {"SOURCE": "small", "DEST": "smaller"}
# Indented blocks that are pictures, by their first words, and what a command prints.
PICTURES = ("sound > encode", "moshi_mlx/  ", "talk.wav  ", "{'source'")


class Block(NamedTuple):
    """A block of code and where it is."""

    document: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.document}:{self.line}"


def blocks() -> list[Block]:
    found = []
    for path in DOCUMENTS:
        for token in MarkdownIt("commonmark").parse(path.read_text(encoding="utf-8")):
            if token.type in ("fence", "code_block"):
                assert token.map is not None
                fence = token.type == "fence"
                found.append(Block(path.name, token.map[0] + 1 + fence, token.info if fence else "", token.content))
    return found


BLOCKS = blocks()
PYTHON = [block for block in BLOCKS if block.language == "python"]
# Other programs' Python, with packages that are not installed here: tests/web/openai_clients.py does the same.
CLIENTS = [block for block in BLOCKS if block.language == "python client"]


def commands() -> list[Block]:
    """The lines of all other blocks, without comments."""
    lines = []
    for block in BLOCKS:
        if block.language.startswith("python") or block.text.startswith(PICTURES[:3]):
            continue
        for offset, line in enumerate(block.text.splitlines()):
            command = re.split(r"\s{2,}(?!-)|\s+#", line.removeprefix("$ ").strip())[0]
            if command and not command.startswith(PICTURES):
                lines.append(Block(block.document, block.line + offset, block.language, command))
    return lines


COMMANDS = commands()
RUN = [command for command in COMMANDS if not any(re.search(pattern, command.text) for pattern in NOT_RUN)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a question in it, one that the built-in model knows."""
    pcm, rate = soundfile.read(QUESTIONS, dtype="float32")
    soundfile.write(tmp_path / "question.wav", pcm[round(9.6 * rate) : round(12.0 * rate)], rate)
    soundfile.write(tmp_path / "speech.wav", pcm[: 2 * rate], rate)
    soundfile.write(tmp_path / "talk.wav", pcm[: rate // 2], rate)
    for name in ("benchmarks", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_something_to_run() -> None:
    """If this fails, the tests below run nothing."""
    assert len(PYTHON) >= 4 and len(RUN) >= 3
    assert {block.document for block in PYTHON} == {"README.md", "embedding.md", "transcribing.md"}
    assert {block.language for block in BLOCKS} <= {"python", "python client", ""}, "say here how that language is run"


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_python_runs_as_written(
    block: Block, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, a reader who copies it gets an error, or hears nothing. A random model stands for a download."""
    load, recogniser = moshi_mlx.load, tiny_model(stt={"audio_delay_seconds": 0.04})
    monkeypatch.setattr(moshi_mlx, "load", lambda name, **given: recogniser if "/stt-" in name else load(name))
    exec(compile("\n" * (block.line - 1) + block.text, block.document, "exec"), {"__name__": "__main__"})
    said = capsys.readouterr().out
    if "question.wav" in block.text:
        assert len(said.split()) >= 3, f"it answers with words, not with {said!r}"
    if "answer.wav" in block.text:
        answer, rate = soundfile.read(folder / "answer.wav")
        assert len(answer) >= 6 * rate and np.abs(answer).max() > 0.05


@pytest.mark.parametrize("block", CLIENTS, ids=lambda block: block.name)
def test_clients_code_is_what_the_tests_do(block: Block) -> None:
    """If this fails, a document shows how to connect in a way that no test tries."""
    tree = compile(block.text, block.document, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)
    tried = (ROOT / "tests" / "web" / "openai_clients.py").read_text(encoding="utf-8")
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {word.arg for word in ast.walk(tree) if isinstance(word, ast.keyword) and word.arg}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names
    assert not [name for name in names if name not in tried]


@pytest.mark.parametrize("command", RUN, ids=lambda command: f"{command.name} {command.text[:40]}")
def test_commands_run_as_written(command: Block, folder: Path) -> None:
    """If this fails, a reader who types it gets an error. If it can never run here, give it a line in NOT_RUN."""
    line = command.text.replace(".venv/bin/", "")
    for word, value in PLACEHOLDERS.items():
        line = re.sub(rf"\b{word}\b", value, line)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{line}: {done.stderr}"


def test_what_is_not_run_is_there() -> None:
    """If this fails, NOT_RUN excuses what no document says any more."""
    for pattern in NOT_RUN:
        assert any(re.search(pattern, command.text) for command in COMMANDS), pattern


USERS_PROGRAM = """
import wave

import numpy as np

import moshi_mlx
from moshi_mlx import GenerationConfig, MoshiError, Sampling, SessionFrame


def answer(name: str) -> list[str]:
    with wave.open(name) as file:
        rate = file.getframerate()
        pcm = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    model = moshi_mlx.load("small", on_progress=print)
    greedy = GenerationConfig(text=Sampling(0.0), audio=Sampling(0.0))
    try:
        reply = model.reply(pcm, rate, seed=1, generation=greedy, on_frame=show)
    except MoshiError as error:
        return [str(error)]
    print(f"{reply.seconds_computed:.1f} s for {reply.seconds_audio:.1f} s, loudest {np.abs(reply.pcm).max():.2f}")
    return [f"{word.start:.2f} {word.text}" for word in reply.words]


def show(frame: SessionFrame) -> None:
    print(frame.text, end="")


print(answer("question.wav"))
"""


def test_a_users_program_type_checks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a program with strict types cannot use the library, or what the documents show does not pass."""
    pytest.importorskip("mypy", reason="comes with the dev extra")
    programs = {"user.py": USERS_PROGRAM}
    for block in PYTHON:
        # soundfile has no types, which is not this package's to mend.
        first = "# mypy: disable-error-code=import-untyped\n" if "import soundfile" in block.text else ""
        programs[f"{block.document.removesuffix('.md').lower()}_{block.line}.py"] = first + block.text
    # If the package brought no types, these would be unused, and strict mypy says so.
    programs["wrong.py"] = (
        "import moshi_mlx\n"
        "moshi_mlx.load(1)  # type: ignore[call-overload]\n"
        'moshi_mlx.load("small").session().step(b"").text.no_such()  # type: ignore[attr-defined]\n'
    )
    for name, text in programs.items():
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(folder / "cache"), *programs]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    exec(compile(USERS_PROGRAM, "user.py", "exec"), {"__name__": "__main__"})
    assert "loudest 0." in capsys.readouterr().out


def test_names_of_the_library_exist() -> None:
    """If this fails, a document names something that moshi_mlx does not have."""
    import moshi_mlx

    for block in PYTHON:
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "moshi_mlx":
                assert hasattr(moshi_mlx, node.attr), f"{block.name}: moshi_mlx.{node.attr}"


def test_files_named_in_the_readme_exist() -> None:
    """If this fails, a link or a path in the README leads nowhere."""
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)#:]+(?:#[^)]*)?)\)", README)]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_make_targets_named_in_the_readme_exist() -> None:
    """If this fails, a `make` line of the README is answered with "No rule to make target"."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    documents = [README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")]
    targets = {name for text in documents for name in re.findall(r"(?:^    |`)make ([a-z-]+)\b", text, re.MULTILINE)}
    assert {"test", "talk", "check"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
