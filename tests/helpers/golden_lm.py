"""The language-model goldens: models, teacher-forced tokens and generation runs of the PyTorch reference.

What the files hold is told in `tests/golden/README.md`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from moshi_mlx.checkpoint.fit import load_config, load_lm
from moshi_mlx.config import UNGENERATED, LmConfig, ModelConfig
from moshi_mlx.layers.conditioning import Condition, TensorCondition
from moshi_mlx.models.lm import Lm

FOLDER = Path(__file__).parents[1] / "golden" / "lm"
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
HELIUM = [name for name in NAMES if name.startswith("helium")]
MOSHI = [name for name in NAMES if name not in HELIUM]


def runs_of(name: str) -> list[str]:
    """The generation runs of a folder, free and forced."""
    return sorted(path.stem for path in (FOLDER / name).glob("*.safetensors") if path.stem not in ("golden", "model"))


@cache
def model(name: str) -> tuple[Lm, ModelConfig]:
    """A golden model in float32. Shared by all tests: nobody may change it."""
    config = load_config(FOLDER / name / "config.json")
    lm = load_lm(config, FOLDER / name / "model.safetensors", dtype=mx.float32)
    return lm, config


@cache
def arrays(name: str, file: str = "golden") -> dict[str, np.ndarray]:
    """The arrays of one file of a folder."""
    loaded: Any = mx.load(str(FOLDER / name / f"{file}.safetensors"))
    return {key: np.array(value) for key, value in loaded.items()}


def about(name: str) -> dict[str, Any]:
    """What golden.json tells."""
    told: dict[str, Any] = json.loads((FOLDER / name / "golden.json").read_text())
    return told


def condition_rows(name: str, file: str = "golden") -> list[dict[str, Any]] | None:
    """The conditions of a file, as :meth:`Lm.condition` takes them; None if the model has no conditioners."""
    told = about(name) if file == "golden" else about(name)[file]
    if not any(told.get("conditions") or ()):
        return None
    rows: list[dict[str, Any]] = [dict(row) for row in told["conditions"]]
    data = arrays(name, file)
    for key in data:
        if key.startswith("cond.") and key.endswith(".tensor"):
            condition = key.removeprefix("cond.").removesuffix(".tensor")
            for index, row in enumerate(rows):
                row[condition] = TensorCondition(data[key][index], data[f"cond.{condition}.mask"][index])
    return rows


def condition(name: str, file: str = "golden") -> Condition | None:
    return model(name)[0].condition(condition_rows(name, file))


@dataclass(frozen=True)
class Run:
    """A recorded generation of the reference, by model position.

    Attributes
    ----------
    tokens : array [positions, batch, 1 + dep_q]
        What each position chose, after any forcing.
    frames : array [positions, batch, user streams]
        User frame that was passed at each call: read as token index ``position - 1``.
    data : dict
        All arrays of the file.
    options : dict
        Arguments for :class:`moshi_mlx.engine.generator.Generator`: seeds and conditions.
    cfg_coef : float
    """

    tokens: np.ndarray
    frames: np.ndarray
    data: dict[str, np.ndarray]
    options: dict[str, Any]
    cfg_coef: float

    def forcing(self, kind: str) -> np.ndarray:
        """What was written over [positions, batch] text or [positions, batch, dep_q] codes; -2 where nothing was."""
        shape = self.tokens.shape[:2] if kind == "text" else (*self.tokens.shape[:2], self.tokens.shape[2] - 1)
        return self.data.get(f"force_{kind}", np.full(shape, UNGENERATED, np.int32))


def run(name: str, file: str) -> Run:
    data = arrays(name, file)
    tokens = data["tokens"]
    batch = tokens.shape[1]
    options: dict[str, Any] = {"seeds": range(batch)}
    rows = condition_rows(name, file)
    if rows is not None:
        options["conditions"] = rows[:batch]
        if len(rows) > batch:
            options["null_conditions"] = rows[batch:]
    frames = data.get("frames", np.zeros((len(tokens), batch, 0), np.int32))
    return Run(tokens, frames, data, options, about(name)[file]["cfg_coef"])


def small_model(seed: int = 0, **changes: Any) -> Lm:
    """A random model whose widths are multiples of 32 and whose logits have a standard deviation of about 2."""
    mx.random.seed(seed)
    config = LmConfig.from_dict(SMALL | changes)
    lm = Lm(config)

    def redraw(name: str, value: mx.array) -> mx.array:
        if name.endswith("learnt_padding"):
            return mx.random.normal(value.shape)
        if value.ndim != 2:
            return 1 + 0.2 * mx.random.normal(value.shape)
        gain = 2.0 if name.startswith(("text_linear", "depformer.linear_out", "extra_heads")) else 1.0
        if "emb" in name and "low_rank" not in name and ".out" not in name:
            return 0.7 * mx.random.normal(value.shape)
        return gain * mx.random.normal(value.shape) * value.shape[1] ** -0.5

    lm.load_weights([(name, redraw(name, value)) for name, value in tree_flatten(lm.parameters())])
    mx.eval(lm.parameters())
    return lm


SMALL: dict[str, Any] = {
    "dim": 64,
    "text_card": 40,
    "n_q": 4,
    "dep_q": 2,
    "card": 30,
    "num_heads": 2,
    "num_layers": 2,
    "hidden_scale": 3.0,
    "context": 12,
    "depformer_dim": 32,
    "depformer_dim_feedforward": 96,
    "depformer_num_heads": 1,
    "depformer_num_layers": 2,
    "delays": [0, 0, 1, 0, 1],
}


def relative_error(ours: Any, reference: Any) -> float:
    """Largest difference over the reference's largest value."""
    ours, reference = np.array(ours), np.array(reference)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
