"""Texts that are spoken together on one text-to-speech model: rows that join and leave at any time.

::

    rows = SpeechRows(engine, Timing.of(config, frame_rate))
    row = rows.join(Manner(seed=1))
    rows.push(row, script.entries("Hello there."))
    rows.finish(row)
    while row in rows.rows:
        spoken = rows.step()          # the rows that are ready; one that waits for text waits at no cost

At each position of a row its machine (:mod:`.tts_machine`) names the two text tokens that may come, the generator takes
one of them, and the voice follows ``delay`` positions later: until then no code is computed. Stages and codec are
those of a conversation (:mod:`moshi_mlx.engine.pipeline`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import UNGENERATED, ZERO_TOKEN, ModelConfig
from ..engine.batch import run_rows
from ..engine.generator import GenerationConfig, Generator, Step
from ..engine.pipeline import Engine
from ..engine.text import Word
from ..errors import ConfigError, StateError
from ..layers.conditioning import TensorCondition
from ..models.sampling import Sampling
from .tts_machine import Entry, Machine

__all__ = ["SAMPLING", "Manner", "SpeechRows", "Spoken", "Timing", "Voice"]

Pcm = NDArray[np.float32]
Ints = NDArray[np.int32]

SAMPLING = GenerationConfig(Sampling(0.6, 25), Sampling(0.6, 250))
"""Kyutai's: temperature 0.6, 25 of the text tokens and 250 of the codes."""
GUIDANCE = 2.0
"""Of Kyutai's programs, in the model or in two rows."""
MAX_SPEAKERS = 5
_LOUDEST = 0.99
_FADE = 0.02  # seconds from and to silence at the ends
_EARLY = 2  # further positions in a step for rows without a voice yet, which cost little


@dataclass(frozen=True)
class Timing:
    """The numbers that belong to a model (Kyutai's ``TTSModel``).

    Attributes
    ----------
    delay : int
        Frames by which the voice follows the text.
    ahead : int
        Words that the second text stream is ahead.
    initial_padding, max_padding, final_padding : int
        Positions before the first word, between words at most, and after the last one.
    """

    delay: int = 16
    ahead: int = 0
    initial_padding: int = 2
    max_padding: int = 8
    final_padding: int = 4

    @classmethod
    def of(cls, config: ModelConfig, frame_rate: float) -> Timing:
        """From a checkpoint's ``tts_config``.

        Raises
        ------
        ConfigError
            If a value makes no sense, or the model speaks two streams.
        """
        given = config.tts_config
        if given.get("multistream"):
            raise ConfigError("tts_config: multistream: true is not supported")
        delay, ahead = given.get("audio_delay", 1.28), given.get("second_stream_ahead", 0)
        if not isinstance(delay, (int, float)) or not 0 <= delay <= 60:
            raise ConfigError(f"tts_config: audio_delay must be seconds from 0 to 60, found {delay!r}")
        if not isinstance(ahead, int) or not 0 <= ahead <= 100 or (ahead and not config.lm.demux_second_stream):
            raise ConfigError(f"tts_config: second_stream_ahead {ahead!r} does not fit the model")
        longest = given.get("max_padding", cls.max_padding)  # ours; Kyutai's programs have it as a constant
        if not isinstance(longest, int) or not 1 <= longest <= 1000:
            raise ConfigError(f"tts_config: max_padding must be frames from 1 to 1000, found {longest!r}")
        return cls(int(delay * frame_rate), ahead, max_padding=longest)


@dataclass(frozen=True)
class Voice:
    """Whose voice it is.

    Attributes
    ----------
    speakers : TensorCondition or None
        Embeddings of the speakers, one after the other, for models that attend to them.
    prefix : array [own_q, frames], int32, or None
        Codes of a recording that the model continues.
    """

    speakers: TensorCondition | None = None
    prefix: Ints | None = None


@dataclass(frozen=True)
class Manner:
    """How a text is spoken.

    Attributes
    ----------
    voice : Voice
    seed : int
    generation : GenerationConfig
        Its ``padding_bonus`` sets the speed: above 0 slower, below 0 faster.
    guidance : float or None
        How closely voice and text are followed: one of the values that the model was trained for, or any number for a
        model that was not, which then takes two rows; 1: off. None: the model without any, where it was trained so.
    codebooks : int or None
        Fewer are faster and rougher; None: all.
    """

    voice: Voice = field(default_factory=Voice)
    seed: int = 0
    generation: GenerationConfig = SAMPLING
    guidance: float | None = GUIDANCE
    codebooks: int | None = None


@dataclass(frozen=True)
class Spoken:
    """The result of one step of a row.

    Attributes
    ----------
    pcm : array [frame_size], float32, or None
        A frame of the voice; None while the model only reads.
    words : tuple of Word
        Words that the next one has followed, with their times in seconds of the voice. Their sound comes later.
    last : bool
        Nothing follows: the row is gone.
    codes : array [codebooks], int32, or None
        Behind ``pcm``.
    """

    pcm: Pcm | None = None
    words: tuple[Word, ...] = ()
    last: bool = False
    codes: Ints | None = None


