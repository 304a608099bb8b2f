"""Text generation through mlx-lm: this project's network beside mlx-lm's own Helium, on the same weights.

Random weights in Hugging Face's layout; both are driven by mlx-lm's ``generate_step`` with its caches, in turns, so
that other work on the machine meets both. The ratio is of the medians of the paired runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table and a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks complete", description=__doc__)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args(argv)
    import mlx.core as mx
    import numpy as np

    ours, theirs = _models(args.dim, args.layers)
    ids = mx.array(np.random.default_rng(0).integers(4, 600, args.prompt))
    from mlx_lm.models.cache import KVCache

    caches = [[KVCache() for _ in model.layers] for model in (ours, theirs)]
    logits = [model(ids[None], cache) for model, cache in zip((ours, theirs), caches, strict=True)]
    apart = float(mx.abs(logits[0] - logits[1]).max())
    figures: dict[str, list[tuple[float, float]]] = {"ours": [], "mlx-lm": []}
    for _ in range(args.runs + 1):  # the first one compiles
        for name, model in (("ours", ours), ("mlx-lm", theirs)):
            figures[name].append(_run(model, ids, args.tokens))
    report: dict[str, Any] = {"logits_apart": apart, "dim": args.dim, "layers": args.layers}
    print(f"{'':8} {'prompt, ms':>12} {'a token, ms':>12}")
    for name, runs in figures.items():
        prompt, token = (statistics.median(run[index] for run in runs[1:]) for index in (0, 1))
        report[name] = {"prompt_ms": round(prompt, 2), "token_ms": round(token, 3)}
        print(f"{name:8} {prompt:12.1f} {token:12.2f}")
    for index, part in enumerate(("prompt", "token")):
        pairs = zip(figures["ours"][1:], figures["mlx-lm"][1:], strict=True)
        report[f"{part}_ratio"] = round(statistics.median(mine[index] / other[index] for mine, other in pairs), 3)
    print(json.dumps(report))
    return 0


def _models(dim: int, layers: int) -> tuple[Any, Any]:
    """This project's network and mlx-lm's, with the same weights."""
    import mlx.core as mx
    from mlx_lm.models.helium import Model, ModelArgs

    from moshi_mlx.checkpoint.fit import load_config, load_lm
    from moshi_mlx.tasks.complete import _Network
    from tests.helpers.checkpoints import helium_config, write_checkpoint

    config = helium_config(
        hidden_size=dim, intermediate_size=3 * dim, num_hidden_layers=layers, head_dim=dim // 4,
        max_position_embeddings=4096,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder) / "m", config, "helium", tokenizer=False, dtype=mx.float32)
        file = next(path.glob("*.safetensors"))
        ours = _Network(load_lm(load_config(path / "config.json"), file))
        theirs = Model(ModelArgs.from_dict(config))
        theirs.load_weights(str(file))
        mx.eval(theirs.parameters())
    return ours, theirs


def _run(model: Any, ids: Any, tokens: int) -> tuple[float, float]:
    """Milliseconds until the first token, and of each after it."""
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import KVCache

    began = time.perf_counter()
    cache = [KVCache() for _ in model.layers]
    steps = generate_step(ids, model, max_tokens=tokens, prompt_cache=cache, prefill_step_size=512)
    next(steps)
    first = time.perf_counter()
    count = sum(1 for _ in steps)
    return 1e3 * (first - began), 1e3 * (time.perf_counter() - first) / max(count, 1)
