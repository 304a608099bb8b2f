"""A step of the language model at a size that computes: 1024 x 8 layers and 512 x 6 layers x 8 steps.

392 M parameters in float32 and in 4 bits, in turns with Kyutai's package; then the same products of rows and weights
alone, in turns with whole steps: what is left is not matrix work. On the CPU ours unpacks the 4 bits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import numpy as np

from .workers import Worker, machine, summary
from .workers.paired import HEAD, paired_steps, ratio, row

SIZE = {
    "dim": 1024, "layers": 8, "heads": 8, "context": 3000, "depth_dim": 512, "depth_layers": 6, "depth_heads": 8,
    "text_card": 32000, "dtype": "float32", "bits": 0,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks lm_size", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of each in a round")
    args = parser.parse_args(argv)
    about = machine()
    print(about)
    print(HEAD)
    rows = {}
    for name, bits in (("float32", 0), ("4 bits", 4)):
        results = paired_steps({**SIZE, "bits": bits}, {"ours": {}}, args.rounds, args.steps, warm=2)
        print(row(f"{name}, Kyutai's moshi_mlx", results, "kyutai"))
        print(row(f"{name}, ours", results, "ours"), flush=True)
        rows[name] = {
            who: {**result, "wall": summary(result["wall"]), "cpu": summary(result["cpu"])}
            for who, result in results.items()
        }
        rows[name] |= {"of_peer": ratio(results, "ours"), "of_peer_by_wall": ratio(results, "ours", "wall")}
    whole: list[float] = []
    alone: list[float] = []
    with Worker("lm_ours.py", {**SIZE, "most": 1000}) as worker:
        worker.ask(steps=4, products=2)
        for _ in range(3 * args.rounds):
            whole += worker.ask(steps=1)["cpu"]
            alone += worker.ask(products=1)["products"]
    share = 1 - float(np.median(alone) / np.median(whole))
    smallest = 1 - min(alone) / min(whole)
    print(f"not matrix work: {100 * share:.1f} % of the medians, {100 * smallest:.1f} % of the smallest")
    rows["not_matrix_work"] = {"of_medians": round(share, 4), "of_minima": round(smallest, 4)}
    print(json.dumps({"benchmark": "lm_size", "machine": about, "settings": SIZE, "rows": rows}))


if __name__ == "__main__":
    main()
