"""Scales and biases learnt from the source: rounding stays, what it stands for is moved.

The packed integers of every affine module are kept, and the scales and biases of their groups are trained (Adam, step
sizes in units of the scale, cosine decay) so that the model's predictions diverge least from the source's, on tokens
that the source sampled. This is the idea of mlx-lm's distilled weight quantization (``mlx_lm.dwq``), for a model with
two kinds of outputs; files and speed are those of the plain recipe. The model's gradients have to fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from moshi_mlx.errors import ConfigError

from ..measure.evaluate import Calibration, Subject
from ..plan.recipes import Plan
from .convert import quantize

__all__ = ["Tuned", "distill"]

Tuned = Mapping[str, Mapping[str, mx.array]]
"""Parts (``weight``, ``scales``, ``biases``) by module, as they are written."""

RATE = 1e-3


def distill(
    subject: Subject,
    plan: Plan,
    calibrations: Sequence[Calibration],
    steps: int,
    *,
    rate: float = RATE,
    progress: Callable[[int], None] = lambda steps: None,
) -> dict[str, dict[str, mx.array]]:
    """Train scales and biases of a plan; the model is as before afterwards.

    Parameters
    ----------
    calibrations : sequence of Calibration
        Conversations to learn from, one a step, in turn.
    steps : int
    rate : float
        How far a scale or bias moves in a step, as a fraction of the scale.

    Raises
    ------
    ConfigError
        If nothing can be trained, or training runs away.
    """
    subject.apply({})
    lm, stored = subject.lm, subject.stored
    modules: dict[str, Any] = dict(lm.named_modules())
    lessons = [_lesson(subject, calibration) for calibration in calibrations]
    parts: dict[str, dict[str, mx.array]] = {}
    integers: dict[str, mx.array] = {}
    for name, q in plan.choices.items():
        if q is None or q.mode != "affine":
            continue
        parts[name] = quantize(modules[name].weight.astype(stored), q)
        ones = mx.ones(parts[name]["scales"].shape)
        grid = mx.dequantize(parts[name]["weight"], ones, mx.zeros_like(ones), group_size=q.group_size, bits=q.bits)
        integers[name] = grid.reshape(grid.shape[0], -1, q.group_size)
    if not parts:
        raise ConfigError("nothing to distill: the plan has no affine modules")
    start = {
        name: {key: found[key].astype(mx.float32) for key in ("scales", "biases")} for name, found in parts.items()
    }  # fmt: skip
    exact = {name: modules[name].weight for name in parts}
    # Modules in a float format take part as they are.
    subject.apply({name: q for name, q in plan.choices.items() if q is not None and name not in parts})

    def at(moves: Any, name: str, key: str) -> mx.array:
        moved: mx.array = start[name][key] + moves[name][key] * mx.abs(start[name]["scales"])
        return moved

    def loss(moves: Any, lesson: tuple[Any, ...]) -> mx.array:
        for name, grid in integers.items():
            weight = grid * at(moves, name, "scales")[..., None] + at(moves, name, "biases")[..., None]
            modules[name].weight = weight.reshape(weight.shape[0], -1).astype(exact[name].dtype)
        tokens, condition, text, text_mask, audio, mask = lesson
        out = lm(tokens, condition)
        total = _divergence(text, out.text_logits, text_mask)
        if lm.config.dep_q:
            total = total + lm.config.dep_q * _divergence(audio, out.logits, mask)
        return total

    moves = {name: {key: mx.zeros_like(value) for key, value in found.items()} for name, found in start.items()}
    optimizer = optim.Adam(learning_rate=optim.cosine_decay(rate, steps))
    value_and_grad = mx.value_and_grad(loss)
    try:
        for step in range(steps):
            value, gradient = value_and_grad(moves, lessons[step % len(lessons)])
            moves = optimizer.apply_gradients(gradient, moves)
            mx.eval(value, moves, optimizer.state)
            if not math.isfinite(float(value)):
                raise ConfigError(f"distilling ran away at step {step}: leave out --distill")
            progress(1)
    finally:
        for name, weight in exact.items():
            modules[name].weight = weight
        subject.apply({})
    for name, found in parts.items():
        found |= {key: at(moves, name, key).astype(stored) for key in ("scales", "biases")}
        mx.eval(found)
    return parts


def _lesson(subject: Subject, calibration: Calibration) -> tuple[Any, ...]:
    """Tokens, and the source's log-probabilities for them with their masks."""
    tokens, condition = mx.array(calibration.tokens), subject.lm.condition(subject.conditions)
    out = subject.lm(tokens, condition)
    text, audio = (_log_softmax(logits) for logits in (out.text_logits, out.logits))
    mx.eval(text, audio, out.text_mask, out.mask)
    return tokens, condition, text, out.text_mask, audio, out.mask


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True) if logits.size else logits


def _divergence(p: mx.array, logits: mx.array, mask: mx.array) -> mx.array:
    kl = (mx.exp(p) * (p - _log_softmax(logits))).sum(axis=-1)
    return (kl * mask).sum() / mx.maximum(mask.sum(), 1)
