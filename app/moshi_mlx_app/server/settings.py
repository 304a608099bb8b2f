"""What a connection asks for in its query, with the names that Kyutai's page uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from moshi_mlx.engine.generator import GenerationConfig
from moshi_mlx.engine.pipeline import Opening

__all__ = ["BadQuery", "Settings", "read_settings"]

_SPANS: dict[str, tuple[type[int] | type[float], float, float]] = {
    "text_temperature": (float, 0, 100),
    "text_topk": (int, 0, 1_000_000),
    "audio_temperature": (float, 0, 100),
    "audio_topk": (int, 0, 1_000_000),
    "pad_mult": (float, -1000, 1000),
    "repetition_penalty": (float, 0.01, 100),
    "repetition_penalty_context": (int, 1, 3000),
    "seed": (int, 0, 2**63 - 1),
    "text_seed": (int, 0, 2**63 - 1),
    "audio_seed": (int, 0, 2**63 - 1),
}


class BadQuery(Exception):
    """A parameter makes no sense; the message names it."""


@dataclass(frozen=True)
class Settings:
    """One connection's wishes.

    Attributes
    ----------
    audio : {"opus", "pcm"}
    events : bool
        Whether it wants kind 0x11.
    seed : int
    generation : GenerationConfig
    gaps : bool
        Whether silence is left out of what it is sent.
    opening : Opening or None
        Prompts.
    """

    audio: Literal["opus", "pcm"]
    events: bool
    seed: int
    generation: GenerationConfig
    gaps: bool = False
    opening: Opening | None = None

    def sampling(self) -> dict[str, float]:
        """What came out of it, under the query's names."""
        config = self.generation
        warmth = config.text.temperature
        return {
            "text_temperature": warmth,
            "text_topk": config.text.top_k,
            "audio_temperature": config.audio.temperature,
            "audio_topk": config.audio.top_k,
            "pad_mult": config.padding_bonus / warmth if warmth else config.padding_bonus,
            "repetition_penalty": config.repetition_penalty,
            "repetition_penalty_context": config.repetition_context,
            "seed": self.seed,
        }


def read_settings(query: Mapping[str, str], base: GenerationConfig, seed: int) -> Settings:
    """Read a query; parameters that it does not have stay as in ``base``, others than these are left alone.

    Parameters
    ----------
    query : mapping
    base : GenerationConfig
        What the server was started with.
    seed : int
        The same.

    Raises
    ------
    BadQuery
    """
    audio = query.get("audio", "opus")
    if audio not in ("opus", "pcm"):
        raise BadQuery(f"audio must be opus or pcm, found {audio[:40]!r}")
    given = {name: _number(name, query[name]) for name in _SPANS if name in query}
    text = replace(base.text, **_renamed(given, text_temperature="temperature", text_topk="top_k"))
    voice = replace(base.audio, **_renamed(given, audio_temperature="temperature", audio_topk="top_k"))
    rest = _renamed(given, repetition_penalty="repetition_penalty", repetition_penalty_context="repetition_context")
    if "pad_mult" in given:
        # Kyutai's Rust server multiplies the tempered probability by exp(pad_mult); here it is added to the logit
        # before the temperature divides it.
        rest["padding_bonus"] = given["pad_mult"] * (text.temperature or 1.0)
    # Text and voice draw from one seed here, and Kyutai's page sends two.
    own = given.get("seed", given.get("text_seed", given.get("audio_seed", seed)))
    return Settings(
        audio="pcm" if audio == "pcm" else "opus",
        events=query.get("events", "") not in ("", "0"),
        seed=int(own),
        generation=replace(base, text=text, audio=voice, **rest),
    )


def _number(name: str, text: str) -> Any:
    kind, low, high = _SPANS[name]
    span = f"{name} must be a {'whole ' if kind is int else ''}number from {low:g} to {high:g}"
    try:
        value = kind(text) if len(text) <= 40 else math.nan
    except ValueError:
        raise BadQuery(f"{span}, found {text!r}") from None
    if not low <= value <= high:
        raise BadQuery(f"{span}, found {text[:40]!r}")
    if name.endswith("temperature") and 0 < value < 1e-6:
        raise BadQuery(f"{name} {value} is too small to divide by; 0 takes the likeliest")
    return value


def _renamed(given: Mapping[str, Any], **names: str) -> dict[str, Any]:
    return {there: given[here] for here, there in names.items() if here in given}
