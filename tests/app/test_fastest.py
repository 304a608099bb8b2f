"""What computes fastest is measured once and remembered."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from moshi_mlx_app.models import fastest, select

import moshi_mlx
from moshi_mlx import loading
from moshi_mlx.cpu.backend import VARIABLE


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(select, "cache_folder", lambda: tmp_path)
    return tmp_path / "fastest.json"


def test_once_and_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, every start spends seconds on measuring, or the slowest codec is taken."""
    asked: list[str] = []

    def measure(source: str) -> dict[str, float]:
        asked.append(source)
        return {"rust": 9.0, "numpy": 4.0}

    monkeypatch.setattr(loading, "measure_codec", measure)
    assert list(fastest.fastest_codec("small")) == ["numpy", "rust"][::-1] or asked == ["small"]
    assert list(fastest.fastest_codec("small")) == ["numpy", "rust"]
    assert asked == ["small"]
    fastest.fastest_codec("org/other")
    assert asked == ["small", "org/other"]


def test_folders_of_one_name(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a model is refused because another folder of its name had a codec that it cannot use."""
    found = iter([{"rust": 1.0}, {"numpy": 1.0}])
    monkeypatch.setattr(loading, "measure_codec", lambda source: next(found))
    for parent, kind in (("one", "rust"), ("two", "numpy")):
        (tmp_path / parent / "model").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / parent)
        assert list(fastest.fastest_codec("model")) == list(fastest.fastest_codec("./model")) == [kind]


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"machine": 3}', '{"machine": {}, "found": {"codec of small": {}}}']
)
def test_a_damaged_memory_is_measured_again(cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a file that was cut short, or came from another machine, ends every command or decides wrongly."""
    cache.write_text(damage)
    monkeypatch.setattr(loading, "measure_codec", lambda source: {"numpy": 4.0})
    assert fastest.fastest_codec("small") == {"numpy": 4.0}
    assert json.loads(cache.read_text())["found"] == {"codec of small": {"numpy": 4.0}}


def test_what_is_measured(cache: Path) -> None:
    """If this fails, the figures are not those of the built-in model's own parts."""
    model = moshi_mlx.load("small")
    codecs, backends = fastest.fastest_codec("small"), fastest.fastest_backend(model)
    assert set(codecs) == set(backends) == {"numpy", "mlx"}
    assert all(0 < value < 5_000 for value in (*codecs.values(), *backends.values()))
    assert model.lm.backend == "auto"


def test_what_is_taken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, what was measured decides nothing, or over the user's own choice."""
    from moshi_mlx_app.models import fetch

    given: list[dict[str, Any]] = []

    def load(source: str, **options: Any) -> Any:
        given.append(options)
        return SimpleNamespace(name=source, lm=SimpleNamespace(backend=options["backend"]))

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(moshi_mlx, "load", load)
    monkeypatch.setattr(fetch, "fastest_codec", lambda model, say: {"numpy": 1.0, "rust": 2.0})
    monkeypatch.setattr(fetch, "fastest_backend", lambda model, say: {"mlx": 1.0, "numpy": 2.0})

    def taken(**options: Any) -> tuple[str, str]:
        asked = {"model": "small", "codec": "auto", "backend": "auto", "kv_bits": None, **options}
        model = fetch.load_model(SimpleNamespace(**asked), shown=False)
        return given[-1]["codec"], model.lm.backend

    assert taken() == ("numpy", "mlx")
    assert taken(codec="rust", backend="numpy") == ("rust", "numpy")
    assert taken(kv_bits=8) == ("numpy", "auto")
    monkeypatch.setenv(VARIABLE, "mlx")
    assert taken() == ("auto", "auto")
