"""How many may talk at once: by time, by memory, and what a conversation of any length costs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from moshi_mlx_app.cli import main
from moshi_mlx_app.models import fetch as fetching
from moshi_mlx_app.server import places as measuring
from moshi_mlx_app.server import server
from moshi_mlx_app.server.places import measure_places, row_bytes

import moshi_mlx
from moshi_mlx.engine import Batch, SessionFrame
from tests.helpers.parrot import Parrot


class Together:
    """Stands for a batch that takes ``base`` seconds for a tick and ``each`` more for each conversation."""

    base, each = 0.001, 0.0
    now: ClassVar[list[float]] = [0.0]

    def __init__(self, engine: Any, kv_bits: int | None = None, processes: Any = None):
        self.size, self.filled = engine.frame_size, set[int]()

    def join(self, settings: Any) -> int:
        return int(settings.seed)

    def opening(self, row: int) -> bool:
        return False

    def fill(self, row: int) -> None:
        assert row not in self.filled
        self.filled.add(row)

    def step(self, frames: Any) -> Any:
        self.now[0] += self.base + self.each * len(frames)
        return {row: SessionFrame(0, np.zeros(self.size, np.float32), "", ()) for row in frames}


@pytest.fixture
def together(monkeypatch):
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: Together.now[0]))
    monkeypatch.setattr(measuring, "Batch", Together)
    monkeypatch.setattr(measuring, "row_bytes", lambda *_: 1000)
    monkeypatch.setattr(measuring, "opus_missing", lambda: "for this test")
    return Together


def test_places_follow_from_the_time_of_a_tick(together, monkeypatch):
    """If this fails, a server lets more talk than it can answer in time, or fewer."""
    monkeypatch.setattr(together, "base", 0.010)
    monkeypatch.setattr(together, "each", 0.0017)
    found = measure_places(Parrot())  # type: ignore[arg-type]
    assert found.count == 12 and max(found.ticks) == 16 and not found.full
    monkeypatch.setattr(together, "base", 0.060)
    assert measure_places(Parrot()).count == 1  # type: ignore[arg-type]


def test_places_have_room_in_memory(together):
    """If this fails, a server with a large model takes more conversations than its memory holds."""
    for room, count in ((0, 1), (2999, 1), (3000, 2), (11_999, 4), (12_000, 8)):
        found = measure_places(Parrot(), room)  # type: ignore[arg-type]
        assert (found.count, found.full) == (count, True)


def test_long_conversations_are_measured():
    """If this fails, places are measured with conversations that have just begun, which cost less than later on."""
    engine = moshi_mlx.load("small").engine
    batch, silence = Batch(engine), np.zeros(engine.frame_size, np.float32)
    rows = [batch.join() for _ in range(3)]
    batch.step({})
    for _ in range(max(engine.lm.config.delays) + 1):
        batch.step(dict.fromkeys(rows, silence))
    for row in rows[:2]:
        batch.fill(row)
    generator, context = batch._predict._generator, engine.lm.config.context
    assert generator.slots == context
    assert [generator.position_of(batch._predict._rows[row].name) >= context for row in rows] == [True, True, False]
    for _ in range(4):
        for answer in batch.step(dict.fromkeys(rows, silence)).values():
            assert not isinstance(answer, Exception) and np.isfinite(answer.pcm).all()
    assert row_bytes(engine, None) > 2 * context * engine.lm.config.dim


def test_the_built_in_model_has_places(monkeypatch):
    """If this fails, `web` does not start with the model that it comes with."""
    monkeypatch.setattr(measuring, "_SECONDS", 0.05)
    found = measure_places(moshi_mlx.load("small"), 11e6)
    assert 1 <= found.count <= 4 and set(found.ticks) <= {1, 2, 4}


@pytest.mark.parametrize("option", ["--max-sessions", "--places"])
def test_the_option_and_its_old_name(monkeypatch, capsys, option):
    """If this fails, commands that named the number of places by its old name end in an error."""
    monkeypatch.setattr(fetching, "load_model", lambda *_, **__: Parrot())
    seen = []

    async def serve(served: server.Server, *_: Any, **__: Any) -> int:
        seen.append((served.line.places, served.engine.alone))
        return 0

    monkeypatch.setattr(server, "serve", serve)
    for count in (1, 3):
        assert main(["web", "--no-browser", "--quiet", option, str(count)]) == 0
    assert seen == [(1, True), (3, False)]
    assert main(["web", "--help"]) == 0
    assert "--max-sessions" in (told := capsys.readouterr().out) and "--places" not in told
