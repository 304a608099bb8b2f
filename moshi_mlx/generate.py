"""One frame of codes in; one text token and one frame of codes out, for any number of conversations at once.

Timing. Call s brings user frame s. The model then runs position s + 1, where it reads that frame (its delayed codes
one position later), and predicts the text token and first code with index s + 1 and the delayed codes with index s.
So with delays of one frame, as Moshi has, call s completes frame s of the model's own voice. Position 0, which reads
nothing but start tokens, runs when the generator is made. No user frame is lost and none waits for the next call:
that is 80 ms less than with generators that read a frame one call later, and one frame more than with those that drop
the first.

Rows. A conversation is a row of a batch: it joins at position 0 beside others that are anywhere, has its own seed,
settings and conditions, waits where it has no frame, and leaves. It says what it would say alone. Its state is a value
that can be taken out, saved and put into another generator (:meth:`Generator.snapshot`, :meth:`Generator.adopt`).
Rows and the slots of their rings come in a few fixed sizes, so that the kernels of a GPU and the memory are bounded,
and go back when conversations have left.

Only integers cross to the host, once a frame. This module knows tokens, not sound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from .config import EOS_ID, UNGENERATED, ZERO_TOKEN
from .errors import ConfigError, StateError, TokenError
from .layers.attention import resize_rings, resize_sources, trim_rings
from .layers.conditioning import Condition, match_slots
from .lean import Array, Stepper, make_stepper
from .lm import Lm
from .sampling import AUDIO_SAMPLING, TEXT_SAMPLING, RowSampling, Sampling, SamplingKind, keys_at, noise_key
from .streaming import (
    State,
    as_mlx,
    as_numpy,
    copy_state,
    describe_state,
    put_rows,
    state_arrays,
    take_rows,
    update_state,
)

__all__ = ["GenerationConfig", "Generator", "Step"]

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class GenerationConfig:
    """How tokens are chosen. Defaults are the PyTorch reference's.

    Attributes
    ----------
    text, audio : Sampling
    repetition_penalty : float
        Divides positive and multiplies negative logits of words among the last ``repetition_context`` text tokens;
        1: off. Special tokens are spared, or the model could not pause.
    repetition_context : int
    padding_bonus : float
        Added to the logit of the text padding token: above 0 the model speaks less, below 0 more.
    cfg_coef : float
        Classifier-free guidance (Ho & Salimans 2022): ``null + cfg_coef * (conditioned - null)`` on all logits; 1: off.
    """

    text: Sampling = field(default=TEXT_SAMPLING)
    audio: Sampling = field(default=AUDIO_SAMPLING)
    repetition_penalty: float = 1.0
    repetition_context: int = 64
    padding_bonus: float = 0.0
    cfg_coef: float = 1.0

    def __post_init__(self) -> None:
        if not self.repetition_penalty > 0:
            raise ConfigError(f"repetition_penalty must be above 0, found {self.repetition_penalty}")
        if self.repetition_context < 1:
            raise ConfigError(f"repetition_context must be at least 1, found {self.repetition_context}")
        for name in ("repetition_penalty", "padding_bonus", "cfg_coef"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} must be a finite number, found {getattr(self, name)}")


@dataclass(frozen=True)
class Step:
    """What one call produced.

    Attributes
    ----------
    index : int
        The call, from 0; -1 for position 0, which runs before the first one.
    text : array [batch], int32
        Text token as sampled at this position; with Moshi's delays it runs one frame ahead of the sound.
    frame : int
        Index of the own frame that is now complete; negative while there is none.
    codes : array [batch, own_q], int32, or None
        Codes of that frame; -1 where it was forced to be empty.
    aligned_text : array [batch], int32, or None
        Text token of that same frame.
    heads : array [batch, heads, extra_heads_dim], float32, or None
        Probabilities of the extra heads.
    """

    index: int
    text: Ints
    frame: int
    codes: Ints | None
    aligned_text: Ints | None
    heads: NDArray[np.float32] | None = None


ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of rows that are computed together; beyond them, powers of two."""
SLOTS = 128
"""Slots of the smallest ring; larger ones have twice as many, up to the context."""


@dataclass(frozen=True)
class _Row:
    """A conversation: its row in the state, with guidance that of its unconditioned half, and how it chooses."""

    main: int
    null: int | None
    seed: int
    config: GenerationConfig


class _Kind(NamedTuple):
    """What decides which operations a step has: the rest is arrays.

    Attributes
    ----------
    text, audio : SamplingKind
    text_given, codes_given : bool or None
        Whether these tokens are forced, in all rows; None where some are.
    bonus, penalty, guided : bool
        Whether any row has a padding bonus, a repetition penalty, guidance.
    """

    text: SamplingKind
    audio: SamplingKind
    text_given: bool | None
    codes_given: bool | None
    bonus: bool
    penalty: bool
    guided: bool


