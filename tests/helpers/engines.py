"""Engines whose stages use a trivial codec and model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from moshi_mlx.engine.generator import Step
from moshi_mlx.engine.pipeline import Answer, Settings
from moshi_mlx.errors import CodecError

__all__ = ["FakeEngine"]


class FakeEngine:
    """Stands for an :class:`~moshi_mlx.engine.Engine`, and for the model that it belongs to.

    Parameters
    ----------
    encoder, decoder : callable
        Make what has ``encode(frame)``, ``decode(codes)`` and ``reset()``; for each conversation.
    generator : callable
        Makes what has ``step(codes)``, a Step, and ``reset()``; called with the conversation's settings.
    reader : callable, optional
        Makes what has ``step(step)``, text and words, for each conversation.
    """

    name, tokenizer, codec = "fake", None, None
    sample_rate, frame_size, frame_rate = 24_000, 1_920, 12.5

    def __init__(
        self,
        encoder: Callable[[], Any],
        decoder: Callable[[], Any],
        generator: Callable[..., Any],
        books: int = 8,
        reader: Callable[[], Any] | None = None,
    ):
        self.encoder, self.decoder, self.generator, self.reader = encoder, decoder, generator, reader
        self.own_q = self.user_q = books
        self.config = SimpleNamespace(stt_config={})

    @property
    def engine(self) -> FakeEngine:
        return self

    @property
    def lead(self) -> int:
        seconds = self.config.stt_config.get("audio_silence_prefix_seconds", 0.0)
        return math.ceil(round(seconds * self.sample_rate) / self.frame_size)

    def encode(self) -> _Encode:
        return _Encode(self)

    def predict(self, kv_bits: int | None = None) -> _Predict:
        return _Predict(self, kv_bits)

    def decode(self) -> _Decode:
        return _Decode(self)


class _Fake:
    batched = False

    def __init__(self, engine: FakeEngine):
        self.engine = engine
        self.rows: dict[int, Any] = {}
        self.settings_of: dict[int, Any] = {}
        self.left: list[tuple[Any, Any]] = []  # with its settings: a row that begins again is the same fake, reset

    def made(self) -> Any:
        raise NotImplementedError

    def join(self, row: int, snapshot: Any = None, settings: Any = None) -> None:
        self.settings_of[row] = settings
        for index, (theirs, fake) in enumerate(self.left):
            if theirs is settings:
                del self.left[index]
                self.rows[row] = fake
                fake.reset()
                return
        self.rows[row] = self.made()

    def leave(self, row: int) -> None:
        if row in self.rows:
            self.left = [*self.left[-9:], (self.settings_of.pop(row), self.rows.pop(row))]

    def snapshot(self, row: int) -> Any:
        raise CodecError("a fake cannot be kept")


class _Encode(_Fake):
    def made(self) -> Any:
        return self.engine.encoder()

    def step(self, rows: Sequence[int], frames: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self.rows[row].encode(frame) for row, frame in zip(rows, frames, strict=True)]


class _Decode(_Fake):
    def made(self) -> Any:
        return self.engine.decoder()

    def step(self, rows: Sequence[int], codes: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        return [
            np.zeros(self.engine.frame_size, np.float32) if one is None else self.rows[row].decode(one)
            for row, one in zip(rows, codes, strict=True)
        ]


class _Predict(_Fake):
    def __init__(self, engine: FakeEngine, kv_bits: int | None):
        super().__init__(engine)
        self.kv_bits = kv_bits
        self.settings = Settings()
        self.counts: dict[int, int] = {}
        self.readers: dict[int, Any] = {}

    def made(self) -> Any:
        about = self.settings
        return self.engine.generator(
            seed=about.seed, generation=about.generation, conditions=about.conditions, kv_bits=self.kv_bits
        )

    def join(self, row: int, settings: Settings | None = None, snapshot: Any = None) -> None:
        self.settings = settings or Settings()
        super().join(row, settings=settings)
        self.counts[row] = -1 - self.engine.lead
        self.readers[row] = None if self.engine.reader is None else self.engine.reader()

    def opening(self, row: int) -> bool:
        return self.counts[row] < 0

    def open(self, row: int) -> None:
        while self.opening(row):
            self.step([row], [None])

    def frames(self, row: int) -> int:
        return self.counts[row]

    def flush(self, row: int) -> tuple[str, tuple[()]]:
        return "", ()

    def step(self, rows: Sequence[int], codes: Sequence[np.ndarray | None]) -> list[Answer | None]:
        return [self._one(row, one) for row, one in zip(rows, codes, strict=True)]

    def _one(self, row: int, codes: np.ndarray | None) -> Answer | None:
        index = self.counts[row]
        step = Step(-1, np.array([3], np.int32), -1, None, None)
        if index > -1 - self.engine.lead:
            step = self.rows[row].step(np.zeros(max(self.engine.user_q, 1), np.int32) if codes is None else codes)
        reader = self.readers[row]
        text, words = ("", ()) if reader is None else reader.step(step)
        self.counts[row] += 1
        if index < 0:
            return None
        spoken = self.engine.own_q and step.codes is not None and step.codes.min() >= 0
        return Answer(index, step.codes[0] if spoken and step.codes is not None else None, text, words, step)
