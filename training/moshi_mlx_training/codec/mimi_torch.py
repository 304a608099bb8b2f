"""Mimi in PyTorch, for training: parameter names and shapes are those of the published files.

Causal SEANet encoder and decoder, a transformer on each side at 25 Hz, and a split residual quantizer: one semantic
codebook and the acoustic ones, both reading the same latent (Moshi, arXiv 2410.00037, section 3.3). Whole signals
only; the library's own Mimi streams. Weights are plain, without weight norm, so export is a copy.

The codebooks follow their data by exponential moving averages (van den Oord et al. 2017, appendix A), kept as
``embedding_sum`` and ``cluster_usage`` just as they are published. They start as k-means of latents that have already
learned something; started at once, they lag behind the growing latents and collapse onto a few entries. Entries that
nothing uses are moved onto data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moshi_mlx_training.speech.synthesis import PHONES

# Speech is quiet beside the decoder's activations. Weights small enough to say so would be rewritten by every step of
# Adam; the last convolution keeps ordinary ones and is turned down by this, which export multiplies in.
OUTPUT_GAIN = 0.02


@dataclass(frozen=True)
class MimiShape:
    """Sizes of a Mimi. The defaults are the built-in model's: 2.6 million parameters."""

    n_filters: int = 16
    ratios: tuple[int, ...] = (8, 6, 5, 4)
    dimension: int = 128
    num_layers: int = 2
    num_heads: int = 4
    dim_feedforward: int = 512
    context: int = 32
    n_q: int = 8
    bins: int = 512
    codebook_dimension: int = 64

    def config(self) -> dict[str, Any]:
        """The ``mimi_config`` of the published format."""
        return {
            "sample_rate": 24000,
            "channels": 1,
            "frame_rate": 12.5,
            "seanet": {
                "channels": 1,
                "dimension": self.dimension,
                "causal": True,
                "n_filters": self.n_filters,
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
                "ratios": list(self.ratios),
                "true_skip": True,
            },
            "quantizer": {
                "dimension": self.codebook_dimension,
                "n_q": self.n_q,
                "bins": self.bins,
                "input_dimension": self.dimension,
                "output_dimension": self.dimension,
            },
            "transformer": {
                "d_model": self.dimension,
                "num_heads": self.num_heads,
                "num_layers": self.num_layers,
                "causal": True,
                "layer_scale": 0.01,
                "context": self.context,
                "conv_layout": True,
                "max_period": 10000,
                "gating": "none",
                "norm": "layer_norm",
                "positional_embedding": "rope",
                "dim_feedforward": self.dim_feedforward,
                "input_dimension": self.dimension,
                "output_dimensions": [self.dimension],
            },
        }


