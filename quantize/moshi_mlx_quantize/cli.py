"""The command ``moshi-mlx-quantize``: a checkpoint in, a smaller one out, and what that cost.

Exit status: 0 done, 1 an error that the message names, 2 the command line is wrong, 130 stopped with Ctrl-C.
Only the standard library is imported before :func:`main` runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from typing import Any, NoReturn

__all__ = ["main"]

DISTRIBUTION = "moshi-mlx-local"
MODE_NAMES = ("affine", "mxfp4", "nvfp4", "mxfp8")
SHELLS = ("bash", "zsh", "fish")
DTYPES = ("float16", "bfloat16", "float32")

DESCRIPTION = """\
Write a smaller copy of a Moshi checkpoint, and say what it cost.

SOURCE is `small` (the built-in model), a folder, a file of weights, or
organisation/name[@revision] on the hub, in PyTorch's, candle's (also GGUF) or
MLX's layout, quantized or not. DEST is a folder that must not exist yet. Memory
holds one tensor at a time.
"""
EPILOG = """\
examples:
  moshi-mlx-quantize small small-q4 --recipe q4 --report small-cost
  moshi-mlx-quantize kyutai/moshiko-mlx-bf16 moshiko-q4 --recipe q4
  moshi-mlx-quantize moshiko moshiko-mixed --q-bits 4 --rule 'depformer=8' --rule 'text head=keep'
  moshi-mlx-quantize moshiko moshiko-4.5 --target-bpw 4.5 --calibration speech.wav --report cost-4.5
  moshi-mlx-quantize moshiko --compare q4,q8,mixed_4_6,protect-8 --report cost
  moshi-mlx-quantize moshiko-q8 moshiko-bf16 --dequantize
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Usage and message; names in it may come from a shell's ``*``."""
        from moshi_mlx.printable import printable

        super().error(printable(message))


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="moshi-mlx-quantize",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="the checkpoint to read; `small` is the built-in model")
    add("dest", nargs="?", metavar="DEST", help="the folder to write")
    add("--hf-path", "--model", dest="hf_path", metavar="SOURCE", help="SOURCE, as mlx_lm.convert calls it")
    add("--mlx-path", metavar="DEST", help="DEST, as mlx_lm.convert calls it")
    add("--weights", metavar="FILE", help="which file of weights to read where SOURCE has several")

    how = parser.add_argument_group("how")
    add = how.add_argument
    add("-q", "--quantize", action="store_true", help="quantize: what happens anyway unless --dequantize is given")
    add("--recipe", "--quant-predicate", metavar="NAME", help="a named recipe; see --list-recipes")
    add("--q-bits", type=int, metavar="N", help="bits per weight: 2, 3, 4, 5, 6 or 8 (default 4)")
    add("--q-group-size", type=int, metavar="N", help="weights per scale: 32, 64 or 128 (default 64)")
    add("--q-mode", choices=MODE_NAMES, help="affine (default), or one of the float formats")
    add("--rule", action="append", default=[], metavar="PATTERN=BITS[:GROUP[:MODE]]",
        help="exception for the modules that PATTERN names (a name, a part of the model, * and ?); "
             "PATTERN=keep leaves them dense; may be repeated, the last one wins")  # fmt: skip
    add("-d", "--dequantize", action="store_true", help="write a dense checkpoint instead")
    add("--dtype", choices=DTYPES, help="type of what is not quantized (default: the source's)")
    add("--lora", metavar="FILE", help="merge lora.safetensors of moshi-finetune first")
    add("--lora-scaling", type=float, metavar="X", help="factor on it (default: the checkpoint's)")

    out = parser.add_argument_group("result")
    add = out.add_argument
    add(
        "--force",
        action="store_true",
        help="replace DEST, once the new one is whole, if it is nothing but a checkpoint; and an earlier report",
    )
    add("--reference-files", action="store_true",
        help="name codec and tokenizer of a hub repository in config.json instead of copying them")  # fmt: skip
    add("--upload-repo", metavar="ORG/NAME", help="then upload the folder, its model card included, to the hub")

    cost = parser.add_argument_group("cost", "measured with the whole dense model in memory")
    add = cost.add_argument
    add("--report", metavar="FOLDER", help="measure, and write report.json and report.html there")
    add("--compare", metavar="RECIPES", default="",
        help="more recipes for the report, commas between: names or BITS:GROUP; DEST may be left out")  # fmt: skip
    add("--calibration", metavar="AUDIO",
        help="recording to measure on, as the user's voice (default: the eight recorded questions)")  # fmt: skip
    add("--frames", type=int, default=125, metavar="N", help="frames of 80 ms to measure on (default 125)")
    add("--target-bpw", type=float, metavar="X",
        help="the measured recipe: so many bits per weight, spent where the outputs are most sensitive")  # fmt: skip
    add("--target-size", type=float, metavar="MB", help="the same, for a file of so many megabytes")
    add("--distill", type=int, default=0, metavar="STEPS",
        help="train scales and biases to predict what the source predicts (160 is a start)")  # fmt: skip

    rest = parser.add_argument_group("other")
    add = rest.add_argument
    add("--list-recipes", action="store_true", help="show the named recipes")
    add("--quiet", action="store_true", help="print errors and warnings only")
    add("--debug", action="store_true", help="show the whole traceback of an error")
    add("--completion", choices=SHELLS, metavar="SHELL",
        help=f"print a script that completes this command in a shell: {', '.join(SHELLS)}")  # fmt: skip
    add("--version", action="version", version=_program())
    return parser


