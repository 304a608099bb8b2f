"""How many can talk at once: measured with the load that they will be.

All of them go through the model in one thread. A frame that comes waits for the tick that runs, and then for its own:
twice the time of a tick with everybody in it is the longest that an answer takes, and must be less than a frame. So the
model has less than half of the interpreter's time, and the connections have the rest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.engine import Batch, Engine, SessionFrame, Settings
from moshi_mlx.engine.codec_processes import CodecProcesses, codec_processes_for
from moshi_mlx.state import state_bytes
from moshi_mlx.tasks.dialogue import Moshi

from .protocols.kyutai import Opus, Pcm, Sound, opus_missing

__all__ = ["Places", "measure_places"]

_MOST = 256
_SHARE = 0.4  # of a frame, for a tick: a fifth of the time is left for what else the machine may do
_SECONDS = 0.4  # for each number of conversations
_SPOKEN = 64  # frames of speech


@dataclass(frozen=True)
class Places:
    """What was measured.

    Attributes
    ----------
    count : int
        Conversations at once; one at least.
    ticks : dict of int to float
        Seconds of a tick (p95), by the number of conversations in it.
    full : bool
        Whether memory, not time, is what limits the count.
    """

    count: int
    ticks: dict[int, float]
    full: bool = False


def measure_places(model: Moshi, room: float = float("inf"), *, kv_bits: int | None = None) -> Places:
    """Run conversations of 1, 2, 4 and more, all of them long ones, on recorded speech; a fraction of a second each.

    Parameters
    ----------
    model : Moshi
    room : float
        Bytes that their states may take.
    kv_bits : {None, 8}
        Precision of the cache.
    """
    from moshi_mlx_app.models.measure import question

    engine = model.engine
    speech = list(islice(question(model), _SPOKEN))
    most = min(_held(room, row_bytes(engine, kv_bits)), _MOST)
    with CodecProcesses(engine, count) if (count := codec_processes_for(engine)) else nullcontext() as processes:
        if processes is not None:
            processes.wait()
        return _measure(Batch(engine, kv_bits=kv_bits, processes=processes), model, speech, most)


def _measure(batch: Batch, model: Moshi, speech: Sequence[NDArray[np.float32]], most: int) -> Places:
    rows, sounds, frame = list[int](), list[Sound](), 1 / model.frame_rate
    ticks: dict[int, float] = {}
    count = 1
    while True:
        while len(rows) < count:
            rows.append(batch.join(Settings(seed=len(rows))))
            sounds.append(Pcm() if opus_missing() else Opus(model.sample_rate))
        ticks[count] = _tick(batch, rows, sounds, speech, frame, max(model.lm.config.delays))
        if ticks[count] > _SHARE * frame or count >= most:
            return Places(_between(ticks, _SHARE * frame), ticks, ticks[count] <= _SHARE * frame)
        count = min(2 * count, most)


def row_bytes(engine: Engine, kv_bits: int | None) -> int:
    """What the state of a long conversation takes in the language model."""
    lm = engine.lm
    return state_bytes(lm.init_state(1, kv_bits=kv_bits, slots=lm.config.context))


def _held(room: float, each: int) -> int:
    """How many rows find room: there is a power of two of them, and half as many beside them while they move."""
    count = 1
    while count < _MOST and 3 * count * each <= room:
        count *= 2
    return count


def _tick(
    batch: Batch,
    rows: Sequence[int],
    sounds: Sequence[Sound],
    speech: Sequence[NDArray[np.float32]],
    frame: float,
    delay: int,
) -> float:
    """Seconds (p95) in which everybody's frame is answered and compressed."""
    took: list[float] = []

    def tick(index: int) -> float:
        began = time.perf_counter()
        heard = {row: speech[(index + 7 * row) % len(speech)] for row in rows}
        for answer, sound in zip(_checked(batch.step(heard)), sounds, strict=True):
            sound.encode(answer.pcm)
        return time.perf_counter() - began

    new = [row for row in rows if batch.opening(row)]
    while any(batch.opening(row) for row in new):
        _checked(batch.step({}))
    for index in range(delay + 1):
        tick(index)
    for row in new:
        batch.fill(row)
    tick(0)  # the first of a size compiles and allocates
    until = time.perf_counter() + _SECONDS
    while len(took) < 3 or time.perf_counter() < until:
        took.append(tick(len(took)))
        if sum(took) > 10 * frame:  # so slow that more of it tells nothing
            break
    return float(np.percentile(took, 95))


def _checked(answers: Mapping[int, SessionFrame | Exception]) -> list[SessionFrame]:
    for error in answers.values():
        if isinstance(error, Exception):
            raise error
    return [answer for answer in answers.values() if isinstance(answer, SessionFrame)]


def _between(ticks: dict[int, float], most: float) -> int:
    """The largest number whose tick takes ``most`` seconds; between two measured ones time grows evenly."""
    fits = [count for count, took in ticks.items() if took <= most]
    if not fits:
        return 1
    low, high = max(fits), max(ticks)
    if low == high:
        return low
    share = (most - ticks[low]) / (ticks[high] - ticks[low])
    return low + int(share * (high - low))
