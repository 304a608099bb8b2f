"""What this machine is and how fast it is: for the verbs ``check`` and ``bench``."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.resources import as_file, files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.generate import GenerationConfig
from moshi_mlx.model import Moshi, make_generator
from moshi_mlx.realtime import Conversation
from moshi_mlx.realtime.meters import Stopwatch

__all__ = [
    "KNOWN",
    "Known",
    "machine",
    "memory_used",
    "paced",
    "percentiles",
    "question",
    "speeds",
    "unpaced",
    "verdict",
]

_PACKAGES = ("mlx", "numpy", "rustymimi", "sounddevice", "soxr", "livekit")
_SHARE_OF_MEMORY = 0.75  # of the machine's memory that a model may take: the system and other programs want theirs
_BESIDE = 1.2e9  # bytes beside the language model's weights: codec, caches, Python
_SHARE_OF_TIME = 0.8  # of a frame that the language model may take
_OVERHEAD = 1.25  # a step by the time its weights alone take to be read


@dataclass(frozen=True)
class Known:
    """A published model.

    Attributes
    ----------
    name : str
        What to give to ``--model``.
    size : int
        Bytes of the language model's weights.
    bits : {4, 8, 16}
        Of a weight.
    """

    name: str
    size: int
    bits: int


KNOWN = (
    Known("kyutai/moshiko-mlx-q4", 4_805_000_000, 4),
    Known("kyutai/moshiko-mlx-q8", 8_169_000_000, 8),
    Known("kyutai/moshiko-mlx-bf16", 15_376_000_000, 16),
    Known("kyutai/moshika-mlx-q4", 4_805_000_000, 4),
    Known("kyutai/moshika-mlx-q8", 8_169_000_000, 8),
    Known("kyutai/moshika-mlx-bf16", 15_376_000_000, 16),
    Known("nvidia/personaplex-7b-v1", 16_743_000_000, 16),
    Known("kyutai/stt-1b-en_fr-mlx", 1_978_000_000, 16),
    Known("kyutai/stt-2.6b-en-mlx", 5_234_000_000, 16),
)
"""Sizes as the repositories' files say."""


def machine() -> dict[str, Any]:
    """System, processor, memory in bytes, and the versions of the packages that matter."""
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
        "packages": versions,
    }


