"""``moshi-mlx-local complete``: Helium continues a text."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from typing import TYPE_CHECKING

from moshi_mlx.errors import ConfigError, TokenError
from moshi_mlx.printable import printable
from moshi_mlx_app.models.fetch import load_model, wrong_model
from moshi_mlx_app.options import add_model_options, bounded
from moshi_mlx_app.screen.terminal import Loading, say, warn

if TYPE_CHECKING:
    from moshi_mlx.models.sampling import Sampling
    from moshi_mlx.tasks.complete import Helium
    from moshi_mlx.tasks.dialogue import Moshi

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

DEFAULT = "kyutai/helium-1-preview-2b"
_LARGEST = 1 << 26  # bytes of a file of prompts

HELP = "continue a text with Helium, a base model: it does not answer or follow instructions"
EXAMPLES = f"""\
examples:
  moshi-mlx-local complete "Aujourd'hui, il est temps"
  moshi-mlx-local complete - < beginning.txt > rest.txt
  moshi-mlx-local complete "Once upon a time" "The sea" --temperature 0
  moshi-mlx-local complete --batch prompts.txt --max-tokens 50

Helium is a base model: it continues a text as its training data might, in any
of its languages; it was not trained to answer, and has no chat format. The
text is printed as it comes; several texts are printed one after the other, each
under its prompt. A prompt and its continuation have 4,096 tokens at most.

Without --model: {DEFAULT}.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="the beginning of a text; - for standard input")
    parser.add_argument("--batch", metavar="FILE", help="continue every line of this file")
    add_model_options(parser, chosen=DEFAULT)
    parser.add_argument(
        "--max-tokens",
        type=bounded(int, 1, 1_000_000),
        default=200,
        metavar="N",
        help="new tokens at most, for each text (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=bounded(float, 0, 100),
        default=0.8,
        metavar="T",
        help="0: always the likeliest token (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=bounded(float, 0, 1),
        default=0.95,
        metavar="P",
        help="sample from the likeliest tokens with total probability P; 0: off (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=bounded(int, 0, 2**62),
        default=0,
        metavar="N",
        help="random seed of the first text; each other has the next one (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="only the text; warnings and errors are still shown")


def run(args: argparse.Namespace) -> int:
    """Continue the texts. Returns the exit status: 0, or 130 after Ctrl-C, which keeps what is printed."""
    prompts = _prompts(args)
    args.model = args.model or DEFAULT
    model = load_model(args, shown=not args.quiet, accept=_accept)
    from moshi_mlx.models.sampling import Sampling

    sampling = Sampling(args.temperature, top_p=args.top_p)
    began = time.perf_counter()
    try:
        tokens = _print(args, model, prompts, sampling)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        sys.stdout.flush()
        warn("the text so far was printed", "stopped")
        return 130
    spent = time.perf_counter() - began
    if not args.quiet:
        warn(f"{tokens} tokens in {spent:.1f} s: {tokens / spent:.1f} a second", "")
    return 0


def _accept(name: str, task: type[Moshi] | Moshi) -> None:
    if task.purpose != "text":
        raise ConfigError(wrong_model(name, task))


def _prompts(args: argparse.Namespace) -> list[str]:
    """All prompts, before a model is fetched for them."""
    prompts = [_read(sys.stdin.fileno(), "standard input") if text == "-" else text for text in args.prompts]
    if args.batch is not None:
        lines = _read(args.batch, args.batch).splitlines()
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        args.parser.error("give a PROMPT, - for standard input, or --batch FILE with a prompt in every line")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise TokenError(f"prompt {number} of {len(prompts)} is empty: give the beginning of a text")
    return prompts


def _read(source: str | int, name: str) -> str:
    try:
        with open(source, "rb", closefd=isinstance(source, str)) as file:
            return file.read(_LARGEST).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenError(f"{name} is no text in UTF-8: byte {error.start} is {error.reason}") from None


def _print(args: argparse.Namespace, model: Helium, prompts: list[str], sampling: Sampling) -> int:
    """Print the texts as they come, or one after the other; returns the number of tokens."""
    tokens, texts = 0, [""] * len(prompts)
    single = len(prompts) == 1
    with Loading(shown=not args.quiet) as loading:
        loading("reading the prompt")
        pieces = model.stream(
            prompts,
            max_tokens=args.max_tokens,
            sampling=sampling,
            seed=args.seed,
            on_progress=lambda read, total: loading(f"read {read} of {total} tokens"),
        )
        first = next(pieces)  # the prompts have been read
    for piece in itertools.chain([first], pieces):
        tokens += piece.finish != "stop"
        if single:
            _write(piece.text)
        texts[piece.prompt] += piece.text
        if piece.finish is not None:
            if single:
                _write("\n")
            else:
                say(f"[{piece.prompt + 1}] {prompts[piece.prompt]}{texts[piece.prompt]}")
            if piece.finish == "context":
                warn(f"text {piece.prompt + 1} fills the context of {model.context:,} tokens and ends there", "notice")
    return tokens


def _write(text: str) -> None:
    """Text on standard output as it comes. A closed pipe ends the program: nobody reads the rest."""
    shown = "\n".join(map(printable, text.split("\n")))
    sys.stdout.write(shown)
    sys.stdout.flush()
