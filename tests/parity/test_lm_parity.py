"""The language model beside live PyTorch `moshi`: fresh weights, tokens and user frames, the same comparisons.

The committed goldens hold one draw of each configuration. Here `tests/golden/make_lm.py` draws another one into a
temporary folder, and the tests that read the goldens read that instead.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from tests import test_generate, test_lm
from tests.helpers import golden_lm

pytest.importorskip("torch", reason="PyTorch is not installed here: run `make reference`")
pytest.importorskip("moshi", reason="the PyTorch reference is not installed here: run `make reference`")

STEPS = 120
ANOTHER_SEED = 1_000


def _maker() -> ModuleType:
    path = Path(__file__).parents[1] / "golden" / "make_lm.py"
    spec = importlib.util.spec_from_file_location("make_lm", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_lm"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """All configurations generated again; names of those with a greedy run."""
    maker, folder = _maker(), tmp_path_factory.mktemp("lm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maker, "OUT", folder)
        patch.setattr(maker, "STEPS", STEPS)
        patch.setattr(golden_lm, "FOLDER", folder)
        for name, case in maker.CASES.items():
            maker.make_case(name, replace(case, seed=case.seed + ANOTHER_SEED, forced={}))
        for cached in (golden_lm.model, golden_lm.arrays):
            cached.cache_clear()
        yield [name for name, case in maker.CASES.items() if case.greedy]
    for cached in (golden_lm.model, golden_lm.arrays):
        cached.cache_clear()


def test_teacher_forcing(drawn: list[str]) -> None:
    """If this fails, the goldens pass by luck of their draw: some weights or tokens give other logits than PyTorch."""
    for name in golden_lm.MOSHI:
        test_lm.test_teacher_forcing(name)
        test_lm.test_hidden_states_and_extra_heads(name)


def test_greedy_runs(drawn: list[str]) -> None:
    """If this fails, some conversation takes another turn than PyTorch's does."""
    assert len(drawn) >= 7
    for name in drawn:
        test_generate.check_run(name, "greedy")