@dataclass
class _Row:
    name: int  # in the generator
    machine: Machine
    codebooks: int
    prefix: Ints
    position: int = 0
    audible: int = 0
    word: tuple[str, int] | None = None  # the latest, and where it was read
    words: list[Word] = field(default_factory=list)
    used: bool = False

    @property
    def lead(self) -> int:
        """Frames of the prefix."""
        return int(self.prefix.shape[1])

    @property
    def ready(self) -> bool:
        return self.position < self.lead or self.machine.ready


class SpeechRows:
    """Any number of texts, spoken together. Belongs to one thread at a time.

    Parameters
    ----------
    engine : Engine
    timing : Timing
    kv_bits : {None, 8}
        Precision of the cache.
    """

    batched = True
    """Whether a step that fails has changed no row."""

    def __init__(self, engine: Engine, timing: Timing, *, kv_bits: int | None = None):
        self._engine, self._timing = engine, timing
        self._generator = Generator(engine.lm, SAMPLING, seeds=None, kv_bits=kv_bits)
        self._decode = engine.decode()
        self._rows: dict[int, _Row] = {}
        self._count = 0
        self._max_delay = engine.lm.config.max_delay

    @property
    def rows(self) -> tuple[int, ...]:
        """The texts, in the order in which they joined. Numbers are never reused."""
        return tuple(self._rows)

    @property
    def ready(self) -> tuple[int, ...]:
        """The rows that :meth:`step` would advance; the others wait for text."""
        return tuple(row for row, held in self._rows.items() if held.ready)

    def join(self, manner: Manner | None = None) -> int:
        """Begin a text.

        Raises
        ------
        ConfigError
            If the manner does not fit the model; nothing has changed then.
        """
        manner, model, timing = manner or Manner(), self._engine.lm.config, self._timing
        codebooks = model.own_q if manner.codebooks is None else manner.codebooks
        if not 1 <= codebooks <= model.own_q:
            raise ConfigError(f"this model has 1 to {model.own_q} codebooks, not {codebooks}")
        prefix = np.zeros((model.own_q, 0), np.int32) if manner.voice.prefix is None else manner.voice.prefix
        if prefix.ndim != 2 or len(prefix) != model.own_q:
            raise ConfigError(f"a voice's prefix has shape [{model.own_q}, frames], found {list(prefix.shape)}")
        condition, null, generation = self._guided(manner, prefix.shape[1])
        name = self._generator.join(manner.seed, config=generation, condition=condition, null_condition=null)
        row, self._count = self._count, self._count + 1
        try:
            self._decode.join(row)
        except BaseException:
            self._generator.leave(name)
            raise
        machine = Machine(
            model.text_card + model.text_start_row,
            timing.ahead,
            max_padding=timing.max_padding,
            initial_padding=timing.initial_padding,
        )
        self._rows[row] = _Row(name, machine, codebooks, prefix)
        return row

    def leave(self, row: int) -> None:
        """End a text, if it exists."""
        held = self._rows.pop(row, None)
        if held is not None:
            self._generator.leave(held.name)
            self._decode.leave(row)

    def push(self, row: int, entries: Iterable[Entry]) -> None:
        """Add to a text."""
        held = self._get(row)
        entries = list(entries)
        held.machine.push(entries)
        held.used = held.used or bool(entries)

    def finish(self, row: int) -> None:
        """Nothing is added to this text any more: it ends when it is spoken. One without words ends at once."""
        held = self._get(row)
        held.machine.finish()
        if not held.used:
            self.leave(row)

    def waiting(self, row: int) -> int:
        """Words of a text that are still to be read."""
        return self._get(row).machine.waiting

    def step(self, rows: Sequence[int] | None = None) -> dict[int, Spoken | Exception]:
        """Advance the rows that are ready, or those of ``rows`` that are, by a frame.

        A row whose voice has not begun, for which no codes are computed, may advance by more than one position.

        Returns
        -------
        dict
            The result of each row that advanced; the exception of each that failed and was removed.
        """
        going = [row for row in (self._rows if rows is None else rows) if self._get(row).ready]
        results: dict[int, Spoken | Exception] = {}
        for _ in range(1 + _EARLY):
            results.update(self._together(going))
            going = [row for row in going if row in self._rows and self._rows[row].ready]
            going = [row for row in going if self._rows[row].position < self._timing.delay]
            if not going:
                break
        for row, result in results.items():
            if isinstance(result, Exception):
                self.leave(row)
            elif row in self._rows:
                results[row] = replace(result, words=self._taken(row))
                if result.last:
                    self.leave(row)
        return results

    # One position

    def _together(self, rows: list[int]) -> dict[int, Spoken | Exception]:
        failed: dict[int, Exception] = {}
        steps = run_rows(_Positions(self), rows, [None] * len(rows), failed) if rows else {}
        codes: dict[int, Ints] = {}
        for row, step in steps.items():
            self._read(self._rows[row], step)
            found = self._codes(self._rows[row], step)
            if found is not None:
                codes[row] = found
        sound: dict[int, Pcm] = {}
        for count in {len(one) for one in codes.values()}:
            some = [row for row, one in codes.items() if len(one) == count]
            sound.update(run_rows(self._decode, some, [codes[row] for row in some], failed))
        spoken = {row: self._spoken(self._rows[row], step, sound.get(row)) for row, step in steps.items()}
        return {**spoken, **failed}

    def _next(self, rows: Sequence[int]) -> list[Step]:
        """One position of some rows in the generator."""
        held = [self._rows[row] for row in rows]
        choices = [(ZERO_TOKEN,) * 2 if row.position < row.lead else row.machine.choices() for row in held]
        codes = [self._given(row) for row in held]
        return self._generator.step_rows([row.name for row in held], own_codes=np.stack(codes), choices=choices)

    def _given(self, row: _Row) -> Ints:
        """Codes [own_q] of a row's frame that begins here: none, the prefix's, or those that the model finds."""
        given = np.full(self._engine.own_q, ZERO_TOKEN, np.int32)
        frame = row.position - self._timing.delay
        if 0 <= frame < row.lead:
            given[: row.codebooks] = row.prefix[: row.codebooks, frame]
        elif frame >= 0:
            given[: row.codebooks] = UNGENERATED
        return given

    def _read(self, row: _Row, step: Step) -> None:
        """What the model has sampled moves the machine on."""
        position, row.position = row.position, row.position + 1
        if position < row.lead:
            return
        assert step.sampled is not None
        before = row.machine.end
        entry = row.machine.advance(position, int(step.sampled[0]))
        if (entry is not None and entry.tokens) or row.machine.end != before:
            if row.word is not None:
                text, began = row.word
                rate = self._engine.frame_rate
                row.words.append(Word(text, (began - row.lead) / rate, (position - row.lead) / rate))
            row.word = None if entry is None else (entry.text, position)

    def _codes(self, row: _Row, step: Step) -> Ints | None:
        """Codes of the frame that is complete; None while there is no voice."""
        if step.codes is None or step.frame < self._timing.delay:
            return None
        codes: Ints = step.codes[0, : row.codebooks]
        return codes

    def _spoken(self, row: _Row, step: Step, pcm: Pcm | None) -> Spoken:
        end, timing = row.machine.end, self._timing
        last = end is not None and row.position >= end + timing.delay + timing.final_padding
        if pcm is None or step.frame < timing.delay + row.lead:
            return Spoken(last=last)
        pcm = np.clip(pcm, -_LOUDEST, _LOUDEST).astype(np.float32)
        fade = min(round(_FADE * self._engine.sample_rate), len(pcm))
        rise = (0.5 - 0.5 * np.cos(np.pi * np.arange(fade) / fade)).astype(np.float32)
        if not row.audible:
            pcm[:fade] *= rise
        if last:
            pcm[len(pcm) - fade :] *= rise[::-1]
        row.audible += 1
        return Spoken(pcm, last=last, codes=self._codes(row, step))

    def _taken(self, row: int) -> tuple[Word, ...]:
        words, self._rows[row].words = tuple(self._rows[row].words), []
        return words

    def _get(self, row: int) -> _Row:
        held = self._rows.get(row)
        if held is None:
            raise StateError(f"there is no text {row} here: it is spoken, or was ended")
        return held

    # Guidance

    def _guided(
        self, manner: Manner, lead: int
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None, GenerationConfig]:
        """Conditions, those of the null half, and sampling settings."""
        conditioners = self._engine.lm.config.conditioners
        condition = self._engine.default_conditions()
        speakers = [name for name, config in conditioners.items() if config.type == "tensor"]
        if manner.voice.speakers is not None and not speakers:
            raise ConfigError("this model has no speaker embeddings: its voice is its own, or that of a recording")
        if condition is not None:
            condition.update(dict.fromkeys(speakers, manner.voice.speakers))
        guidance, generation = manner.guidance, replace(manner.generation, cfg_coef=1.0)
        if condition is not None and "cfg" in conditioners:
            known = conditioners["cfg"].possible_values or ()
            value = None if guidance is None else f"{guidance:.1f}"
            if value is not None and (value not in known or float(value) != guidance):
                raise ConfigError(f"a guidance of {guidance:g} is not one that this model knows: {', '.join(known)}")
            condition["cfg"] = value
            return condition, None, generation
        if guidance is None or guidance == 1.0:
            return condition, None, generation
        masked = lead + self._timing.delay if lead else 0
        generation = replace(generation, cfg_coef=guidance, cfg_audio_only=True, cfg_masked_frames=masked)
        return condition, None if condition is None else dict.fromkeys(conditioners), generation


class _Positions:
    """The generator's share of a step, as a stage: rows that fail are found one by one."""

    batched = True

    def __init__(self, rows: SpeechRows):
        self._rows = rows

    def step(self, rows: Sequence[int], values: Sequence[None]) -> list[Step]:
        return self._rows._next(rows)
