"""The command ``moshi-mlx-finetune``: recordings in, a low-rank update of a model out.

Exit status: 0 done, 1 an error that the message names, 2 the command line is wrong, 130 stopped with Ctrl-C.
Only the standard library is imported before :func:`main` runs.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from typing import NoReturn

__all__ = ["build_parser", "main"]

DISTRIBUTION = "moshi-mlx-local"

DESCRIPTION = """\
Teach a Moshi from recorded conversations, on this machine: a low-rank update
(LoRA) of any checkpoint that loads, quantized or not, in moshi-finetune's files.

DATA is a folder of `talk --record`, a folder or list (.jsonl) of moshi-finetune,
or any stereo recordings: Moshi's voice on the left, the user's on the right, and
Moshi's words with their times in a JSON file of the same name.
"""
EPILOG = """\
examples:
  moshi-mlx-finetune prepare recordings --recogniser kyutai/stt-1b-en_fr-mlx
  moshi-mlx-finetune train kyutai/moshiko-mlx-q4 recordings my-moshi --steps 500
  moshi-mlx-local talk --model kyutai/moshiko-mlx-q4 --lora my-moshi/lora.safetensors
  moshi-mlx-quantize kyutai/moshiko-mlx-bf16 merged --lora my-moshi/lora.safetensors --recipe q8
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Usage and message; names in it may come from a shell's ``*``."""
        from moshi_mlx.printable import printable

        super().error(printable(message))


def _whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return number


def _weight(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number from 0 on")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 2 <= number <= 3600:
        raise argparse.ArgumentTypeError(f"{text} must be a number of seconds from 2 to 3600")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to below 1")
    return number


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="moshi-mlx-finetune",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_program())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    words = "add timed words to recordings, and show what would be learnt"
    _add_prepare(commands.add_parser("prepare", help=words, description=words, allow_abbrev=False))
    _add_train(commands.add_parser("train", help="train, or go on with a training", allow_abbrev=False))
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--duration", type=_seconds, default=10.0, metavar="S", help="seconds of a piece (default 10)")
    add("--text-ahead", type=_weight, default=0.0, metavar="S",
        help="seconds by which words come before their sound (default 0; words that a model wrote come before it "
             "already)")  # fmt: skip
    add("--quiet", action="store_true", help="print errors, warnings and results only")
    add("--debug", action="store_true", help="show the whole traceback of an error")


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", metavar="DATA", help="folder, list or file of recordings")
    add("--recogniser", metavar="MODEL", help="speech-to-text checkpoint that writes down the left channel")
    add("--again", action="store_true", help="write down recordings that have words already, too")
    add("--model", default="small", metavar="MODEL", help="the model to train, whose tokens are shown (default small)")
    add("--show", type=_count, default=2, metavar="N", help="pieces of which the tokens are shown (default 2)")
    _add_common(parser)


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint to start from: `small`, a folder, or organisation/name on the hub")
    add("data", metavar="DATA", help="folder, list or file of recordings")
    add("out", metavar="OUT", help="folder for the result; the same command goes on with a training that was stopped")
    add("--weights", metavar="FILE", help="which file of weights to read where MODEL has several")
    what = parser.add_argument_group("what is trained")
    add = what.add_argument
    add("--rank", type=_whole, default=16, metavar="N", help="of the update (default 16)")
    add("--scaling", type=_positive, default=2.0, metavar="X", help="factor on the update (default 2)")
    add("--part", choices=("all", "temporal", "depth"), default="all",
        help="linear layers of both transformers or of one; Kyutai's program reads files of `all` only")  # fmt: skip
    add("--ft-embed", action="store_true", help="train the embedding tables as well, in whole")
    how = parser.add_argument_group("how")
    add = how.add_argument
    add("--steps", type=_whole, default=100, metavar="N", help="updates (default 100)")
    add("--rate", "--lr", type=_positive, default=1e-4, metavar="X", help="largest learning rate (default 0.0001)")
    add("--batch", type=_whole, default=1, metavar="N", help="pieces at once (default 1)")
    add("--accumulate", type=_whole, default=1, metavar="N", help="batches of one update (default 1)")
    add("--first-codebook-weight", type=_weight, default=1.0, metavar="X",
        help="of the first code of the voice, which carries the words (default 1)")  # fmt: skip
    add("--text-padding-weight", type=_weight, default=0.5, metavar="X", help="of silence in the text (default 0.5)")
    add("--vary-user", type=_share, default=0.0, metavar="X",
        help="share of pieces in which the user speaks faster here and slower there, and with less of their voice: for "
             "little data (default 0)")  # fmt: skip
    add("--seed", type=_count, default=0, metavar="N", help="of the order of pieces and the first values (default 0)")
    add("--memory", type=_positive, metavar="GB",
        help="memory to use (default: what Metal grants, else three quarters of the machine's)")  # fmt: skip
    add("--keep-activations", action="store_true",
        help="keep what layers compute for the backward pass: faster, more memory")  # fmt: skip
    add("--base", choices=("auto", "packed", "unpacked"), default="auto",
        help="quantized weights while training: unpacked is faster on a CPU, and the same numbers (default auto: "
             "unpacked on a CPU if they are an eighth of the memory at most)")  # fmt: skip
    see = parser.add_argument_group("what is shown and kept")
    add = see.add_argument
    add("--validation", metavar="DATA", help="recordings to judge by (default: a share of DATA, which is not learnt)")
    add("--validation-share", type=_share, default=0.05, metavar="X", help="that share (default 0.05; 0: none)")
    add("--validate-every", type=_count, default=50, metavar="N", help="steps (default 50; 0: at the end)")
    add("--keep-every", type=_count, default=50, metavar="N", help="steps between files that are kept (default 50)")
    add("--sample-every", type=_count, default=0, metavar="N", help="steps between spoken samples (default 0: none)")
    add("--log-every", type=_whole, default=10, metavar="N", help="steps between lines (default 10)")
    add("--force", action="store_true", help="begin again in a folder with an earlier training")
    _add_common(parser)


def _program() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{DISTRIBUTION} {version(DISTRIBUTION)}"
    except PackageNotFoundError:
        return f"{DISTRIBUTION} (not installed)"


def main(argv: list[str] | None = None) -> int:
    """Run the program; ``argv`` without the program's name, by default the process's. Returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        try:
            args = build_parser().parse_args(arguments)
            if args.command == "prepare":
                from .prepare import prepare

                return prepare(args)
            from .run import train

            return train(args)
        finally:
            sys.stdout.flush()
    except SystemExit as end:  # argparse: after --help, --version or a usage error
        return end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt:
        print("stopped: nothing more was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if "--debug" in arguments:
            from moshi_mlx.printable import printable

            print(*map(printable, traceback.format_exc().splitlines()), sep="\n", file=sys.stderr)
        return _report(error)


def _report(error: Exception) -> int:
    """Say in one line what went wrong; the system's errors as ``file: reason``."""
    from moshi_mlx.errors import MoshiError

    from .show import warn

    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    elif not isinstance(error, (MoshiError, OSError)):
        message = (
            f"something unexpected went wrong: {type(error).__name__}: {message}. This is a fault in {_program()}; "
            "run it again with --debug to see where"
        )
    warn(message, "error")
    return 1


if __name__ == "__main__":
    sys.exit(main())