def _program() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{DISTRIBUTION} {version(DISTRIBUTION)}"
    except PackageNotFoundError:
        return f"{DISTRIBUTION} (not installed)"


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
    arguments = sys.argv[1:] if argv is None else argv
    previous: Any = None
    try:
        previous = signal.signal(signal.SIGTERM, _terminated)
    except ValueError:  # not in the main thread: whoever runs it there handles signals
        pass
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except SystemExit as end:  # argparse: after --help, --version or a usage error; or terminated
        return end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if "--debug" in arguments:
            from moshi_mlx.printable import printable

            print(*map(printable, traceback.format_exc().splitlines()), sep="\n", file=sys.stderr)
        return _report(error)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _terminated(*_: object) -> None:
    raise SystemExit(143)


def _run(arguments: list[str]) -> int:
    parser = build_parser()
    # Options may stand between SOURCE and DEST, which parse_args alone refuses; after -- it is the one that works.
    args = parser.parse_args(arguments) if "--" in arguments else parser.parse_intermixed_args(arguments)
    if args.list_recipes:
        from .plan.recipes import RECIPES

        for recipe in RECIPES.values():
            print(f"{recipe.name:14} {recipe.text}")
        return 0
    if args.completion:
        print(_completion(parser, args.completion))
        return 0
    _check_arguments(parser, args)
    from .run import run

    return run(args)


def _completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """A script for the shell; it starts no Python."""
    import shtab

    from .plan.recipes import RECIPES

    for action in parser._actions:
        if action.dest == "recipe":
            action.choices = tuple(RECIPES)
        elif action.dest in ("source", "dest", "hf_path", "mlx_path", "report"):
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.dest in ("weights", "lora", "calibration"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)


def _check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what contradicts itself, with the usage and status 2."""
    if args.hf_path is not None:
        if args.source is not None and args.dest is None and args.mlx_path is None:
            args.dest = args.source
        elif args.source is not None:
            parser.error("SOURCE and --hf-path are the same thing: give one")
        args.source = args.hf_path
    if args.mlx_path is not None:
        if args.dest is not None:
            parser.error("DEST and --mlx-path are the same thing: give one")
        args.dest = args.mlx_path
    if args.source is None:
        parser.error("SOURCE is missing: the checkpoint to read")
    args.compare = [name.strip() for name in args.compare.split(",") if name.strip()]
    if args.dest is None and not args.compare:
        parser.error("DEST is missing: the folder to write")
    numbers = args.q_bits is not None or args.q_group_size is not None or args.q_mode is not None
    if args.recipe and numbers:
        parser.error("a recipe says bits, groups and mode itself: leave out --recipe, or --q-bits and its like")
    targets = [value for value in (args.target_bpw, args.target_size) if value is not None]
    if len(targets) > 1:
        parser.error("--target-bpw and --target-size: give one")
    if targets and not 0 < targets[0] < float("inf"):
        parser.error("a target must be above 0")
    if targets and (args.recipe or numbers or args.rule or args.dequantize):
        parser.error("a target goes with no recipe, bits or rules: the measurement chooses them")
    args.measures = bool(args.report is not None or args.compare or targets or args.distill)
    if args.calibration is not None and not args.measures:
        parser.error("--calibration goes with --report, --compare, a target or --distill: nothing else is measured")
    if args.distill < 0 or (args.distill and (args.dest is None or args.dequantize)):
        parser.error("--distill takes a number of steps, needs DEST, and does not go with --dequantize")
    if args.frames < 1:
        parser.error("--frames must be at least 1")
    if args.upload_repo is not None and args.dest is None:
        parser.error("--upload-repo needs DEST")
    if args.dest is None and (args.recipe or numbers or args.dequantize):
        parser.error("without DEST nothing is written: name what to measure with --compare")
    if args.dequantize and (args.quantize or args.recipe or numbers or args.rule):
        parser.error("--dequantize goes with no recipe, bits or rules")


def _report(error: Exception) -> int:
    """Say in one line what went wrong; the system's errors as ``file: reason``."""
    from moshi_mlx.errors import MoshiError

    from .terminal import warn

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
