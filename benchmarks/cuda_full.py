"""Moshi's full size, 7.69 B parameters, on a CUDA GPU: bfloat16, 8 and 4 bits, beside Kyutai's two packages.

Needs MLX's CUDA backend here, and in the Python that KYUTAI_PYTHON names; KYUTAI_TORCH_PYTHON names one with PyTorch
and moshi 0.2.13. One model is in memory at a time. p50 and p95 of a step at the start of a session and with a full
cache, against the floor: the bytes that a step must read over the memory's bandwidth, which a copy measures.

Without such a GPU nothing is measured: the same programs run a scaled-down model, to check sizes, arguments and
results (``--check`` does that anywhere).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from .workers import Worker, machine, peer_python, summary

FULL = {
    "dim": 4096, "layers": 32, "heads": 32, "context": 3000, "depth_dim": 1024, "depth_layers": 6, "depth_heads": 16,
    "text_card": 32000, "dtype": "bfloat16", "bits": 0,
}  # fmt: skip
SCALED = {
    **FULL, "dim": 256, "layers": 2, "heads": 4, "context": 16, "depth_dim": 256, "depth_layers": 2, "depth_heads": 4,
    "text_card": 256, "dtype": "float32",
}  # fmt: skip
RECIPES = {"bfloat16": 0, "8 bits": 8, "4 bits": 4}

HAS_CUDA = "import mlx.core as mx; print(int(getattr(mx, 'cuda', None) is not None and mx.cuda.is_available()))"


def floor_bytes(sizes: dict[str, Any], bits: int, keys: int) -> int:
    """Bytes that a step reads: every weight but the embeddings' once, and ``keys`` positions of the cache in bfloat16.

    A weight costs 2 bytes; or its bits, and a scale and a bias of 2 bytes for a group (64 at 8 bits, 32 at 4).
    """
    per_weight = 2.0 if not bits else bits / 8 + 4 / (32 if bits == 4 else 64)

    def layer(dim: int) -> int:
        return 4 * dim * dim + 3 * dim * (11 * dim // 4)

    depth_steps, card = 8, 2048
    dim, depth = sizes["dim"], sizes["depth_dim"]
    weights = sizes["layers"] * layer(dim) + dim * sizes["text_card"]
    weights += depth_steps * (dim * depth + sizes["depth_layers"] * layer(depth) + depth * card)
    return int(weights * per_weight) + sizes["layers"] * 2 * dim * keys * 2


def bandwidth() -> float:
    """Bytes a second that a copy of 1 GB reads and writes on this GPU; the best of several."""
    import mlx.core as mx

    source = mx.zeros((2**28,), mx.float32)
    mx.eval(source)
    best = 0.0
    for _ in range(10):
        began = time.perf_counter()
        mx.eval(source + 1)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - began))
    return best


def has_cuda(python: str) -> bool:
    ran = subprocess.run([python, "-c", HAS_CUDA], capture_output=True, text=True, check=False)
    return ran.stdout.strip() == "1"


def steps_of(script: str, settings: dict[str, Any], python: str, steps: int) -> dict[str, Any]:
    """Step times early in a session, and once the cache is full."""
    context = settings["context"]
    with Worker(script, {**settings, "most": context + 2 * steps + 20}, python) as worker:
        worker.ask(steps=10)
        early = worker.ask(steps=steps)["wall"]
        done = 10 + steps
        while done < context:
            worker.ask(steps=min(200, context - done))
            done += min(200, context - done)
        return {"about": worker.about, "early": summary(early), "full": summary(worker.ask(steps=steps)["wall"])}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cuda_full", description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--check", action="store_true", help="only the scaled-down model, on whatever is here")
    args = parser.parse_args(argv)
    about = machine()
    print(about)
    real = not args.check and has_cuda(sys.executable)
    sizes, steps = (FULL, args.steps) if real else (SCALED, 5)
    rate = bandwidth() if real else None
    peers = {
        "ours": ("lm_ours.py", sys.executable),
        "Kyutai's moshi_mlx": ("lm_kyutai.py", peer_python()),
        "Kyutai's PyTorch": ("lm_torch.py", os.environ.get("KYUTAI_TORCH_PYTHON") or None),
    }
    rows: list[dict[str, Any]] = []
    print("" if real else "No CUDA GPU: not measured. A model scaled down, to check that everything fits:")
    heads = " ".join(f"{head:>10}" for head in ("p50 early", "p95 early", "p50 full", "p95 full"))
    print(f"{'':10} {'milliseconds':20} {heads} {'floor':>8}")
    for recipe, bits in RECIPES.items():
        settings = {**sizes, "bits": bits}
        floor = None if rate is None else 1e3 * floor_bytes(FULL, bits, FULL["context"]) / rate
        for name, (script, python) in peers.items():
            if name == "Kyutai's PyTorch" and bits:
                continue
            row: dict[str, Any] = {"recipe": recipe, "program": name, "floor_ms": floor and round(floor, 2)}
            if python is None or (real and script == "lm_kyutai.py" and not has_cuda(python)):
                print(f"{recipe:10} {name:20} not measured: no Python with it was named, or its MLX has no CUDA")
            else:
                row |= steps_of(script, settings, python, steps)
                times = [row[when][key] for when in ("early", "full") for key in ("p50", "p95")]
                shown = " ".join(f"{value:10.2f}" if real else f"{'fits':>10}" for value in times)
                print(f"{recipe:10} {name:20} {shown} {'-' if floor is None else f'{floor:.2f}':>8}", flush=True)
            row["measured"] = real
            rows.append(row)
    gigabytes = {recipe: round(floor_bytes(FULL, bits, FULL["context"]) / 1e9, 2) for recipe, bits in RECIPES.items()}
    print(f"bytes a step of the full size, cache full (GB): {gigabytes}")
    result = {"bandwidth": rate, "bytes_a_step_gb": gigabytes, "rows": rows if real else [], "checked": not real}
    print(json.dumps({"benchmark": "cuda_full", "machine": about, "settings": FULL, **result}))


if __name__ == "__main__":
    main()
