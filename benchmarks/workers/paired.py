"""Our step and Kyutai's in turns."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from . import Worker, peer_python, summary

__all__ = ["paired_steps", "ratio", "row"]


def paired_steps(
    settings: dict[str, Any], variants: dict[str, dict[str, Any]], rounds: int, steps: int, warm: int = 4
) -> dict[str, Any]:
    """Steps of each variant of ours, and of Kyutai's package, in blocks that take turns.

    Parameters
    ----------
    settings : dict
        Sizes of the model, for every worker.
    variants : dict
        Our ways to run it: a name, and what it changes in the settings.
    rounds, steps : int
        Blocks of each, and steps in a block.

    Returns
    -------
    dict
        By name (``kyutai``, and the variants'): what the worker said, ``wall`` and ``cpu`` milliseconds of every step.
    """
    settings = {**settings, "most": warm + rounds * steps + 1}
    python = peer_python()
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        if python is not None:
            workers["kyutai"] = stack.enter_context(Worker("lm_kyutai.py", settings, python))
        for name, changes in variants.items():
            workers[name] = stack.enter_context(Worker("lm_ours.py", settings | changes))
        for name, worker in workers.items():
            worker.ask(steps=warm)
            results[name] = {"about": worker.about, "wall": [], "cpu": []}
        for _ in range(rounds):
            for name, worker in workers.items():
                answer = worker.ask(steps=steps)
                results[name]["wall"] += answer["wall"]
                results[name]["cpu"] += answer["cpu"]
        with tempfile.TemporaryDirectory() as folder:
            for name, worker in workers.items():
                answer = worker.ask(count=str(Path(folder) / "graph.dot"))
                results[name].update({key: answer[key] for key in ("primitives", "reads", "resident_mb")})
    return results


def ratio(results: dict[str, Any], name: str) -> float | None:
    """Median processor time of one of ours over Kyutai's."""
    if "kyutai" not in results:
        return None
    return round(float(np.median(results[name]["cpu"]) / np.median(results["kyutai"]["cpu"])), 3)


def row(name: str, result: dict[str, Any] | None, share: float | None) -> str:
    """A line of the table."""
    if result is None:
        return f"{name:34} not measured (KYUTAI_PYTHON names no Python with moshi_mlx)"
    cpu, wall = summary(result["cpu"]), summary(result["wall"])
    graph = f"{result['primitives']:6d} {result['reads']:6d}" if result["primitives"] else f"{'-':>6} {'-':>6}"
    told = "" if share is None else f"{share:7.2f}"
    return f"{name:34} {cpu['p50']:8.1f} {cpu['min']:8.1f} {wall['p50']:8.1f} {wall['min']:8.1f} {graph} {told}"


HEAD = (
    f"{'milliseconds a step':34} {'cpu p50':>8} {'cpu min':>8} {'wall p50':>8} {'wall min':>8} {'operat.':>6}"
    f" {'reads':>6} {'of peer':>7}"
)
