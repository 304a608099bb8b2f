"""Options that several commands share, and their translation into the library's settings."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `--help` needs no MLX
    from moshi_mlx.engine.generator import GenerationConfig
    from moshi_mlx.engine.pipeline import Opening
    from moshi_mlx.tasks.dialogue import Moshi

__all__ = [
    "add_cache_option",
    "add_generation_options",
    "add_machine_options",
    "add_model_options",
    "add_role_options",
    "bounded",
    "generation_from",
    "opening_from",
    "role_from",
]

_LONGEST_ROLE = 100_000  # bytes


def bounded(kind: type[int] | type[float], low: float, high: float = math.inf) -> Callable[[str], float]:
    """A converter for argparse: a finite number from ``low`` to ``high``; a bad one is a usage error."""

    def convert(text: str) -> float:
        span = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of {low:g} or more"
        what = f"{'a whole' if kind is int else 'a'} number" + (f" {span}" if math.isfinite(low) else "")
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {what}, found {text!r}") from None
        if not math.isfinite(value) or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {what}, found {text!r}")
        return value

    return convert


def add_model_options(parser: argparse.ArgumentParser, *, chosen: str = "") -> None:
    """``--model``, ``--lora``, ``--codec``, ``--backend``.

    Parameters
    ----------
    chosen : str
        What ``--model`` defaults to, if not to the built-in model; the option's default is None then.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=None if chosen else "small",
        metavar="M",
        help="a folder, a repository on the hub such as kyutai/moshiko-mlx-q4 (optionally with @revision), or small, "
        f"the built-in model; the command check lists those that run here. Default: {chosen or 'small'}",
    )
    group.add_argument(
        "--lora", metavar="FILE", help="merge lora.safetensors of moshi-mlx-finetune or moshi-finetune into the model"
    )
    group.add_argument(
        "--codec",
        choices=("auto", "rust", "mlx", "numpy"),
        default="auto",
        help="what computes the audio codec: auto is the fastest here, measured once (default: %(default)s)",
    )
    group.add_argument(
        "--backend",
        choices=("auto", "mlx", "numpy"),
        default="auto",
        help="what computes the language model: numpy takes small ones only; auto is the fastest here, measured once "
        "(default: %(default)s)",
    )


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """``--seed`` and the sampling options; defaults come from the checkpoint."""
    group = parser.add_argument_group("sampling (defaults come from the checkpoint)")
    number, count = bounded(float, 0, 100), bounded(int, 0, 1_000_000)
    share = bounded(float, 0, 1)
    group.add_argument(
        "--seed",
        type=bounded(int, 0, 2**63 - 1),
        default=0,
        metavar="N",
        help="random seed; no effect with greedy sampling (default: 0)",
    )
    group.add_argument("--greedy", action="store_true", help="always take the most likely token: temperatures of 0")
    group.add_argument(
        "--text-temperature", type=number, metavar="T", help="temperature of the text; 0: greedy; typical: 0.7"
    )
    group.add_argument(
        "--audio-temperature", type=number, metavar="T", help="temperature of the voice; 0: greedy; typical: 0.8"
    )
    group.add_argument(
        "--text-top-k", type=count, metavar="K", help="sample text from the K most likely tokens; 0: all"
    )
    group.add_argument(
        "--audio-top-k", type=count, metavar="K", help="sample the voice from the K most likely tokens; 0: all"
    )
    group.add_argument(
        "--top-p", type=share, metavar="P", help="sample from the most likely tokens with total probability P; 0: off"
    )
    group.add_argument(
        "--min-p", type=share, metavar="P", help="drop tokens less than P times as likely as the best; 0: off"
    )
    group.add_argument(
        "--repetition-penalty",
        type=bounded(float, 0.01, 100),
        metavar="R",
        help="above 1: fewer repeated words; 1: off",
    )
    group.add_argument(
        "--padding-bonus",
        type=bounded(float, -1000, 1000),
        metavar="B",
        help="above 0: the model speaks less; below 0: more",
    )


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    """``--kv-bits``: precision of the key-value cache."""
    parser.add_argument(
        "--kv-bits",
        type=int,
        choices=(8,),
        help="precision of the key-value cache: about half its memory, for large models on a GPU (default: 16 bits)",
    )


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """``--hosts``, ``--ranks``, ``--python``: several machines for one model."""
    group = parser.add_argument_group("several machines (docs/several-macs.md)")
    group.add_argument(
        "--hosts",
        metavar="A,B",
        help="divide the language model among these machines, which MLX's mlx.launch reaches by ssh; the first one is "
        "this machine, by the name that the others know it by",
    )
    group.add_argument(
        "-n",
        "--ranks",
        type=bounded(int, 1, 64),
        default=1,
        metavar="N",
        help="processes on each machine; 2 tries it on this one alone (default: %(default)s)",
    )
    group.add_argument(
        "--python", metavar="PATH", help="Python on the other machines (default: the path that this one has here)"
    )


def add_role_options(parser: argparse.ArgumentParser) -> None:
    """``--role``, ``--voice``, ``--no-pin``: for PersonaPlex."""
    group = parser.add_argument_group("role (PersonaPlex only)")
    group.add_argument(
        "--role",
        metavar="TEXT",
        help="what the model is told about itself before the conversation; @FILE reads it from a file; '' for nothing",
    )
    group.add_argument(
        "--voice",
        metavar="V",
        help="a voice that comes with the model, such as NATF2, a recording of a few seconds, or a file that the "
        "command voice wrote; '' for none",
    )
    group.add_argument(
        "--no-pin",
        action="store_true",
        help="let the role leave the model's context like everything else (with PersonaPlex after four minutes)",
    )


def opening_from(args: argparse.Namespace, model: Moshi) -> Opening | None:
    """The prompts that the options ask for; None if there are none.

    Raises
    ------
    MoshiError
        If the model takes none, or they cannot be used.
    """
    if not hasattr(args, "role"):  # a command without these options
        return None
    return model.opening(role_from(args), args.voice, pin=not args.no_pin)


def role_from(args: argparse.Namespace) -> str | None:
    """The text of ``--role``, which may name a file with @."""
    from moshi_mlx.errors import ConfigError

    given: str | None = args.role
    if given is None or not given.startswith("@"):
        return given
    with open(given[1:], "rb") as file:
        data = file.read(_LONGEST_ROLE + 1)
    try:
        if len(data) > _LONGEST_ROLE:
            raise ConfigError(f"{given[1:]}: a role has a few sentences, and this file more than {_LONGEST_ROLE} bytes")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{given[1:]}: the file with the role is not UTF-8 text") from error


def generation_from(args: argparse.Namespace, base: GenerationConfig) -> GenerationConfig:
    """``base`` with the given options replaced."""
    text, audio = base.text, base.audio
    if args.greedy:
        text, audio = replace(text, temperature=0.0), replace(audio, temperature=0.0)
    both = {name: getattr(args, name) for name in ("top_p", "min_p")}
    return replace(
        base,
        text=replace(text, **_given(temperature=args.text_temperature, top_k=args.text_top_k, **both)),
        audio=replace(audio, **_given(temperature=args.audio_temperature, top_k=args.audio_top_k, **both)),
        **_given(repetition_penalty=args.repetition_penalty, padding_bonus=args.padding_bonus),
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
