"""A leader in a process of its own: ``python -m tests.helpers.sharded '{"folder": ..., "ranks": 2, "do": ...}'``.

MLX joins a group once in the life of a process, so each test that needs one starts this. One line of JSON comes out.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

import mlx.core as mx
import numpy as np

import moshi_mlx
from moshi_mlx.engine.generator import GenerationConfig, Generator
from moshi_mlx.engine.pipeline import Engine
from moshi_mlx.errors import MoshiError
from moshi_mlx.layers.conditioning import TensorCondition
from moshi_mlx.models.sampling import GREEDY
from moshi_mlx.sharding import Leader, launch, step_traffic
from moshi_mlx.state import describe_state, state_arrays

FIXED = GenerationConfig(text=GREEDY, audio=GREEDY)


def heard(model: Any, rows: int, frames: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, model.lm.config.card, (frames, rows, model.lm.config.user_q)).astype(np.int32)


def conditions_of(model: Any) -> list[dict[str, Any]] | None:
    """A voice and a mood, for a model that takes them (:func:`tests.helpers.checkpoints.conditioned_config`)."""
    if not model.lm.config.conditioners:
        return None
    voice = np.random.default_rng(3).standard_normal((5, 24)).astype(np.float32)
    return [{"voice": TensorCondition(voice, np.arange(5) < 4), "mood": "glad"}]


def greedy(model: Any, steps: int) -> dict[str, Any]:
    """Tokens of one conversation, and all logits behind them."""
    generator = Generator(model.lm, FIXED, conditions=conditions_of(model))
    backend, logits = generator._numpy_backend, []

    def keep(function: Any) -> Any:
        def kept(*args: Any) -> Any:
            found = function(*args)
            logits.append(found)
            return found

        return kept

    backend.text_logits, backend.depth = keep(backend.text_logits), keep(backend.depth)  # type: ignore[method-assign]
    tokens, found = [], []
    for frame in heard(model, 1, steps):
        step = generator.step(frame)
        tokens += [*step.text.tolist(), *([] if step.codes is None else step.codes[0].tolist())]
        found += [np.array(part)[0] for part in logits]
        logits.clear()
    return {"tokens": tokens, "logits": found, "text": tokens}


def together(model: Any) -> dict[str, Any]:
    """Conversations that join, wait, leave, are kept and taken up again; sampled, with seeds."""
    generator = Generator(model.lm, seeds=None)
    said: list[int] = []
    codes = iter(heard(model, 1, 500, 1))

    def step(*rows: int, first: bool = False) -> None:
        given = np.concatenate([next(codes) for _ in rows]) if not first else np.full((len(rows), codes0), -2, np.int32)
        for one in generator.step_rows(rows, given):
            said.extend([int(one.text[0]), *([] if one.codes is None else one.codes[0].tolist())])

    codes0 = model.lm.config.user_q
    a = generator.join(1)
    step(a, first=True)
    step(a)
    b, c = generator.join(2), generator.join(3)
    step(b, c, first=True)
    for _ in range(3):
        step(a, c)
        step(b)
    generator.leave(a)
    step(c, b)
    kept = generator.snapshot([b, c])
    schema = [(entry.name, entry.dtype, entry.shape) for entry in describe_state(kept)]
    values = [np.array(array.astype(mx.float32)) for array in state_arrays(kept)]
    step(b, c)
    generator.restore(kept, [b, c])
    step(b, c)
    other = Generator(model.lm, seeds=None)
    (d, e), generator = other.adopt(kept), other
    step(d, e)
    generator.fill(d)
    step(d)
    generator.leave(d)
    step(e)
    generator.reset()
    for _ in range(2):
        said.extend(generator.step(next(codes)).text.tolist())
    return {"said": said, "schema": schema, "values": values, "kept": kept}


def same(leader: Leader, model: Any, plain: Any, job: dict[str, Any]) -> dict[str, Any]:
    """What the group computes, beside what this process computes alone."""
    sums: list[int] = []
    all_sum = mx.distributed.all_sum
    alone = greedy(plain, job["steps"])

    def counted(x: mx.array, **how: Any) -> mx.array:
        sums.append(x.nbytes)
        return all_sum(x, **how)

    def run() -> dict[str, Any]:
        generator = Generator(model.lm, FIXED, conditions=conditions_of(model))
        generator.step(heard(model, 1, 1)[0])
        orders = leader.orders
        mx.distributed.all_sum = counted
        for frame in heard(model, 1, 5):
            generator.step(frame)
        mx.distributed.all_sum = all_sum
        counted_orders = leader.orders - orders
        return {"orders": counted_orders, **greedy(model, job["steps"])}

    ours = leader.call(run)
    traffic = step_traffic(model.lm.config, itemsize=4)
    engines = [Engine(one.config, one.lm, one.codec, one.tokenizer) for one in (model, plain)]
    result = {
        "tokens": len(ours["tokens"]),
        "same": ours["tokens"] == alone["tokens"],
        "off": max(
            float(np.abs(a - b).max() / max(1.0, float(np.abs(b).max())))
            for a, b in zip(ours["logits"], alone["logits"], strict=True)
        ),
        "sums": len(sums) / 5,
        "bytes": sum(sums) / 5,
        "orders": ours["orders"] / 5,
        "formula": [traffic.sums, traffic.sum_bytes, traffic.orders],
        "fingerprints": engines[0].fingerprint() == engines[1].fingerprint(),
        "heads": model.lm.transformer.layers[0].self_attn.num_heads,
    }
    if job.get("together"):
        mine, its = leader.call(together, model), together(plain)
        result["together"] = mine["said"] == its["said"]
        result["schema"] = mine["schema"] == its["schema"]
        result["kept"] = max(float(np.abs(a - b).max()) for a, b in zip(mine["values"], its["values"], strict=True))
    return result


def ended(leader: Leader, model: Any, plain: Any, job: dict[str, Any]) -> dict[str, Any]:
    """What happens to a recording that is answered when a rank fares ill."""
    peer = leader._peers[0]
    frames = np.zeros((400, model.frame_size), np.float32)
    after: list[float] = []

    def strike() -> None:
        after.append(time.monotonic())
        os.kill(peer.pid, {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "late": signal.SIGUSR1}[job["do"]])

    with model.session() as session:
        for number, frame in enumerate(frames):
            if number == 5:
                threading.Timer(0.01, strike).start()
            try:
                session.step(frame)
            except MoshiError as error:
                return {
                    "error": f"{type(error).__name__}: {error}", "frames": number, "took": time.monotonic() - after[0]
                }  # fmt: skip
    return {"error": "", "frames": len(frames)}


def main() -> None:
    job = json.loads(sys.argv[1])
    plain = moshi_mlx.load(job["folder"], dtype=mx.float32, backend="mlx") if job["do"] == "same" else None
    limits = {name: job[name] for name in ("silence", "late") if name in job}
    try:
        with launch(ranks=job["ranks"], command=job.get("command"), **limits) as leader:
            began = time.monotonic()
            model = moshi_mlx.load(job["folder"], dtype=mx.float32, sharding=leader)
            result = (same if job["do"] == "same" else ended)(leader, model, plain, job)
            pids = [peer.pid for peer in leader._peers]
        result |= {"seconds": time.monotonic() - began, "pids": pids}
    except MoshiError as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
