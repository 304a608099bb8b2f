"""This checkout's benchmarks beside another checkout's, in turns.

    git worktree add ../before f77116a
    python -m benchmarks paired -- --beside ../before --names small startup

Each round runs every benchmark in both checkouts, with this Python and the checkout's own packages. Figures are matched
by their names in the JSON lines: medians of the rounds, and their ratio. The machine is as noisy for one as for the
other; a ratio within a few hundredths of 1 means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("", "app", "quantize", "finetune", "training")


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a JSON value by their path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{name}[{index}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, float(value)


def run(folder: Path, name: str, options: Sequence[str]) -> dict[str, float]:
    """The figures of one benchmark in one checkout."""
    paths = os.pathsep.join(str(folder / package) for package in PACKAGES)
    command = [sys.executable, "-m", "benchmarks", name, *(["--", *options] if options else [])]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=900
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{name} in {folder} printed no figures: {done.stderr.strip()[-500:]}")
    return dict(leaves(json.loads(lines[-1])))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks paired", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="the other checkout")
    parser.add_argument("--names", nargs="+", default=["small", "startup", "lm_overhead"], help="which benchmarks")
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    parser.add_argument("--options", default="", help="of every benchmark, in one string")
    args = parser.parse_args(argv)
    if args.beside is None:
        print("nothing to compare with: name another checkout with --beside")
        return 0
    rows = []
    for name in args.names:
        found: dict[Path, list[dict[str, float]]] = {args.beside.resolve(): [], ROOT: []}
        for _ in range(args.rounds):
            for folder, figures in found.items():
                figures.append(run(folder, name, args.options.split()))
        before, after = found.values()
        print(f"{name:40} {'there':>10} {'here':>10} {'ratio':>7}", flush=True)
        for key in before[0]:
            if not all(key in figures for figures in (*before, *after)):
                continue
            old, new = (statistics.median(figures[key] for figures in each) for each in (before, after))
            ratio = new / old if old else float("nan")
            rows.append({"benchmark": name, "figure": key, "there": old, "here": new, "ratio": round(ratio, 4)})
            print(f"  {key:38} {old:10.3f} {new:10.3f} {ratio:7.3f}", flush=True)
    print(json.dumps({"benchmark": "paired", "rounds": args.rounds, "rows": rows}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