class _Team:
    """Rows that step together, and what follows from who they are.

    A lane is a row of the state that is computed: on a GPU all of them, in numpy those that step.

    Attributes
    ----------
    mains : array [n]
        The conversations' rows in the state.
    at : array [n]
        Their lanes.
    owner : array [lanes], or None
        Whose tokens a lane reads: with guidance the unconditioned half reads its conversation's, and a lane that waits
        borrows somebody's. None where lanes and conversations are the same.
    fixed : dict
        What every step of the team needs.
    """

    def __init__(self, members: Sequence[_Row], total: int, everyone: bool, stepper: Stepper, pad: int, words: int):
        nulls = [member.null for member in members if member.null is not None]
        self.mains = np.array([member.main for member in members], np.intp)
        stepping = np.concatenate([self.mains, np.array(nulls, np.intp)])
        lanes = stepper.computed(stepping, total)
        lane = np.full(total, -1, np.intp)
        lane[lanes] = np.arange(len(lanes))
        self.at = lane[self.mains]
        # Rows that nobody has may advance: who joins brings a state of his own.
        whole = everyone and len(lanes) == total and bool((lanes == np.arange(total)).all())
        owner = np.zeros(len(lanes), np.intp)
        owner[self.at] = np.arange(len(members))
        twin = np.arange(len(lanes))
        for index, member in enumerate(members):
            if member.null is not None:
                owner[lane[member.null]], twin[self.at[index]] = index, lane[member.null]
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
            fixed.update(source=self.at[owner], twin=twin, coefficients=coefficients[:, None])
        if self.bonus:
            fixed["bonus"] = bonus
        fixed = as_mlx(fixed) if stepper.xp is mx else fixed
        self.fixed = {**fixed, "text": stepper.settings(self.text), "audio": stepper.settings(self.audio)}
        if not whole:
            self.fixed["rows"] = stepper.selection(stepping, total)

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of lanes, from those of conversations."""
        return values if self.owner is None else values[self.owner]


class Generator:
    """Conversations on one model, advanced together frame by frame.

    Parameters
    ----------
    lm : Lm
        Shared; never changed.
    config : GenerationConfig
        Of conversations that bring none of their own.
    seeds : sequence of int, or None
        The conversations to begin with, one each, at position 0, which is run. None: there is none yet.
    conditions, null_conditions : sequence of mapping, or None
        Values for the model's conditioners, one mapping a conversation; with guidance also what to steer away from.
    kv_bits : {None, 8}
        Precision of the cache.
    text, own_codes
        What position 0 should predict, as for :meth:`step`.

    Notes
    -----
    A generator belongs to the thread that made it, as MLX's streams do.
    """

    def __init__(
        self,
        lm: Lm,
        config: GenerationConfig | None = None,
        *,
        seeds: Sequence[int] | None = (0,),
        conditions: Sequence[Mapping[str, Any]] | None = None,
        null_conditions: Sequence[Mapping[str, Any]] | None = None,
        kv_bits: int | None = None,
        text: ArrayLike | None = None,
        own_codes: ArrayLike | None = None,
    ):
        self.lm = lm
        self.config = config or GenerationConfig()
        model = lm.config
        self._kv_bits = kv_bits
        self._stepper = make_stepper(lm, kv_bits)
        self._columns = 2 * max(model.delays) + 3
        self._delays = np.array(model.delays)
        words = model.text_card + model.text_start_row
        text_ids = (words + 1) * words if model.demux_second_stream else words
        self._highest = np.array([text_ids - 1] + [model.card] * model.n_q)
        self._starts = np.array([model.text_start_id] + [model.audio_start_id] * model.n_q, np.int32)
        self._own, self._users = np.arange(1 + model.own_q), np.arange(1 + model.own_q, model.num_streams)
        self._highest_delay = max(model.delays)
        self._shape = np.array([model.context, model.text_card, model.card, *model.delays], np.int32)
        self._rows: dict[int, _Row] = {}
        self._count = 0
        self._clear()
        self._first: Step | None = None
        if seeds is None:
            return
        seeds = [int(seed) for seed in seeds]
        if not seeds:
            raise ConfigError("seeds must name at least one conversation")
        if self.config.cfg_coef != 1.0 and (conditions is None or null_conditions is None):
            raise ConfigError("guidance (cfg_coef other than 1) needs conditions and null_conditions")
        for given in (conditions, null_conditions):
            if given is not None and len(given) != len(seeds):
                raise ConfigError(f"{len(seeds)} conversations need as many conditions, found {len(given)}")
        forced = self._check_forced(text, own_codes, len(seeds))
        none = [None] * len(seeds)
        everyone = zip(seeds, conditions or none, null_conditions or none, strict=True)
        self._begin([self._joining(seed, None, condition, null) for seed, condition, null in everyone])
        team = self._team(self.rows)
        self._force(team, *forced)
        self._first = self._together(team, *self._advance(team))

    # Who is there

    @property
    def rows(self) -> tuple[int, ...]:
        """Names of the conversations, in the order in which they came. A name is never given twice."""
        return tuple(self._rows)

    @property
    def batch(self) -> int:
        """Conversations that are there."""
        return len(self._rows)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each conversation."""
        return tuple(row.seed for row in self._rows.values())

    @property
    def position(self) -> int:
        """The next position to run: calls so far, plus one.

        Raises
        ------
        StateError
            If conversations differ in it, or there is none: see :meth:`position_of`.
        """
        found = {self.position_of(row) for row in self._rows}
        if len(found) != 1:
            raise StateError(f"{self.batch} conversations are at {len(found)} positions: ask for one with position_of")
        return found.pop()

    @property
    def first(self) -> Step:
        """What position 0 of the conversations that were there from the beginning predicted."""
        if self._first is None:
            raise StateError("this generator began without a conversation: step_rows gives what position 0 predicts")
        return self._first

    def position_of(self, row: int) -> int:
        """The next position that one conversation runs; 0 for one that has joined and not stepped yet."""
        return int(self._book["position"][self._row(row).main])

    @property
    def capacity(self) -> int:
        """Rows that are computed together: one of :data:`ROWS`, 0 where nobody is there."""
        return self._capacity

    @property
    def slots(self) -> int:
        """Slots of the rings: :data:`SLOTS` doubled as often as the longest conversation needs, up to the context."""
        return 0 if self._state is None else int(self._state["transformer"]["0"]["keys"].shape[2])

    def join(
        self,
        seed: int = 0,
        *,
        config: GenerationConfig | None = None,
        condition: Mapping[str, Any] | None = None,
        null_condition: Mapping[str, Any] | None = None,
        text: ArrayLike | None = None,
        own_codes: ArrayLike | None = None,
    ) -> int:
        """Begin a conversation beside the others. Nothing is computed: its first :meth:`step_rows` runs position 0.

        Parameters
        ----------
        seed : int
        config : GenerationConfig, optional
            Default: the generator's.
        condition, null_condition : mapping, optional
            Values for the model's conditioners; with guidance also what to steer away from.
        text : int, optional
        own_codes : array [own_q], optional
            What position 0 should predict, as for :meth:`step`.

        Returns
        -------
        int
            The conversation's name.

        Raises
        ------
        ConfigError, TokenError
            As when a generator is made; nothing has changed then.
        """
        forced = self._check_forced(text, own_codes, 1)
        name = self._begin([self._joining(int(seed), config, condition, null_condition)])[0]
        self._force(self._team((name,)), *forced)
        return name

    def leave(self, row: int) -> None:
        """End a conversation. Memory goes back when the rest needs a quarter of the rows, or a smaller ring."""
        self._row(row)
        del self._rows[row]
        self._teams.clear()
        self._shrink()

    # A frame

    def reset(self, *, text: ArrayLike | None = None, own_codes: ArrayLike | None = None) -> Step:
        """Begin all conversations anew: empty caches, then position 0. Returns what it predicted.

        Raises
        ------
        TokenError
            If a token is out of range or misshapen; the generator is unchanged then.
        """
        forced = self._check_forced(text, own_codes, self.batch)
        members = list(self._rows.values())
        both = [row for member in members for row in (member.main, member.null) if row is not None]
        part = take_rows(self._state, both)
        trim_rings(part["transformer"], np.zeros(len(both), np.int32))
        put_rows(self._state, both, part)
        book = self._new_book([member.seed for member in members], [member.config for member in members])
        put_rows(self._book, [member.main for member in members], book)
        self._shrink()
        team = self._team(self.rows)
        self._force(team, *forced)
        self._first = self._together(team, *self._advance(team))
        return self._first

    def step(
        self,
        user_codes: ArrayLike | None = None,
        *,
        text: ArrayLike | None = None,
        own_codes: ArrayLike | None = None,
    ) -> Step:
        """Take the next user frame of all conversations, which are at one position, and advance them.

        Parameters
        ----------
        user_codes : array [batch, user_q] or [user_q], int
            The user's frame; -1 feeds zeros, ``card`` feeds the start code (Hibiki's end of input). None only if the
            model listens to nobody.
        text : array [batch] or int, optional
            Text token to take instead of sampling, -2 where to sample.
        own_codes : array [batch, own_q] or [own_q], optional
            Codes to take instead of sampling for the own frame with index ``position`` (its delayed codes are
            kept until they are due); -2 where to sample, -1 for nothing.

        Returns
        -------
        Step

        Raises
        ------
        TokenError
            If a token is out of range or misshapen; the generator is unchanged then.
        StateError
            If conversations are at different positions, or have not begun: see :meth:`step_rows`.
        """
        if self.position == 0:
            raise StateError("these conversations have joined and not begun: step_rows runs their position 0")
        return self._together(*self._stepped(self.rows, user_codes, text, own_codes))

    def step_rows(
        self,
        rows: Sequence[int],
        user_codes: ArrayLike | None = None,
        *,
        text: ArrayLike | None = None,
        own_codes: ArrayLike | None = None,
    ) -> list[Step]:
        """Advance some conversations by one position, each from its own; the others wait.

        Parameters
        ----------
        rows : sequence of int
            Names, as :meth:`join` gave them.
        user_codes : array [rows, user_q], int
            As for :meth:`step`. A conversation at position 0 reads nothing: -2 there. None where none reads.
        text, own_codes : array [rows], array [rows, own_q], optional
            As for :meth:`step`.

        Returns
        -------
        list of Step
            One for each of ``rows``, with a batch of one: what the conversation alone would give.

        Raises
        ------
        TokenError
            If a token is out of range or misshapen; the generator is unchanged then.
        StateError
            If a row is not there, or named twice.
        """
        names = tuple(rows)
        if not names:
            return []
        if len(set(names)) != len(names):
            raise StateError(f"a conversation is named twice in {list(names)}")
        team, produced, heads = self._stepped(names, user_codes, text, own_codes)
        positions = self._book["position"][team.mains].tolist()
        frames = np.array([self._frame_at(position - 1) for position in positions])
        complete = self._complete(team, frames)
        return [
            Step(
                index=positions[index] - 2,
                text=produced[index : index + 1, 0],
                frame=int(frames[index]),
                codes=complete[index : index + 1, 1:] if frames[index] >= 0 and self.lm.config.own_q else None,
                aligned_text=complete[index : index + 1, 0] if frames[index] >= 0 else None,
                heads=None if heads is None else heads[index : index + 1],
            )
            for index in range(len(names))
        ]

    # State

    def snapshot(self, rows: Sequence[int] | None = None) -> State:
        """Everything that conversations need to go on, as a state of its own, one row each.

        Parameters
        ----------
        rows : sequence of int, optional
            Names; default: all.

        Returns
        -------
        State
            Of MLX arrays. It fits any generator on this model with this precision of the cache, in numpy or in MLX.

        Raises
        ------
        StateError
            If a conversation is not there, or has not begun.
        """
        members = [self._row(row) for row in (self.rows if rows is None else rows)]
        mains = [member.main for member in members]
        book = take_rows(self._book, mains)
        if not members or book["position"].min() < 1:
            raise StateError("a snapshot needs conversations that have begun")
        slots = self._slots_for(int(book["position"].max()))

        def part(index: list[int]) -> State:
            alone = index == list(range(self._capacity))
            taken = copy_state(self._state) if alone else take_rows(self._state, index)
            resize_rings(taken["transformer"], slots)
            if "cross_slots" in taken["transformer"]:
                resize_sources(taken["transformer"], int(taken["transformer"]["cross_slots"].max()))
            return taken

        snapshot = {"lm": part(mains), **book, "model": np.tile(self._shape, (len(mains), 1))}
        if any(member.null is not None for member in members):
            snapshot["null"] = part([member.main if member.null is None else member.null for member in members])
        snapshot = as_mlx(snapshot)
        mx.eval(state_arrays(snapshot))
        return snapshot

    def restore(self, snapshot: State, rows: Sequence[int] | None = None) -> None:
        """Let conversations go on from a snapshot of as many, of the same model and settings.

        Parameters
        ----------
        snapshot : State
        rows : sequence of int, optional
            Names; default: all.

        Raises
        ------
        StateError
            If it does not fit, or is damaged; the generator is unchanged then.
        """
        names = self.rows if rows is None else tuple(rows)
        members = [self._row(row) for row in names]
        book, parts = self._read(snapshot, len(members))
        for index, member in enumerate(members):
            if not np.array_equal(book["settings"][index], _settings(member.config)):
                raise StateError(
                    "the snapshot does not fit: its conversation has other settings; adopt takes them over"
                )
        places = [(member.main, member.null) for member in members]
        self._install(places, book, parts)
        for name, member, words in zip(names, members, book["seed"].tolist(), strict=True):
            self._rows[name] = replace(member, seed=_seed(words))
        self._teams.clear()

    def adopt(self, snapshot: State) -> list[int]:
        """Let the conversations of a snapshot join, each with its seed, settings and conditions.

        Returns
        -------
        list of int
            Their names.

        Raises
        ------
        StateError
            If it does not fit, or is damaged; the generator is unchanged then.
        """
        book, parts = self._read(snapshot, None)
        configs = [_config(settings) for settings in book["settings"]]
        names = self._enter([_seed(words) for words in book["seed"].tolist()], configs)
        self._install([(self._rows[name].main, self._rows[name].null) for name in names], book, parts)
        return names

    # Rows: who has which, and how many there are

    def _row(self, name: int) -> _Row:
        row = self._rows.get(name)
        if row is None:
            raise StateError(f"there is no conversation {name} here; there are {list(self._rows)}")
        return row

    def _team(self, names: tuple[int, ...]) -> _Team:
        team = self._teams.get(names)
        if team is None:
            if len(self._teams) >= 16:
                self._teams.clear()
            members, config = [self._row(name) for name in names], self.lm.config
            everyone = len(names) == len(self._rows)
            pad, words = config.existing_text_padding_id, config.text_out
            team = self._teams[names] = _Team(members, self._capacity, everyone, self._stepper, pad, words)
        return team

    def _joining(
        self,
        seed: int,
        config: GenerationConfig | None,
        condition: Mapping[str, Any] | None,
        null: Mapping[str, Any] | None,
    ) -> tuple[int, GenerationConfig, Mapping[str, Any] | None, Mapping[str, Any] | None]:
        """What a conversation begins with, checked."""
        config = config or self.config
        _words(seed)
        if config.cfg_coef == 1.0:
            return seed, config, condition, None
        if condition is None or null is None:
            raise ConfigError("guidance (cfg_coef other than 1) needs conditions and null_conditions")
        return seed, config, *match_slots(condition, null)

    def _begin(self, joining: Sequence[tuple[int, GenerationConfig, Any, Any]]) -> list[int]:
        """Let conversations join at position 0."""
        values = [condition for _, _, condition, _ in joining]
        values += [null for _, config, _, null in joining if config.cfg_coef != 1.0]
        given = None if all(value is None for value in values) else [value or {} for value in values]
        condition, slots = self.lm.condition(given), self.slots or self._slots_for(1)
        fresh = self.lm.init_state(len(values), condition=condition, kv_bits=self._kv_bits, slots=slots)
        seeds, configs = [one[0] for one in joining], [one[1] for one in joining]
        names = self._enter(seeds, configs)
        members = [self._rows[name] for name in names]
        nulls = [member.null for member in members if member.null is not None]
        self._put([*(member.main for member in members), *nulls], fresh)
        self._write_book([member.main for member in members], self._new_book(seeds, configs))
        return names

    def _enter(self, seeds: Sequence[int], configs: Sequence[GenerationConfig]) -> list[int]:
        """Names and rows for conversations whose state is still to be put there."""
        needed = sum(1 if config.cfg_coef == 1.0 else 2 for config in configs)
        if self._used() + needed > self._capacity:
            self._resize(_rows_for(self._used() + needed))
        taken = {row for member in self._rows.values() for row in (member.main, member.null)}
        free = (row for row in range(self._capacity) if row not in taken)
        names = []
        for seed, config in zip(seeds, configs, strict=True):
            null = None if config.cfg_coef == 1.0 else next(free)
            self._rows[self._count] = _Row(next(free), null, seed, config)
            names.append(self._count)
            self._count += 1
        self._teams.clear()
        return names

    def _used(self) -> int:
        return sum(1 if member.null is None else 2 for member in self._rows.values())

    def _clear(self) -> None:
        """No rows: nothing is held."""
        self._capacity = 0
        self._state: Any = None
        self._book: State = self._new_book([], [])
        self._keys = np.zeros((0, 2, 2), np.uint32)
        self._teams: dict[tuple[int, ...], _Team] = {}

    def _resize(self, total: int) -> None:
        """Move all rows into a batch of ``total``."""
        if not total:
            return self._clear()
        index: list[int] = []
        for name, member in self._rows.items():
            null = None if member.null is None else len(index) + 1
            moved = replace(member, main=len(index), null=null)
            index += [member.main] if member.null is None else [member.main, member.null]
            self._rows[name] = moved
        used = len(index)
        index += [0] * (total - used)  # what these hold is put over before anybody reads it
        if self._capacity:
            self._state = take_rows(self._state, index)
            self._book = take_rows(self._book, index)
            self._keys = self._keys[index]
            self._settle()
        else:
            self._book = self._new_book([0] * total, [self.config] * total)
            self._keys = np.zeros((total, 2, 2), np.uint32)
        self._book["position"][used:] = 0
        self._capacity = total
        self._teams.clear()

    def _shrink(self) -> None:
        """Give back rows and slots that nobody needs."""
        needed = _rows_for(self._used())
        if 4 * needed <= self._capacity or not needed:
            self._resize(needed)
        if self._state is None:
            return
        both = [row for member in self._rows.values() for row in (member.main, member.null) if row is not None]
        mains = [member.main for member in self._rows.values()]
        longest = int(self._book["position"][mains].max())
        others = np.setdiff1d(np.arange(self._capacity), mains)
        self._book["position"][others] = 0
        rings = self._state["transformer"]
        resize_rings(rings, min(self._slots_for(max(longest, 1)), self.slots))
        if "cross_slots" in rings:
            resize_sources(rings, int(np.array(rings["cross_slots"])[both].max()))
        self._settle()

    def _settle(self) -> None:
        """Evaluate the state, so that what it was made of is given back."""
        self._stepper.wait(self._state)

    def _slots_for(self, positions: int) -> int:
        """Slots of the smallest ring that holds so many positions, or the whole context."""
        slots = SLOTS
        while slots < positions:
            slots *= 2
        return min(slots, self.lm.config.context)

    def _put(self, rows: list[int], part: State) -> None:
        """Put a state of the language model into some rows."""
        part = self._stepper.open(part)
        if self._state is None:
            index = np.zeros(self._capacity, np.int32)
            index[rows] = np.arange(len(rows))
            self._state = take_rows(part, index.tolist())
            return
        mine, its = self._state["transformer"], part["transformer"]
        slots = max(self.slots, its["0"]["keys"].shape[2])
        for rings in (mine, its):
            resize_rings(rings, slots)
        if "cross_slots" in mine:
            cross = max(rings["0"]["cross_keys"].shape[2] for rings in (mine, its))
            for rings in (mine, its):
                resize_sources(rings, cross)
        put_rows(self._state, rows, part)

    def _new_book(self, seeds: Sequence[int], configs: Sequence[GenerationConfig]) -> State:
        """What conversations hold beside the language model's state, at position 0.

        Column p % columns of ``inputs`` holds what each stream feeds at position p; -2 where that is not known yet.
        """
        rows, streams = len(seeds), self.lm.config.num_streams
        width = max((config.repetition_context for config in configs), default=1)
        return {
            "inputs": np.full((rows, streams, self._columns), UNGENERATED, np.int32),
            "recent": np.full((rows, width), ZERO_TOKEN, np.int32),
            "position": np.zeros(rows, np.int32),
            "seed": np.array([_words(seed) for seed in seeds], np.uint32).reshape(rows, 4),
            "settings": np.array([_settings(config) for config in configs], np.float32).reshape(rows, 12),
        }

    def _write_book(self, rows: list[int], book: State) -> None:
        """Put what :meth:`_new_book` made, or a snapshot holds, into some rows."""
        width = max(self._book["recent"].shape[1], book["recent"].shape[1])
        for each in (self._book, book):  # the newest are last
            more = width - each["recent"].shape[1]
            each["recent"] = np.pad(each["recent"], ((0, 0), (more, 0)), constant_values=ZERO_TOKEN)
        put_rows(self._book, rows, book)
        for row, words in zip(rows, book["seed"].tolist(), strict=True):
            self._keys[row] = [noise_key(_seed(words), stream) for stream in (0, 1)]

    def _read(self, snapshot: State, rows: int | None) -> tuple[State, list[State]]:
        """The book of a snapshot, in numpy, and its states of the language model; refused if they do not fit."""
        found = describe_state(snapshot)
        heads = {entry.name: entry for entry in found}
        position = np.array(snapshot["position"]) if "position" in heads else np.ones(1, np.int32)
        if rows is None:
            rows = len(position)
        recent = heads["recent"].shape[-1] if "recent" in heads else 1
        cross = [entry.shape[2] for entry in found if entry.name == "lm.transformer.0.cross_keys"]
        slots = self._slots_for(int(position.max(initial=1)))
        like: State = {
            **self._new_book([0] * rows, [replace(self.config, repetition_context=max(recent, 1))] * rows),
            "model": np.tile(self._shape, (rows, 1)),
            "lm": self._template(rows, slots, *cross),
        }
        if any(entry.name.startswith("null.") for entry in found):
            like["null"] = self._template(rows, slots, *cross)
        update_state(like, snapshot)
        book = as_numpy({name: like[name] for name in like if name not in ("lm", "null")})
        parts = [like[name] for name in ("lm", "null") if name in like]
        if not np.array_equal(book.pop("model"), np.tile(self._shape, (rows, 1))):
            raise StateError("the snapshot does not fit this model: its context, vocabularies or delays are others")
        inputs = book["inputs"]
        wrong = (inputs < UNGENERATED).any() or (inputs > self._highest[:, None]).any() or (position < 1).any()
        for part in parts:
            rings = part["transformer"]
            wrong |= not np.array_equal(np.array(rings["offset"]), position)
        try:
            configs = [_config(settings) for settings in book["settings"]]
        except ConfigError as error:
            raise StateError(f"the snapshot is damaged: its settings make no sense ({error})") from error
        wrong |= len(parts) != (2 if any(config.cfg_coef != 1.0 for config in configs) else 1)
        if wrong or any(config.repetition_context > recent for config in configs):
            raise StateError("the snapshot is damaged: it holds tokens that this model does not have")
        for part in parts:
            trim_rings(part["transformer"], book["position"])
        return book, parts

    def _template(self, rows: int, slots: int, cross: int = 1) -> State:
        """A state of the language model with the schema that a snapshot must have."""
        config, condition = self.lm.config, None
        if config.conditioners and config.fuser is not None:
            added = mx.zeros((rows, 1, config.dim)) if config.fuser.sum else None
            condition = Condition(added, mx.zeros((rows, cross, config.dim)) if config.fuser.cross else None)
        return self.lm.init_state(rows, condition=condition, kv_bits=self._kv_bits, slots=slots)

    def _install(self, places: Sequence[tuple[int, int | None]], book: State, parts: list[State]) -> None:
        """Put what :meth:`_read` gave into rows of the state."""
        self._put([main for main, _ in places], parts[0])
        guided = [(index, null) for index, (_, null) in enumerate(places) if null is not None]
        if guided:
            self._put([null for _, null in guided], take_rows(parts[1], [index for index, _ in guided]))
        self._write_book([main for main, _ in places], book)

    # One position

    def _stepped(
        self, names: tuple[int, ...], user_codes: ArrayLike | None, text: ArrayLike | None, own_codes: ArrayLike | None
    ) -> tuple[_Team, Ints, NDArray[np.float32] | None]:
        """Check what is given, note it where it will be read, and advance."""
        model, count = self.lm.config, len(names)
        team = self._team(names)
        begun = self._book["position"][team.mains] > 0
        codes = None
        if model.user_q and (user_codes is not None or begun.any()):
            if user_codes is None:
                raise TokenError(f"this model listens: step needs a user frame of {model.user_q} codes")
            lowest = ZERO_TOKEN if begun.all() else UNGENERATED
            codes = self._tokens("user_codes", user_codes, count, model.user_q, lowest, model.card)
            if ((codes == UNGENERATED) == begun[:, None]).any():
                raise TokenError(
                    "user_codes are -2 for a conversation at position 0, which reads none, and nowhere else"
                )
        elif user_codes is not None and np.size(user_codes):
            raise TokenError("this model listens to nobody: user_codes must be None")
        forced = self._check_forced(text, own_codes, count)
        if codes is not None:
            self._note(team, codes, self._users, self._book["position"][team.mains] - 1)
        self._force(team, *forced)
        return team, *self._advance(team)

    def _force(self, team: _Team, text: Ints | None, own_codes: Ints | None) -> None:
        """Note tokens that are to be taken instead of sampled."""
        position = self._book["position"][team.mains]
        if text is not None:
            self._note(team, text[:, None], self._own[:1], position - self._delays[0])
        if own_codes is not None:
            self._note(team, own_codes, self._own[1:], position)

    def _note(self, team: _Team, tokens: Ints, streams: NDArray[Any], index: NDArray[Any]) -> None:
        """Note token ``index`` [n] of some streams where it will be read; -2 leaves what is there."""
        columns = (index[:, None] + 1 + self._delays[streams]) % self._columns
        inputs, place = self._book["inputs"], (team.mains[:, None], streams, columns)
        inputs[place] = np.where(tokens == UNGENERATED, inputs[place], tokens)

    def _advance(self, team: _Team) -> tuple[Ints, NDArray[np.float32] | None]:
        """Run one position of each row: tokens [n, 1 + own_q], and what the extra heads say."""
        book, mains, own = self._book, team.mains, self._own
        needed = int(book["position"].max()) + 1  # a row that waits needs its slots, too
        if needed > self.slots < self.lm.config.context:
            resize_rings(self._state["transformer"], self._slots_for(needed))
        position, inputs = book["position"][mains], book["inputs"]
        column = inputs[mains, :, position % self._columns]
        if (position <= self._highest_delay).any():
            column = np.where(position[:, None] > self._delays, column, self._starts)
        if (column == UNGENERATED).any():
            raise StateError(
                f"position {position.tolist()}: a stream has no token; was the state restored from another model?"
            )
        following = (mains[:, None], own, (position[:, None] + 1) % self._columns)
        wanted = inputs[following]
        tokens, heads = self._predict(team, column, wanted, position)
        # Tokens that are all forced do not depend on the caches, whose graph would grow if nobody evaluated it.
        caches = self._state if (wanted != UNGENERATED).all() else {"offset": self._state["transformer"]["offset"]}
        self._stepper.wait(caches, *([tokens] if heads is None else [tokens, heads]))
        produced = np.array(tokens)[team.at]
        inputs[following] = produced
        for index, row, _ in team.penalized:
            book["recent"][row] = np.append(book["recent"][row, 1:], produced[index, 0])
        inputs[mains, :, (position - self._highest_delay - 1) % self._columns] = UNGENERATED
        book["position"][mains] = position + 1
        return produced, None if heads is None else np.array(heads)[team.at]

    def _predict(self, team: _Team, column: Ints, wanted: Ints, position: Ints) -> tuple[Array, Array | None]:
        """Tokens [lanes, 1 + own_q] of this position, lazily; ``wanted`` overrides where it is not -2."""
        stepper = self._stepper
        free = wanted == UNGENERATED
        text_given, codes_given = (_alike(~part) for part in (free[:, 0], free[:, 1:]))
        kind = _Kind(
            team.text.kind, team.audio.kind, text_given, codes_given, team.bonus, bool(team.penalized), team.guided
        )
        arrays: dict[str, Any] = {"column": team.spread(column)}
        keys = self._keys[team.mains]
        if not (text_given or team.text.kind.greedy):
            arrays["text_keys"] = team.spread(keys_at(keys[:, 0], position))
        if not (codes_given or team.audio.kind.greedy):
            arrays["audio_keys"] = team.spread(keys_at(keys[:, 1], position))
        if text_given is not False or codes_given is not False:
            arrays["wanted"] = team.spread(wanted)
        if team.penalized:
            arrays["penalty"] = team.spread(self._penalties(team))
        if stepper.xp is mx:
            arrays = as_mlx(arrays)
        given = {**team.fixed, **arrays}
        made = stepper.run(_choose_text, kind, given, self._state)
        self._state["transformer"] = made["state"]
        if not self.lm.config.own_q:
            return made["text"][:, None], made.get("heads")
        stepper.launch(made["hidden"])
        tokens = stepper.run(_choose_codes, kind, given, made["hidden"], made["text"], stepper.drawn(made.get("noise")))
        return tokens, made.get("heads")

    def _penalties(self, team: _Team) -> NDArray[np.float32]:
        """What text logits [n, text_out] are divided by, or multiplied with, for words that were said lately."""
        model = self.lm.config
        factor = np.ones((len(team.mains), model.text_out), np.float32)
        special = {0, 1, EOS_ID, model.existing_text_padding_id}
        for index, row, config in team.penalized:
            recent = set(self._book["recent"][row, -config.repetition_context :].tolist()) - special
            factor[index, [token for token in recent if 0 <= token < model.text_out]] = config.repetition_penalty
        return factor

    def _frame_at(self, position: int) -> int:
        """The own frame that is complete after ``position``; negative while there is none."""
        return position - 1 - max(self.lm.config.max_delay - 1, 0)

    def _complete(self, team: _Team, frames: Ints) -> Ints:
        """Text and own codes [n, 1 + own_q] of one frame of each row, gathered back from where they are read."""
        columns = (frames[:, None] + 1 + self._delays[self._own]) % self._columns
        found: Ints = self._book["inputs"][team.mains[:, None], self._own, columns]
        return found

    def _together(self, team: _Team, produced: Ints, heads: NDArray[np.float32] | None) -> Step:
        """One step for conversations that are at one position."""
        position = int(self._book["position"][team.mains[0]]) - 1
        frame = self._frame_at(position)
        complete = self._complete(team, np.full(len(produced), frame)) if frame >= 0 else None
        return Step(
            index=position - 1,
            text=produced[:, 0],
            frame=frame,
            codes=complete[:, 1:] if complete is not None and self.lm.config.own_q else None,
            aligned_text=None if complete is None else complete[:, 0],
            heads=heads,
        )

    # Checks

    def _check_forced(
        self, text: ArrayLike | None, own_codes: ArrayLike | None, count: int
    ) -> tuple[Ints | None, Ints | None]:
        model = self.lm.config
        if text is not None:
            column = np.reshape(_array("text", text), (-1, 1))
            text = self._tokens("text", column, count, 1, UNGENERATED, int(self._highest[0]))[:, 0]
        if own_codes is not None:
            own_codes = self._tokens("own_codes", own_codes, count, model.own_q, UNGENERATED, model.card)
        return text, own_codes

    def _tokens(self, name: str, value: ArrayLike, count: int, width: int, lowest: int, highest: int) -> Ints:
        tokens = _array(name, value)
        if tokens.ndim == 1:
            tokens = tokens[None]
        if tokens.shape != (count, width):
            raise TokenError(f"{name} must have shape [{count}, {width}], found {list(tokens.shape)}")
        if not np.issubdtype(tokens.dtype, np.integer):
            raise TokenError(f"{name} must be integers, found {tokens.dtype}")
        if tokens.size and (tokens.min() < lowest or tokens.max() > highest):
            raise TokenError(f"{name} must be between {lowest} and {highest}, found {tokens.min()} to {tokens.max()}")
        return tokens.astype(np.int32)


