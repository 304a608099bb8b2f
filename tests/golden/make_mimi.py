"""Makes tests/golden/mimi: small codecs, and what the PyTorch reference does with them.

    python -m tests.golden.make_mimi

Run it from the root of the repository in an environment with torch, moshi 0.2.13 and safetensors (`make reference`
makes one). Each folder gets config.json, mimi.safetensors (published layout) and golden.safetensors, which holds

- ``pcm`` [samples], int16: the input, times 32768
- ``codes`` [codebooks, frames], int32: of the whole signal at once
- ``codes_stream``: a frame at a time. The reference writes the keys of a frame into its ring before it reads, so once
  the ring has wrapped the earlier latents of a frame miss keys that they see in a whole sequence: from there on the
  two differ.
- ``decoded`` [samples]: waveform of ``codes`` at once
- ``decoded_stream``: waveform of ``codes`` a frame at a time
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.helpers.mimi_torch import build, decode_stream, encode_stream, make_realistic, published_state

FOLDER = Path(__file__).parent / "mimi"


def config(
    *,
    rate: int,
    frame_rate: float,
    ratios: list[int],
    filters: int,
    dimension: int,
    n_q: int,
    bins: int,
    context: int,
    layers: int,
    seanet: dict[str, Any] | None = None,
    transformer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "sample_rate": rate,
        "channels": 1,
        "frame_rate": frame_rate,
        "seanet": {
            "channels": 1,
            "dimension": dimension,
            "causal": True,
            "n_filters": filters,
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
            "ratios": ratios,
            "true_skip": True,
            **(seanet or {}),
        },
        "quantizer": {
            "dimension": dimension // 2,
            "n_q": n_q,
            "bins": bins,
            "input_dimension": dimension,
            "output_dimension": dimension,
        },
        "transformer": {
            "d_model": dimension,
            "num_heads": 4,
            "num_layers": layers,
            "causal": True,
            "layer_scale": 0.01,
            "context": context,
            "conv_layout": True,
            "max_period": 10000,
            "gating": "none",
            "norm": "layer_norm",
            "positional_embedding": "rope",
            "dim_feedforward": 4 * dimension,
            "input_dimension": dimension,
            "output_dimensions": [dimension],
            **(transformer or {}),
        },
    }


CASES = {
    # The published shape in small; the ring of keys wraps after 10 of 30 frames.
    "published_shape": (
        config(
            rate=24000,
            frame_rate=12.5,
            ratios=[8, 6, 5, 4],
            filters=4,
            dimension=32,
            n_q=8,
            bins=64,
            context=20,
            layers=2,
        ),
        30,
    ),
    # Other rates and kernels, dilation, four latents a frame, a context shorter than two frames.
    "dilated": (
        config(
            rate=8000,
            frame_rate=25.0,
            ratios=[5, 4, 4],
            filters=6,
            dimension=40,
            n_q=5,
            bins=40,
            context=7,
            layers=1,
            seanet={"n_residual_layers": 2, "kernel_size": 5, "last_kernel_size": 5, "dilation_base": 3},
        ),
        60,
    ),
    # Weight norm as it is trained, no layer scale, another bottleneck, a context longer than the signal.
    "weight_norm": (
        config(
            rate=16000,
            frame_rate=50.0,
            ratios=[5, 4, 4],
            filters=6,
            dimension=32,
            n_q=3,
            bins=50,
            context=250,
            layers=1,
            seanet={"norm": "weight_norm", "compress": 3},
            transformer={"layer_scale": None},
        ),
        60,
    ),
}


def speech(samples: int, rate: int, seed: int) -> np.ndarray:
    """As 16-bit samples, so that the file is small and exact."""
    from tests.helpers.signal import speechlike

    return np.round(32767 * speechlike(samples, rate, seed)).astype(np.int16)


def main() -> None:
    torch.set_num_threads(1)
    for seed, (name, (settings, frames)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model = build(settings)
        samples = speech(frames * model.frame_size, model.sample_rate, seed)
        pcm = samples.astype(np.float32) / 32768
        make_realistic(model, pcm, seed)
        with torch.no_grad():
            whole = model.encode(torch.from_numpy(pcm)[None, None])[0].numpy().astype(np.int32)
            decoded_whole = model.decode(torch.from_numpy(whole)[None].long())[0, 0].numpy()
        stream, decoded_stream = encode_stream(model, pcm), decode_stream(model, whole)
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
        save_file(published_state(model), folder / "mimi.safetensors")
        golden = {
            "pcm": samples,
            "codes": whole,
            "codes_stream": stream,
            "decoded": decoded_whole,
            "decoded_stream": decoded_stream,
        }
        save_file({key: torch.from_numpy(value.copy()) for key, value in golden.items()}, folder / "golden.safetensors")
        wraps = settings["transformer"]["context"] / model.downsample.conv._stride
        same = (whole == stream).all(axis=0)
        gap = np.abs(decoded_stream - decoded_whole).reshape(frames, -1).max(axis=1)
        print(
            f"{name}: {frames} frames, ring full after {wraps:g}; codes used {[len(np.unique(row)) for row in whole]}; "
            f"stream differs from whole in frames {np.flatnonzero(~same).tolist()}; "
            f"decoded apart by {gap[: int(wraps)].max():.1e} before and {gap.max():.1e} in all; "
            f"level {decoded_whole.std():.3f}"
        )


if __name__ == "__main__":
    main()
