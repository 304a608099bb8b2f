"""Sampling the tokens of one position, for rows that step together with different settings.

:func:`choose_text` and :func:`choose_codes` are functions of arrays, so that their graphs can be kept on a GPU:
a :class:`Kind` determines the operations, a :class:`Team` the participating rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..config import END_PAD_ID, UNGENERATED, ZERO_TOKEN
from ..cpu.lm import Array, Backend
from ..errors import ConfigError
from ..models.lm import Lm
from ..models.sampling import AUDIO_SAMPLING, TEXT_SAMPLING, RowSampling, Sampling, SamplingKind
from ..state import State, as_mlx

__all__ = [
    "SETTINGS",
    "GenerationConfig",
    "Kind",
    "Row",
    "Team",
    "choose_codes",
    "choose_text",
    "config_from",
    "seed_from",
    "seed_words",
    "settings_of",
]


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling settings. Defaults are the PyTorch reference's.

    Attributes
    ----------
    text, audio : Sampling
    repetition_penalty : float
        Divides positive and multiplies negative logits of words among the last ``repetition_context`` text tokens;
        1: off. Special tokens are exempt; otherwise the model could not pause.
    repetition_context : int
    padding_bonus : float
        Added to the logit of the text padding token: above 0 the model speaks less, below 0 more.
    cfg_coef : float
        Classifier-free guidance (Ho & Salimans 2022): ``null + cfg_coef * (conditioned - null)`` on all logits; 1: off.
    cfg_audio_only : bool
        Guide the codes alone, by a null half that reads no text (-1): text-to-speech (moshi ``cfg_is_no_text``).
    cfg_masked_frames : int
        The null half reads nothing (-1) in place of the first so many frames (moshi ``cfg_is_masked_until``).
    """

    text: Sampling = field(default=TEXT_SAMPLING)
    audio: Sampling = field(default=AUDIO_SAMPLING)
    repetition_penalty: float = 1.0
    repetition_context: int = 64
    padding_bonus: float = 0.0
    cfg_coef: float = 1.0
    cfg_audio_only: bool = False
    cfg_masked_frames: int = 0

    def __post_init__(self) -> None:
        if not self.repetition_penalty > 0:
            raise ConfigError(f"repetition_penalty must be above 0, found {self.repetition_penalty}")
        if self.repetition_context < 1:
            raise ConfigError(f"repetition_context must be at least 1, found {self.repetition_context}")
        if self.cfg_masked_frames < 0:
            raise ConfigError(f"cfg_masked_frames must be 0 or more, found {self.cfg_masked_frames}")
        for name in ("repetition_penalty", "padding_bonus", "cfg_coef"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} must be a finite number, found {getattr(self, name)}")


_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_OTHERS = (
    "repetition_penalty", "repetition_context", "padding_bonus", "cfg_coef", "cfg_audio_only", "cfg_masked_frames",
)  # fmt: skip
SETTINGS = 2 * len(_SAMPLING) + len(_OTHERS)
"""Numbers that :func:`settings_of` gives."""


def settings_of(config: GenerationConfig) -> NDArray[np.float32]:
    """A configuration as it is stored in a state, in the precision in which it is used."""
    values = [getattr(part, name) for part in (config.text, config.audio) for name in _SAMPLING]
    return np.array([*values, *(getattr(config, name) for name in _OTHERS)], np.float32)


def config_from(settings: NDArray[np.float32]) -> GenerationConfig:
    # The shortest decimal that gives this float32: usually the one that was written.
    values = [float(str(value)) for value in settings]
    try:
        text, audio = (
            Sampling(temperature, int(top_k), top_p, min_p)
            for temperature, top_k, top_p, min_p in (values[:4], values[4:8])
        )
        penalty, context, bonus, coefficient, audio_only, masked = values[8:]
        return GenerationConfig(text, audio, penalty, int(context), bonus, coefficient, bool(audio_only), int(masked))
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"settings {values} are no numbers") from error


def seed_words(seed: int) -> list[int]:
    """A seed as it is stored in a state: 128 bits, two's complement, in words of 32."""
    if not -(2**127) <= seed < 2**127:
        raise ConfigError(f"a seed has at most 128 bits, found {seed}")
    return [seed >> shift & 0xFFFFFFFF for shift in (0, 32, 64, 96)]


def seed_from(words: Sequence[int]) -> int:
    seed = sum(word << 32 * index for index, word in enumerate(words))
    return seed - 2**128 if seed >= 2**127 else seed