def _choose_text(stepper: Stepper, lm: Lm, kind: _Kind, given: Mapping[str, Any], state: State) -> dict[str, Any]:
    """The temporal transformer and the text token.

    Returns
    -------
    dict
        ``hidden`` [lanes, dim], ``text`` [lanes], ``state`` of the transformer; ``noise`` of the codes and what the
        extra ``heads`` say, where there are any.
    """
    xp, model = stepper.xp, lm.config
    made: dict[str, Any] = {}
    text_noise = stepper.noise(given["text_keys"], (model.text_out,)) if "text_keys" in given else None
    if "audio_keys" in given:
        made["noise"] = stepper.noise(given["audio_keys"], (model.own_q, model.card))
    made["hidden"] = hidden = stepper.temporal(given["column"], state, given.get("rows"))
    made["state"] = state["transformer"]
    if model.extra_heads_num_heads:
        logits = lm.extra_head_logits(mx.array(hidden)).astype(mx.float32)
        made["heads"] = mx.softmax(logits, axis=-1).transpose(1, 0, 2)
    if kind.text_given:
        return {**made, "text": given["wanted"][:, 0]}
    logits = _guide(stepper.text_logits(hidden).astype(xp.float32), kind, given, xp)
    if kind.bonus:
        logits = logits + given["bonus"]
    if kind.penalty:
        penalty = given["penalty"]
        logits = xp.where(logits > 0, logits / penalty, logits * penalty)
    text = stepper.draw(logits, kind.text, given["text"], text_noise)
    return {**made, "text": _settled(text, 0, kind.text_given, kind, given, xp)}


