"""``moshi-mlx-local completion``: what a shell needs to complete verbs, options, files and the names of models."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from moshi_mlx_app.known import BUILTIN, KNOWN
from moshi_mlx_app.terminal import say
from moshi_mlx_app.version import DISTRIBUTION

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

HELP = "print a script that completes commands in your shell"
EXAMPLES = f"""\
examples:
  bash:  moshi-mlx-local completion bash > ~/.local/share/bash-completion/completions/{DISTRIBUTION}
  zsh:   moshi-mlx-local completion zsh > ~/.zfunc/_{DISTRIBUTION}
         with  fpath+=(~/.zfunc); autoload -U compinit; compinit  in ~/.zshrc
  fish:  moshi-mlx-local completion fish > ~/.config/fish/completions/{DISTRIBUTION}.fish

Once for each shell; to try it in this one alone: source <(moshi-mlx-local completion bash)
The script starts no Python at a Tab: print it anew after an update.
"""
SHELLS = ("bash", "zsh", "fish")

_FILES = ("question", "output", "transcript", "picture", "trace", "cert", "key")
_FOLDERS = ("record",)
_MODEL = {"bash": "_moshi_models", "zsh": "_moshi_models", "fish": "(_moshi_models)"}
_NAMES = " ".join((BUILTIN, *(known.name for known in KNOWN)))
_PREAMBLE = {
    "bash": f'_moshi_models() {{\n  compgen -W "{_NAMES}" -- "$1"\n  compgen -d -- "$1"\n}}',
    "zsh": f"_moshi_models() {{\n  _alternative 'models:model:({_NAMES})' 'folders:folder:_files -/'\n}}",
    "fish": f"function _moshi_models\n  printf '%s\\n' {_NAMES}\n  __fish_complete_directories (commandline -ct)\nend",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's own options."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def run(args: argparse.Namespace) -> int:
    """Print the script. Returns the exit status."""
    import shtab

    from moshi_mlx_app.cli import build_parser
    from moshi_mlx_app.verbs import talk

    parser = build_parser()
    talk.add_arguments(parser)  # its options need no verb
    for action in _actions(parser):
        if action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.dest == "model":
            action.complete = _MODEL  # type: ignore[attr-defined]
    say(shtab.complete(parser, args.shell, preamble=_PREAMBLE))  # type: ignore[arg-type]
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every option and argument, those of the verbs too."""
    for action in parser._actions:
        yield action
        verbs: Any = action.choices
        if isinstance(action, argparse._SubParsersAction):
            for verb in verbs.values():
                yield from _actions(verb)