@dataclass(frozen=True)
class Row:
    """A conversation: its row in the state, with guidance also that of its unconditioned half, and its settings.

    ``pinned`` of its first positions stay when its ring wraps.
    """

    main: int
    null: int | None
    seed: int
    config: GenerationConfig
    pinned: int = 0


class Kind(NamedTuple):
    """Determines which operations a step has; everything else is arrays.

    Attributes
    ----------
    text, audio : SamplingKind
    text_given, codes_given : bool or None
        Whether these tokens are forced, in all rows; None where some are.
    bonus, penalty, guided : bool
        Whether any row has a padding bonus, a repetition penalty, guidance.
    chosen : bool
        Whether what is sampled selects one of two given text tokens, as in text-to-speech.
    depth : int
        Steps of the depth transformer; the codes after them are given in all rows.
    sinks : int
        Slots among which rows that have wrapped keep pinned positions; 0 if there are none.
    """

    text: SamplingKind
    audio: SamplingKind
    text_given: bool | None
    codes_given: bool | None
    bonus: bool
    penalty: bool
    guided: bool
    chosen: bool
    depth: int
    sinks: int = 0


class Team:
    """Rows that step together, and what depends on that selection.

    A lane is a row of the state that is computed: on a GPU all of them, in numpy those that step.

    Attributes
    ----------
    mains : array [n]
        The conversations' rows in the state.
    at : array [n]
        Their lanes.
    owner : array [lanes], or None
        The conversation whose tokens a lane reads: with guidance the unconditioned half reads its conversation's; a
        waiting lane reads those of another. None if lanes and conversations are the same.
    fixed : dict
        What every step of the team needs.
    """

    def __init__(self, members: Sequence[Row], total: int, everyone: bool, backend: Backend, pad: int, words: int):
        nulls = [member.null for member in members if member.null is not None]
        self.mains = np.array([member.main for member in members], np.intp)
        stepping = np.concatenate([self.mains, np.array(nulls, np.intp)])
        lanes = backend.computed(stepping, total)
        lane = np.full(total, -1, np.intp)
        lane[lanes] = np.arange(len(lanes))
        self.at = lane[self.mains]
        # Unused rows may advance: a conversation that joins brings its own state.
        whole = everyone and len(lanes) == total and bool((lanes == np.arange(total)).all())
        owner = np.zeros(len(lanes), np.intp)
        owner[self.at] = np.arange(len(members))
        twin = np.arange(len(lanes))
        self._masked: list[tuple[int, int, GenerationConfig]] = []
        for index, member in enumerate(members):
            if member.null is not None:
                owner[lane[member.null]], twin[self.at[index]] = index, lane[member.null]
                if member.config.cfg_audio_only or member.config.cfg_masked_frames:
                    self._masked.append((int(lane[member.null]), index, member.config))
        plain = len(lanes) == len(members) and bool((owner == np.arange(len(members))).all())
        self.owner = None if plain else owner
        configs = [member.config for member in members]
        of_lanes = configs if plain else [configs[index] for index in owner]
        self.text, self.audio = (
            RowSampling([getattr(config, name) for config in of_lanes]) for name in ("text", "audio")
        )
        self.penalized = [
            (index, member.main, member.config)
            for index, member in enumerate(members)
            if member.config.repetition_penalty != 1.0
        ]
        bonus = np.zeros((len(lanes), words), np.float32)
        if pad < words:
            bonus[:, pad] = [config.padding_bonus for config in of_lanes]
        fixed: dict[str, Any] = {}
        self.guided, self.bonus = bool(nulls), bool(bonus.any())
        if self.guided:
            coefficients = np.array([config.cfg_coef for config in of_lanes], np.float32)
            of_text = np.array([1.0 if config.cfg_audio_only else config.cfg_coef for config in of_lanes], np.float32)
            fixed.update(source=self.at[owner], twin=twin)
            fixed.update(coefficients=coefficients[:, None], text_coefficients=of_text[:, None])
        if self.bonus:
            fixed["bonus"] = bonus
        fixed = as_mlx(fixed) if backend.xp is mx else fixed
        self.fixed = {**fixed, "text": backend.settings(self.text), "audio": backend.settings(self.audio)}
        if not whole:
            self.fixed["rows"] = backend.selection(stepping, total)

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of lanes, from those of conversations."""
        return values if self.owner is None else values[self.owner]

    def columns(self, column: NDArray[np.int32], position: NDArray[Any], delays: NDArray[Any]) -> NDArray[np.int32]:
        """The tokens [lanes, streams] that lanes read: a null half does not read what its guidance leaves out."""
        spread = self.spread(column)
        for lane, index, config in self._masked:
            left_out = position[index] <= delays + config.cfg_masked_frames
            left_out[0] |= config.cfg_audio_only
            spread[lane, left_out & (position[index] > delays)] = ZERO_TOKEN
        return spread


def choose_text(backend: Backend, lm: Lm, kind: Kind, given: Mapping[str, Any], state: State) -> dict[str, Any]:
    """The temporal transformer and the text token.

    Returns
    -------
    dict
        ``hidden`` [lanes, dim], ``text`` [lanes], ``state`` of the transformer; ``noise`` of the codes, the output
        of the extra ``heads`` and what was ``sampled`` [lanes] to choose the text, if there are any.
    """
    xp, model = backend.xp, lm.config
    made: dict[str, Any] = {}
    text_noise = backend.noise(given["text_keys"], (model.text_out,)) if "text_keys" in given else None
    if "audio_keys" in given:
        made["noise"] = backend.noise(given["audio_keys"], (model.own_q, model.card))
    embedded = (given["embedded"], given["replaced"]) if "embedded" in given else None
    made["hidden"] = hidden = backend.temporal(given["column"], state, given.get("rows"), embedded, kind.sinks)
    made["state"] = state["transformer"]
    if model.extra_heads_num_heads:
        logits = lm.extra_head_logits(mx.array(hidden)).astype(mx.float32)
        made["heads"] = mx.softmax(logits, axis=-1).transpose(1, 0, 2)
    if kind.text_given:
        return {**made, "text": given["wanted"][:, 0]}
    logits = _guide(backend.text_logits(hidden).astype(xp.float32), kind, given, xp, "text_coefficients")
    if kind.bonus:
        logits = logits + given["bonus"]
    if kind.penalty:
        penalty = given["penalty"]
        logits = xp.where(logits > 0, logits / penalty, logits * penalty)
    text = backend.draw(logits, kind.text, given["text"], text_noise)
    if kind.chosen:
        made["sampled"] = text
        chosen = xp.where(text == END_PAD_ID, given["choices"][:, 0], given["choices"][:, 1])
        text = xp.where(chosen == UNGENERATED, text, chosen)
    return {**made, "text": _settled(text, 0, kind.text_given, kind, given, xp)}


def choose_codes(
    backend: Backend, lm: Lm, kind: Kind, given: Mapping[str, Any], hidden: Array, text: Array, noise: Array | None
) -> Array:
    """The depth transformer, one code after the other: ``text`` and codes [lanes, 1 + own_q]."""
    xp = backend.xp
    if kind.codes_given:
        return xp.concatenate([text[:, None], given["wanted"][:, 1:]], axis=1)
    cache: list[Any] = []
    chosen = [text]
    for codebook in range(kind.depth):
        logits = _guide(backend.depth(codebook, hidden, chosen[-1], cache).astype(xp.float32), kind, given, xp)
        code = backend.draw(logits, kind.audio, given["audio"], None if noise is None else noise[:, codebook])
        chosen.append(_settled(code, 1 + codebook, kind.codes_given, kind, given, xp))
    produced = xp.stack(chosen, axis=1)
    if kind.depth < lm.config.own_q:
        produced = xp.concatenate([produced, given["wanted"][:, 1 + kind.depth :]], axis=1)
    return produced


def _guide(logits: Array, kind: Kind, given: Mapping[str, Any], xp: Any, name: str = "coefficients") -> Array:
    """Logits of guided rows moved away from those of their unconditioned half."""
    if not kind.guided:
        return logits
    null = logits[given["twin"]]
    return xp.where(given[name] == 1, logits, null + given[name] * (logits - null))


def _settled(drawn: Array, stream: int, forced: bool | None, kind: Kind, given: Mapping[str, Any], xp: Any) -> Array:
    """Tokens [lanes] as they are fed on: forced where some are, and both halves of a guided row alike."""
    if forced is None:
        wanted = given["wanted"][:, stream]
        drawn = xp.where(wanted != UNGENERATED, wanted, drawn)
    return drawn[given["source"]] if kind.guided else drawn