def _choose_codes(
    stepper: Stepper, lm: Lm, kind: _Kind, given: Mapping[str, Any], hidden: Array, text: Array, noise: Array | None
) -> Array:
    """The depth transformer, one code after the other: ``text`` and codes [lanes, 1 + own_q]."""
    xp = stepper.xp
    if kind.codes_given:
        return xp.concatenate([text[:, None], given["wanted"][:, 1:]], axis=1)
    cache: list[Any] = []
    chosen = [text]
    for codebook in range(lm.config.own_q):
        logits = _guide(stepper.depth(codebook, hidden, chosen[-1], cache).astype(xp.float32), kind, given, xp)
        code = stepper.draw(logits, kind.audio, given["audio"], None if noise is None else noise[:, codebook])
        chosen.append(_settled(code, 1 + codebook, kind.codes_given, kind, given, xp))
    return xp.stack(chosen, axis=1)


def _guide(logits: Array, kind: _Kind, given: Mapping[str, Any], xp: Any) -> Array:
    """Logits of guided rows moved away from those of their unconditioned half."""
    if not kind.guided:
        return logits
    null = logits[given["twin"]]
    return xp.where(given["coefficients"] == 1, logits, null + given["coefficients"] * (logits - null))


def _settled(drawn: Array, stream: int, forced: bool | None, kind: _Kind, given: Mapping[str, Any], xp: Any) -> Array:
    """Tokens [lanes] as they are fed on: forced where some are, and both halves of a guided row alike."""
    if forced is None:
        wanted = given["wanted"][:, stream]
        drawn = xp.where(wanted != UNGENERATED, wanted, drawn)
    return drawn[given["source"]] if kind.guided else drawn


