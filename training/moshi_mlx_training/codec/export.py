"""A trained codec as published files: ``mimi.safetensors`` and ``mimi_config.json``.

python -m moshi_mlx_training.codec.export runs/codec/codec.pt moshi_mlx/builtin/small
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moshi_mlx_training.codec.mimi_torch import CausalConv, Codebook, Mimi


def published_tensors(model: Mimi, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The tensors of a published file: no phone head, codebooks as entries with a usage of one."""
    tensors = {name: value.detach() for name, value in model.state_dict().items() if not name.startswith("phone_head")}
    for name, module in model.named_modules():
        if isinstance(module, Codebook):
            # Only the quotient is read. As entries it survives 16 bits; as sums over rare entries it would not.
            tensors[f"{name}.embedding_sum"] = module.embedding
            tensors[f"{name}.cluster_usage"] = torch.ones_like(module.cluster_usage)
            tensors[f"{name}._initialized"] = torch.ones(1)
        elif isinstance(module, CausalConv) and module.gain != 1:
            for kind in ("weight", "bias"):
                tensors[f"{name}.conv.conv.{kind}"] = tensors[f"{name}.conv.conv.{kind}"] * module.gain
    return {name: value.to("cpu", dtype).contiguous().clone() for name, value in sorted(tensors.items())}


def export(model: Mimi, folder: Path, dtype: torch.dtype = torch.float16) -> tuple[Path, Path]:
    """Write both files; returns their paths (weights, config)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights, config = folder / "mimi.safetensors", folder / "mimi_config.json"
    save_file(published_tensors(model, dtype), weights, metadata={"format": "pt"})
    config.write_text(json.dumps(model.shape.config(), indent=2) + "\n")
    return weights, config


def from_published(weights: Path, usage: float) -> Mimi:
    """A model that goes on from a published file: what `export` wrote, each codebook entry used ``usage`` times a step.

    Raises KeyError naming a tensor that the file lacks. The phone head, which is not published, is new.
    """
    from safetensors.torch import load_file

    model, stored = Mimi(), load_file(weights)
    state = {name: stored[name].float() for name in model.state_dict() if not name.startswith("phone_head")}
    for name, module in model.named_modules():
        if isinstance(module, Codebook):
            entries = state[f"{name}.embedding_sum"] / state[f"{name}.cluster_usage"].clamp_min(1e-5)[:, None]
            state[f"{name}.embedding_sum"] = entries * usage
            state[f"{name}.cluster_usage"] = torch.full_like(state[f"{name}.cluster_usage"], usage)
            state[f"{name}._initialized"] = torch.ones(1)
        elif isinstance(module, CausalConv) and module.gain != 1:
            for kind in ("weight", "bias"):
                state[f"{name}.conv.conv.{kind}"] = state[f"{name}.conv.conv.{kind}"] / module.gain
    model.load_state_dict(state, strict=False)
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    from moshi_mlx_training.checkpoint import load_model

    parser = argparse.ArgumentParser(
        prog="python -m moshi_mlx_training.codec.export", description=__doc__.split("\n")[0]
    )
    parser.add_argument("checkpoint", type=Path, help="codec.pt or finetuned.pt")
    parser.add_argument("folder", type=Path, help="where the two files go")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    options = parser.parse_args(arguments)
    model = load_model(options.checkpoint)
    weights, _ = export(model, options.folder, getattr(torch, options.dtype))
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("phone_head"))
    print(json.dumps({"bytes": weights.stat().st_size, "parameters": count, "file": str(weights)}))


if __name__ == "__main__":
    main()
