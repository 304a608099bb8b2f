"""Which implementation computes."""

from __future__ import annotations

import mlx.core as mx
import pytest

import moshi_mlx
from moshi_mlx.cpu.backend import VARIABLE, choose_backend
from moshi_mlx.cpu.lm import NumpyBackend, make_backend
from moshi_mlx.errors import ConfigError
from moshi_mlx.loading import measure_backend
from tests.helpers.golden_lm import small_model


def test_choosing(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a Mac computes a small model on the wrong half of its chip, whatever was asked for."""
    monkeypatch.delenv(VARIABLE, raising=False)
    here = "numpy" if mx.default_device().type == mx.cpu else "mlx"
    assert choose_backend() == here and choose_backend("mlx") == "mlx" and choose_backend("numpy") == "numpy"
    monkeypatch.setenv(VARIABLE, "mlx")
    assert choose_backend() == "mlx" and choose_backend("numpy") == "numpy"
    for wrong in ("MLX", "cuda"):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(ConfigError, match="auto, mlx, numpy"):
            choose_backend()
    with pytest.raises(ConfigError, match="'gpu'"):
        choose_backend("gpu")


def test_the_model_keeps_what_was_asked_for() -> None:
    """If this fails, ``backend=`` is taken and ignored."""
    lm = small_model()
    lm.backend = "numpy"
    assert isinstance(make_backend(lm), NumpyBackend)
    with pytest.raises(ConfigError, match="8-bit cache"):
        make_backend(lm, kv_bits=8)
    lm.backend = "mlx"
    assert not isinstance(make_backend(lm), NumpyBackend)
    model = moshi_mlx.load("small", backend="mlx", codec="mlx")
    assert model.lm.backend == "mlx" and model.codec is not None and model.codec.kind == "mlx"
    with pytest.raises(ConfigError, match="backend mlx"):
        moshi_mlx.load("small", backend="numpy", dtype=mx.bfloat16)


def test_a_measurement_changes_nothing() -> None:
    """If this fails, a model that was measured goes on with the slower backend."""
    model = moshi_mlx.load("small", backend="mlx")
    assert set(measure_backend(model, seconds=0.01)) == {"numpy", "mlx"} and model.lm.backend == "mlx"
