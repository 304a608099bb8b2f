"""A model that says back what it hears, for tests of everything around the model.

:func:`install` puts it in place of every model that would be loaded. Run as a program, it is ``moshi-mlx-local`` with
that model, on the machine's own sound devices; with ``--fake-card`` first, on devices made of Python.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":  # as the program itself does: what is being imported may swallow Ctrl-C, or abort
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import numpy as np

import moshi_mlx
from moshi_mlx.engine.generator import Step
from tests.helpers.engines import FakeEngine

__all__ = ["Parrot", "install", "pump"]

FRAME, RATE, BOOKS = 1_920, 24_000, 8


class Parrot:
    """Replaces a loaded model.

    Parameters
    ----------
    seconds : float
        What each stage takes for a frame.
    fails_at : int
        Frame at which the model raises; -1 for never.
    fails_for : int, optional
        Seed of the conversations in which it does; by default all.

    Attributes
    ----------
    begun : list of dict, optional
        Gets what each conversation began with.
    reader : callable, optional
        Makes for each conversation what its steps say.
    """

    name, description, trained = "parrot", "parrot (says what it hears)", True
    sample_rate, frame_size, frame_rate = RATE, FRAME, 12.5
    tokenizer = None
    purpose, command = "dialogue", "talk"
    takes_role, default_role = False, ""
    begun: list[dict[str, Any]] | None = None
    reader: Any = None

    def __init__(self, seconds: float = 0.0, fails_at: int = -1, fails_for: int | None = None):
        self.seconds, self.fails_at, self.fails_for = seconds, fails_at, fails_for
        self.config = SimpleNamespace(stt_config={}, model_type="moshi", lm_gen_config={})
        self.lm = SimpleNamespace(config=SimpleNamespace(own_q=BOOKS, user_q=BOOKS, delays=(0,) * 17))
        self.codec = SimpleNamespace(num_codebooks=BOOKS, encoder=lambda: _Ear(self), decoder=lambda: _Mouth(self))
        self.frames: dict[int, np.ndarray] = {}
        self.heard = 0
        self._numbers = itertools.count()

        self.engine = FakeEngine(lambda: _Ear(self), lambda: _Mouth(self), self._mind, BOOKS, lambda: self._reader())

    def opening(self, role: Any = None, voice: Any = None, *, pin: bool = True) -> None:
        return None

    def voices(self) -> list[str]:
        return []

    def load(self, *_: Any, **__: Any) -> Parrot:
        return self

    def _mind(self, **settings: Any) -> _Mind:
        if self.begun is not None:
            self.begun.append(settings)
        return _Mind(self, self.fails_at if self.fails_for in (None, settings["seed"]) else -1)

    def _reader(self) -> Any:
        return _Silent() if self.reader is None else self.reader(self)


class _Silent:
    def step(self, step: Step) -> tuple[str, tuple[()]]:
        return "", ()


class _Ear:
    def __init__(self, parrot: Parrot):
        self.parrot = parrot

    def encode(self, frame: np.ndarray) -> np.ndarray:
        parrot = self.parrot
        time.sleep(parrot.seconds)
        number = next(parrot._numbers)  # several conversations may share a parrot
        parrot.frames[number] = frame.copy()
        parrot.frames.pop(number - 1000, None)
        parrot.heard += 1
        return np.full(BOOKS, number, np.int32)

    def reset(self) -> None:
        pass


class _Mouth(_Ear):
    def decode(self, codes: np.ndarray) -> np.ndarray:
        time.sleep(self.parrot.seconds)
        return self.parrot.frames[int(codes[0])]


class _Mind:
    def __init__(self, parrot: Parrot, fails_at: int):
        self.parrot, self.fails_at, self.count = parrot, fails_at, 0

    def step(self, codes: np.ndarray) -> Step:
        if self.count == self.fails_at:
            raise RuntimeError("broken on purpose")
        time.sleep(self.parrot.seconds)
        self.count += 1
        return Step(self.count, np.array([3], np.int32), self.count, codes[None].copy(), None)

    def reset(self) -> None:
        pass


def install(parrot: Parrot) -> None:
    """Every model is this one from now on; for processes that end with the test, or with a monkeypatch around."""
    moshi_mlx.load = parrot.load  # type: ignore[assignment]


def pump(card: Any, sound: Any = None) -> None:
    """Let a fake card's streams call back every 10 ms, in a thread, until the card is ``finished``.

    The microphone gives ``sound(index, count)``.
    """

    def run() -> None:
        index, began = 0, time.monotonic()
        while not card.finished:
            index += 1
            time.sleep(max(0.0, began + index * 0.01 - time.monotonic()))
            for stream in list(card.streams):
                if not stream.active:
                    continue
                count = round(stream.options["samplerate"] / 100)
                data = np.zeros((count, stream.options["channels"]), np.float32)
                if stream.kind == "input":
                    data[:] = 0.1 * np.sin(np.arange(count) * 0.1)[:, None] if sound is None else sound(index, count)
                stream.call(data)

    threading.Thread(target=run, daemon=True).start()


def main() -> int:
    """The program with this model."""
    arguments = sys.argv[1:]
    install(Parrot())
    from moshi_mlx_app.cli import main as program
    from moshi_mlx_app.models import fetch

    fetch.fetch = lambda *_, **__: None  # there is nothing to fetch

    if arguments[:1] == ["--fake-card"]:
        from moshi_mlx_app.audio import portaudio

        from tests.app.test_device import FakeCard

        card = FakeCard()
        portaudio.sounddevice = lambda: card
        pump(card)
        arguments = arguments[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[1:] = [*arguments, "--model", "small"]  # a name that needs no network, nor a measurement of the machine
    return program()


if __name__ == "__main__":
    sys.exit(main())
