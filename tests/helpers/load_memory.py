"""How much memory loading takes: peak resident memory against the size of the model, in every layout.

Run it from the root of the repository; the argument is the size of the checkpoint in megabytes::

    python -m tests.helpers.load_memory 600
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .checkpoints import small_config, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CASES = ("mlx", "torch", "torch-split", "candle", "sharded", "helium", "gguf", "mlx-q4", "torch-lora", "mlx-float32")

_CHILD = """
import json, sys
import mlx.core as mx
from moshi_mlx.checkpoint.fit import flat_parameters, load_config, load_lm
from tests.helpers.load_memory import peak_bytes
mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))
config, weights, lora, dtype = json.loads(sys.argv[1])
config = load_config(config)
before = peak_bytes()
lm = load_lm(config, weights, lora=lora, dtype=dtype and getattr(mx, dtype))
size = sum(value.nbytes for value in flat_parameters(lm).values())
print(json.dumps({"model": size, "peak": peak_bytes() - before}))
"""


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage, not inherited from the parent
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    """Reset :func:`peak_bytes` if the system can; otherwise it stays the peak since the start of the process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def config_of_size(megabytes: int, layout: str) -> dict[str, Any]:
    """A configuration whose bfloat16 weights take about so many megabytes."""
    if layout == "helium":
        from .checkpoints import helium_config

        per_layer = (1024 * 3072 + 3 * 1024 * 2048) * 2 / 1e6
        return helium_config(
            hidden_size=1024,
            intermediate_size=2048,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=128,
            num_hidden_layers=max(1, round(megabytes / per_layer)),
        )
    # A third in the depth transformer, whose projections PyTorch stacks.
    depth_layer = 8 * (4 * 512 * 512 + 3 * 512 * 1024) * 2 / 1e6
    layer = (4 * 512 * 512 + 3 * 512 * 1536) * 2 / 1e6
    return small_config(
        dim=512,
        num_heads=8,
        num_layers=max(1, round(megabytes * 2 / 3 / layer)),
        n_q=16,
        dep_q=8,
        delays=[0] * 17,
        depformer_dim=512,
        depformer_dim_feedforward=1536,
        depformer_num_heads=8,
        depformer_num_layers=max(1, round(megabytes / 3 / depth_layer)),
    )


def measure(folder: Path, case: str, megabytes: int) -> dict[str, int]:
    """Bytes of the model and peak growth of resident memory while another process loads it."""
    layout, _, variant = case.partition("-") if case != "torch-split" else (case, "", "")
    write_checkpoint(
        folder,
        config_of_size(megabytes, layout),
        layout,
        quantize={"bits": 4, "group_size": 32} if variant == "q4" else None,
        tokenizer=False,
        lora="new" if variant == "lora" else None,
    )
    index = folder / "model.safetensors.index.json"
    weights = (
        index if index.exists() else next(iter(sorted(folder.glob("model*.gguf")) or [folder / "model.safetensors"]))
    )
    lora = folder / "lora.safetensors"
    arguments = [
        str(folder / "config.json"),
        str(weights),
        str(lora) if lora.exists() else None,
        variant if variant == "float32" else None,
    ]
    run = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(arguments)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    result: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    return result


def main(megabytes: int, cases: list[str]) -> None:
    print(f"{'case':12} {'model MB':>9} {'peak MB':>9} {'ratio':>6}")
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(Path(folder), case, megabytes)
        model, peak = result["model"] / 1e6, result["peak"] / 1e6
        print(f"{case:12} {model:9.0f} {peak:9.0f} {peak / model:6.2f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 600, sys.argv[2:] or list(CASES))
