"""A model that costs nothing: it answers every frame at once, so that these tests see the program and not MLX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import moshi_mlx
from moshi_mlx.engine.text import Word
from moshi_mlx.tasks import TASKS
from moshi_mlx.tasks.dialogue import SessionFrame


class FakeSession:
    """Says one word every ten frames, in a voice that is the negative of half the question."""

    def __init__(self, model: FakeModel, seed: int, generation: Any):
        self.model, self.seed, self.generation = model, seed, generation
        self.index = 0
        self.kv_bits: int | None = None

    def __enter__(self) -> FakeSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.model.closed += 1

    def step(self, pcm: np.ndarray) -> SessionFrame:
        assert pcm.shape == (1920,) and pcm.dtype == np.float32
        index, self.index = self.index, self.index + 1
        self.model.on_frame(index)
        text, words = "", ()
        if index % 10 == 0:
            text = self.model.says[(index // 10) % len(self.model.says)]
            words = (Word(text.strip(), index * 0.08, index * 0.08 + 0.4),)
        return SessionFrame(index, (-0.5 * pcm).astype(np.float32), text, words)

    def finish(self) -> SessionFrame:
        end = self.index * 0.08
        return SessionFrame(self.index, np.zeros(0, np.float32), " end.", (Word("end.", end, end),))


class FakeModel:
    """What ``moshi_mlx.load`` gives, as far as the program looks at it."""

    name, trained = "fake", True
    sample_rate, frame_size, frame_rate = 24000, 1920, 12.5
    description = "fake (says what it is told)"

    def __init__(self) -> None:
        self.config = SimpleNamespace(stt_config={}, model_type="moshi", lm_gen_config={})
        self.says: list[str] = [" Hello", " there.", " Fine", " day."]
        self.on_frame: Callable[[int], None] = lambda index: None
        self.loaded: list[tuple[str, dict[str, Any]]] = []
        self.sessions: list[FakeSession] = []
        self.closed = 0

    @property
    def purpose(self) -> str:
        return TASKS[self.config.model_type].purpose

    def load(self, source: str = "small", **options: Any) -> FakeModel:
        self.loaded.append((source, options))
        return self

    def trailing_silence(self, tail: float) -> int:
        """The real one: it looks at the configuration only."""
        task = TASKS[self.config.model_type]
        return task(self.config, None, self, None).trailing_silence(tail)  # type: ignore[arg-type]

    def opening(self, role: str | None, voice: str | None, *, pin: bool) -> None:
        assert role is None and voice is None

    def session(self, *, seed: int = 0, generation: Any = None, kv_bits: int | None = None) -> FakeSession:
        self.sessions.append(FakeSession(self, seed, generation))
        self.sessions[-1].kv_bits = kv_bits
        return self.sessions[-1]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """The fake, in place of every model that would be fetched and loaded."""
    fake = FakeModel()
    monkeypatch.setattr("moshi_mlx_app.models.fetch.fetch", lambda source, **_: None)
    monkeypatch.setattr(moshi_mlx, "load", fake.load)
    return fake


@pytest.fixture(autouse=True)
def apart(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's: no network, an empty cache folder, and no second spent on measuring the machine."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("moshi_mlx_app.models.select.cache_folder", lambda: tmp_path_factory.getbasetemp() / "cache")
    monkeypatch.setattr("moshi_mlx_app.models.measure.speeds", lambda: {4: 1e9, 8: 1e9, 16: 1e9})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, made the current one."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
