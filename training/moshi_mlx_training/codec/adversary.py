"""A discriminator of spectrograms, trained to tell the decoder's sound from the original: the cure for buzz.

Complex spectra at two resolutions through small two-dimensional convolutions, hinge losses and feature matching, as in
EnCodec (Défossez et al., arXiv 2210.13438), a good deal smaller.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOWS = (512, 1024)


class SpectrogramJudge(nn.Module):
    """pcm [batch, samples] -> logits [batch, 1, bands, time] and the layers' outputs, at one resolution."""

    def __init__(self, window: int, channels: int = 12) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("taper", torch.hann_window(window), persistent=False)
        self.layers = nn.ModuleList(
            nn.Conv2d(inside, channels, (9, 3), (2, 1), padding=(4, 1)) for inside in (2, channels, channels)
        )
        self.layers.append(nn.Conv2d(channels, channels, 3, padding=1))
        self.last = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, pcm: Tensor) -> tuple[Tensor, list[Tensor]]:
        spectrum = torch.stft(pcm, self.window, self.window // 4, window=self.taper, return_complex=True)
        pairs = torch.view_as_real(spectrum).permute(0, 3, 1, 2)
        size = pairs.square().sum(1, keepdim=True).add(1e-5).sqrt()
        x, outputs = pairs * size**-0.6, []  # loudness compressed, so that quiet sounds are judged too
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            outputs.append(x)
        return self.last(x), outputs


class Discriminator(nn.Module):
    """All resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.judges = nn.ModuleList(SpectrogramJudge(window) for window in WINDOWS)

    def forward(self, pcm: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        return [one(pcm) for one in self.judges]


def losses_of(discriminator: Discriminator, said: Tensor, meant: Tensor) -> tuple[Tensor, Tensor]:
    """(what the decoder should lower, what the discriminator should lower) for pcm [batch, samples].

    The first is differentiated with respect to ``said``, the second to the discriminator's parameters.
    """
    real, fake = discriminator(meant), discriminator(said)
    decoder, own = said.new_zeros(()), said.new_zeros(())
    for (real_logits, real_layers), (fake_logits, fake_layers) in zip(real, fake, strict=True):
        own = own + F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
        matching = sum(
            ((ours - theirs.detach()).abs().mean() / theirs.detach().abs().mean().clamp_min(1e-3))
            for ours, theirs in zip(fake_layers, real_layers, strict=True)
        )
        decoder = decoder - fake_logits.mean() + 2 * matching / len(fake_layers)
    return decoder / len(real), own / len(real)
