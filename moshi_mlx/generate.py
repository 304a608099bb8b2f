"""One frame of codes in; one text token and one frame of codes out.

Timing. Call s brings user frame s. The model then runs position s + 1, where it reads that frame (its delayed codes
one position later), and predicts the text token and first code with index s + 1 and the delayed codes with index s.
So with delays of one frame, as Moshi has, call s completes frame s of the model's own voice. Position 0, which reads
nothing but start tokens, runs when the generator is made. No user frame is lost and none waits for the next call:
that is 80 ms less than with generators that read a frame one call later, and one frame more than with those that drop
the first.

Only integers cross to the host, once a frame. This module knows tokens, not sound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from .config import EOS_ID, UNGENERATED, ZERO_TOKEN
from .errors import ConfigError, StateError, TokenError
from .lean import Array, make_stepper
from .lm import Lm
from .sampling import AUDIO_SAMPLING, TEXT_SAMPLING, Sampling, gumbel_noise
from .streaming import State, update_state

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


class Generator:
    """A batch of conversations on one model, advanced together frame by frame.

    Parameters
    ----------
    lm : Lm
        Shared; never changed.
    config : GenerationConfig
    seeds : sequence of int
        One conversation each: their number is the batch size.
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
        seeds: Sequence[int] = (0,),
        conditions: Sequence[Mapping[str, Any]] | None = None,
        null_conditions: Sequence[Mapping[str, Any]] | None = None,
        kv_bits: int | None = None,
        text: ArrayLike | None = None,
        own_codes: ArrayLike | None = None,
    ):
        self.lm = lm
        self.config = config or GenerationConfig()
        self.seeds = tuple(int(seed) for seed in seeds)
        if not self.seeds:
            raise ConfigError("seeds must name at least one conversation")
        for seed in self.seeds:
            _words(seed)
        model = lm.config
        self._guided = self.config.cfg_coef != 1.0
        if self._guided and (conditions is None or null_conditions is None):
            raise ConfigError("guidance (cfg_coef other than 1) needs conditions and null_conditions")
        rows = conditions if not self._guided else [*(conditions or ()), *(null_conditions or ())]
        for given in (conditions, null_conditions):
            if given is not None and len(given) != self.batch:
                raise ConfigError(f"{self.batch} conversations need as many conditions, found {len(given)}")
        self._condition = lm.condition(rows)
        self._kv_bits = kv_bits
        self._stepper = make_stepper(lm, kv_bits)
        self._columns = 2 * max(model.delays) + 3
        self._delays = np.array(model.delays)
        words = model.text_card + model.text_start_row
        text_ids = (words + 1) * words if model.demux_second_stream else words
        self._highest = np.array([text_ids - 1] + [model.card] * model.n_q)
        self._starts = np.array([model.text_start_id] + [model.audio_start_id] * model.n_q, np.int32)
        self._state: Any = None
        self.first = self.reset(text=text, own_codes=own_codes)
        """What position 0 predicted."""

    @property
    def batch(self) -> int:
        """Conversations that advance together."""
        return len(self.seeds)

    @property
    def position(self) -> int:
        """The next position to run: calls so far, plus one."""
        return self._position

    def reset(self, *, text: ArrayLike | None = None, own_codes: ArrayLike | None = None) -> Step:
        """Begin anew: empty caches, then position 0. Returns what it predicted.

        Raises
        ------
        TokenError
            If a token is out of range or misshapen; the generator is unchanged then.
        """
        model = self.lm.config
        forced = self._check_forced(text, own_codes)
        copies = 2 * self.batch if self._guided else self.batch
        fresh = self.lm.init_state(copies, condition=self._condition, kv_bits=self._kv_bits)
        self._state = self._stepper.open(fresh)
        # Column p % columns holds what each stream feeds at position p; -2 where that is not known yet.
        self._inputs = np.full((self.batch, model.num_streams, self._columns), UNGENERATED, np.int32)
        self._recent = np.full((self.batch, self.config.repetition_context), ZERO_TOKEN, np.int32)
        self._position = 0
        self.first = self._run(*forced)
        return self.first

    def step(
        self,
        user_codes: ArrayLike | None = None,
        *,
        text: ArrayLike | None = None,
        own_codes: ArrayLike | None = None,
    ) -> Step:
        """Take the next user frame and advance by one position.

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
        """
        model = self.lm.config
        if model.user_q:
            if user_codes is None:
                raise TokenError(f"this model listens: step needs a user frame of {model.user_q} codes")
            codes = self._tokens("user_codes", user_codes, model.user_q, ZERO_TOKEN, model.card)
        elif user_codes is not None and np.size(user_codes):
            raise TokenError("this model listens to nobody: user_codes must be None")
        forced = self._check_forced(text, own_codes)
        if model.user_q:
            self._put(codes, slice(1 + model.own_q, None), self._position - 1)
        return self._run(*forced)

    def snapshot(self) -> State:
        """Everything that a later :meth:`restore` needs, as a state of its own."""
        return {
            "lm": self._stepper.export(self._state),
            "inputs": mx.array(self._inputs),
            "recent": mx.array(self._recent),
            "position": mx.array([self._position] * self.batch, mx.int32),
            "seed": mx.array([_words(seed) for seed in self.seeds], mx.uint32),
        }

    def restore(self, snapshot: State) -> None:
        """Go on from a snapshot of the same model, batch size and settings.

        Raises
        ------
        StateError
            If it does not fit; the generator is unchanged then.
        """
        mine = self.snapshot()
        update_state(mine, snapshot)
        inputs, position = np.array(mine["inputs"]), np.array(mine["position"])
        if (
            (position < 1).any()
            or (position != position[0]).any()
            or (inputs < UNGENERATED).any()
            or (inputs > self._highest[:, None]).any()
        ):
            raise StateError("the snapshot is damaged: it holds tokens that this model does not have")
        self._state = self._stepper.open(mine["lm"])
        self._inputs = inputs
        self._recent = np.array(mine["recent"])
        self._position = int(position[0])
        self.seeds = tuple(_seed(words) for words in np.array(mine["seed"]).tolist())

    def _run(self, text: Ints | None, own_codes: Ints | None) -> Step:
        model, position = self.lm.config, self._position
        if text is not None:
            self._put(text[:, None], slice(0, 1), position - model.delays[0])
        if own_codes is not None:
            self._put(own_codes, slice(1, 1 + model.own_q), position)
        started = position > self._delays
        column = np.where(started, self._inputs[:, :, position % self._columns], self._starts)
        if (column == UNGENERATED).any():
            raise StateError(f"position {position}: a stream has no token; was the state restored from another model?")
        wanted = self._inputs[:, : 1 + model.own_q, (position + 1) % self._columns]
        tokens, heads = self._predict(column, wanted)
        # Tokens that are all forced do not depend on the caches, whose graph would grow if nobody evaluated it.
        caches = {} if (wanted == UNGENERATED).any() else self._state
        self._stepper.wait(caches, *([tokens] if heads is None else [tokens, heads]))
        produced = np.array(tokens)
        wanted[:] = produced  # a view: what this position predicts is what the next one reads
        self._remember(produced[:, 0])
        self._inputs[:, :, (position - max(model.delays) - 1) % self._columns] = UNGENERATED
        self._position = position + 1
        frame = position - 1 - max(model.max_delay - 1, 0)
        complete = self._frame(frame) if frame >= 0 else None
        return Step(
            index=position - 1,
            text=produced[:, 0],
            frame=frame,
            codes=complete[:, 1:] if complete is not None and model.own_q else None,
            aligned_text=None if complete is None else complete[:, 0],
            heads=None if heads is None else np.array(heads),
        )

    def _predict(self, column: Ints, wanted: Ints) -> tuple[Array, Array | None]:
        """Tokens [batch, 1 + own_q] of this position, lazily; ``wanted`` overrides where it is not -2."""
        lm, model, config, stepper = self.lm, self.lm.config, self.config, self._stepper
        xp = stepper.xp
        text_given, codes_given = [bool((part != UNGENERATED).all()) for part in (wanted[:, 0], wanted[:, 1:])]
        text_noise = None if text_given else self._noise(config.text, (model.text_out,), 0)
        noise = None if codes_given else self._noise(config.audio, (model.own_q, model.card), 1)
        hidden = stepper.temporal(np.concatenate([column, column]) if self._guided else column, self._state)
        heads = None
        if model.extra_heads_num_heads:
            logits = lm.extra_head_logits(mx.array(hidden[: self.batch])).astype(mx.float32)
            heads = mx.softmax(logits, axis=-1).transpose(1, 0, 2)
        if text_given:
            text = xp.array(wanted[:, 0])
        else:
            logits = self._guide(stepper.text_logits(hidden).astype(xp.float32))
            sampled = stepper.sample(self._adjust(logits), config.text, self._drawn(text_noise))
            text = self._override(sampled, wanted[:, 0])
        if not model.own_q:
            return text[:, None], heads
        if codes_given:
            return xp.concatenate([text[:, None], xp.array(wanted[:, 1:])], axis=1), heads
        noise = self._drawn(noise)
        cache: list[Any] = []
        chosen = [text]
        for codebook in range(model.own_q):
            previous = xp.concatenate([chosen[-1]] * 2) if self._guided else chosen[-1]
            logits = self._guide(stepper.depth(codebook, hidden, previous, cache).astype(xp.float32))
            code = stepper.sample(logits, config.audio, None if noise is None else noise[:, codebook])
            chosen.append(self._override(code, wanted[:, 1 + codebook]))
        return xp.stack(chosen, axis=1), heads

    def _guide(self, logits: Array) -> Array:
        if not self._guided:
            return logits
        conditioned, null = logits[: self.batch], logits[self.batch :]
        return null + self.config.cfg_coef * (conditioned - null)

    def _override(self, sampled: Array, wanted: Ints) -> Array:
        if (wanted == UNGENERATED).all():
            return sampled
        xp = self._stepper.xp
        return xp.where(xp.array(wanted != UNGENERATED), xp.array(wanted), sampled)

    def _adjust(self, logits: Array) -> Array:
        """Padding bonus and repetition penalty on text logits [batch, text_out]."""
        config, pad, xp = self.config, self.lm.config.existing_text_padding_id, self._stepper.xp
        if config.padding_bonus and pad < logits.shape[-1]:
            bonus = np.zeros(logits.shape[-1], np.float32)
            bonus[pad] = config.padding_bonus
            logits = logits + xp.array(bonus)
        if config.repetition_penalty != 1.0:
            factor = np.ones(logits.shape, np.float32)
            special = {0, 1, EOS_ID, pad}
            for row, recent in enumerate(self._recent):
                words = [token for token in set(recent.tolist()) - special if 0 <= token < factor.shape[1]]
                factor[row, words] = config.repetition_penalty
            penalty = xp.array(factor)
            logits = xp.where(logits > 0, logits / penalty, logits * penalty)
        return logits

    def _noise(self, sampling: Sampling, shape: tuple[int, ...], stream: int) -> mx.array | None:
        if sampling.temperature == 0:
            return None
        noise = gumbel_noise(self.seeds, self._position, shape, stream)
        if self._stepper.xp is np:
            mx.async_eval(noise)  # MLX's thread draws it while this one computes
        return noise

    def _drawn(self, noise: mx.array | None) -> Array | None:
        return noise if noise is None or self._stepper.xp is mx else np.array(noise)

    def _remember(self, text: Ints) -> None:
        if self.config.repetition_penalty != 1.0:
            self._recent = np.concatenate([self._recent[:, 1:], text[:, None]], axis=1)

    def _put(self, tokens: Ints, streams: slice, index: int) -> None:
        """Note token ``index`` of some streams where it will be read; -2 leaves what is there."""
        for stream, row in zip(range(*streams.indices(len(self._delays))), tokens.T, strict=True):
            position = index + 1 + int(self._delays[stream])
            slot = self._inputs[:, stream, position % self._columns]
            slot[:] = np.where(row == UNGENERATED, slot, row)

    def _frame(self, index: int) -> Ints:
        """Text and own codes [batch, 1 + own_q] with one index, gathered back from where they are read."""
        model = self.lm.config
        return np.stack(
            [
                self._inputs[:, stream, (index + 1 + model.delays[stream]) % self._columns]
                for stream in range(1 + model.own_q)
            ],
            axis=1,
        )

    def _check_forced(self, text: ArrayLike | None, own_codes: ArrayLike | None) -> tuple[Ints | None, Ints | None]:
        model = self.lm.config
        if text is not None:
            text = self._tokens(
                "text", np.reshape(_array("text", text), (-1, 1)), 1, UNGENERATED, int(self._highest[0])
            )[:, 0]
        if own_codes is not None:
            own_codes = self._tokens("own_codes", own_codes, model.own_q, UNGENERATED, model.card)
        return text, own_codes

    def _tokens(self, name: str, value: ArrayLike, width: int, lowest: int, highest: int) -> Ints:
        tokens = _array(name, value)
        if tokens.ndim == 1:
            tokens = tokens[None]
        if tokens.shape != (self.batch, width):
            raise TokenError(f"{name} must have shape [{self.batch}, {width}], found {list(tokens.shape)}")
        if not np.issubdtype(tokens.dtype, np.integer):
            raise TokenError(f"{name} must be integers, found {tokens.dtype}")
        if tokens.size and (tokens.min() < lowest or tokens.max() > highest):
            raise TokenError(f"{name} must be between {lowest} and {highest}, found {tokens.min()} to {tokens.max()}")
        return tokens.astype(np.int32)


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