def _alike(flags: NDArray[np.bool_]) -> bool | None:
    """Whether all are true, or none is; None if some are."""
    return True if flags.all() else None if flags.any() else False


def _rows_for(used: int) -> int:
    """The number of rows that are computed for ``used``."""
    return 1 << (used - 1).bit_length() if used else 0


_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_OTHERS = ("repetition_penalty", "repetition_context", "padding_bonus", "cfg_coef")


def _settings(config: GenerationConfig) -> NDArray[np.float32]:
    """A configuration as a state keeps it, in the precision in which it is used."""
    values = [getattr(part, name) for part in (config.text, config.audio) for name in _SAMPLING]
    return np.array([*values, *(getattr(config, name) for name in _OTHERS)], np.float32)


def _config(settings: NDArray[np.float32]) -> GenerationConfig:
    # The shortest decimal that is this float32: what somebody wrote, where he wrote one.
    values = [float(str(value)) for value in settings]
    try:
        text, audio = (
            Sampling(temperature, int(top_k), top_p, min_p)
            for temperature, top_k, top_p, min_p in (values[:4], values[4:8])
        )
        penalty, context, bonus, coefficient = values[8:]
        return GenerationConfig(text, audio, penalty, int(context), bonus, coefficient)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"settings {values} are no numbers") from error


def _words(seed: int) -> list[int]:
    """A seed as a state keeps it: 128 bits, two's complement, in words of 32."""
    if not -(2**127) <= seed < 2**127:
        raise ConfigError(f"a seed has at most 128 bits, found {seed}")
    return [seed >> shift & 0xFFFFFFFF for shift in (0, 32, 64, 96)]


def _seed(words: Sequence[int]) -> int:
    seed = sum(word << 32 * index for index, word in enumerate(words))
    return seed - 2**128 if seed >= 2**127 else seed


def _array(name: str, value: ArrayLike) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:  # rows of unequal length
        raise TokenError(f"{name} must be an array of integers: {error}") from error
