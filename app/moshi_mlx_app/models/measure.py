"""Describe this machine and measure its speed: for the commands ``check`` and ``bench``."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from importlib.resources import as_file, files
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.engine.generator import GenerationConfig
from moshi_mlx.realtime import Conversation
from moshi_mlx.realtime.stats import Stopwatch
from moshi_mlx.tasks.dialogue import Moshi

__all__ = [
    "machine",
    "memory_used",
    "paced",
    "percentiles",
    "question",
    "speeds",
    "unpaced",
]

_PACKAGES = ("mlx", "numpy", "rustymimi", "sounddevice", "soxr", "livekit")
_GROUP = 64
_AT_ONCE = {True: 5e8, False: 5e7}  # bytes of weights per measurement, on a GPU and on a CPU


def machine() -> dict[str, Any]:
    """System, processor, memory in bytes, and the versions of the relevant packages."""
    import mlx.core as mx

    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    described = mx.device_info() if hasattr(mx, "device_info") else {}
    return {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "processor": str(described.get("device_name", "")),
        "device": "gpu" if mx.default_device().type == mx.gpu else "cpu",
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        # The memory that Metal grants a program for the GPU; other backends have no such value.
        "gpu_memory": int(described.get("max_recommended_working_set_size", 0)) or None,
        "packages": versions,
    }


def memory_used() -> int:
    """Peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def percentiles(watch: Stopwatch) -> dict[str, float]:
    """Milliseconds of one stage."""
    return {
        **{f"p{percent}": round(watch.percentile(percent) * 1e3, 2) for percent in (50, 95)},
        "max": round(watch.longest * 1e3, 2),
    }


def _milliseconds(watch: Stopwatch) -> list[float]:
    return [round(float(seconds) * 1e3, 3) for seconds in watch.recent()]


