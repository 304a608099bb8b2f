"""How far two waveforms are apart: mel and linear spectra at several resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_mlx_training.speech.synthesis import SAMPLE_RATE

RESOLUTIONS = ((256, 32), (512, 48), (1024, 80), (2048, 100))  # (window, mel bands); hop is a quarter window
REPORTED = 1024  # the resolution whose mel distance is logged and evaluated
FLOOR = 1e-3  # added to mel magnitudes under the logarithm: about the noise of 16 bits
TRAINING_FLOOR = 3e-2  # in the loss, 50 dB below loud speech: the gradient of near-silence otherwise drowns it


@cache
def mel_filters(window: int, bands: int) -> Tensor:
    """Triangles [bands, window // 2 + 1], equally spaced on the mel scale from 0 to 12 kHz, peak 1."""
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    bins = np.linspace(0, SAMPLE_RATE / 2, window // 2 + 1)
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return torch.tensor(np.maximum(0, np.minimum(rise, fall)), dtype=torch.float32)


@cache
def _window(size: int) -> Tensor:
    return torch.hann_window(size)


class _Magnitude(torch.autograd.Function):
    """|STFT| [batch, time, bins] of pcm [batch, samples], centred, Hann, hop of a quarter window.

    Written out because it is a third of the training step otherwise: no complex intermediate is kept or filled.
    """

    @staticmethod
    def forward(ctx: Any, pcm: Tensor, size: int) -> Tensor:
        half, hop = size // 2, size // 4
        frames = F.pad(pcm[:, None], (half, half), mode="reflect")[:, 0].unfold(-1, size, hop) * _window(size)
        spectrum = torch.fft.rfft(frames)
        magnitude = (
            spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag).sqrt_()
        )  # abs() takes six times as long
        ctx.save_for_backward(spectrum, magnitude)
        ctx.size, ctx.samples = size, pcm.shape[-1]
        return magnitude

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        spectrum, magnitude = ctx.saved_tensors
        size, samples = ctx.size, ctx.samples
        half, hop = size // 2, size // 4
        weighted = spectrum * (gradient / (magnitude + 1e-6))
        weighted[..., 1:-1] *= 0.5  # the inverse transform counts these bins twice
        frames = torch.fft.irfft(weighted, size) * (size * _window(size))
        batch, count, _ = frames.shape
        padded = frames.new_zeros(batch, max((count + 3) * hop, samples + size))
        blocks = padded[:, : (count + 3) * hop].view(batch, count + 3, hop)
        for part in range(4):
            blocks[:, part : part + count] += frames[:, :, part * hop : (part + 1) * hop]
        out = padded[:, half : half + samples].clone()
        out[:, 1 : half + 1] += padded[:, :half].flip(-1)  # what was reflected flows back
        out[:, -half - 1 : -1] += padded[:, half + samples : size + samples].flip(-1)
        return out, None


def magnitudes(pcm: Tensor, window: int, bands: int) -> tuple[Tensor, Tensor]:
    """(linear, mel) magnitudes [batch, time, bins or bands] of pcm [batch, samples]."""
    linear: Tensor = _Magnitude.apply(pcm, window)  # type: ignore[no-untyped-call]
    return linear, linear @ mel_filters(window, bands).T


def mel_distance(said: Tensor, meant: Tensor) -> Tensor:
    """Mean absolute difference of natural-log mel magnitudes, 80 bands, window 1024: the reported "mel L1"."""
    bands = dict(RESOLUTIONS)[REPORTED]
    logs = [(magnitudes(x, REPORTED, bands)[1] + FLOOR).log() for x in (said, meant)]
    return (logs[0] - logs[1]).abs().mean()


def spectral_loss(said: Tensor, meant: Tensor, which: Sequence[int] = (0, 1, 2, 3)) -> tuple[Tensor, Tensor | None]:
    """Training loss, and the mel distance if its resolution is among ``which``, of pcm [batch, samples].

    The mean over these resolutions of the log-mel distance and 0.3 of the spectral convergence (the norm of the
    difference over the norm of what was meant; Yamamoto et al., arXiv 1910.11480).
    """
    loss, reported = said.new_zeros(()), None
    for window, bands in (RESOLUTIONS[index] for index in which):
        linear, mel = magnitudes(said, window, bands)
        with torch.no_grad():
            linear_meant, mel_meant = magnitudes(meant, window, bands)
        distance = ((mel + TRAINING_FLOOR).log() - (mel_meant + TRAINING_FLOOR).log()).abs().mean()
        scale = linear_meant.square().mean().sqrt().clamp_min(0.1)
        loss = loss + distance + 0.3 * ((linear - linear_meant).square().mean() + 1e-8).sqrt() / scale
        if window == REPORTED:
            with torch.no_grad():
                reported = ((mel + FLOOR).log() - (mel_meant + FLOOR).log()).abs().mean()
    return loss / len(which), reported


def low_loss(said: Tensor, meant: Tensor, window: int = 768, top: float = 4000.0) -> Tensor:
    """How far spectra below ``top`` Hz are apart: where PESQ is lost (docs/findings.md).

    The squared difference of magnitudes to the power of 0.3, four times as heavy at the bottom as at the top, over the
    square of what was meant. pcm [batch, samples]; a number without a unit.
    """
    bins = slice(1, int(top / SAMPLE_RATE * window))
    frequency = torch.arange(bins.start, bins.stop) * (SAMPLE_RATE / window)
    weight = (1 + 3 / (1 + (frequency / 1000) ** 2))[:, None]
    both = torch.stft(
        torch.cat([said, meant]), window, window // 4, window=_window(window), return_complex=True
    )[:, bins]  # fmt: skip
    ours, theirs = (both.real.square() + both.imag.square() + 1e-4).pow(0.15).chunk(2)
    return ((ours - theirs).square() * weight).mean() / (theirs.square() * weight).mean().clamp_min(1e-3)
