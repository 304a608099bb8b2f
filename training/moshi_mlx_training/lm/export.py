"""A trained language model as a published file: ``model.safetensors`` in MLX's layout, 8 bits by default.

python -m moshi_mlx_training.lm.export moshi_mlx/builtin/small runs/lm/train/lm.safetensors
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from moshi_mlx.checkpoint.layouts import from_internal
from moshi_mlx.checkpoint.readers import write_safetensors
from moshi_mlx.config import LmConfig
from moshi_mlx.models.lm import Lm
from moshi_mlx_training.lm.evaluate import load_weights
from moshi_mlx_training.lm.model import flat
from moshi_mlx_training.lm.train import read_model

GROUP = 64


def published_tensors(lm: Lm, config: LmConfig, bits: int | None = 8) -> dict[str, mx.array]:
    """The tensors of a published file; ``lm`` is quantized in place. ``bits`` None: bfloat16.

    Norms stay float32, scales are bfloat16, as in published files.
    """
    if bits:
        nn.quantize(lm, group_size=GROUP, bits=bits)
    tensors = {}
    for name, value in flat(lm.parameters()):
        norm = "norm" in name and name.endswith(".weight")
        tensors[name] = value if value.dtype == mx.uint32 or norm else value.astype(mx.bfloat16)
    return from_internal(tensors, "mlx", config)


def mix(lm: Lm, other: Lm, share: float) -> None:
    """Replace a model's weights by a mean in which those of ``other`` have this share.

    Between weights that were trained on and those they began with, the mean keeps most of what either knows
    (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022).
    """
    if not 0 <= share <= 1:
        raise SystemExit(f"--mean: the share must be from 0 to 1, found {share:g}")
    theirs = dict(flat(other.parameters()))
    mixed = [
        (name, (1 - share) * value.astype(mx.float32) + share * theirs[name].astype(mx.float32))
        for name, value in flat(lm.parameters())
    ]
    lm.update(tree_unflatten(mixed))
    mx.eval(lm.parameters())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moshi_mlx_training.lm.export", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder with config.json; the file goes there")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bits", type=int, default=8, choices=(0, 4, 8), help="0: bfloat16 (8)")
    parser.add_argument(
        "--mean", nargs=2, metavar=("FILE", "SHARE"), help="other weights that make up this share of the file's"
    )
    parser.add_argument("--to", type=Path, help="another file name")
    options = parser.parse_args(arguments)
    config, _ = read_model(options.model)
    lm = load_weights(options.checkpoint, config)
    if options.mean is not None:
        mix(lm, load_weights(Path(options.mean[0]), config), float(options.mean[1]))
    count = sum(int(value.size) for _, value in flat(lm.parameters()))
    path = options.to or options.model / "model.safetensors"
    write_safetensors(path, published_tensors(lm, config, options.bits or None))
    print(json.dumps({"file": str(path), "bytes": path.stat().st_size, "parameters": count}))


if __name__ == "__main__":
    main()
