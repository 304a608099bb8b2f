"""Small codecs, a signal to put through them, and the proof that a differing code is a near-tie."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from moshi_mlx.layers.conv import CausalConv, CausalConvTranspose
from moshi_mlx.models.mimi import Mimi, MimiConfig
from tests.helpers.signal import speechlike

TINY: dict[str, Any] = {
    "sample_rate": 24000,
    "channels": 1,
    "frame_rate": 150.0,
    "seanet": {
        "channels": 1,
        "dimension": 16,
        "causal": True,
        "n_filters": 4,
        "n_residual_layers": 1,
        "activation": "ELU",
        "compress": 2,
        "dilation_base": 2,
        "disable_norm_outer_blocks": 0,
        "kernel_size": 7,
        "residual_kernel_size": 3,
        "last_kernel_size": 3,
        "norm": "none",
        "pad_mode": "constant",
        "ratios": [5, 4, 4],
        "true_skip": True,
    },
    "quantizer": {"dimension": 8, "n_q": 4, "bins": 32, "input_dimension": 16, "output_dimension": 16},
    "transformer": {
        "d_model": 16,
        "num_heads": 2,
        "num_layers": 2,
        "causal": True,
        "layer_scale": 0.3,
        "context": 8,
        "conv_layout": True,
        "max_period": 10000,
        "gating": "none",
        "norm": "layer_norm",
        "positional_embedding": "rope",
        "dim_feedforward": 32,
        "input_dimension": 16,
        "output_dimensions": [16],
    },
}
"""160 samples a frame, two latents a frame, a context of four frames."""


def tiny_mimi(seed: int = 0, **changes: Any) -> Mimi:
    """A codec of a few thousand parameters whose codes depend on what it hears."""
    mx.random.seed(seed)
    config = MimiConfig.from_dict({**TINY, **changes})
    mimi = Mimi(config)
    convs = [module for module in mimi.modules() if isinstance(module, (CausalConv, CausalConvTranspose))]
    for conv in convs:  # what training would do, or the signal fades on its way
        conv.weight = 2 * conv.weight
    signal = mx.array(speechlike(40 * config.frame_size, config.sample_rate, seed))
    latent = mimi.latent(signal[None, None])[0]
    for group in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
        residual = group.input_proj(latent)
        for codebook in group.codebooks:
            mean = residual.mean(0)
            mixture = mx.random.normal((len(codebook.embedding), len(residual))) / len(residual) ** 0.5
            codebook.embedding = mean + 0.7 * mixture @ (residual - mean)
            residual = residual - codebook.decode(codebook.encode(residual))
    mx.eval(mimi.parameters())
    return mimi


def unproven_differences(mimi: Mimi, pcm: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> list[str]:
    """Where two streams of codes [codebooks, frames] of ``pcm`` [samples] differ for no good reason.

    A difference is a near-tie if both entries are within 1e-4 (relative) of the same distance from what they
    quantize. Later codebooks of that group and frame then quantize another residual, and are not compared.
    """
    if (ours == theirs).all():
        return []
    latent = mimi.latent(mx.array(pcm)[None, None])[0]
    faults = []
    semantic = mimi.quantizer.semantic
    groups = [(mimi.quantizer.rvq_first, 0, semantic), (mimi.quantizer.rvq_rest, semantic, len(ours))]
    for group, start, stop in groups:
        residual = np.array(group.input_proj(latent), np.float64)
        tied = np.zeros(ours.shape[1], bool)
        for index in range(start, stop):
            entries = np.array(group.codebooks[index - start].embedding, np.float64)
            for frame in np.flatnonzero((ours[index] != theirs[index]) & ~tied):
                mine, other = (
                    np.sum((residual[frame] - entries[codes[index, frame]]) ** 2) for codes in (ours, theirs)
                )
                if abs(other - mine) > 1e-4 * mine:
                    faults.append(f"codebook {index}, frame {frame}: distances {mine:.6g} and {other:.6g}")
                tied[frame] = True
            residual -= entries[ours[index]]
    return faults
