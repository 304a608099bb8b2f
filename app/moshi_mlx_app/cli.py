"""The command ``moshi-mlx-local``: picks a verb, runs it, and turns what goes wrong into one line and an exit status.

Exit status: 0 done, 1 an error that the message names, 2 the command line is wrong, 130 stopped with Ctrl-C.
Only the standard library is imported before :func:`main` runs, after :mod:`moshi_mlx_app.start` has seen to Ctrl-C.
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

VERBS = ("talk", "file", "web", "devices", "check", "bench", "completion")
"""Modules in :mod:`moshi_mlx_app.commands`, in the order of the help."""

DESCRIPTION = """\
Moshi, the spoken dialogue model that listens and speaks at the same time, on
this computer. Without a verb it talks with you, by microphone and loudspeaker,
and takes the best model that this machine can hold and run in time.
"""
EPILOG = """\
examples:
  moshi-mlx-local                                    talk
  moshi-mlx-local --model small --record talks       with the built-in model; keep it
  moshi-mlx-local file question.wav -o answer.wav    answer a recording
  moshi-mlx-local file --demo -o answer.wav          the questions that come along
  moshi-mlx-local talk --help                        everything that can be set
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with an argument in a sentence that obeys nothing that stands in the argument."""

    def error(self, message: str) -> NoReturn:
        from moshi_mlx_app.screen.terminal import warn

        self.print_usage(sys.stderr)
        warn(message, f"{self.prog}: error")
        raise SystemExit(2)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Room for the longest option beside its explanation."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, **{"max_help_position": 30, **options})

    def format_help(self) -> str:
        self._action_max_length += 2  # argparse forgets that verbs are indented once more
        return super().format_help()


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog=DISTRIBUTION,
        usage=f"{DISTRIBUTION} [--debug] [VERB] [options of the verb, or of talk]\n       {DISTRIBUTION} --version",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=program())
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", prog=DISTRIBUTION, required=True)
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
        # Without a default of its own, which would replace what stands before the verb.
        verb.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the whole traceback of an error"
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
        if getattr(sys, name) is None:  # closed by whoever started the program
            setattr(sys, name, open(os.devnull, "w"))
        # A locale without the letter that a model says must not end the program.
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
    """Ctrl-C ends the process on the spot while the verbs are imported; afterwards it is what Python makes of it."""
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
        if args.verb in ("talk", "file", "check", "bench"):
            importlib.import_module("moshi_mlx.tasks.dialogue")
    status: int = args.run(args)
    return status


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Options stand where one likes: before the verb, before and after what belongs to it."""
    actions = [action for verb in verbs(parser).values() for action in verb._actions]
    valued = {name for action in actions if action.nargs is None for name in action.option_strings}
    args, unknown = parser.parse_known_args(_with_verb(arguments, valued))
    if unknown:  # said with the verb's own usage, not with the program's
        getattr(args, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The verbs' own parsers, by name."""
    found = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(next(found, {}))


def _with_verb(arguments: list[str], valued: Container[str]) -> list[str]:
    """The arguments with the verb before the options: the first word that is no option and no value, else ``talk``.

    ``valued`` are the options with a value in the next word.
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
    """Say in one sentence what went wrong, the system's errors as ``file: reason``; with ``debug`` where, too."""
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
            f"something unexpected went wrong: {type(error).__name__}: {message}. This is a fault in {program()}; "
            "run it again with --debug to see where"
        )
    # The library speaks of its own arguments; here they are options.
    warn(message.replace("choose the codec mlx or numpy", "choose --codec mlx or --codec numpy"), "error")
    return 1


if __name__ == "__main__":
    sys.exit(main())
