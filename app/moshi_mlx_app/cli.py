"""The program ``moshi-mlx-local``: selects a command, runs it, and reports errors as one line and an exit status.

Exit status: 0 success, 1 an error, 2 a wrong command line, 130 stopped with Ctrl-C.
Only the standard library is imported before :func:`main` runs, after :mod:`moshi_mlx_app.start` has set up Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Container, Iterator
from typing import Any, NoReturn

from moshi_mlx_app.start import end
from moshi_mlx_app.version import DISTRIBUTION, program

__all__ = ["VERBS", "main"]

VERBS = (
    "talk",
    "file",
    "transcribe",
    "speak",
    "translate",
    "complete",
    "web",
    "devices",
    "check",
    "bench",
    "voice",
    "completion",
)
"""Modules in :mod:`moshi_mlx_app.commands`, in the order of the help."""

DESCRIPTION = """\
Moshi, the spoken dialogue model that listens and speaks at the same time, on
this computer. Without a command it starts a live conversation with microphone
and loudspeaker, and takes the best model that this machine can hold and run in
real time.
"""
EPILOG = """\
examples:
  moshi-mlx-local                                    talk
  moshi-mlx-local --model small --record talks       use the built-in model, and record
  moshi-mlx-local file question.wav -o answer.wav    answer a recording
  moshi-mlx-local file --demo -o answer.wav          answer the included questions
  moshi-mlx-local translate speech.wav -o english.wav --model kyutai/hibiki-1b-mlx-bf16
  moshi-mlx-local talk --help                        all options of a command
"""


class _Parser(argparse.ArgumentParser):
    """Reports argument errors without passing control characters of an argument to the terminal."""

    def error(self, message: str) -> NoReturn:
        from moshi_mlx_app.screen.terminal import warn

        self.print_usage(sys.stderr)
        warn(message, f"{self.prog}: error")
        raise SystemExit(2)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Leaves enough space for the longest option next to its help."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, **{"max_help_position": 30, **options})

    def format_help(self) -> str:
        self._action_max_length += 2  # argparse ignores the extra indentation of commands
        return super().format_help()


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog=DISTRIBUTION,
        usage=f"{DISTRIBUTION} [--debug] [COMMAND] [options of COMMAND, or of talk]\n       {DISTRIBUTION} --version",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=program())
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    verbs = parser.add_subparsers(title="commands", dest="verb", metavar="COMMAND", prog=DISTRIBUTION, required=True)
    for name in VERBS:
        module = importlib.import_module(f"moshi_mlx_app.commands.{name}")
        verb = verbs.add_parser(
            name,
            help=module.HELP,
            description=f"{module.HELP[0].upper()}{module.HELP[1:]}.",
            epilog=module.EXAMPLES,
            formatter_class=_Help,
            allow_abbrev=False,
        )
        module.add_arguments(verb)
        # No default, which would replace a --debug before the command.
        verb.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the full traceback of an error"
        )
        verb.set_defaults(run=module.run, parser=verb)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the program's name; by default the process's.

    Returns
    -------
    int
        The exit status.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "w"))
        # A character that the locale cannot encode must not end the program.
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")
    arguments = sys.argv[1:] if argv is None else argv
    try:
        try:
            return _run(arguments)
        finally:
            if argv is None and threading.current_thread() is threading.main_thread():
                # The process ends: Ctrl-C, pressed again, would only spoil its exit status.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.stdout.flush()
    except SystemExit as end:  # argparse: after --help, --version or a usage error
        return end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        from moshi_mlx_app.screen.terminal import silence_output

        silence_output()
        return 0
    except Exception as error:
        return _report(error, debug="--debug" in arguments)


@contextlib.contextmanager
def _quick_end() -> Iterator[None]:
    """Ctrl-C ends the process immediately while the commands are imported; afterwards Python's default applies."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, end):
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(arguments: list[str]) -> int:
    with _quick_end():
        parser = build_parser()
        args = parse(parser, arguments)
        if args.verb in ("talk", "file", "translate", "complete", "check", "bench"):
            importlib.import_module("moshi_mlx.tasks.dialogue")
    if os.environ.get("MLX_RANK", "0") != "0" and hasattr(args, "hosts"):
        return int(importlib.import_module("moshi_mlx.sharding.__main__").main())  # mlx.launch has started this rank
    status: int = args.run(args)
    return status


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments; options may stand before the command, and anywhere after it."""
    actions = [action for verb in verbs(parser).values() for action in verb._actions]
    valued = {name for action in actions if action.nargs is None for name in action.option_strings}
    args, unknown = parser.parse_known_args(_with_verb(arguments, valued))
    if unknown:  # reported with the command's usage, not the program's
        getattr(args, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands, by name."""
    found = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(next(found, {}))


def _with_verb(arguments: list[str], valued: Container[str]) -> list[str]:
    """The arguments with the command first: the first word that is no option and no value, else ``talk``.

    ``valued`` are the options that take their value from the next word.
    """
    first = next((place for place, text in enumerate(arguments) if text != "--debug"), len(arguments))
    if arguments[first : first + 1] in (["-h"], ["--help"], ["--version"]):
        return arguments
    place = first
    while place < len(arguments) and arguments[place].startswith("-") and arguments[place] != "--":
        place += 2 if arguments[place] in valued else 1
    word = arguments[place] if place < len(arguments) else ""
    if place == first and word and word != "--":
        return arguments
    rest = [*arguments[first:place], *arguments[place + 1 :]] if word in VERBS else arguments[first:]
    return [*arguments[:first], word if word in VERBS else "talk", *rest]


def _report(error: Exception, *, debug: bool) -> int:
    """Print an error as one sentence, system errors as ``file: reason``; with ``debug`` the traceback too."""
    from moshi_mlx.errors import MoshiError
    from moshi_mlx.printable import printable
    from moshi_mlx_app.screen.terminal import warn

    if debug:
        for line in "".join(traceback.format_exception(error)).splitlines():
            print(printable(line), file=sys.stderr)
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    elif not isinstance(error, (MoshiError, OSError)):
        message = (
            f"something unexpected went wrong: {type(error).__name__}: {message}. This is a bug in {program()}; "
            "run it again with --debug to see where"
        )
    # The library names its arguments; here they are options.
    warn(message.replace("choose the codec mlx or numpy", "choose --codec mlx or --codec numpy"), "error")
    return 1


if __name__ == "__main__":
    sys.exit(main())
