"""How much memory quantizing takes: peak resident memory of the whole process, from the first import to the end.

Run it from the root of the repository; the argument is the size of the checkpoint in megabytes::

    python -m tests.quantize.memory 3200

The checkpoint has Moshi's widths (4,096; a largest matrix of 185 MB) from 1,000 MB on, in PyTorch's layout with
stacked depth projections, bfloat16, with random weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from moshi_mlx_quantize.write.writer import Entry, StreamingWriter

from moshi_mlx.checkpoint.fit import flat_parameters
from moshi_mlx.checkpoint.layouts import from_internal
from moshi_mlx.config import ModelConfig
from moshi_mlx.models.lm import Lm

from ..helpers.checkpoints import small_config

ROOT = Path(__file__).resolve().parents[2]

_CHILD = """
import sys
from moshi_mlx_quantize.cli import main
from tests.helpers.load_memory import peak_bytes
status = main(sys.argv[1:])
print(peak_bytes(), file=sys.stderr)
sys.exit(status)
"""


def config_of_size(megabytes: int) -> dict[str, Any]:
    """A configuration whose bfloat16 weights take about so many megabytes."""
    dim = 4096 if megabytes >= 1000 else 512
    depth = dim // 4
    layer = (4 * dim**2 + 3 * dim * (21 * dim // 8)) * 2 / 1e6
    fixed = (8 * 2 * (4 * depth**2 + 3 * depth * (21 * depth // 8)) + 8 * depth * dim + 8001 * (2 * dim + depth)) * 2e-6
    return small_config(
        dim=dim,
        text_card=8000,
        num_heads=dim // 128,
        num_layers=max(1, round((megabytes - fixed) / layer)),
        hidden_scale=4,
        dep_q=8,
        n_q=16,
        delays=[0] * 17,
        depformer_dim=depth,
        depformer_dim_feedforward=4 * depth,
        depformer_num_heads=depth // 64,
    )


def write_random(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """Write a checkpoint tensor by tensor; returns its bytes and those of its largest tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    parsed = ModelConfig.from_dict(config)
    shapes = from_internal(flat_parameters(Lm(parsed.lm)), "torch", parsed.lm)
    entries = {name: Entry(tuple(value.shape), mx.bfloat16) for name, value in shapes.items()}
    block = np.random.default_rng(0).standard_normal(2**22, np.float32) * np.float32(0.02)
    with StreamingWriter(folder / "model.safetensors", entries) as writer:
        for name, entry in entries.items():
            count = int(np.prod(entry.shape))
            values = mx.array(np.resize(block, count)).astype(mx.bfloat16).reshape(entry.shape)
            writer.write(name, values + (1 if "norm" in name else 0))
    (folder / "config.json").write_text(json.dumps(config))
    sizes = [entry.nbytes for entry in entries.values()]
    return sum(sizes), max(sizes)


def measure(folder: Path, megabytes: int, *options: str) -> dict[str, float]:
    """Quantize a random checkpoint in another process; sizes in MB and seconds."""
    size, largest = write_random(folder / "source", config_of_size(megabytes))
    began = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder / "source"), str(folder / "result"), "--quiet", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in (".", "app", "quantize"))},
    )
    assert run.returncode == 0, run.stderr
    peak = int(run.stderr.splitlines()[-1])
    written = sum(path.stat().st_size for path in (folder / "result").iterdir())
    return {
        "source": size / 1e6,
        "largest": largest / 1e6,
        "result": written / 1e6,
        "peak": peak / 1e6,
        "seconds": time.perf_counter() - began,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        found = measure(
            Path(place), int(sys.argv[1]) if len(sys.argv) > 1 else 3200, "--recipe", *sys.argv[2:3] or ["q4"]
        )
    print({key: round(value, 1) for key, value in found.items()})
