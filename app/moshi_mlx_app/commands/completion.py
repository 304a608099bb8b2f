"""``moshi-mlx-local completion``: shell completion for commands, options, files and model names."""

from __future__ import annotations

import argparse

from moshi_mlx_app.models.catalog import BUILTIN, CATALOG
from moshi_mlx_app.screen.terminal import say
from moshi_mlx_app.version import DISTRIBUTION

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

HELP = "print a script that completes commands in your shell"
EXAMPLES = f"""\
examples:
  bash:  moshi-mlx-local completion bash > ~/.local/share/bash-completion/completions/{DISTRIBUTION}
  zsh:   moshi-mlx-local completion zsh > ~/.zfunc/_{DISTRIBUTION}
         with  fpath+=(~/.zfunc); autoload -U compinit; compinit  in ~/.zshrc
  fish:  moshi-mlx-local completion fish > ~/.config/fish/completions/{DISTRIBUTION}.fish

Install it once per shell; to try it in the current one: source <(moshi-mlx-local completion bash)
The script does not run Python: print it again after an update.
"""
SHELLS = ("bash", "zsh", "fish")

_FILES = ("question", "output", "transcript", "picture", "trace", "cert", "key")
_FOLDERS = ("record",)
_NAMES = {
    "_moshi_mlx_local_dialogue_models": [BUILTIN, *(model.name for model in CATALOG if model.purpose == "dialogue")],
    "_moshi_mlx_local_models": [BUILTIN, *(model.name for model in CATALOG)],
}
_ANY_MODEL = ("file", "bench")  # commands that need no dialogue model


def _preamble(shell: str) -> str:
    """Functions that complete the names of models, and folders."""
    functions = []
    for function, names in _NAMES.items():
        words = " ".join(names)
        functions.append(
            {
                "bash": f'{function}() {{\n  compgen -W "{words}" -- "$1"\n  compgen -d -- "$1"\n}}',
                "zsh": f"{function}() {{\n  _alternative 'models:model:({words})' 'folders:folder:_files -/'\n}}",
                "fish": f"function {function}\n  printf '%s\\n' {words}\n"
                "  __fish_complete_directories (commandline -ct)\nend",
            }[shell]
        )
    return "\n".join(functions)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def run(args: argparse.Namespace) -> int:
    """Print the script. Returns the exit status."""
    import shtab

    from moshi_mlx_app.cli import build_parser, verbs
    from moshi_mlx_app.commands import talk

    parser = build_parser()
    talk.add_arguments(parser)  # its options work without a command
    for verb, options in [("talk", parser), *verbs(parser).items()]:
        models = "_moshi_mlx_local_models" if verb in _ANY_MODEL else "_moshi_mlx_local_dialogue_models"
        for action in options._actions:
            if action.dest in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.dest in _FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.dest == "model":
                action.complete = {"bash": models, "zsh": models, "fish": f"({models})"}  # type: ignore[attr-defined]
    script = shtab.complete(parser, args.shell, preamble={args.shell: _preamble(args.shell)})  # type: ignore[arg-type]
    # Otherwise zsh completes talk's options after every command.
    all_options = "_arguments -C -s $_shtab_moshi_mlx_local_opt"
    say(*script.replace(all_options, all_options.replace("-s", '-s -A "-*"')).split("\n"))
    return 0
