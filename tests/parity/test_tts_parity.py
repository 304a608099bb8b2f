"""Texts spoken beside live PyTorch `moshi`: other models, voices and prefixes than the committed goldens have."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.tasks import test_speaking

pytest.importorskip("torch", reason="PyTorch is not installed here: run `make reference`")
pytest.importorskip("moshi", reason="the PyTorch reference is not installed here: run `make reference`")


def _maker(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "golden" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # make_tts imports make_lm by its name
    spec.loader.exec_module(module)
    return module


def test_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the goldens pass by luck of their draw: some text is spoken with other codes than PyTorch's."""
    _maker("make_lm")
    maker = _maker("make_tts")
    monkeypatch.setattr(maker, "OUT", tmp_path)
    monkeypatch.setattr(maker, "SEED", 1_000)
    maker.main()
    monkeypatch.setattr(test_speaking, "GOLDEN", tmp_path)
    monkeypatch.setattr(test_speaking, "RUNS", json.loads((tmp_path / "runs.json").read_text()))
    assert len(test_speaking.RUNS) == 4
    for name in test_speaking.RUNS:
        with pytest.MonkeyPatch.context() as patch:
            test_speaking.test_kyutais_codes(name, "numpy", patch)
