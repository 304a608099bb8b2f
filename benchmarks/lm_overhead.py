"""What a step of the language model costs beside its arithmetic: full depth, tiny layers.

Moshi's 32 temporal and 6 x 8 depth layers, 64 channels wide, in turns with Kyutai's package: Python, graph building,
operations and synchronisation are nearly all of it. ``modules`` is our path for GPUs, run on the CPU. How long it holds
the interpreter is measured separately: with the graph rebuilt for each step, and kept, as it is on a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from .workers import Worker, machine, summary
from .workers.paired import HEAD, paired_steps, ratio, row

TINY = {
    "dim": 64, "layers": 32, "heads": 8, "context": 3000, "depth_dim": 64, "depth_layers": 6, "depth_heads": 8,
    "text_card": 1000, "dtype": "float32", "bits": 0,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks lm_overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=15, help="steps of each in a round")
    args = parser.parse_args(argv)
    about = machine()
    print(about)
    results = paired_steps(TINY, {"ours": {}, "modules": {"modules": True}}, args.rounds, args.steps)
    print(HEAD)
    print(row("Kyutai's moshi_mlx", results, "kyutai"))
    print(row("ours", results, "ours"))
    print(row("ours, modules", results, "modules"))
    held = {}
    for batch in (1, 16):
        for name, compiled in (("rebuilt", False), ("kept", True)):
            with Worker("lm_ours.py", {**TINY, "modules": True, "compiled": compiled, "batch": batch}) as worker:
                held[f"{batch}, {name}"] = summary(worker.ask(python=args.rounds * args.steps)["python"])
    print(
        "milliseconds of a step that hold the interpreter, graph "
        + "; ".join(f"{name}: {times['p50']:.2f} (least {times['min']:.2f})" for name, times in held.items())
    )
    rows = {
        name: {
            **result,
            "wall": summary(result["wall"]),
            "cpu": summary(result["cpu"]),
            "of_peer": ratio(results, name),
            "of_peer_by_wall": ratio(results, name, "wall"),
        }
        for name, result in results.items()
    }
    print(json.dumps({"benchmark": "lm_overhead", "machine": about, "settings": TINY, "rows": rows, "python": held}))


if __name__ == "__main__":
    main()
