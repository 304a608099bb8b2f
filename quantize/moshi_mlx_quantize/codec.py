"""What quantizing the codec would cost: the linear layers of its transformers; never codebooks and convolutions.

Codebooks decide which code is nearest: a rounded table is another codec. The transformers' layers are quantized and
expanded again in a codec in memory. Of the encoder's, the codes that change are counted; of the decoder's, the distance
of the sound from that of the exact decoder is measured, for the same codes. Nothing is written: the library loads dense
codecs only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from moshi_mlx.checkpoint.files import read_json
from moshi_mlx.checkpoint.quantization import Quantization
from moshi_mlx.codec import MimiCodec, mimi_codec
from moshi_mlx.errors import CheckpointError, ConfigError
from moshi_mlx.hub import CheckpointFiles
from moshi_mlx.mimi import MimiConfig
from moshi_mlx.mimi_weights import load_mimi

from .convert import dequantize, quantize
from .recipes import describe
from .terminal import table

__all__ = ["CodecCost", "codec_table", "load_codec", "measure_codec"]

KINDS = (
    Quantization(8, 64), Quantization(6, 64), Quantization(4, 32), Quantization(4, 64), Quantization(3, 64),
    Quantization(8, 32, "mxfp8"), Quantization(4, 32, "mxfp4"),
)  # fmt: skip


@dataclass(frozen=True)
class CodecCost:
    """One choice for all linear layers of the codec's transformers.

    Attributes
    ----------
    choice : str
    megabytes : float
        Of those layers.
    changed_first, changed : float
        Share of the codes that change, in the first codebook and in all.
    snr : float
        Of the decoded sound against the exact decoder's, in dB.
    """

    choice: str
    megabytes: float
    changed_first: float
    changed: float
    snr: float


def load_codec(files: CheckpointFiles, num_codebooks: int) -> MimiCodec:
    """The checkpoint's codec in MLX.

    Raises
    ------
    CheckpointError
        If it has none.
    """
    if files.mimi is None:
        raise CheckpointError(f"{files.source} has no codec to measure")
    sizes = MimiConfig() if files.mimi_config is None else MimiConfig.from_dict(read_json(files.mimi_config))
    return mimi_codec(load_mimi(files.mimi, sizes, num_codebooks))


def measure_codec(codec: MimiCodec, pcm: NDArray[np.float32], kinds: Sequence[Quantization] = KINDS) -> list[CodecCost]:
    """Costs of each choice on a recording at the codec's rate; choices that no group size allows are left out.

    Raises
    ------
    ConfigError
        If the recording is shorter than a frame.
    """
    pcm = pcm[: len(pcm) // codec.frame_size * codec.frame_size]
    if not len(pcm):
        raise ConfigError("the recording is shorter than a frame: give a longer one")
    layers: dict[str, nn.Linear] = {
        name: module
        for name, module in codec.mimi.named_modules()
        if isinstance(module, nn.Linear) and "transformer" in name
    }
    exact = {name: layer.weight for name, layer in layers.items()}
    codes = codec.encode(pcm)
    sound = codec.decode(codes)
    costs = []
    for q in kinds:
        if any(weight.shape[-1] % q.group_size for weight in exact.values()):
            continue
        size = 0
        for name, layer in layers.items():
            parts = quantize(exact[name].astype(mx.float32), q)
            size += parts["weight"].nbytes + exact[name].shape[0] * exact[name].shape[1] // q.group_size * (
                4 if q.mode == "affine" else 1
            )
            layer.weight = dequantize(parts, q).astype(exact[name].dtype)
        try:
            mx.eval(codec.mimi.parameters())
            quantized = mimi_codec(codec.mimi)
            other = quantized.encode(pcm)
            noise = quantized.decode(codes) - sound
        finally:
            for name, layer in layers.items():
                layer.weight = exact[name]
        changed = other != codes
        power = float(np.square(sound).sum() / max(float(np.square(noise).sum()), 1e-30))
        costs.append(
            CodecCost(
                describe(q),
                size / 1e6,
                float(changed[0].mean()),
                float(changed.mean()),
                float(10 * np.log10(max(power, 1e-30))),
            )
        )
    return costs


def codec_table(costs: Sequence[CodecCost]) -> str:
    """One line a choice."""
    rows = [
        [c.choice, f"{c.megabytes:.2f}", f"{100 * c.changed_first:.1f} %", f"{100 * c.changed:.1f} %", f"{c.snr:.1f}"]
        for c in costs
    ]
    return table(["codec's transformers", "MB", "first codes changed", "codes changed", "SNR dB"], rows)
