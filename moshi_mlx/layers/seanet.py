"""SEANet (Tagliasacchi et al. 2020), as EnCodec and Mimi use it: waveform <-> latent, causal, channels last.

The encoder halves nothing but time: each stage is residual blocks, then a strided convolution that doubles the
channels. The decoder mirrors it.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ..state import State
from .conv import CausalConv, CausalConvTranspose, elu

__all__ = ["ResidualBlock", "SEANetDecoder", "SEANetEncoder"]


class ResidualBlock(nn.Module):
    """``x + conv1(elu(conv_k(elu(x))))`` with fewer channels in between."""

    def __init__(self, channels: int, hidden: int, kernel_size: int, dilation: int):
        super().__init__()
        self.narrow = CausalConv(channels, hidden, kernel_size, dilation=dilation)
        self.widen = CausalConv(hidden, channels, 1)

    def init_state(self, batch: int) -> State:
        return {"narrow": self.narrow.init_state(batch)}

    def __call__(self, x: mx.array) -> mx.array:
        return self.step(x, self.init_state(x.shape[0]))

    def step(self, x: mx.array, state: State) -> mx.array:
        return x + self.widen.step(elu(self.narrow.step(elu(x), state["narrow"])), {})


class _Stage(nn.Module):
    """Residual blocks and one change of rate: after them in the encoder, before them in the decoder."""

    def __init__(self, resample: nn.Module, residuals: Sequence[ResidualBlock], resample_first: bool):
        super().__init__()
        self.resample = resample
        self.residuals = list(residuals)
        self.resample_first = resample_first

    def init_state(self, batch: int) -> State:
        state: State = {str(index): block.init_state(batch) for index, block in enumerate(self.residuals)}
        return {**state, "resample": self.resample.init_state(batch)}

    def step(self, x: mx.array, state: State) -> mx.array:
        if self.resample_first:
            x = self.resample.step(elu(x), state["resample"])
        for index, block in enumerate(self.residuals):
            x = block.step(x, state[str(index)])
        return x if self.resample_first else self.resample.step(elu(x), state["resample"])


class _SEANet(nn.Module):
    first: CausalConv
    stages: list[_Stage]
    last: CausalConv

    def init_state(self, batch: int) -> State:
        state: State = {"first": self.first.init_state(batch)}
        for index, stage in enumerate(self.stages):
            state[str(index)] = stage.init_state(batch)
        return {**state, "last": self.last.init_state(batch)}

    def __call__(self, x: mx.array) -> mx.array:
        return self.step(x, self.init_state(x.shape[0]))

    def step(self, x: mx.array, state: State) -> mx.array:
        x = self.first.step(x, state["first"])
        for index, stage in enumerate(self.stages):
            x = stage.step(x, state[str(index)])
        return self.last.step(elu(x), state["last"])


class SEANetEncoder(_SEANet):
    """Waveform [batch, samples, audio_channels] to latent [batch, samples / prod(ratios), dimension].

    Parameters
    ----------
    ratios : sequence of int
        Changes of rate in the decoder's order; the encoder goes through them backwards.
    n_filters : int
        Channels at the rate of the waveform; they double at each stage.
    n_residual_layers, residual_kernel_size, dilation_base, compress : int
        Residual blocks per stage, their kernel, the base of their growing dilation, and their bottleneck.
    """

    def __init__(
        self,
        *,
        channels: int,
        dimension: int,
        n_filters: int,
        ratios: Sequence[int],
        n_residual_layers: int,
        kernel_size: int,
        residual_kernel_size: int,
        last_kernel_size: int,
        dilation_base: int,
        compress: int,
    ):
        super().__init__()
        width = n_filters
        self.first = CausalConv(channels, width, kernel_size)
        self.stages = []
        for ratio in reversed(ratios):
            residuals = [
                ResidualBlock(width, width // compress, residual_kernel_size, dilation_base**index)
                for index in range(n_residual_layers)
            ]
            resample = CausalConv(width, 2 * width, 2 * ratio, stride=ratio)
            self.stages.append(_Stage(resample, residuals, resample_first=False))
            width *= 2
        self.last = CausalConv(width, dimension, last_kernel_size)


class SEANetDecoder(_SEANet):
    """Latent [batch, time, dimension] to waveform [batch, time * prod(ratios), audio_channels].

    The parameters are those of :class:`SEANetEncoder`.
    """

    def __init__(
        self,
        *,
        channels: int,
        dimension: int,
        n_filters: int,
        ratios: Sequence[int],
        n_residual_layers: int,
        kernel_size: int,
        residual_kernel_size: int,
        last_kernel_size: int,
        dilation_base: int,
        compress: int,
    ):
        super().__init__()
        width = n_filters * 2 ** len(ratios)
        self.first = CausalConv(dimension, width, kernel_size)
        self.stages = []
        for ratio in ratios:
            resample = CausalConvTranspose(width, width // 2, 2 * ratio, stride=ratio)
            width //= 2
            residuals = [
                ResidualBlock(width, width // compress, residual_kernel_size, dilation_base**index)
                for index in range(n_residual_layers)
            ]
            self.stages.append(_Stage(resample, residuals, resample_first=True))
        self.last = CausalConv(width, channels, last_kernel_size)
