"""The measured recipe: bits go where the model's outputs are most sensitive.

Every unit (a matrix of a layer; in the depth transformer the same matrix of all steps together) is quantized alone,
once with each choice, and the divergence of the outputs is measured. Where divergences are small they add up, so the
best use of a given size is a knapsack: from the cheapest choice everywhere, the upgrade that saves the most divergence
per byte is taken until the size is used up (the convex hull of each unit's choices; Everett 1963).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moshi_mlx.checkpoint.quantization import Quantization
from moshi_mlx.errors import ConfigError

from ..measure.evaluate import Calibration, Outputs, Subject, compare
from .recipes import DENSE_PARTS, Module, Plan, describe

__all__ = ["CANDIDATES", "Sensitivity", "allocate", "measure", "measured_plan", "unit_of"]

CANDIDATES = tuple(Quantization(bits, 64) for bits in (2, 3, 4, 5, 6, 8))
"""What the measured recipe chooses from; 32 instead of 64 where 64 does not divide a width."""


def unit_of(module: Module) -> str:
    """Modules that are decided together: depth steps, and embedding tables of one kind."""
    name = re.sub(r"^(audio_embs|extra_heads|depformer\.(?:embs|linear_in|linear_out))\.\d+", r"\1.*", module.name)
    return re.sub(r"^(depformer\.layers\.\d+\.(?:in_proj|out_proj|gating))\.\d+", r"\1.*", name)


@dataclass(frozen=True)
class Sensitivity:
    """What each choice costs each unit.

    Attributes
    ----------
    units : dict of str to list of Module
    choices : dict of str to list of (Quantization, bytes, frame divergence)
        From small to large.
    """

    units: dict[str, list[Module]]
    choices: dict[str, list[tuple[Quantization, int, float]]]


def measure(
    subject: Subject,
    modules: Sequence[Module],
    calibration: Calibration,
    reference: Outputs,
    *,
    candidates: Sequence[Quantization] = CANDIDATES,
    progress: Callable[[int], None] = lambda steps: None,
) -> Sensitivity:
    """Quantize every unit alone, with each candidate, and measure."""
    found = _sizes(modules, candidates)
    for unit, choices in found.choices.items():
        for index, (q, size, _) in enumerate(choices):
            subject.apply({module.name: q for module in found.units[unit]})
            choices[index] = (q, size, compare(reference, subject.outputs(calibration)).frame_kl)
            progress(1)
    subject.apply({})
    return found


def _sizes(modules: Sequence[Module], candidates: Sequence[Quantization]) -> Sensitivity:
    """What each choice takes; what it costs is not known yet."""
    units: dict[str, list[Module]] = {}
    for module in modules:
        if module.part not in DENSE_PARTS:
            units.setdefault(unit_of(module), []).append(module)
    choices: dict[str, list[tuple[Quantization, int, float]]] = {}
    for unit, members in units.items():
        for q in candidates:
            fitting = _fit(members, q)
            if fitting is not None:
                choices.setdefault(unit, []).append((fitting, sum(module.bytes(fitting) for module in members), 0.0))
    return Sensitivity({unit: units[unit] for unit in choices}, choices)


def _fit(members: Sequence[Module], q: Quantization) -> Quantization | None:
    for group in (q.group_size, 32):
        if all(module.width % group == 0 for module in members):
            return Quantization(q.bits, group, q.mode)
    return None


def allocate(sensitivity: Sensitivity, target: int) -> dict[str, Quantization]:
    """A choice for every unit, within ``target`` bytes.

    Raises
    ------
    ConfigError
        If even the cheapest choices are larger.
    """
    hulls = {unit: _hull(choices) for unit, choices in sensitivity.choices.items()}
    at = dict.fromkeys(hulls, 0)
    size = sum(hull[0][1] for hull in hulls.values())
    if size > target:
        raise ConfigError(
            f"{target / 1e6:.1f} MB are too few: the smallest choices take {size / 1e6:.1f} MB. Ask for more"
        )
    while True:
        best: tuple[float, str] | None = None
        for unit, hull in hulls.items():
            if at[unit] + 1 == len(hull):
                continue
            now, then = hull[at[unit]], hull[at[unit] + 1]
            if size + then[1] - now[1] > target:
                continue
            gain = (now[2] - then[2]) / (then[1] - now[1])
            if best is None or gain > best[0]:
                best = (gain, unit)
        if best is None:
            break
        unit = best[1]
        size += hulls[unit][at[unit] + 1][1] - hulls[unit][at[unit]][1]
        at[unit] += 1
    return {unit: hull[at[unit]][0] for unit, hull in hulls.items()}


def _hull(choices: Sequence[tuple[Quantization, int, float]]) -> list[tuple[Quantization, int, float]]:
    """The choices worth having: each larger one is better, and saves less per byte than the one before it."""
    hull: list[tuple[Quantization, int, float]] = []
    for choice in sorted(choices, key=lambda c: (c[1], c[2])):
        if hull and choice[2] >= hull[-1][2]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(a: tuple[Quantization, int, float], b: tuple[Quantization, int, float]) -> float:
    return (a[2] - b[2]) / max(1, b[1] - a[1])


def measured_plan(
    subject: Subject,
    modules: Sequence[Module],
    calibration: Calibration,
    reference: Outputs,
    target: int,
    *,
    candidates: Sequence[Quantization] = CANDIDATES,
    progress: Callable[[int], None] = lambda steps: None,
) -> tuple[Plan, Sensitivity]:
    """The plan for ``target`` bytes of quantized modules (what stays dense not counted), and what it rests on."""
    allocate(_sizes(modules, candidates), target)  # too small a target is known before anything is measured
    found = measure(subject, modules, calibration, reference, candidates=candidates, progress=progress)
    chosen = {module.name: q for unit, q in allocate(found, target).items() for module in found.units[unit]}
    skipped = {module.name: f"{module.part} stay dense" for module in modules if module.part in DENSE_PARTS}
    return Plan("measured", {module.name: chosen.get(module.name) for module in modules}, skipped), found


def as_rows(sensitivity: Sensitivity) -> list[dict[str, object]]:
    """The measurement for a report."""
    return [
        {"unit": unit, "choice": describe(q), "bytes": size, "frame_kl": kl}
        for unit, choices in sensitivity.choices.items()
        for q, size, kl in choices
    ]
