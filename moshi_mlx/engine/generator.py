"""One frame of codes in; one text token and one frame of codes out, for any number of conversations at once.

Timing. Call s brings user frame s. The model then runs position s + 1, where it reads that frame (its delayed codes
one position later), and predicts the text token and first code with index s + 1 and the delayed codes with index s.
So with delays of one frame, as Moshi has, call s completes frame s of the model's own voice. Position 0, which reads
only start tokens, runs when the generator is created. No user frame is lost and none waits for the next call:
this saves 80 ms compared with generators that read a frame one call later, and one frame compared with those that drop
the first.

Rows. A conversation is a row of a batch: it joins at position 0 while others are at any position, has its own seed,
settings and conditions, waits when it has no frame, and leaves. It gives the answer that it would give alone. Its state
is a value that can be extracted, saved and adopted by another generator (:meth:`Generator.snapshot`,
:meth:`Generator.adopt`). Rows and the slots of their rings come in a few fixed sizes, so that the number of GPU kernels
and the memory are bounded, and are freed when conversations have left.

Only integers are transferred to the host, once per frame. This module handles tokens, not sound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..config import EOS_ID, UNGENERATED, ZERO_TOKEN
from ..cpu.lm import Array, make_backend
from ..errors import ConfigError, StateError, TokenError
from ..models.lm import Lm
from ..models.sampling import keys_at
from ..state import State, as_mlx
from .choose import GenerationConfig, Kind, Team, choose_codes, choose_text
from .rows import Rows

__all__ = ["GenerationConfig", "Generator", "Step"]

Ints = NDArray[np.int32]
_Embedded = tuple[NDArray[np.float32], NDArray[np.bool_]]


@dataclass(frozen=True)
class Step:
    """The result of one call.

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
    sampled : array [batch], int32, or None
        The text token that was sampled to choose ``text`` from two.
    """

    index: int
    text: Ints
    frame: int
    codes: Ints | None
    aligned_text: Ints | None
    heads: NDArray[np.float32] | None = None
    sampled: Ints | None = None


class Generator:
    """Conversations on one model, advanced together frame by frame.

    Parameters
    ----------
    lm : Lm
        Shared; never changed.
    config : GenerationConfig
        Of conversations that bring none of their own.
    seeds : sequence of int, or None
        One conversation per seed is created, and its position 0 is run. None: no conversation yet.
    conditions, null_conditions : sequence of mapping, or None
        Values for the model's conditioners, one mapping per conversation; with guidance also the negative conditions.
    kv_bits : {None, 8}
        Precision of the cache.
    text, own_codes
        What position 0 should predict, as for :meth:`step`.
    pinning : bool
        Whether conversations that join may keep their first positions beyond the context.

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
        pinning: bool = False,
    ):
        self.lm = lm
        self.config = config or GenerationConfig()
        model = lm.config
        self._numpy_backend = make_backend(lm, kv_bits)
        self._rows: Rows = (
            Rows(lm, self._numpy_backend, self.config, kv_bits, pinning)
            if lm.sharding is None
            else lm.sharding.rows(lm, self._numpy_backend, self.config, kv_bits)
        )
        self._columns = self._rows.columns
        self._delays = np.array(model.delays)
        self._starts = np.array([model.text_start_id] + [model.audio_start_id] * model.n_q, np.int32)
        self._own, self._users = np.arange(1 + model.own_q), np.arange(1 + model.own_q, model.num_streams)
        self._highest_delay = max(model.delays)
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
        self._rows.join([self._rows.checked(seed, None, condition, null) for seed, condition, null in everyone])
        team = self._rows.team(self.rows)
        self._force(team, *forced)
        self._first = self._together(team, *self._advance(team))

    # Who is there

    @property
    def rows(self) -> tuple[int, ...]:
        """Names of the conversations, in the order in which they joined. Names are never reused."""
        return tuple(self._rows.members)

    @property
    def batch(self) -> int:
        """Conversations that are there."""
        return len(self._rows.members)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each conversation."""
        return tuple(row.seed for row in self._rows.members.values())

    @property
    def position(self) -> int:
        """The next position to run: calls so far, plus one.

        Raises
        ------
        StateError
            If conversations are at different positions, or there are none: see :meth:`position_of`.
        """
        found = {self.position_of(row) for row in self._rows.members}
        if len(found) != 1:
            raise StateError(f"{self.batch} conversations are at {len(found)} positions: ask for one with position_of")
        return found.pop()

    @property
    def first(self) -> Step:
        """What position 0 predicted for the conversations that the generator was created with."""
        if self._first is None:
            raise StateError("this generator started without a conversation: step_rows gives what position 0 predicts")
        return self._first

    def position_of(self, row: int) -> int:
        """The next position that one conversation runs; 0 for one that has joined and not stepped yet."""
        return int(self._rows.book["position"][self._rows.get(row).main])

    @property
    def capacity(self) -> int:
        """Rows that are computed together: 1, 2, 4, 8 and so on; 0 without conversations."""
        return self._rows.capacity

    @property
    def slots(self) -> int:
        """Slots of the rings: 128, 256 and so on up to the context, as the longest conversation needs."""
        return self._rows.slots

    def join(
        self,
        seed: int = 0,
        *,
        config: GenerationConfig | None = None,
        condition: Mapping[str, Any] | None = None,
        null_condition: Mapping[str, Any] | None = None,
        text: ArrayLike | None = None,
        own_codes: ArrayLike | None = None,
        pinned: int = 0,
    ) -> int:
        """Add a conversation. Nothing is computed: its first :meth:`step_rows` runs position 0.

        Parameters
        ----------
        seed : int
        config : GenerationConfig, optional
            Default: the generator's.
        condition, null_condition : mapping, optional
            Values for the model's conditioners; with guidance also the negative condition.
        text : int, optional
        own_codes : array [own_q], optional
            What position 0 should predict, as for :meth:`step`.
        pinned : int
            How many of its first positions are still seen when it has more than the context holds: see
            :mod:`moshi_mlx.layers.attention`.

        Returns
        -------
        int
            The conversation's name.

        Raises
        ------
        ConfigError, TokenError
            As for the constructor; nothing has changed in that case.
        """
        forced = self._check_forced(text, own_codes, 1)
        name = self._rows.join([self._rows.checked(int(seed), config, condition, null_condition)], pinned)[0]
        self._force(self._rows.team((name,)), *forced)
        return name

    def leave(self, row: int) -> None:
        """End a conversation. Memory is freed when the rest needs a quarter of the rows, or a smaller ring."""
        self._rows.leave(row)

    def fill(self, row: int) -> None:
        """Let a conversation cost what a long one costs, as :meth:`moshi_mlx.engine.Batch.fill`."""
        self._rows.fill(row)

    # A frame

    def reset(self, *, text: ArrayLike | None = None, own_codes: ArrayLike | None = None) -> Step:
        """Restart all conversations: empty caches, then position 0. Returns what it predicted.

        Raises
        ------
        TokenError
            If a token is out of range or misshapen; the generator is unchanged then.
        StateError
            If there are no conversations.
        """
        if not self.batch:
            raise StateError("there is no conversation to reset")
        forced = self._check_forced(text, own_codes, self.batch)
        self._rows.clear()
        team = self._rows.team(self.rows)
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
            model has no user streams.
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
            If conversations are at different positions, or have not started: see :meth:`step_rows`.
        """
        if self.position == 0:
            raise StateError("these conversations have joined but not started: step_rows runs their position 0")
        return self._together(*self._stepped(self.rows, user_codes, text, own_codes))

    def step_rows(
        self,
        rows: Sequence[int],
        user_codes: ArrayLike | None = None,
        *,
        text: ArrayLike | None = None,
        own_codes: ArrayLike | None = None,
        embedded: Mapping[int, ArrayLike] | None = None,
        choices: ArrayLike | None = None,
    ) -> list[Step]:
        """Advance some conversations by one position, each from its own; the others wait.

        Parameters
        ----------
        rows : sequence of int
            Names, as :meth:`join` gave them.
        user_codes : array [rows, user_q], int
            As for :meth:`step`. A conversation at position 0 reads nothing: -2 there. None if none reads.
        text, own_codes : array [rows], array [rows, own_q], optional
            As for :meth:`step`.
        embedded : mapping of int to array [dim], optional
            Summed embeddings that a conversation reads in place of its tokens; these count as read all the same.
        choices : array [rows, 2], optional
            Text tokens to take if 0, the start of a word, is sampled, and if anything else is; -2 for what is sampled.
            The depth transformer and the next position read the token taken. This needs no extra read by the host.

        Returns
        -------
        list of Step
            One for each of ``rows``, with a batch of one: the result that the conversation would give alone.

        Raises
        ------
        TokenError
            If a token is out of range or misshapen; the generator is unchanged then.
        StateError
            If a row does not exist, or is named twice.
        """
        names = tuple(rows)
        if not names:
            return []
        if len(set(names)) != len(names):
            raise StateError(f"a conversation is named twice in {list(names)}")
        team, produced, heads, sampled = self._stepped(names, user_codes, text, own_codes, embedded, choices)
        positions = self._rows.book["position"][team.mains].tolist()
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
                sampled=None if sampled is None else sampled[index : index + 1],
            )
            for index in range(len(names))
        ]

    # State

    def snapshot(self, rows: Sequence[int] | None = None) -> State:
        """The state from which conversations can be continued, one row each.

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
            If a conversation does not exist, or has not started.
        """
        return self._rows.snapshot(self.rows if rows is None else rows)

    def restore(self, snapshot: State, rows: Sequence[int] | None = None) -> None:
        """Continue conversations from a snapshot of the same number, model and settings.

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
        self._rows.restore(snapshot, self.rows if rows is None else rows)

    def adopt(self, snapshot: State) -> list[int]:
        """Add the conversations of a snapshot, each with its seed, settings and conditions.

        Returns
        -------
        list of int
            Their names.

        Raises
        ------
        StateError
            If it does not fit, or is damaged; the generator is unchanged then.
        """
        return self._rows.adopt(snapshot)

    # One position

    def _stepped(
        self,
        names: tuple[int, ...],
        user_codes: ArrayLike | None,
        text: ArrayLike | None,
        own_codes: ArrayLike | None,
        embedded: Mapping[int, ArrayLike] | None = None,
        choices: ArrayLike | None = None,
    ) -> tuple[Team, Ints, NDArray[np.float32] | None, Ints | None]:
        """Check the input, store it where it will be read, and advance."""
        model, count = self.lm.config, len(names)
        team = self._rows.team(names)
        begun = self._rows.book["position"][team.mains] > 0
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
            raise TokenError("this model has no user streams: user_codes must be None")
        forced = self._check_forced(text, own_codes, count)
        vectors = self._check_embedded(embedded, names)
        if choices is not None:
            choices = self._tokens("choices", choices, count, 2, UNGENERATED, int(self._rows.highest[0]))
        if codes is not None:
            self._note(team, codes, self._users, self._rows.book["position"][team.mains] - 1)
        self._force(team, *forced)
        return team, *self._advance(team, vectors, choices)

    def _force(self, team: Team, text: Ints | None, own_codes: Ints | None) -> None:
        """Store tokens to take instead of sampling."""
        position = self._rows.book["position"][team.mains]
        if text is not None:
            self._note(team, text[:, None], self._own[:1], position - self._delays[0])
        if own_codes is not None:
            self._note(team, own_codes, self._own[1:], position)

    def _note(self, team: Team, tokens: Ints, streams: NDArray[Any], index: NDArray[Any]) -> None:
        """Store token ``index`` [n] of some streams where it will be read; -2 keeps the existing one."""
        columns = (index[:, None] + 1 + self._delays[streams]) % self._columns
        inputs, place = self._rows.book["inputs"], (team.mains[:, None], streams, columns)
        inputs[place] = np.where(tokens == UNGENERATED, inputs[place], tokens)

    def _advance(
        self, team: Team, embedded: _Embedded | None = None, choices: Ints | None = None
    ) -> tuple[Ints, NDArray[np.float32] | None, Ints | None]:
        """Run one position of each row: tokens [n, 1 + own_q], the output of the extra heads, and the text sampled."""
        state, book, mains = self._rows.state, self._rows.book, team.mains
        self._rows.make_room()
        position, inputs = book["position"][mains], book["inputs"]
        column = inputs[mains, :, position % self._columns]
        if (position <= self._highest_delay).any():
            column = np.where(position[:, None] > self._delays, column, self._starts)
        if (column == UNGENERATED).any():
            raise StateError(
                f"position {position.tolist()}: a stream has no token; was the state restored from another model?"
            )
        following = (mains[:, None], self._own, (position[:, None] + 1) % self._columns)
        wanted = inputs[following]
        tokens, made = self._predict(team, column, wanted, position, embedded, choices)
        # If all tokens are forced they do not depend on the caches, whose graph would grow if it were not evaluated.
        caches = state if (wanted != UNGENERATED).all() else {"offset": state["transformer"]["offset"]}
        more = [name for name in ("heads", "sampled") if name in made]
        fetched = self._numpy_backend.fetch(caches, tokens, *(made[name] for name in more))
        produced, *rest = (found[team.at] for found in fetched)
        said = dict(zip(more, rest, strict=True))
        inputs[following] = produced
        for index, row, _ in team.penalized:
            book["recent"][row] = np.append(book["recent"][row, 1:], produced[index, 0])
        inputs[mains, :, (position - self._highest_delay - 1) % self._columns] = UNGENERATED
        book["position"][mains] = position + 1
        return produced, said.get("heads"), said.get("sampled")

    def _predict(
        self,
        team: Team,
        column: Ints,
        wanted: Ints,
        position: Ints,
        embedded: _Embedded | None,
        choices: Ints | None,
    ) -> tuple[Array, Mapping[str, Any]]:
        """Tokens [lanes, 1 + own_q] of this position, lazily, and what :func:`choose_text` made.

        ``wanted`` overrides where it is not -2.
        """
        backend = self._numpy_backend
        free = wanted == UNGENERATED
        depth = int(np.flatnonzero(free[:, 1:].any(axis=0)).max(initial=-1)) + 1
        text_given, codes_given = (_alike(~part) for part in (free[:, 0], free[:, 1 : 1 + max(depth, 1)]))
        kind = Kind(
            team.text.kind,
            team.audio.kind,
            text_given,
            codes_given,
            team.bonus,
            bool(team.penalized),
            team.guided,
            choices is not None and not text_given,
            depth,
            self._rows.sinks(),
        )
        arrays: dict[str, Any] = {"column": team.columns(column, position, self._delays)}
        draws = [not (given or how.greedy) for given, how in ((text_given, kind.text), (codes_given, kind.audio))]
        if any(draws):
            keys = team.spread(keys_at(self._rows.keys[team.mains], position[:, None]))
            arrays.update((name, keys[:, n]) for n, name in enumerate(("text_keys", "audio_keys")) if draws[n])
        if text_given is not False or codes_given is not False or depth < self.lm.config.own_q:
            arrays["wanted"] = team.spread(wanted)
        if kind.chosen:
            assert choices is not None
            arrays["choices"] = team.spread(choices)
        if team.penalized:
            arrays["penalty"] = team.spread(self._penalties(team))
        if embedded is not None:
            arrays["embedded"], arrays["replaced"] = (team.spread(part) for part in embedded)
        if backend.xp is mx:
            arrays = as_mlx(arrays)
        given = {**team.fixed, **arrays}
        made = backend.run(choose_text, kind, given, self._rows.state)
        self._rows.state["transformer"] = made["state"]
        if not self.lm.config.own_q:
            return made["text"][:, None], made
        backend.launch(made["hidden"])
        tokens = backend.run(choose_codes, kind, given, made["hidden"], made["text"], backend.drawn(made.get("noise")))
        return tokens, made

    def _penalties(self, team: Team) -> NDArray[np.float32]:
        """The factor that text logits [n, text_out] are divided by, or multiplied with, for recent words."""
        model = self.lm.config
        factor = np.ones((len(team.mains), model.text_out), np.float32)
        special = {0, 1, EOS_ID, model.existing_text_padding_id}
        for index, row, config in team.penalized:
            recent = set(self._rows.book["recent"][row, -config.repetition_context :].tolist()) - special
            factor[index, [token for token in recent if 0 <= token < model.text_out]] = config.repetition_penalty
        return factor

    def _frame_at(self, position: int) -> int:
        """The own frame that is complete after ``position``; negative while there is none."""
        return position - 1 - max(self.lm.config.max_delay - 1, 0)

    def _complete(self, team: Team, frames: Ints) -> Ints:
        """Text and own codes [n, 1 + own_q] of one frame of each row, gathered back from where they are read."""
        columns = (frames[:, None] + 1 + self._delays[self._own]) % self._columns
        found: Ints = self._rows.book["inputs"][team.mains[:, None], self._own, columns]
        return found

    def _together(
        self, team: Team, produced: Ints, heads: NDArray[np.float32] | None, sampled: Ints | None = None
    ) -> Step:
        """One step for conversations that are at one position."""
        position = int(self._rows.book["position"][team.mains[0]]) - 1
        frame = self._frame_at(position)
        complete = self._complete(team, np.full(len(produced), frame)) if frame >= 0 else None
        return Step(
            index=position - 1,
            text=produced[:, 0],
            frame=frame,
            codes=complete[:, 1:] if complete is not None and self.lm.config.own_q else None,
            aligned_text=None if complete is None else complete[:, 0],
            heads=heads,
            sampled=sampled,
        )

    # Checks

    def _check_forced(
        self, text: ArrayLike | None, own_codes: ArrayLike | None, count: int
    ) -> tuple[Ints | None, Ints | None]:
        model = self.lm.config
        if text is not None:
            column = np.reshape(_array("text", text), (-1, 1))
            text = self._tokens("text", column, count, 1, UNGENERATED, int(self._rows.highest[0]))[:, 0]
        if own_codes is not None:
            own_codes = self._tokens("own_codes", own_codes, count, model.own_q, UNGENERATED, model.card)
        return text, own_codes

    def _check_embedded(self, embedded: Mapping[int, ArrayLike] | None, names: tuple[int, ...]) -> _Embedded | None:
        """Vectors [n, dim], and which of the conversations have one."""
        if not embedded:
            return None
        if self.lm.sharding is not None:
            raise ConfigError("a model on several machines takes no embeddings: use a recording as voice")
        if embedded.keys() - set(names):
            raise StateError(f"embeddings are for conversations that step, {list(names)}; found {list(embedded)}")
        vectors, given = np.zeros((len(names), self.lm.config.dim), np.float32), np.zeros(len(names), bool)
        for name, vector in embedded.items():
            found = np.asarray(vector, np.float32)
            if found.shape != vectors.shape[1:]:
                raise TokenError(f"an embedding must have shape [{self.lm.config.dim}], found {list(found.shape)}")
            vectors[names.index(name)], given[names.index(name)] = found, True
        return vectors, given

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


def _alike(flags: NDArray[np.bool_]) -> bool | None:
    """True if all are, False if none is, None otherwise."""
    return True if flags.all() else None if flags.any() else False


def _array(name: str, value: ArrayLike) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:  # rows of unequal length
        raise TokenError(f"{name} must be an array of integers: {error}") from error
