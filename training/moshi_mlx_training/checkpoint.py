"""Checkpoints that survive being killed, and the log beside them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moshi_mlx_training.codec.mimi_torch import Mimi, MimiShape


def save(path: Path, state: dict[str, Any]) -> None:
    """Write whole or not at all: a kill in the middle leaves the file that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def model_state(model: Mimi) -> dict[str, Any]:
    return {"shape": asdict(model.shape), "model": model.state_dict()}


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's dictionary; raises FileNotFoundError naming the command that makes one."""
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}: train one with 'python -m moshi_mlx_training.codec.train'")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def load_model(path: Path) -> Mimi:
    """The model of a checkpoint, in evaluation mode."""
    state = load(path)
    shape: dict[str, Any] = {**state["shape"], "ratios": tuple(state["shape"]["ratios"])}
    model = Mimi(MimiShape(**shape))
    model.load_state_dict(state["model"])
    return model.eval()


class Log:
    """Averages over a span of steps: a line of JSON in a file, a short line on the screen."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a", encoding="utf-8")
        self.sums: dict[str, list[float]] = {}

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.sums.setdefault(name, []).append(float(value))

    def write(self, **state: Any) -> dict[str, Any]:
        line = {**state, **{name: round(sum(v) / len(v), 4) for name, v in self.sums.items()}}
        self.sums = {}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        print("  ".join(f"{k} {v}" for k, v in line.items()), flush=True)
        return line
