"""The KV cache in 8 bits: its bytes, and what it costs in divergence (KL) on the trained built-in model.

The built-in model answers its recorded questions; then the same tokens go through it once with the cache in the
weights' type and once in 8 bits. KL (nats) between what the two predict, for the text and for each code given the
codes before it, and how often the likeliest token is another. Bytes are also given for Moshi 7B in bfloat16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import soundfile

import moshi_mlx
from moshi_mlx.config import ModelConfig
from moshi_mlx.cpu.lm import make_backend
from moshi_mlx.layers.attention import Attention
from moshi_mlx.state import state_bytes

from .workers import machine

QUESTIONS = Path(__file__).resolve().parents[1] / "moshi_mlx" / "assets" / "questions.wav"


def tokens_of_a_talk(model: moshi_mlx.Moshi, frames: int) -> np.ndarray:
    """What each stream held at each position [positions, streams] while the model heard the questions."""
    sound, rate = soundfile.read(QUESTIONS, dtype="float32")
    pcm = moshi_mlx.audio.as_mono(sound, rate, model.sample_rate)
    size = model.frame_size
    columns: list[np.ndarray] = []
    with model.session() as session:
        backend = type(make_backend(model.lm))
        plain = backend.temporal

        def recorded(self: Any, tokens: np.ndarray, state: Any, rows: Any = None) -> Any:
            columns.append(tokens[0].copy())
            return plain(self, tokens, state, rows)

        backend.temporal = recorded  # type: ignore[method-assign]
        try:
            for index in range(frames):
                start = index * size % (len(pcm) - size)
                session.step(pcm[start : start + size])
        finally:
            backend.temporal = plain  # type: ignore[method-assign]
    return np.stack(columns)


def predictions(lm: moshi_mlx.Lm, columns: np.ndarray, kv_bits: int | None) -> tuple[np.ndarray, int]:
    """Log-probabilities [positions, 1 + own_q, ...] as a list of arrays, and the cache's bytes."""
    state = lm.init_state(1, kv_bits=kv_bits)
    size = state_bytes(state)
    out = []
    following = np.concatenate([columns[1:], columns[-1:]])
    for column, after in zip(columns, following, strict=True):
        hidden = lm.step(mx.array(column)[None, :, None], state)[:, 0]
        logits = [lm.text_linear(hidden)]
        cache: list[Any] = []
        for k in range(lm.config.own_q):
            logits.append(lm.depformer.step(k, hidden, mx.array(after[k : k + 1]), cache))
        padded = [mx.pad(x, ((0, 0), (0, widest(lm) - x.shape[1])), constant_values=-1e9) for x in logits]
        stacked = mx.concatenate(padded)
        log = stacked - mx.logsumexp(stacked, axis=-1, keepdims=True)
        mx.eval(log)
        out.append(np.array(log))
    return np.stack(out), size


def widest(lm: moshi_mlx.Lm) -> int:
    return max(lm.config.text_out, lm.config.card)


def cache_bytes(config: moshi_mlx.LmConfig, kv_bits: int | None) -> int:
    """Bytes of a full cache in bfloat16."""
    attention = Attention(config.dim, config.num_heads, context=config.context, kv_repeat=config.kv_repeat)
    return config.num_layers * state_bytes(attention.init_ring(1, mx.bfloat16, kv_bits))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks lm_kv8", description=__doc__)
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--model", default="small")
    args = parser.parse_args(argv)
    about = machine()
    print(about)
    model = moshi_mlx.load(args.model)
    columns = tokens_of_a_talk(model, args.frames)
    plain, size = predictions(model.lm, columns, None)
    packed, small = predictions(model.lm, columns, 8)
    divergence = (np.exp(plain) * (plain - packed)).sum(axis=-1)
    other = plain.argmax(axis=-1) != packed.argmax(axis=-1)
    moshi = ModelConfig.moshi_7b().lm
    whole, half = cache_bytes(moshi, None), cache_bytes(moshi, 8)
    rows = {
        "positions": len(columns),
        "bytes": {"float32": size, "8 bits": small, "share": round(small / size, 3)},
        "moshi_7b_bytes": {"bfloat16": whole, "8 bits": half, "share": round(half / whole, 3)},
        "text": {"kl": float(divergence[:, 0].mean()), "kl_p99": float(np.percentile(divergence[:, 0], 99))},
        "codes": {"kl": float(divergence[:, 1:].mean()), "kl_p99": float(np.percentile(divergence[:, 1:], 99))},
    }
    rows["text"]["other_choice"] = float(other[:, 0].mean())
    rows["codes"]["other_choice"] = float(other[:, 1:].mean())
    print(f"cache: {size / 1e3:.0f} kB in float32, {small / 1e3:.0f} kB in 8 bits ({100 * small / size:.0f} %)")
    print(f"Moshi 7B: {whole / 1e6:.0f} MB in bfloat16, {half / 1e6:.0f} MB in 8 bits ({100 * half / whole:.0f} %)")
    print(f"{'':8} {'mean KL':>10} {'99 %':>10} {'other choice':>13}   {len(columns)} positions")
    for name in ("text", "codes"):
        row = rows[name]
        print(f"{name:8} {row['kl']:10.2e} {row['kl_p99']:10.2e} {100 * row['other_choice']:11.2f} %")
    print(json.dumps({"benchmark": "lm_kv8", "machine": about, "model": args.model, "rows": rows}))


if __name__ == "__main__":
    main()
