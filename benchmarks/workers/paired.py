"""Our step and Kyutai's in turns."""

from __future__ import annotations

from contextlib import ExitStack
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
        for name, worker in workers.items():
            answer = worker.ask(count=True)
            results[name].update({key: answer[key] for key in ("primitives", "kernels", "reads", "resident_mb")})
    return results


def ratio(results: dict[str, Any], name: str, clock: str = "cpu") -> float | None:
    """Median time of one of ours over Kyutai's, by processor (``cpu``) or wall time."""
    if "kyutai" not in results:
        return None
    return round(float(np.median(results[name][clock]) / np.median(results["kyutai"][clock])), 3)


def row(name: str, results: dict[str, Any], who: str) -> str:
    """A line of the table, for what :func:`paired_steps` found of ``who``."""
    result = results.get(who)
    if result is None:
        return f"{name:34} not measured (KYUTAI_PYTHON names no Python with moshi_mlx)"
    times = "".join(f" {summary(result[clock])[key]:8.1f}" for clock in ("cpu", "wall") for key in ("p50", "min"))
    graph = "".join(f" {result[key] or '-':>7}" for key in ("primitives", "kernels", "reads"))
    shares = [None if who == "kyutai" else ratio(results, who, clock) for clock in ("cpu", "wall")]
    return f"{name:34}{times}{graph}" + "".join("" if share is None else f" {share:8.2f}" for share in shares)


HEAD = (
    f"{'milliseconds a step':34} {'cpu p50':>8} {'cpu min':>8} {'wall p50':>8} {'wall min':>8} {'operat.':>7}"
    f" {'kernels':>7} {'reads':>7} {'of peer':>8} {'by wall':>8}"
)
"""Kernels: operations that compute, with norm, rotation and attention as one each, as on a GPU."""