class Holder(nn.Module):
    """A level of nesting in the published parameter names."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class _BlockProduct(torch.autograd.Function):
    """A causal convolution as one product: blocks of rows, each with the history it needs, times a banded matrix.

    x [batch, time, in], matrix [(history + block) * in, outputs * out], bias [out] -> [batch, time / stride, out].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None, block: int) -> Tensor:
        batch, time, size = x.shape
        blocks = x.reshape(batch, time // block, block * size)
        past = len(matrix) - block * size
        columns = x.new_empty(batch, time // block, len(matrix))
        columns[:, :, past:] = blocks
        columns[:, 0, :past] = 0
        columns[:, 1:, :past] = blocks[:, :-1, block * size - past :]
        columns = columns.flatten(0, 1)
        ctx.save_for_backward(columns, matrix)
        ctx.shape, ctx.block, ctx.out = x.shape, block, None if bias is None else len(bias)
        if bias is None:
            return (columns @ matrix).view(batch, -1, matrix.shape[1])
        out = torch.addmm(bias.repeat(matrix.shape[1] // len(bias)), columns, matrix)
        return out.view(batch, -1, len(bias))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        columns, matrix = ctx.saved_tensors
        (batch, time, size), block = ctx.shape, ctx.block
        past = len(matrix) - block * size
        flat = gradient.reshape(len(columns), matrix.shape[1])
        back = None
        if ctx.needs_input_grad[0]:
            spread = (flat @ matrix.T).view(batch, time // block, len(matrix))
            back = spread[:, :, past:].contiguous()
            back[:, :-1, block * size - past :] += spread[:, 1:, :past]
            back = back.view(batch, time, size)
        bias = None if ctx.out is None else flat.sum(0).view(-1, ctx.out).sum(0)
        return back, columns.T @ flat, bias, None


class _OverlapProduct(torch.autograd.Function):
    """A transposed convolution whose kernel is two strides: one product, halves of neighbours added.

    x [batch, time, in], matrix [in, 2 * stride * out], bias [out] -> [batch, time * stride, out].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        batch, time, size = x.shape
        ctx.save_for_backward(x, matrix)
        ctx.out = len(bias)
        half = matrix.shape[1] // 2
        tiled = torch.cat([bias.repeat(half // len(bias)), bias.new_zeros(half)])
        parts = torch.addmm(tiled, x.reshape(-1, size), matrix).view(batch, time, 2, half)
        out = parts[:, :, 0].contiguous()
        out[:, 1:] += parts[:, :-1, 1]
        return out.view(batch, -1, len(bias))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x, matrix = ctx.saved_tensors
        batch, time, size = x.shape
        half = matrix.shape[1] // 2
        rows = gradient.reshape(batch, time, half)
        parts = gradient.new_empty(batch, time, 2, half)
        parts[:, :, 0] = rows
        parts[:, :-1, 1] = rows[:, 1:]
        parts[:, -1, 1] = 0
        flat = parts.view(-1, 2 * half)
        bias = rows.reshape(-1, half).sum(0).view(-1, ctx.out).sum(0)
        return (flat @ matrix.T).view(batch, time, size), x.reshape(-1, size).T @ flat, bias


class _Elu(torch.autograd.Function):
    """ELU whose gradient is taken from its result, which spares the second exponential."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = F.elu(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (out,) = ctx.saved_tensors
        result: Tensor = torch.ops.aten.elu_backward(gradient, 1.0, 1.0, 1.0, True, out)
        return result


class Elu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Elu.apply(x)  # type: ignore[no-untyped-call]
        return out


def compute_type(x: Tensor) -> torch.dtype:
    """bfloat16 under autocast, else the tensor's own type."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class CausalConv(nn.Module):
    """Left-padded convolution: [batch, time, in] -> [batch, time / stride, out].

    Products of whole blocks of time, for two reasons. They need no change of layout, which is half the time of
    oneDNN's convolutions with so few channels; and oneDNN's bfloat16 convolution of 16 channels, kernel 8, stride 4
    was found to return noise, as was the gradient of the transposed one (torch 2.13 on a CPU with AMX).
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        stride: int = 1,
        bias: bool = True,
        mode: str = "constant",
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.gain = gain
        self.conv = Holder(conv=nn.Conv1d(channels_in, channels_out, kernel, stride, bias=bias))
        self.padding, self.mode = kernel - stride, mode

    def block(self, time: int) -> int:
        """Rows of a block: enough for the history, and for a product of some 64 columns."""
        layer: nn.Conv1d = self.conv.conv  # type: ignore[assignment]
        stride = layer.stride[0]
        block = stride
        while block < self.padding or (block * layer.in_channels < 64 and block < 8):
            block += stride
        while time % block:
            block += stride
        return block

    def forward(self, x: Tensor) -> Tensor:
        layer: nn.Conv1d = self.conv.conv  # type: ignore[assignment]
        kernel, stride = layer.kernel_size[0], layer.stride[0]
        kind = compute_type(x)
        x, weight = x.to(kind), layer.weight * self.gain
        bias = None if layer.bias is None else (layer.bias * self.gain).to(kind)
        if self.mode == "replicate" or (stride == 1 and layer.in_channels >= 128):  # at 25 Hz: little of everything
            if self.padding:
                past = x[:, :1].expand(-1, self.padding, -1)
                x = torch.cat([past if self.mode == "replicate" else torch.zeros_like(past), x], 1)
            columns = x.unfold(1, kernel, stride).flatten(2)  # [batch, time, in * kernel]
            return F.linear(columns, weight.flatten(1), bias)
        block = self.block(x.shape[1])
        taps = weight.permute(2, 1, 0)  # [kernel, in, out]
        rows = self.padding + block
        bands = [F.pad(taps, (0, 0, 0, 0, at, rows - kernel - at)) for at in range(0, block, stride)]
        matrix = torch.stack(bands, 2).reshape(rows * layer.in_channels, -1).to(kind)
        out: Tensor = _BlockProduct.apply(x, matrix, bias, block)  # type: ignore[no-untyped-call]
        return out.view(len(x), -1, layer.out_channels)


class CausalConvTranspose(nn.Module):
    """Transposed convolution, kernel of two strides, no overhang: [batch, time, in] -> [batch, time * stride, out]."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.convtr = Holder(
            convtr=nn.ConvTranspose1d(channels_in, channels_out, kernel, stride, groups=groups, bias=bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        layer: nn.ConvTranspose1d = self.convtr.convtr  # type: ignore[assignment]
        stride, kind = layer.stride[0], compute_type(x)
        x, weight = x.to(kind), layer.weight.to(kind)
        if layer.groups > 1:  # depthwise: every channel has its own two halves
            first, second = weight[:, 0].T.unflatten(0, (2, stride))  # [stride, channels] each
            past = F.pad(x[:, :-1], (0, 0, 1, 0))
            return (x[:, :, None] * first + past[:, :, None] * second).flatten(1, 2)
        assert layer.bias is not None
        matrix = weight.unflatten(2, (2, stride)).permute(0, 2, 3, 1).flatten(1)
        out: Tensor = _OverlapProduct.apply(x, matrix, layer.bias.to(kind))  # type: ignore[no-untyped-call]
        return out


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 2
        self.block = nn.Sequential(Elu(), CausalConv(channels, hidden, 3), Elu(), CausalConv(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.block(x)
        return out


def seanet_encoder(shape: MimiShape) -> nn.Module:
    channels = shape.n_filters
    layers: list[nn.Module] = [CausalConv(1, channels, 7)]
    for ratio in reversed(shape.ratios):
        layers += [ResidualBlock(channels), Elu(), CausalConv(channels, 2 * channels, 2 * ratio, ratio)]
        channels *= 2
    layers += [Elu(), CausalConv(channels, shape.dimension, 3)]
    return Holder(model=nn.Sequential(*layers))


def seanet_decoder(shape: MimiShape) -> nn.Module:
    channels = shape.n_filters << len(shape.ratios)
    layers: list[nn.Module] = [CausalConv(shape.dimension, channels, 7)]
    for ratio in shape.ratios:
        layers += [
            Elu(),
            CausalConvTranspose(channels, channels // 2, 2 * ratio, ratio),
            ResidualBlock(channels // 2),
        ]
        channels //= 2
    layers += [Elu(), CausalConv(channels, 1, 3, gain=OUTPUT_GAIN)]
    return Holder(model=nn.Sequential(*layers))


def rope(x: Tensor) -> Tensor:
    """Rotary positions over interleaved pairs, base 10000: x [batch, heads, time, size]."""
    time, size = x.shape[-2:]
    frequency = torch.exp(torch.arange(0, size, 2, device=x.device) * (-math.log(10000.0) / size))
    angle = torch.arange(time, device=x.device)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


class Scale(nn.Module):
    """LayerScale."""

    def __init__(self, size: int, initial: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((size,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Attention(nn.Module):
    """Causal attention over the last ``context`` positions, itself included."""

    def __init__(self, size: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads, self.context = heads, context
        self.in_proj_weight = nn.Parameter(torch.empty(3 * size, size))
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, size = x.shape
        projected = F.linear(x, self.in_proj_weight).view(batch, time, 3, self.heads, size // self.heads)
        q, k, v = projected.permute(2, 0, 3, 1, 4)
        delta = torch.arange(time, device=x.device)[:, None] - torch.arange(time, device=x.device)
        mask = (delta >= 0) & (delta < self.context)
        attended = F.scaled_dot_product_attention(rope(q), rope(k), v, attn_mask=mask)
        out: Tensor = self.out_proj(attended.transpose(1, 2).reshape(batch, time, size))
        return out


class Layer(nn.Module):
    """Pre-norm transformer layer with LayerScale and exact GELU."""

    def __init__(self, shape: MimiShape) -> None:
        super().__init__()
        size = shape.dimension
        self.norm1, self.norm2 = nn.LayerNorm(size, eps=1e-5), nn.LayerNorm(size, eps=1e-5)
        self.self_attn = Attention(size, shape.num_heads, shape.context)
        self.linear1 = nn.Linear(size, shape.dim_feedforward, bias=False)
        self.linear2 = nn.Linear(shape.dim_feedforward, size, bias=False)
        # Two layers need no damping against depth: a tenth learns faster than the published model's hundredth.
        self.layer_scale_1, self.layer_scale_2 = Scale(size, 0.1), Scale(size, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1(self.self_attn(self.norm1(x)))
        return x + self.layer_scale_2(self.linear2(F.gelu(self.linear1(self.norm2(x)))))


class Transformer(nn.Module):
    """[batch, time, dimension] -> the same."""

    def __init__(self, shape: MimiShape) -> None:
        super().__init__()
        self.transformer = Holder(layers=nn.ModuleList(Layer(shape) for _ in range(shape.num_layers)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.transformer.layers:  # type: ignore[union-attr]
            x = layer(x)
        return x


class Codebook(nn.Module):
    """Euclidean codebook that follows its data."""

    embedding_sum: Tensor
    cluster_usage: Tensor
    _initialized: Tensor

    def __init__(self, bins: int, size: int) -> None:
        super().__init__()
        self.register_buffer("_initialized", torch.zeros(1))
        self.register_buffer("cluster_usage", torch.ones(bins))
        self.register_buffer("embedding_sum", torch.randn(bins, size) * 0.01)

    @property
    def embedding(self) -> Tensor:
        """[bins, size]"""
        return self.embedding_sum / self.cluster_usage.clamp_min(1e-5)[:, None]

    def nearest(self, x: Tensor) -> Tensor:
        """Indices [points] of x [points, size]."""
        embedding = self.embedding
        return ((embedding**2).sum(-1) / 2 - x @ embedding.T).argmin(-1)

    @torch.no_grad()
    def follow(self, x: Tensor, index: Tensor, decay: float = 0.99, dead: float = 0.15) -> None:
        """Move towards the points x [points, size] that chose ``index`` [points]."""
        bins, points = len(self.cluster_usage), len(x)
        counts = torch.zeros_like(self.cluster_usage).index_add_(0, index, torch.ones_like(x[:, 0]))
        sums = torch.zeros_like(self.embedding_sum).index_add_(0, index, x)
        self.cluster_usage.lerp_(counts, 1 - decay)
        self.embedding_sum.lerp_(sums, 1 - decay)
        unused = self.cluster_usage < dead * points / bins
        if unused.any():
            self.place(x, unused, points / bins)

    @torch.no_grad()
    def place(self, x: Tensor, where: Tensor, usage: float) -> None:
        """Put the entries ``where`` [bins] on random points of x."""
        chosen = x[torch.randint(0, len(x), (int(where.sum()),), device=x.device)]
        self.embedding_sum[where] = (chosen + 1e-3 * torch.randn_like(chosen)) * usage
        self.cluster_usage[where] = usage

    @torch.no_grad()
    def fit(self, x: Tensor, usage: float, rounds: int = 8) -> None:
        """k-means on points x [points, size], of which each entry will see ``usage`` a step."""
        bins = len(self.cluster_usage)
        first = torch.randperm(len(x))[:bins] if len(x) >= bins else torch.randint(0, len(x), (bins,))
        entries = x[first.to(x.device)].clone()
        for _ in range(rounds):
            index = ((entries**2).sum(-1) / 2 - x @ entries.T).argmin(-1)
            counts = torch.zeros(len(entries), device=x.device).index_add_(0, index, torch.ones_like(x[:, 0]))
            sums = torch.zeros_like(entries).index_add_(0, index, x)
            entries = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], entries)
        self.cluster_usage.fill_(usage)
        self.embedding_sum.copy_(entries * usage)
        self._initialized.fill_(1)


class ResidualQuantizer(nn.Module):
    """Projection, codebooks on what the earlier ones left, projection back."""

    def __init__(self, shape: MimiShape, n_q: int) -> None:
        super().__init__()
        self.input_proj = nn.Conv1d(shape.dimension, shape.codebook_dimension, 1, bias=False)
        self.output_proj = nn.Conv1d(shape.codebook_dimension, shape.dimension, 1, bias=False)
        self.vq = Holder(
            layers=nn.ModuleList(Holder(_codebook=Codebook(shape.bins, shape.codebook_dimension)) for _ in range(n_q))
        )

    @property
    def books(self) -> list[Codebook]:
        return [layer._codebook for layer in self.vq.layers]  # type: ignore[union-attr]

    def project(self, z: Tensor) -> Tensor:
        """Latent [batch, frames, dimension] -> points [batch * frames, size], float32."""
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(z.float().flatten(0, 1), self.input_proj.weight[:, :, 0])

    def back(self, points: Tensor, batch: int) -> Tensor:
        """Points -> latent [batch, frames, dimension]."""
        with torch.autocast(points.device.type, enabled=False):
            return F.linear(points, self.output_proj.weight[:, :, 0]).unflatten(0, (batch, -1))

    def quantize(self, points: Tensor, books: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the chosen entries (no gradient), indices [points, books], commitment loss; learns when training."""
        rest, total, indices = points, torch.zeros_like(points), []
        commitment = points.new_zeros(())
        for book in self.books[:books]:
            index = book.nearest(rest.detach())
            chosen = book.embedding[index]
            if self.training:
                commitment = commitment + F.mse_loss(rest, chosen)
                book.follow(rest.detach(), index)
            indices.append(index)
            total, rest = total + chosen, rest - chosen
        return total, torch.stack(indices, -1), commitment

    @torch.no_grad()
    def fit(self, points: Tensor, usage: float) -> None:
        """k-means for one codebook after the other."""
        for book in self.books:
            book.fit(points, usage)
            points = points - book.embedding[book.nearest(points)]

    def decode(self, indices: Tensor) -> Tensor:
        """indices [points, books] -> points."""
        return torch.stack(
            [book.embedding[indices[:, i]] for i, book in enumerate(self.books[: indices.shape[1]])]
        ).sum(0)


class Mimi(nn.Module):
    """The codec. ``phone_head`` reads phones off the semantic codebook in training and is not exported."""

    def __init__(self, shape: MimiShape | None = None) -> None:
        super().__init__()
        self.shape = shape = shape or MimiShape()
        size = shape.dimension
        self.encoder, self.decoder = seanet_encoder(shape), seanet_decoder(shape)
        self.encoder_transformer, self.decoder_transformer = Transformer(shape), Transformer(shape)
        self.downsample = Holder(conv=CausalConv(size, size, 4, 2, bias=False, mode="replicate"))
        self.upsample = Holder(convtr=CausalConvTranspose(size, size, 4, 2, groups=size, bias=False))
        self.quantizer = Holder(rvq_first=ResidualQuantizer(shape, 1), rvq_rest=ResidualQuantizer(shape, shape.n_q - 1))
        self.phone_head = nn.Linear(shape.codebook_dimension, 2 * len(PHONES))
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Weights that keep a signal's variance through the ELUs; speech comes in at about -24 dB, and leaves so.

        PyTorch's defaults shrink it a hundredfold on the way, and the first thousand steps go into growing it back.
        """
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose1d):
                taps = module.kernel_size[0] // module.stride[0]
                module.weight.normal_(0, 1.2 / math.sqrt(taps * module.in_channels / module.groups))
            elif isinstance(module, nn.Conv1d):
                module.weight.normal_(0, 1.2 / math.sqrt(module.in_channels * module.kernel_size[0]))
            if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)) and module.bias is not None:
                # Not zero: silence would reach the first LayerNorm as exact zeros, whose gradient is immense.
                module.bias.uniform_(-0.1, 0.1)
            if isinstance(module, ResidualBlock):
                module.block[3].conv.conv.weight.mul_(0.4)  # type: ignore[union-attr, operator]
        self.encoder.model[0].conv.conv.weight.mul_(8)  # type: ignore[union-attr, index, operator]
        self.decoder.model[-1].conv.conv.weight.mul_(0.5)  # type: ignore[union-attr, index, operator]

    @property
    def first(self) -> ResidualQuantizer:
        return self.quantizer.rvq_first  # type: ignore[return-value]

    @property
    def rest(self) -> ResidualQuantizer:
        return self.quantizer.rvq_rest  # type: ignore[return-value]

    def latent(self, pcm: Tensor) -> Tensor:
        """pcm [batch, 1, frames * 1920] -> [batch, frames, dimension]."""
        z: Tensor = self.downsample.conv(self.encoder_transformer(self.encoder.model(pcm.transpose(1, 2))))
        return z

    def synthesize(self, z: Tensor) -> Tensor:
        """[batch, frames, dimension] -> pcm [batch, 1, frames * 1920]."""
        pcm: Tensor = self.decoder.model(self.decoder_transformer(self.upsample.convtr(z)))
        return pcm.transpose(1, 2)

    def phones(self, semantic: Tensor, batch: int) -> Tensor:
        """Semantic points -> logits [batch, frames, 2, phones]."""
        logits: Tensor = self.phone_head(semantic)
        return logits.view(batch, -1, 2, len(PHONES))

    def forward(self, pcm: Tensor, books: int | None = None, bypass: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Training pass with straight-through gradients.

        Parameters
        ----------
        pcm : [batch, 1, frames * 1920]
        books : how many codebooks, the semantic one included; None is all
        bypass : quantize nothing (the first steps, before there is anything to quantize)

        Returns
        -------
        pcm, commitment loss, phone logits [batch, frames, 2, phones]
        """
        batch = len(pcm)
        z = self.latent(pcm)
        semantic, acoustic = self.first.project(z), self.rest.project(z)
        if bypass:  # nothing but a leash on the scale of what will be quantized
            size = (semantic.square().mean() - 1).square() + (acoustic.square().mean() - 1).square()
            mixed = self.first.back(semantic, batch) + self.rest.back(acoustic, batch)
            return self.synthesize(mixed), size, self.phones(semantic, batch)
        chosen, _, commitment = self.first.quantize(semantic)
        semantic = semantic + (chosen - semantic).detach()
        mixed = self.first.back(semantic, batch)
        if books is None or books > 1:
            chosen, _, more = self.rest.quantize(acoustic, None if books is None else books - 1)
            commitment = commitment + more
            mixed = mixed + self.rest.back(acoustic + (chosen - acoustic).detach(), batch)
        return self.synthesize(mixed), commitment, self.phones(semantic, batch)

    @torch.no_grad()
    def round_to_half(self) -> None:
        """Give every weight a value that 16 bits hold, so that the exported file hears exactly the same codes."""
        for parameter in self.parameters():
            parameter.copy_(parameter.half().float())
        for book in (*self.first.books, *self.rest.books):
            book.embedding_sum.copy_(book.embedding.half().float())
            book.cluster_usage.fill_(1)

    @torch.no_grad()
    def encode(self, pcm: Tensor) -> Tensor:
        """pcm [batch, 1, frames * 1920] -> codes [batch, books, frames]."""
        z = self.latent(pcm)
        indices = [rvq.quantize(rvq.project(z))[1] for rvq in (self.first, self.rest)]
        return torch.cat(indices, -1).unflatten(0, (len(pcm), -1)).transpose(1, 2)

    def latent_of(self, codes: Tensor) -> Tensor:
        """codes [batch, books, frames] -> what the decoder reads, [batch, frames, dimension]."""
        indices = codes.transpose(1, 2).flatten(0, 1)
        z = self.first.back(self.first.decode(indices[:, :1]), len(codes))
        return z + self.rest.back(self.rest.decode(indices[:, 1:]), len(codes))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes [batch, books, frames] -> pcm [batch, 1, frames * 1920]."""
        return self.synthesize(self.latent_of(codes))
