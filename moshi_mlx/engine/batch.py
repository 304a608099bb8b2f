"""Conversations that go through a model together: rows that join and leave at any time.

::

    batch = Batch(model.engine)
    row = batch.join(Settings(seed=1))
    answers = batch.step({row: pcm})     # the rows that have a frame; the others wait at no cost

A row gives the answer that it would give alone, whatever the other rows do. A row that fails is removed, and the others
continue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..state import State
from .pipeline import Decode, Encode, Engine, SessionFrame, Settings
from .text import Word

if TYPE_CHECKING:
    from .codec_processes import CodecProcesses, Spread

__all__ = ["Batch", "OnStage", "Stage", "run_rows"]

Pcm = NDArray[np.float32]

OnStage = Callable[[str, float, float], object]
"""Called as "encode", "model" or "decode" ends, with when it began and ended (:func:`time.monotonic`)."""


class Stage(Protocol):
    """What steps rows. ``batched``: whether a step that fails has changed no row."""

    batched: bool

    def step(self, rows: Sequence[int], values: Any, /) -> list[Any]: ...


class Batch:
    """Any number of conversations, advanced together. Belongs to one thread at a time.

    Parameters
    ----------
    engine : Engine
    kv_bits : {None, 8}
        Precision of the cache.
    processes : CodecProcesses, optional
        Child processes that share the codec's work (:mod:`moshi_mlx.engine.codec_processes`).

    Attributes
    ----------
    on_stage : callable or None
        See :data:`OnStage`.
    """

    def __init__(self, engine: Engine, *, kv_bits: int | None = None, processes: CodecProcesses | None = None):
        self._encode: Encode | Spread = engine.encode()
        self._predict = engine.predict(kv_bits)
        self._decode: Decode | Spread = engine.decode()
        if processes is not None:
            self._encode, self._decode = processes.spread(self._encode), processes.spread(self._decode)
        self._rows: dict[int, None] = {}
        self._count = 0
        self.on_stage: OnStage | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        """The conversations, in the order in which they joined. Numbers are never reused."""
        return tuple(self._rows)

    def join(self, settings: Settings | None = None, snapshot: State | None = None) -> int:
        """Start a conversation, or continue one from a snapshot.

        Raises
        ------
        MoshiError
            If the settings or the snapshot do not fit the model; nothing has changed in that case.
        """
        row = self._count
        self._count += 1
        try:
            self._encode.join(row, snapshot)
            self._predict.join(row, settings, snapshot)
            self._decode.join(row, snapshot)
        except BaseException:
            self.leave(row)
            raise
        self._rows[row] = None
        return row

    def leave(self, row: int) -> None:
        """End a conversation, if it exists."""
        self._rows.pop(row, None)
        for stage in (self._encode, self._predict, self._decode):
            stage.leave(row)

    def opening(self, row: int) -> bool:
        """Whether a conversation still has steps before its first frame; :meth:`step` runs them by itself."""
        return self._predict.opening(row)

    def opened(self, row: int) -> tuple[int, int]:
        """How many steps before its first frame a conversation has run, and how many there are."""
        return self._predict.opened(row)

    def open(self, row: int, on_step: Callable[[int, int], object] | None = None) -> None:
        """Run all steps before a conversation's first frame at once; ``on_step`` is told :meth:`opened` after each."""
        if on_step is None:
            self._predict.open(row)
        while self._predict.opening(row):
            self._predict.step([row], [None])
            if on_step is not None:
                on_step(*self._predict.opened(row))

    def fill(self, row: int) -> None:
        """Let a conversation take time and memory as one that is longer than the model's context.

        For measurements: what it answers from now on means nothing. It must have answered one frame more than the
        model's longest delay.
        """
        self._predict.fill(row)

    def frames(self, row: int) -> int:
        """Frames that a conversation has answered."""
        return self._predict.frames(row)

    def step(self, frames: Mapping[int, Pcm | None]) -> dict[int, SessionFrame | Exception]:
        """Advance the conversations that have a frame, and those that are still opening.

        Parameters
        ----------
        frames : mapping of int to array [frame_size], float32
            The next frame of each conversation that has one; not of those that are :meth:`opening`. None is the end
            of the user's sound, for translation models.

        Returns
        -------
        dict
            The answer for each of ``frames``, and the error for each conversation that failed and was removed.
        """
        failed: dict[int, Exception] = {}
        opening = dict.fromkeys(row for row in self._rows if self._predict.opening(row))
        codes = self._run("encode", self._encode, frames, failed)
        answers = self._run("model", self._predict, {**codes, **opening}, failed)
        spoken = {row: answer for row, answer in answers.items() if answer is not None}
        sound = self._run("decode", self._decode, {row: answer.codes for row, answer in spoken.items()}, failed)
        for row in failed:
            self.leave(row)
        return {**failed, **{row: spoken[row].frame(pcm) for row, pcm in sound.items()}}

    def flush(self, row: int) -> tuple[str, tuple[Word, ...]]:
        """The last text and words of a conversation, which are complete only at its end."""
        return self._predict.flush(row)

    def snapshot(self, row: int) -> State:
        """The state from which a conversation can be continued, here or elsewhere: a tree of arrays with one row.

        Raises
        ------
        StateError
            If it is still opening.
        CodecError
            If the codec cannot give its state (Rust).
        """
        return {
            part: value
            for stage in (self._encode, self._predict, self._decode)
            for part, value in stage.snapshot(row).items()
        }

    def _run(self, name: str, stage: Stage, given: Mapping[int, Any], failed: dict[int, Exception]) -> dict[int, Any]:
        """Run a stage for each row."""
        if not given:
            return {}
        began = time.monotonic()
        done = run_rows(stage, list(given), list(given.values()), failed)
        if self.on_stage is not None:
            self.on_stage(name, began, time.monotonic())
        return done


def run_rows(stage: Stage, rows: list[int], values: list[Any], failed: dict[int, Exception]) -> dict[int, Any]:
    """A stage's results by row; after a failure each row is run by itself, to find the faulty one.

    ``failed`` gets the exceptions, those that a stage returns in place of results as well.
    """
    if len(rows) == 1 or stage.batched:
        try:
            found = dict(zip(rows, stage.step(rows, values), strict=True))
            failed.update({row: result for row, result in found.items() if isinstance(result, Exception)})
            return {row: result for row, result in found.items() if row not in failed}
        except Exception as error:
            if len(rows) == 1:
                failed[rows[0]] = error
                return {}
    done: dict[int, Any] = {}
    for row, value in zip(rows, values, strict=True):
        done.update(run_rows(stage, [row], [value], failed))
    return done
