"""Mimi in PyTorch with random weights that behave like trained ones. Needs torch and the package `moshi` 0.2.13.

Freshly initialized, Mimi's activations fade to nothing and all frames get the same code. Here each convolution gets
the gain that gives its output a deviation of one on a given signal, and codebooks are drawn with the covariance of the
residuals that they will have to quantize. So codes are as diverse as those of a trained codec, and each codebook takes
away a part of the residual, as there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from moshi.models import loaders
from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)


def build(config: dict[str, Any] | None = None) -> Any:
    """A fresh Mimi of a configuration; None: the published one."""
    config = config or loaders._mimi_config
    return loaders.get_mimi(None, config, num_codebooks=config["quantizer"]["n_q"]).eval()


def load(path: str, config: dict[str, Any] | None = None, num_codebooks: int | None = None) -> Any:
    """Mimi from a file, as the reference reads it."""
    config = config or loaders._mimi_config
    return loaders.get_mimi(path, config, num_codebooks=num_codebooks or config["quantizer"]["n_q"]).eval()


@torch.no_grad()
def make_realistic(model: Any, pcm: np.ndarray, seed: int, layer_scale: float = 0.3) -> None:
    """Set the weights of ``model`` in place, after ``pcm`` [samples], whole frames of a speech-like signal."""
    torch.manual_seed(seed)
    x = torch.from_numpy(pcm)[None, None]
    latent = _set_gains(model.encoder, x)
    for transformer in (model.encoder_transformer, model.decoder_transformer):
        for layer in transformer.transformer.layers:
            for norm in (layer.norm1, layer.norm2):
                norm.weight.add_(0.1 * torch.randn_like(norm.weight))
                norm.bias.add_(0.1 * torch.randn_like(norm.bias))
            for name in ("layer_scale_1", "layer_scale_2"):
                if hasattr(getattr(layer, name), "scale"):
                    getattr(layer, name).scale.fill_(layer_scale)
    (latent,) = model.encoder_transformer(latent)
    latent = _set_gains(model.downsample, latent)
    for group in (model.quantizer.rvq_first, model.quantizer.rvq_rest):
        _fill_codebooks(group, latent)
    latent = _set_gains(model.upsample, model.decode_latent(model.encode(x)))
    (latent,) = model.decoder_transformer(latent)
    _set_gains(model.decoder, latent)
    last = [module for module in model.decoder.modules() if isinstance(module, nn.Conv1d)][-1]
    for parameter in last.parameters():
        parameter.mul_(0.1)  # the loudness of speech


def _set_gains(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run ``module`` once; each convolution is rescaled as the signal comes through it."""

    def rescale(conv: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if conv.bias is not None:
            conv.bias.normal_(0, 0.1)
        # Under weight norm the gain is a parameter of its own.
        (conv.weight_g if hasattr(conv, "weight_g") else conv.weight).div_(output.std())
        if hasattr(conv, "weight_g"):
            conv.weight = torch._weight_norm(conv.weight_v, conv.weight_g, 0)
        return conv.forward(*inputs)

    hooks = [part.register_forward_hook(rescale) for part in module.modules() if isinstance(part, CONVOLUTIONS)]
    out: torch.Tensor = module(x)
    for hook in hooks:
        hook.remove()
    return out


def _fill_codebooks(group: Any, latent: torch.Tensor) -> None:
    """Entries are random mixtures of the residuals of the signal, nearer to their mean than they."""
    group.output_proj.weight.normal_(0, group.dimension**-0.5)
    group.input_proj.weight.normal_(0, latent.shape[1] ** -0.5)
    residual = group.input_proj(latent).transpose(1, 2).flatten(0, 1)
    for layer in group.vq.layers:
        book = layer._codebook
        mean = residual.mean(0)
        entries = mean + 0.4 * torch.randn(book.codebook_size, len(residual)) @ (residual - mean) / len(residual) ** 0.5
        usage = 0.5 + 3 * torch.rand(len(entries))
        book.cluster_usage.copy_(usage)
        book.embedding_sum.copy_(entries * usage[:, None])
        book._initialized.fill_(1)
        book.register_buffer("_embedding", None, persistent=False)
        book._cached_initialized = True
        residual = residual - book.embedding[torch.cdist(residual, book.embedding).argmin(-1)]


def published_state(model: Any) -> dict[str, torch.Tensor]:
    """The tensors by their names in the published file."""
    state = {}
    for name, tensor in model.state_dict().items():
        for part in ("in", "out"):
            new = "in_proj_weight" if part == "in" else "out_proj.weight"
            name = name.replace(f"self_attn.{part}_projs.0.weight", f"self_attn.{new}")
        state[name] = tensor.contiguous().clone()
    return state


@torch.no_grad()
def encode_stream(model: Any, pcm: np.ndarray) -> np.ndarray:
    """Codes [codebooks, frames] of ``pcm`` [samples], a frame at a time."""
    size = model.frame_size
    frames = torch.from_numpy(pcm).reshape(-1, 1, 1, size)
    with model.streaming(1):
        return torch.cat([model.encode(frame) for frame in frames], -1)[0].numpy().astype(np.int32)


@torch.no_grad()
def decode_stream(model: Any, codes: np.ndarray) -> np.ndarray:
    """Samples of ``codes`` [codebooks, frames], a frame at a time."""
    columns = torch.from_numpy(codes.astype(np.int64))[None].split(1, dim=-1)
    with model.streaming(1):
        return torch.cat([model.decode(column) for column in columns], -1)[0, 0].numpy()
