"""Mimi at full size, beside Kyutai's moshi_mlx and rustymimi in the same run: ``python -m benchmarks.mimi``.

Each codec runs in a process of its own on the same file of random weights, in the published sizes and layout, with
eight codebooks. They take turns, a few frames each, so that what else the machine does hits all of them. What
computes in MLX runs twice: on its own matrix products and on the system's OpenBLAS, where there is one. ``at once``
is a frame in and another out on two threads, as a conversation has them. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import ctypes.util
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.workers import Worker, machine, peer_python, summary

OURS = "ours (numpy on a CPU)"
ROUND = 2
WARM = 1


def write_weights(path: Path, codebooks: int) -> None:
    """A file of the published codec's names and sizes; its values are random, and do not fade on their way."""
    import mlx.core as mx

    from moshi_mlx.checkpoint.mimi import published_mimi_weights
    from moshi_mlx.layers.conv import CausalConv, CausalConvTranspose
    from moshi_mlx.models.mimi import Mimi

    mx.random.seed(0)
    mimi = Mimi(num_codebooks=codebooks)
    for module in mimi.modules():
        if isinstance(module, (CausalConv, CausalConvTranspose)):
            module.weight = 2 * module.weight
    mx.save_safetensors(str(path), published_mimi_weights(mimi))


def plan(openblas: str | None, peer: str | None, rust: bool) -> dict[str, tuple[str, dict[str, Any], str | None]]:
    """Name, worker, its settings and its interpreter of every codec that can be measured here."""
    found: dict[str, tuple[str, dict[str, Any], str | None]] = {
        OURS: ("codec_ours.py", {"kind": "numpy", "blas": ""}, None),
        "ours in MLX": ("codec_ours.py", {"kind": "mlx", "blas": ""}, None),
    }
    if openblas:
        found["ours in MLX, OpenBLAS"] = ("codec_ours.py", {"kind": "mlx", "blas": openblas}, None)
    if rust:
        found["rustymimi"] = ("codec_ours.py", {"kind": "rust", "blas": ""}, None)
    if peer:
        found["moshi_mlx"] = ("codec_kyutai.py", {"blas": ""}, peer)
        if openblas:
            found["moshi_mlx, OpenBLAS"] = ("codec_kyutai.py", {"blas": openblas}, peer)
    return found


def has_rust() -> bool:
    return importlib.util.find_spec("rustymimi") is not None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mimi", description="Mimi at full size.")
    parser.add_argument("--frames", type=int, default=24, help="of each codec (default: %(default)s)")
    parser.add_argument("--codebooks", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=30, help="begin no round after (default: %(default)s)")
    args = parser.parse_args(argv)
    until = time.monotonic() + 60 * args.minutes
    blas, peer = ctypes.util.find_library("openblas"), peer_python()
    times: dict[str, dict[str, dict[str, list[float]]]] = {}
    about: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_weights(folder / "mimi.safetensors", args.codebooks)
        shared = {"path": str(folder / "mimi.safetensors"), "codebooks": args.codebooks}
        workers = {}
        for name, (script, settings, python) in plan(blas, peer, has_rust()).items():
            more = {} if python is None else {"python": python}
            workers[name] = stack.enter_context(Worker(script, {**shared, **settings}, **more))
            workers[name].ask(frames=WARM)
            about[name], times[name] = workers[name].about, {}
        done = 0
        while done < args.frames and time.monotonic() < until:
            now = min(ROUND, args.frames - done)
            for name, worker in workers.items():
                for stage, values in worker.ask(frames=now).items():
                    for clock, part in values.items():
                        times[name].setdefault(stage, {}).setdefault(clock, []).extend(part)
            done += now
            print(f"{done} of {args.frames} frames", file=sys.stderr, flush=True)
    here = machine()
    print(f"{here['processor']}, {here['cores']} cores, load {here['load']}; {here['system']}, MLX {here['mlx']}")
    print(f"milliseconds a frame, medians of {done}; processor time of all threads, and (wall time)")
    print(f"{'':24} {'encode':>16} {'decode':>16} {'both':>8} {'at once':>16}")
    rows = {name: {s: {c: summary(v) for c, v in by.items()} for s, by in one.items()} for name, one in times.items()}
    for name, row in rows.items():
        cells = [_cell(row.get(stage)) for stage in ("encode", "decode")]
        print(f"{name:24} {cells[0]} {cells[1]} {_both(row):8.1f} {_cell(row.get('pair'))}")
    if peer is None:
        print("moshi_mlx: not measured (KYUTAI_PYTHON names no Python that has it)")
    ratios = compare(rows)
    print("in and out, ours = 1: " + ", ".join(f"{name} {ratio:.1f}" for name, ratio in ratios.items()))
    print(json.dumps({"benchmark": "mimi", "machine": here, "about": about, "ms": rows, "ratios": ratios}))


def compare(rows: dict[str, Any]) -> dict[str, float]:
    """How many times the processor time of ours, for a frame in and a frame out, the others take."""
    return {name: round(_both(row) / _both(rows[OURS]), 2) for name, row in rows.items() if name != OURS}


def _both(row: dict[str, Any]) -> float:
    return float(row["encode"]["cpu"]["p50"] + row["decode"]["cpu"]["p50"])


def _cell(stage: dict[str, Any] | None) -> str:
    return f"{'-':>16}" if stage is None else f"{stage['cpu']['p50']:7.1f} ({stage['wall']['p50']:6.1f})"


if __name__ == "__main__":
    main()
