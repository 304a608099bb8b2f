"""Every option named in a message, a help text or a document must exist."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from moshi_mlx_app import cli

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "app" / "moshi_mlx_app"
FILLED = "\0"  # what an f-string fills in
FLAG = re.compile(r"(?<![\w`-])--[a-z\0][a-z0-9\0-]*")
COMMAND = re.compile(r"moshi-mlx-local((?: +(?!#|\|)[^\s`()]+)+)")
PARSER = cli.build_parser()


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings}


VERBS = {verb: options(parser) for verb, parser in cli.verbs(PARSER).items()}
ANY = options(PARSER) | {"--debug"}


def texts(path: Path) -> Iterator[str]:
    """Every string of a module that is no docstring and not an option itself, as where it is defined."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped.update(map(id, node.values))
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else FILLED for part in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            if not FLAG.fullmatch(node.value):
                yield node.value


def imported(path: Path) -> set[Path]:
    """The app's modules that a module needs, and those need in turn; another verb's module and the parser end it."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop().read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("moshi_mlx_app"):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                module = APP.joinpath(*name.split(".")[1:]).with_suffix(".py")
                if module.is_file() and module not in found | {APP / "cli.py"} and module.parent.name != "commands":
                    found.add(module)
                    waiting.append(module)
    return found


def unknown(text: str, known: set[str]) -> list[str]:
    """Options in a text that do not exist: in a whole command line its own command counts, elsewhere ``known``."""
    bad = []
    for command in COMMAND.findall(text):
        words = [*command.split()]
        verb = next((word for word in cli._with_verb(words, set()) if word in VERBS), "talk")
        bad += [flag for flag in FLAG.findall(" ".join(words)) if flag not in VERBS[verb] | ANY]
    for flag in FLAG.findall(COMMAND.sub("", text)):
        pattern = re.compile(re.escape(flag).replace(re.escape(FILLED), ".+"))
        if not any(pattern.fullmatch(option) for option in known):
            bad.append(flag)
    return bad


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verb_names_options_that_it_has(verb: str) -> None:
    """If this fails, a message suggests an option that this command does not have."""
    own = APP / "commands" / f"{verb}.py"
    for module in (own, *imported(own)):
        for text in texts(module):
            assert not unknown(text, VERBS[verb] | ANY), (verb, module.name, text)


def test_the_program_names_options_that_it_has() -> None:
    """If this fails, the help or an error of the program itself leads nowhere."""
    loading = set.intersection(*(names for names in VERBS.values() if "--model" in names))
    for text in texts(APP / "cli.py"):  # what it says about models comes from a verb that loads one
        assert not unknown(text, ANY | loading), text


def test_the_library_names_no_option() -> None:
    """If this fails, programs without a command line, or with another one, tell their users of options of this one."""
    for path in sorted((ROOT / "moshi_mlx").rglob("*.py")):
        if path.name != "local.py":  # a command itself, which names the one to use
            for text in texts(path):
                assert not FLAG.search(text.replace("`", " ")), (path.name, text)


def test_documents_and_the_page_name_options_that_exist() -> None:
    """If this fails, a command that somebody copies is refused."""
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *APP.rglob("*.js"), *APP.rglob("*.html")]
    found = 0
    for path in documents:
        for command in COMMAND.findall(path.read_text(encoding="utf-8")):
            found += 1
            assert not unknown(f"moshi-mlx-local{command}", set()), (path.name, command)
    assert found > 10


def test_what_the_library_calls_an_argument_is_an_option_here(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, an error tells people at a terminal to write Python."""
    assert cli.main(["file", "--demo", "-o", "a.wav", "--codec", "rust"]) == 1
    said = capsys.readouterr().err
    assert "the Rust codec" in said and "kind=" not in said and "codec=" not in said and "--codec mlx" in said
