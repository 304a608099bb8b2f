"""The speech-to-text model of ``--captions``, and whether this machine has time for it beside a conversation."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from moshi_mlx.errors import ConfigError
from moshi_mlx_app.screen.terminal import Loading, warn

if TYPE_CHECKING:
    from moshi_mlx.tasks.dialogue import Moshi
    from moshi_mlx.tasks.transcribe import SpeechToText

__all__ = ["HELP", "SHARE", "find_recogniser", "load_recogniser", "time_for_both"]

HELP = "also write down what you say, with this speech-to-text model (a hub repository or a folder), if there is time"
SHARE = 0.9
"""Of a frame's time that both models together may take."""


def time_for_both(stages: dict[str, dict[str, float]], recogniser: dict[str, dict[str, float]]) -> float:
    """Milliseconds of a frame in which the slowest stage of a conversation and the whole recogniser run, one after
    the other, as on one GPU; from :func:`moshi_mlx_app.models.measure.unpaced`."""
    return max(stages[name]["p95"] for name in ("encode", "step", "decode")) + recogniser["frame"]["p50"]


def find_recogniser(args: argparse.Namespace, model: Moshi) -> SpeechToText:
    """The model that ``args.captions`` names, for what is said to ``model``.

    Raises
    ------
    ConfigError
        If it is for something else, or hears another rate.
    """
    from moshi_mlx.tasks.transcribe import SpeechToText
    from moshi_mlx_app.models.fetch import load_model

    named = argparse.Namespace(**{**vars(args), "model": args.captions, "weights": None, "lora": None})
    found = load_model(named, shown=not getattr(args, "quiet", False))
    if not isinstance(found, SpeechToText):
        raise ConfigError(f"--captions {args.captions} is a model for {found.purpose}: name a speech-to-text model")
    if found.sample_rate != model.sample_rate:
        raise ConfigError(f"--captions {args.captions} hears {found.sample_rate} Hz, {model.name} {model.sample_rate}")
    return found


def load_recogniser(args: argparse.Namespace, model: Moshi, frames: int = 12) -> SpeechToText | None:
    """The same, or None, with a warning, if this machine has no time for both."""
    from moshi_mlx_app.models.measure import unpaced

    found = find_recogniser(args, model)
    with Loading(shown=not args.quiet) as loading:
        loading("measuring whether there is time for captions")
        took = time_for_both(unpaced(model, frames), unpaced(found, frames))
    frame = 1e3 / model.frame_rate
    if took > SHARE * frame:
        warn(f"no captions: with {found.name} a frame of {frame:.0f} ms would take {took:.0f} ms here")
        return None
    return found
