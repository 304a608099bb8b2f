"""The catalog of published models, what each is for, and whether a machine can hold it and run it in real time.

Everything here is calculated from the measurements of :mod:`moshi_mlx_app.models.measure`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["BUILTIN", "CATALOG", "PublishedModel", "kind", "may_take", "room", "verdict"]

BUILTIN = "small"
"""The model that needs no download."""

_SHARE_OF_MEMORY = 0.75  # of the machine's memory that a model may take: the rest is for the system and other programs
_BESIDE = 0.8e9  # bytes beside weights and cache: the codec, Python, MLX
_SHARE_OF_TIME = 0.9  # of a frame that a step may take; the codec runs in parallel
_OVERHEAD = 0.005  # seconds of a step that are not spent reading weights


@dataclass(frozen=True)
class PublishedModel:
    """A published model.

    Attributes
    ----------
    name : str
        The value for ``--model``.
    size : int
        Bytes of the language model's weights.
    bits : {4, 8, 16}
        Bits per weight.
    read : int
        Bytes of weights that one step reads: all but the embeddings, of which it reads one row each.
    cache : int
        Bytes of keys and values, bfloat16, with a full context: kept in memory, and read at every step.
    purpose : str
        That of its class (:mod:`moshi_mlx.tasks`).
    gated : bool
        Whether its publisher requires an account and an agreement.
    """

    name: str
    size: int
    bits: int
    read: int
    cache: int
    purpose: Literal["dialogue", "speech-to-text", "text-to-speech", "translation", "text"] = "dialogue"
    gated: bool = False


_MOSHI_CACHE = 2 * 32 * 3000 * 4096 * 2  # keys and values, layers, context, dim, bytes
CATALOG = (
    PublishedModel("kyutai/moshiko-mlx-bf16", 15_376_000_000, 16, 14_750_000_000, _MOSHI_CACHE),
    PublishedModel("kyutai/moshiko-mlx-q8", 8_169_000_000, 8, 7_840_000_000, _MOSHI_CACHE),
    PublishedModel("kyutai/moshiko-mlx-q4", 4_805_000_000, 4, 4_610_000_000, _MOSHI_CACHE),
    PublishedModel("kyutai/moshika-mlx-bf16", 15_376_000_000, 16, 14_750_000_000, _MOSHI_CACHE),
    PublishedModel("kyutai/moshika-mlx-q8", 8_169_000_000, 8, 7_840_000_000, _MOSHI_CACHE),
    PublishedModel("kyutai/moshika-mlx-q4", 4_805_000_000, 4, 4_610_000_000, _MOSHI_CACHE),
    PublishedModel("nvidia/personaplex-7b-v1", 16_743_000_000, 16, 16_080_000_000, _MOSHI_CACHE, gated=True),
    PublishedModel(
        "kyutai/stt-1b-en_fr-mlx", 1_978_000_000, 16, 1_680_000_000, 2 * 16 * 750 * 2048 * 2, "speech-to-text"
    ),
    PublishedModel(
        "kyutai/stt-2.6b-en-mlx", 5_234_000_000, 16, 4_950_000_000, 2 * 48 * 375 * 2048 * 2, "speech-to-text"
    ),
    PublishedModel(
        "kyutai/tts-1.6b-en_fr", 3_684_000_000, 16, 3_370_000_000, 2 * 16 * 500 * 2048 * 2, "text-to-speech"
    ),
    PublishedModel(
        "kyutai/hibiki-2b-mlx-bf16", 7_460_000_000, 16, 6_720_000_000, 2 * 24 * 3000 * 2560 * 2, "translation"
    ),
    PublishedModel(
        "kyutai/hibiki-1b-mlx-bf16", 3_600_000_000, 16, 3_140_000_000, 2 * 16 * 500 * 2048 * 2, "translation"
    ),
    PublishedModel("kyutai/helium-1-preview-2b", 4_345_000_000, 16, 4_100_000_000, 2 * 24 * 4096 * 2560 * 2, "text"),
    PublishedModel("kyutai/helium-1-2b", 4_048_000_000, 16, 3_786_000_000, 2 * 28 * 4096 * 1024 * 2, "text"),
)
"""Sizes of the repositories' files. The better of two for dialogue comes first, a man's voice before a woman's."""


def kind(name: str) -> str:
    """The same for models that differ only in the voice."""
    return name.replace("moshika", "moshiko")


def room(machine: Mapping[str, Any]) -> int:
    """Bytes that a model may take on a machine that :func:`~moshi_mlx_app.models.measure.machine` described."""
    return int(min(machine["memory"] * _SHARE_OF_MEMORY, machine.get("gpu_memory") or float("inf")))


def verdict(
    published: PublishedModel,
    room: int,
    speed: Mapping[int, float],
    steps: Mapping[str, float] | None = None,
    frame: float = 0.08,
) -> dict[str, Any]:
    """Whether a model fits into ``room`` [bytes] of memory and runs in real time, and why.

    Parameters
    ----------
    speed : mapping of int to float
        Bytes of weights per second, by bits: :func:`~moshi_mlx_app.models.measure.speeds`.
    steps : mapping of str to float, optional
        Measured milliseconds of a step (p95), by :func:`kind`; preferred over the estimate.
    frame : float
        Seconds.

    Returns
    -------
    dict
        For JSON.
    """
    needed = published.size + published.cache + _BESIDE
    measured = (steps or {}).get(kind(published.name))
    step = published.read / speed[published.bits] + published.cache / speed[16] + _OVERHEAD
    limit = _SHARE_OF_TIME
    if measured is not None:
        step, limit = measured / 1e3, 1.0
    takes = "would take about" if measured is None else "took"
    return {
        "model": published.name,
        "purpose": published.purpose,
        "gated": published.gated,
        "fits": needed <= room,
        "keeps_up": step <= limit * frame,
        "needed_bytes": round(needed),
        "step_ms": round(step * 1e3, 1),
        "measured": measured is not None,
        "why": f"needs {needed / 1e9:.1f} GB of {room / 1e9:.1f}; a step {takes} {_time(step)}{may_take(frame)}",
    }


def may_take(frame: float) -> str:
    """The end of a verdict's ``why``, so that a caller can remove it; ``frame`` in seconds."""
    return f" and may take {_time(frame)}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
