"""Windows of conversation as the arrays that a training step reads.

What is worth learning is chosen here, on integers, so that a step has the same shapes every time: which frames the
depth transformer sees, how much each text token weighs, and which inputs are spoiled. Inputs are spoiled because at
run time the model reads its own, imperfect codes: without it the true past tells the answer and nothing else is learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moshi_mlx.config import LmConfig
from moshi_mlx.engine.text import EPAD, PAD
from moshi_mlx_training.lm.dialogue import AS_BEFORE, LEAD, NONE, Manner, Pieces, Window, compose

PAD_WEIGHT, WORD_WEIGHT, FIRST_WEIGHT = 0.3, 1.0, 10.0  # of text tokens
DECIDING_WEIGHT = 8.0  # of words that tell answers apart
LISTENING_WEIGHT, SAID_WEIGHT, STOPPED_WEIGHT = 0.6, 1.0, 2.0  # of padding in questions, answers, after interruptions
DEPTH_SHARE = 0.16  # of all frames, whose codes are learnt in one step
SILENT_SHARE = 0.15  # of those, frames in which the own voice is silent
# Chance that an input is spoiled, per conversation and then per token, on average.
SPOIL = 0.7
OWN_SPOILED, USER_SEMANTIC_SPOILED, USER_ACOUSTIC_SPOILED, TEXT_SPOILED = 0.15, 0.04, 0.15, 0.05
USER_FRAME_SPOILED = 0.02  # all codes of a user's frame at once


@dataclass(frozen=True)
class Batch:
    """Arrays of one step; n frames are batch * time in row-major order, fixed numbers of rows are gathered from them.

    Attributes
    ----------
    inputs : array [batch, streams, time], int32
        What each stream holds at each position: delayed, and spoiled here and there.
    text, text_weight : arrays [n]
        The token to predict and how much it counts.
    depth_rows : array [rows], int32
        Positions whose codes are learnt; ``depth_tokens`` [rows, 1 + dep_q] are their text token and codes.
    answer_rows, answer, answer_weight : arrays [rows]
        Where to tell the answer, which it is, and 0 for rows that only fill up.
    heard_rows, heard, heard_weight : arrays [rows]
        The same for words just heard.
    phone_rows, phone_weight : arrays [rows]; phones : array [rows, 2]
        The same for what is being said.
    first_weight : array [n]
        1 where the first word of an answer is predicted.
    """

    inputs: mx.array
    text: mx.array
    text_weight: mx.array
    depth_rows: mx.array
    depth_tokens: mx.array
    answer_rows: mx.array
    answer: mx.array
    answer_weight: mx.array
    heard_rows: mx.array
    heard: mx.array
    heard_weight: mx.array
    phone_rows: mx.array
    phones: mx.array
    phone_weight: mx.array
    first_weight: mx.array

    def arrays(self) -> tuple[mx.array, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def delayed(tokens: NDArray[np.int32], config: LmConfig) -> NDArray[np.int32]:
    """`delays.delay_tokens` on the host: [streams, time] -> [streams, time + 1]."""
    streams, time = tokens.shape
    out = np.full((streams, time + 1), config.audio_start_id, np.int32)
    out[0] = config.text_start_id
    for stream, delay in enumerate(config.delays):
        out[stream, delay + 1 :] = tokens[stream, : time - delay]
    return out


def spoil(
    inputs: NDArray[np.int32], config: LmConfig, rng: np.random.Generator, text_spoiled: float = TEXT_SPOILED
) -> None:
    """Replace some tokens of inputs [streams, time], in place, by random ones; a share of the text by padding."""
    if rng.random() > SPOIL:
        return
    own, time = 1 + config.own_q, inputs.shape[1]
    chance = np.full((len(inputs), 1), USER_ACOUSTIC_SPOILED * rng.random() * 2)
    chance[own : own + 1] = USER_SEMANTIC_SPOILED * rng.random() * 2
    chance[1:own] = OWN_SPOILED * rng.random() * 2
    chance[0] = 0
    # Whole frames of the own voice go wrong together as often as single codes do.
    frames = np.repeat(rng.random((1, time)) < chance[1, 0] / 2, own - 1, axis=0)
    hit = rng.random(inputs.shape) < chance
    hit[1:own] |= frames
    hit[own:] |= rng.random((1, time)) < USER_FRAME_SPOILED
    hit[:, 0] = False
    hit &= inputs >= 0  # nothing stays nothing
    inputs[hit] = rng.integers(0, config.card, int(hit.sum()))
    lost = (rng.random(time) < text_spoiled) & (inputs[0] != config.text_start_id)
    inputs[0, lost] = PAD


def drop_acoustic(inputs: NDArray[np.int32], config: LmConfig, rng: np.random.Generator) -> None:
    """Hide the user's acoustic codes in inputs [streams, time], in place: what is said is in the semantic ones.

    All of the books or the last of them, throughout or for a while; they hold random codes then, or what streams hold
    before they begin.
    """
    own, time = 1 + config.own_q, inputs.shape[1]
    first = own + (1 if rng.random() < 0.6 else int(rng.integers(1, len(inputs) - own)))
    begin, end = (0, time) if rng.random() < 0.5 else np.sort(rng.integers(0, time + 1, 2))
    part = inputs[first:, begin:end]
    hidden = config.audio_start_id if rng.random() < 0.5 else rng.integers(0, config.card, part.shape)
    inputs[first:, begin:end] = np.where(part == config.audio_start_id, part, hidden)


def _rows(
    index: NDArray[np.intp], count: int, rng: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """``count`` of the positions, or all of them and copies of position 0 with weight 0."""
    if len(index) > count:
        index = np.sort(rng.choice(index, count, replace=False))
    rows, weight = np.zeros(count, np.int32), np.zeros(count, np.float32)
    rows[: len(index)], weight[: len(index)] = index, 1
    return rows, weight


def make_batch(windows: Sequence[Window], config: LmConfig, rng: np.random.Generator, dropped: float = 0.0) -> Batch:
    """A step's arrays from conversations of equal length; ``dropped`` of them without all of the user's codes."""
    time = windows[0].tokens.shape[1]
    n = len(windows) * time
    shifted = np.stack([delayed(window.tokens, config) for window in windows])
    inputs, targets = shifted[:, :, :-1].copy(), shifted[:, : 1 + config.dep_q, 1:]
    for row in inputs:
        spoil(row, config, rng)
        if dropped and rng.random() < dropped:
            drop_acoustic(row, config, rng)
    text = np.stack([window.tokens[0] for window in windows]).reshape(n)
    first = np.stack([window.first for window in windows]).reshape(n)
    weight = np.where(text == PAD, PAD_WEIGHT, WORD_WEIGHT).astype(np.float32)
    phones = np.stack([window.phones for window in windows]).reshape(n, 2)
    speaking = np.stack([window.speaking for window in windows])
    written = np.pad(speaking, ((0, 0), (0, LEAD)))[:, LEAD:].reshape(n)
    weight[(phones[:, 0] != NONE) & (text == PAD)] = LISTENING_WEIGHT  # or weighty words are begun too early
    weight[written & (text == PAD)] = SAID_WEIGHT  # or begun twice
    weight[np.stack([window.deciding for window in windows]).reshape(n) & (text != PAD)] = DECIDING_WEIGHT
    weight[np.stack([window.stopped for window in windows]).reshape(n) & (text == PAD)] = STOPPED_WEIGHT
    begins = np.flatnonzero(first)
    announced = begins[begins > 0] - 1
    weight[announced[text[announced] == EPAD]] = FIRST_WEIGHT / 3  # when to speak matters too
    weight[first] = FIRST_WEIGHT
    depth_count = int(n * DEPTH_SHARE)
    silent_count = int(depth_count * SILENT_SHARE)
    known = (targets[:, 1:] < config.card).all(1)
    loud, still = np.flatnonzero(speaking & known), np.flatnonzero(~speaking & known)
    loud = rng.permutation(loud)[: depth_count - silent_count]
    depth_rows = np.sort(np.concatenate([loud, rng.permutation(still)[: depth_count - len(loud)]])).astype(np.int32)
    frames = targets.transpose(0, 2, 1).reshape(n, -1)
    answer = np.stack([window.answer for window in windows]).reshape(n)
    heard = np.stack([window.heard for window in windows]).reshape(n)
    answer_rows, answer_weight = _rows(np.flatnonzero(answer != NONE), n // 8, rng)
    heard_rows, heard_weight = _rows(np.flatnonzero(heard != NONE), n // 8, rng)
    phone_rows, phone_weight = _rows(np.flatnonzero(phones[:, 0] != NONE), n // 4, rng)
    return Batch(
        mx.array(inputs),
        mx.array(text),
        mx.array(weight),
        mx.array(depth_rows),
        mx.array(frames[depth_rows]),
        mx.array(answer_rows),
        mx.array(np.maximum(answer[answer_rows], 0)),
        mx.array(answer_weight),
        mx.array(heard_rows),
        mx.array(np.maximum(heard[heard_rows], 0)),
        mx.array(heard_weight),
        mx.array(phone_rows),
        mx.array(np.maximum(phones[phone_rows], 0)),
        mx.array(phone_weight),
        mx.array(first.astype(np.float32)),
    )


def training_batch(
    pieces: Pieces,
    config: LmConfig,
    size: int,
    frames: int,
    seed: int,
    step: int,
    worker: int = 0,
    manner: Manner = AS_BEFORE,
    dropped: float = 0.0,
) -> Batch:
    """The batch of one worker at one step: depends on its arguments and the pieces alone."""
    rng = np.random.default_rng([seed, step, worker])
    return make_batch([compose(pieces, frames, rng, manner) for _ in range(size)], config, rng, dropped)
