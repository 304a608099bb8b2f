"""Completion, asked of real shells."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from moshi_mlx_app import cli
from moshi_mlx_app.cli import main
from moshi_mlx_app.commands.completion import SHELLS

PROGRAM, QUANTIZE = "moshi-mlx-local", "moshi-mlx-quantize"

# What is typed, and some of what must come. Without a verb the options are those of talk.
TYPED = [
    ("", set(cli.VERBS)),
    ("ch", {"check"}),
    ("--rec", {"--record"}),
    ("talk --no-a", {"--no-aec"}),
    ("file --codec ", {"auto", "rust", "mlx", "numpy"}),
    ("file ques", {"question.wav"}),
    ("talk --model kyutai/moshiko", {f"kyutai/moshiko-mlx-{bits}" for bits in ("q4", "q8", "bf16")}),
    ("web --model kyutai/", {f"kyutai/moshi{who}-mlx-{bits}" for who in ("ko", "ka") for bits in ("q4", "q8", "bf16")}),
    ("file --model kyutai/stt", {"kyutai/stt-1b-en_fr-mlx", "kyutai/stt-2.6b-en-mlx"}),
    ("bench --model kyutai/stt", {"kyutai/stt-1b-en_fr-mlx", "kyutai/stt-2.6b-en-mlx"}),
    ("completion f", {"fish"}),
]


@pytest.fixture
def script(request: pytest.FixtureRequest, here: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Both programs' scripts for a shell, in one file beside a question."""
    shell: str = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    from moshi_mlx_quantize.cli import main as quantize

    (here / "question.wav").write_text("")
    assert main(["completion", shell]) == 0
    path = here / f"script.{shell}"
    path.write_text(capsys.readouterr().out)
    assert quantize(["--completion", shell]) == 0
    (here / f"quantize.{shell}").write_text(capsys.readouterr().out)
    return path


@pytest.mark.parametrize("script", ["bash"], indirect=True)
def test_bash(script: Path) -> None:
    """If this fails, Tab does nothing in bash, or completes what does not exist."""
    ask = """
    source "$1"; shift; name=_shtab_${1//-/_}
    COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=("$@"); COMP_CWORD=$(($#-1))
    $name "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"; printf '%s\\n' "${COMPREPLY[@]}"
    """

    def complete(path: Path, program: str, text: str) -> set[str]:
        words = [program, *text.split(), *([""] if not text or text.endswith(" ") else [])]
        done = subprocess.run(
            ["bash", "--norc", "-c", ask, "bash", str(path), *words],
            cwd=script.parent,
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert not done.stderr, done.stderr
        return set(done.stdout.split())

    for text, wanted in TYPED:
        assert wanted <= complete(script, PROGRAM, text), text
    assert complete(script, PROGRAM, "talk --no-a") == {"--no-aec"}
    for verb in ("", "talk ", "web ", "check "):  # these models do not converse
        assert complete(script, PROGRAM, f"{verb}--model kyutai/stt") == set()
    assert "--q-bits" in complete(script.with_name("quantize.bash"), QUANTIZE, "--q-")
    assert "q4" in complete(script.with_name("quantize.bash"), QUANTIZE, "--recipe q")


@pytest.mark.parametrize("script", ["fish"], indirect=True)
def test_fish(script: Path) -> None:
    """If this fails, Tab does nothing in fish, or completes what does not exist."""
    lines = [f"source {script}", f"source {script.with_name('quantize.fish')}"]
    typed = [*((f"{PROGRAM} {text}", wanted) for text, wanted in TYPED), (f"{QUANTIZE} --q-b", {"--q-bits"})]
    for text, _ in typed:
        lines += [f"complete -C '{text}'", "echo ----"]
    done = subprocess.run(
        ["fish", "--no-config", "-c", "\n".join(lines)], cwd=script.parent, capture_output=True, text=True, timeout=60
    )
    assert not done.stderr, done.stderr
    answers = done.stdout.split("----\n")
    for (text, wanted), answer in zip(typed, answers, strict=False):
        offered = {line.partition("\t")[0] for line in answer.splitlines()}
        assert wanted <= offered, text
        assert "kyutai/stt-1b-en_fr-mlx" in wanted or "kyutai/stt-1b-en_fr-mlx" not in offered, text


@pytest.mark.parametrize("script", ["zsh"], indirect=True)
def test_zsh(script: Path) -> None:
    """If this fails, Tab does nothing in zsh, or completes what does not exist."""
    child, master = pty.fork()
    if child == 0:
        os.environ.update(TERM="dumb", COLUMNS="300", PS1="> ")
        os.chdir(script.parent)
        os.execvp("zsh", ["zsh", "-f", "-i"])

    # Tab completes with the first match, notes the line, and empties it.
    setup = [
        "autoload -U compinit && compinit -u -D; setopt menucomplete",
        f'eval "$(cat {script})"; eval "$(cat {script.with_name("quantize.zsh")})"',
        'note() { zle complete-word; print -r -- "$BUFFER" >> noted; BUFFER= }; zle -N note; bindkey "^I" note',
    ]
    typed = [*((f"{PROGRAM} {text}", wanted) for text, wanted in TYPED), (f"{QUANTIZE} --q-b", {"--q-bits"})]
    noted, end = script.with_name("noted"), time.monotonic() + 60
    keys = "\n".join([*setup, "echo rea''dy\n"]).encode()
    shown = b""
    try:
        while time.monotonic() < end and not (noted.exists() and noted.read_text().count("\n") == len(typed)):
            if b"ready" in shown:
                shown, keys = b"", "\t".join([*(text for text, _ in typed), ""]).encode()
            if keys:
                keys = keys[os.write(master, keys[:200]) :]
            if select.select([master], [], [], 0.05)[0]:
                shown += os.read(master, 65536)
    finally:
        os.close(master)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    answers = noted.read_text().splitlines()
    assert len(answers) == len(typed)
    for (text, wanted), answer in zip(typed, answers, strict=True):
        assert answer.startswith(text) and answer.rstrip().endswith(tuple(wanted)), (text, answer)


def test_a_shell_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, somebody sources an error message."""
    assert main(["completion", "tcsh"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and all(shell in said.err for shell in SHELLS)
