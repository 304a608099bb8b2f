"""Steps of our generator on a random model. The same questions and answers as lm_kyutai.py."""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from benchmarks.workers import graph
from moshi_mlx.config import LmConfig
from moshi_mlx.cpu.lm import Backend, NumpyBackend
from moshi_mlx.engine import generator as generate
from moshi_mlx.engine.generator import GenerationConfig, Generator
from moshi_mlx.models.lm import Lm
from moshi_mlx.models.sampling import GREEDY


def build(ask: dict[str, Any]) -> Lm:
    """A random model of the sizes asked for, its delays Moshi's."""
    mx.random.seed(0)
    config = LmConfig.from_dict(
        {
            "dim": ask["dim"],
            "num_layers": ask["layers"],
            "num_heads": ask["heads"],
            "hidden_scale": 4.125,
            "context": ask["context"],
            "depformer_dim": ask["depth_dim"],
            "depformer_dim_feedforward": 33 * ask["depth_dim"] // 8,
            "depformer_num_layers": ask["depth_layers"],
            "depformer_num_heads": ask["depth_heads"],
            "text_card": ask["text_card"],
        }
    )
    lm = Lm(config)
    lm.set_dtype(getattr(mx, ask["dtype"]))
    return lm


class Recorder:
    """Stands in for ``mx.eval`` during one step: counts the evaluations, and what is in their graphs."""

    def __init__(self) -> None:
        self.primitives = self.kernels = self.reads = 0
        self._eval, self._async_eval = mx.eval, mx.async_eval

    def __enter__(self) -> Recorder:
        mx.eval = self._waited
        mx.async_eval = self._launched
        return self

    def __exit__(self, *_: object) -> None:
        mx.eval, mx.async_eval = self._eval, self._async_eval

    def _count(self, arrays: tuple[Any, ...]) -> None:
        flat = [value for _, value in tree_flatten(list(arrays)) if isinstance(value, mx.array)]
        primitives, kernels = graph.count(*flat)
        self.primitives += primitives
        self.kernels += kernels

    def _waited(self, *arrays: Any) -> None:
        self._count(arrays)
        self.reads += 1
        self._eval(*arrays)

    def _launched(self, *arrays: Any) -> None:
        self._count(arrays)
        self._eval(*arrays)  # else a graph that is half done would be counted


def python_time(generator: Generator, steps: int) -> list[float]:
    """Milliseconds of this thread for steps that are built and not evaluated: so long others wait for the interpreter.

    Norm, rotation and attention are one kernel each, as on a GPU, which would evaluate while this thread sleeps. Here
    the evaluation would take the processor's caches as well.
    """
    batch, users, rng = generator.batch, generator.lm.config.user_q, np.random.default_rng(0)
    backend: Any = generator._numpy_backend
    if backend._compiled is not None:
        backend._compiled.clear()  # graphs of this machine's kernels
    took, built = [], []

    def fetch(state: Any, *arrays: mx.array) -> list[np.ndarray]:
        built.append(arrays)  # evaluation would take the graph apart while others run
        return [np.zeros(array.shape, np.int32) for array in arrays]

    backend.launch, backend.fetch = lambda *arrays: None, fetch
    with graph.fused():
        for _ in range(steps + 3):  # the first ones draw the graph that is kept
            codes = rng.integers(0, generator.lm.config.card, size=(batch, users))
            began = time.thread_time()
            generator.step(codes)
            took.append((time.thread_time() - began) * 1e3)
    return took[3:]


def products(generator: Generator) -> float:
    """Milliseconds of processor time of a step's products of a row with a weight, alone."""
    backend: Any = generator._numpy_backend
    assert isinstance(backend, NumpyBackend)
    depth = backend._depth
    matrices = [m for layer in backend._layers for m in (layer._in, layer._out, layer._gating._in, layer._gating._out)]
    matrices.append(backend._text_linear)
    for index, weights in enumerate(depth._schedule):
        matrices.append(depth._in[weights])
        for layer in depth._layers:
            gating = layer._gating[weights]
            matrices += [layer._in[weights], layer._out[weights], gating._in, gating._out]
        matrices.append(depth._out[index])
    rows = {size: np.ones((1, size), np.float32) for size in {len(m.weight) for m in matrices}}
    began = time.process_time()
    for matrix in matrices:
        matrix(rows[len(matrix.weight)])
    return (time.process_time() - began) * 1e3


def skip(generator: Generator, frames: int) -> None:
    """Set the counters of a full cache ahead, by a multiple of its length: what would be there after so many frames."""
    assert frames % generator.lm.config.context == 0 and frames % generator._rows.columns == 0
    rings = generator._rows.state["transformer"]
    rings["offset"] = rings["offset"] + frames
    generator._rows.book["position"] += frames


def main() -> None:
    ask = json.loads(sys.argv[1])
    lm = build(ask)
    parameters = sum(value.size for _, value in tree_flatten(lm.parameters()))
    if ask["bits"]:
        nn.quantize(lm, bits=ask["bits"], group_size=32 if ask["bits"] == 4 else 64)
    mx.eval(lm.parameters())
    batch, config = ask.get("batch", 1), GenerationConfig()
    if ask.get("greedy"):
        config = GenerationConfig(GREEDY, GREEDY)
    if ask.get("modules"):
        generate.make_backend = lambda lm, kv_bits=None: Backend(lm, compiled=bool(ask.get("compiled")))
    generator = Generator(lm, config, seeds=range(batch), kv_bits=ask.get("kv_bits"))
    rng = np.random.default_rng(0)
    users = lm.config.user_q
    print(json.dumps({"parameters": parameters, "mlx": version("mlx")}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        answer: dict[str, Any] = {"wall": [], "cpu": []}
        for _ in range(question.get("steps", 0)):
            codes = rng.integers(0, lm.config.card, size=(batch, users))
            began, used = time.perf_counter(), time.process_time()
            generator.step(codes)
            ended = time.perf_counter()
            answer["wall"].append((ended - began) * 1e3)
            answer["cpu"].append((time.process_time() - used) * 1e3)
        if question.get("skip"):
            skip(generator, question["skip"])
        if question.get("count"):
            with Recorder() as recorder:
                generator.step(rng.integers(0, lm.config.card, size=(batch, users)))
            answer.update(primitives=recorder.primitives, reads=recorder.reads)
            with graph.fused(), Recorder() as recorder:
                generator.step(rng.integers(0, lm.config.card, size=(batch, users)))
            answer["kernels"] = recorder.kernels
        if question.get("products"):
            answer["products"] = [products(generator) for _ in range(question["products"])]
        if question.get("python"):
            answer["python"] = python_time(generator, question["python"])
        answer["position"] = generator.position
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