def memory_used() -> int:
    """Bytes that this process has held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def percentiles(watch: Stopwatch) -> dict[str, float]:
    """Milliseconds of one stage."""
    return {
        **{f"p{percent}": round(watch.percentile(percent) * 1e3, 2) for percent in (50, 95)},
        "max": round(watch.longest * 1e3, 2),
    }


def question(model: Moshi) -> Iterator[NDArray[np.float32]]:
    """One silent frame, then the questions that come with the program, again and again."""
    import soundfile

    with as_file(files("moshi_mlx_app") / "assets" / "questions.wav") as path:
        pcm, rate = soundfile.read(path, dtype="float32")
    if rate != model.sample_rate:
        import soxr

        pcm = soxr.resample(pcm, rate, model.sample_rate)
    # The silence before the first words would make a short measurement one of silence.
    pcm = pcm[max(int(np.argmax(np.abs(pcm) > 0.05)) - model.frame_size // 2, 0) :]
    size = model.frame_size
    yield np.zeros(size, np.float32)
    while True:
        for start in range(0, len(pcm) - size + 1, size):
            yield np.ascontiguousarray(pcm[start : start + size], np.float32)


def unpaced(model: Moshi, frames: int, generation: GenerationConfig | None = None) -> dict[str, Any]:
    """Each stage by itself, one frame after the other, as fast as it goes.

    Returns
    -------
    dict
        Milliseconds of ``encode``, ``step``, ``decode`` and ``frame``; ``rtf``; ``silent`` and ``spoken``: whether
        the first and a later frame went through with finite sound.
    """
    lm, codec = model.lm.config, model.codec
    assert codec is not None
    encoder = codec.encoder() if lm.user_q else None
    decoder = codec.decoder() if lm.own_q else None
    generator = make_generator(model, 0, generation)
    watches = {name: Stopwatch(max(frames, 1)) for name in ("encode", "step", "decode", "frame")}
    sound = question(model)
    fine: list[bool] = []
    total = 0.0
    for index in range(-2, frames):  # two before anything counts: the first of a kind compiles and allocates
        pcm = next(sound)
        marks = [time.perf_counter()]
        codes = None if encoder is None else encoder.encode(pcm)
        marks.append(time.perf_counter())
        step = generator.step(None if codes is None else codes[: lm.user_q])
        marks.append(time.perf_counter())
        voice = np.zeros(model.frame_size, np.float32)
        if decoder is not None and step.codes is not None and step.codes.min() >= 0:
            voice = decoder.decode(step.codes[0])
        marks.append(time.perf_counter())
        fine.append(bool(np.isfinite(voice).all()) and voice.shape == (model.frame_size,))
        if index >= 0:
            for name, seconds in zip(("encode", "step", "decode"), np.diff(marks), strict=True):
                watches[name].add(float(seconds))
            watches["frame"].add(marks[-1] - marks[0])
            total += marks[-1] - marks[0]
    return {
        **{name: percentiles(watch) for name, watch in watches.items()},
        "frames": frames,
        "rtf": round(total * model.frame_rate / max(frames, 1), 3),
        "silent": fine[0],
        "spoken": all(fine[1:]),
    }


def paced(model: Moshi, frames: int, generation: GenerationConfig | None = None) -> dict[str, Any]:
    """A conversation on a microphone that gives one frame every 80 ms, with all its threads."""
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
        while conversation.meters.frames < frames and time.monotonic() < until and conversation.running:
            time.sleep(0.01)
        meters = conversation.meters
    return {
        **{name: percentiles(getattr(meters, name)) for name in ("encode", "step", "decode")},
        "answer": percentiles(meters.lag),
        "frames": meters.frames,
        "late": meters.late,
        "dropped_seconds": round(meters.dropped_in / model.sample_rate, 3),
        "gaps": meters.underruns,
    }


def speeds() -> dict[int, float]:
    """Bytes of weights that go through a matrix-vector product in a second, for weights of 4, 8 and 16 bits."""
    import mlx.core as mx

    wide, high = 4096, 2048
    matrix = mx.random.normal((high, wide)).astype(mx.bfloat16)
    kind = mx.bfloat16 if mx.default_device().type == mx.gpu else mx.float32
    x = mx.random.normal((1, wide)).astype(kind)
    found = {}
    for bits in (4, 8, 16):
        if bits == 16:
            plain = matrix if kind == mx.bfloat16 else matrix.astype(mx.float32)
            mx.eval(plain, x)
            size, product = plain.nbytes, _times(plain, x)
        else:
            quantized = mx.quantize(matrix, group_size=64, bits=bits)
            mx.eval(quantized, x)
            size, product = sum(part.nbytes for part in quantized), _quantized_times(quantized, x, bits)
        # A 16-bit weight is twice as large on a processor that multiplies 32 bits: count what the file holds.
        found[bits] = (2 * high * wide if bits == 16 else size) / _fastest(product)
    return found


def _times(matrix: Any, x: Any) -> Callable[[], Any]:
    return lambda: x @ matrix.T


def _quantized_times(parts: Any, x: Any, bits: int) -> Callable[[], Any]:
    import mlx.core as mx

    weights, scales, biases = parts
    return lambda: mx.quantized_matmul(x, weights, scales, biases, transpose=True, group_size=64, bits=bits)


def _fastest(product: Callable[[], Any], chain: int = 8, tries: int = 5) -> float:
    """Seconds of one product: the best of several chains, because other programs only ever make it slower."""
    import mlx.core as mx

    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        mx.eval([product() for _ in range(chain)])
        best = min(best, (time.perf_counter() - began) / chain)
    return best


def verdict(known: Known, memory: int, speed: dict[int, float], frame: float = 0.08) -> dict[str, Any]:
    """Whether a model fits into ``memory`` [bytes] and keeps up, and why.

    A step reads nearly all weights once: Moshi's depth transformer has its own for every codebook.
    """
    needed = known.size + _BESIDE
    room = memory * _SHARE_OF_MEMORY
    step = known.size / speed[known.bits] * _OVERHEAD
    fits, in_time = needed <= room, step <= _SHARE_OF_TIME * frame
    why = (
        f"needs {needed / 1e9:.1f} GB of {room / 1e9:.1f}; "
        f"a step would take about {step * 1e3:.0f} ms of {frame * 1e3:.0f}"
    )
    return {
        "model": known.name,
        "fits": fits,
        "keeps_up": in_time,
        "needed_bytes": round(needed),
        "step_ms": round(step * 1e3, 1),
        "why": why,
    }