def question(model: Moshi) -> Iterator[NDArray[np.float32]]:
    """One silent frame, then the included questions in a loop."""
    import soundfile

    with as_file(files("moshi_mlx") / "assets" / "questions.wav") as path:
        pcm, rate = soundfile.read(path, dtype="float32")
    if rate != model.sample_rate:
        import soxr

        pcm = soxr.resample(pcm, rate, model.sample_rate)
    # With the silence before the first words, a short measurement would be one of silence.
    pcm = pcm[max(int(np.argmax(np.abs(pcm) > 0.05)) - model.frame_size // 2, 0) :]
    size = model.frame_size
    yield np.zeros(size, np.float32)
    while True:
        for start in range(0, len(pcm) - size + 1, size):
            yield np.ascontiguousarray(pcm[start : start + size], np.float32)


def unpaced(
    model: Moshi,
    frames: int,
    generation: GenerationConfig | None = None,
    *,
    kv_bits: int | None = None,
    series: dict[str, list[float]] | None = None,
) -> dict[str, Any]:
    """Measure each stage, one frame after the other, at full speed.

    Parameters
    ----------
    kv_bits : int, optional
        As for :meth:`Moshi.session`.
    series : dict, optional
        Receives the milliseconds of every frame, by stage.

    Returns
    -------
    dict
        Milliseconds of ``encode``, ``step``, ``decode`` and ``frame``; ``rtf``; ``silent`` and ``spoken``: whether
        the first and a later frame went through with finite sound.
    """
    watches = {name: Stopwatch(max(frames, 1)) for name in ("encode", "step", "decode", "frame")}
    took: dict[str, float] = {}
    fine: list[bool] = []
    total = 0.0
    with model.session(generation=generation, kv_bits=kv_bits) as session:
        session.on_stage = lambda name, began, ended: took.update({"step" if name == "model" else name: ended - began})
        # Two warm-up frames: the first ones compile and allocate.
        for index, pcm in enumerate(islice(question(model), frames + 2), start=-2):
            began = time.perf_counter()
            voice = session.step(pcm).pcm
            took["frame"] = time.perf_counter() - began
            fine.append(bool(np.isfinite(voice).all()) and voice.shape == (model.frame_size,))
            if index >= 0:
                for name, seconds in took.items():
                    watches[name].add(seconds)
                total += took["frame"]
    if series is not None:
        series.update({name: _milliseconds(watch) for name, watch in watches.items()})
    return {
        **{name: percentiles(watch) for name, watch in watches.items()},
        "frames": frames,
        "rtf": round(total * model.frame_rate / max(frames, 1), 3),
        "silent": fine[0],
        "spoken": all(fine[1:]),
    }


def paced(
    model: Moshi,
    frames: int,
    generation: GenerationConfig | None = None,
    *,
    series: dict[str, list[float]] | None = None,
) -> dict[str, Any]:
    """Measure a conversation with all its threads, fed with one frame every 80 ms.

    ``series`` as for :func:`unpaced`, with ``latency``, and at most the last thousand frames.
    """
    sound = question(model)
    with Conversation(model, generation=generation) as conversation:
        out = np.zeros(model.frame_size // 8, np.float32)
        began = time.monotonic()
        for index in range(frames * 8):
            time.sleep(max(0.0, began + (index + 1) / (8 * model.frame_rate) - time.monotonic()))
            if index % 8 == 7:
                conversation.feed(next(sound))
            conversation.read_into(out)
            conversation.check()
        until = time.monotonic() + 2.0
        while conversation.stats.frames < frames and time.monotonic() < until and conversation.running:
            time.sleep(0.01)
        stats = conversation.stats
    stages = {"encode": stats.encode, "step": stats.step, "decode": stats.decode, "latency": stats.latency}
    if series is not None:
        series.update({name: _milliseconds(watch) for name, watch in stages.items()})
    return {
        **{name: percentiles(watch) for name, watch in stages.items()},
        "frames": stats.frames,
        "late": stats.late,
        "dropped_seconds": round(stats.dropped_in / model.sample_rate, 3),
        "underruns": stats.underruns,
    }


def speeds(seconds: float = 1.0) -> dict[int, float]:
    """Bytes of weights per second in matrix-vector products, for weights of 4, 8 and 16 bits.

    The matrices are many, and large together: a single one would stay in a cache, which a model's weights do not.

    Parameters
    ----------
    seconds : float
        Approximate duration; other programs only make it slower, so the best of several rounds counts.
    """
    import mlx.core as mx

    gpu = mx.default_device().type == mx.gpu
    kind, wide, high = (mx.bfloat16, 4096, 16_384) if gpu else (mx.float32, 4096, 512)
    matrix = mx.random.normal((high, wide)).astype(mx.bfloat16)
    x = mx.random.normal((1, wide)).astype(kind)
    found = {}
    for bits in (4, 8, 16):
        parts = [matrix.astype(kind)] if bits == 16 else list(mx.quantize(matrix, group_size=_GROUP, bits=bits))
        mx.eval(parts, x)
        once = min(_seconds_of([parts], x, bits) for _ in range(2))  # the first call compiles
        held = sum(part.nbytes for part in parts)
        count = int(min(_AT_ONCE[gpu] / held, max(seconds / 9 / once, 1)))
        copies = [parts, *([part + 0 for part in parts] for _ in range(count - 1))]
        mx.eval(copies)
        best, until = once, time.perf_counter() + seconds / 3
        while time.perf_counter() < until:
            best = min(best, _seconds_of(copies, x, bits) / count)
        # A CPU multiplies in 32 bits where the file has 16: count the bytes of the file.
        found[bits] = (2 * high * wide if bits == 16 else held) / best
        del parts, copies
        mx.clear_cache()  # the model that is loaded next may need all memory
    return found


def _seconds_of(matrices: list[list[Any]], x: Any, bits: int) -> float:
    """Time of one product with each part."""
    import mlx.core as mx

    def product(weights: Any, scales: Any = None, biases: Any = None) -> Any:
        if scales is None:
            return x @ weights.T
        return mx.quantized_matmul(x, weights, scales, biases, transpose=True, group_size=_GROUP, bits=bits)

    began = time.perf_counter()
    mx.eval([product(*parts) for parts in matrices])
    return time.perf_counter() - began
