"""Split residual vector quantization, at inference: latent <-> codes.

Each codebook quantizes what the ones before it left over (Zeghidour et al. 2021, SoundStream). Mimi splits them into
two groups, a semantic and an acoustic one, which both read the same latent through projections of their own.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

__all__ = ["Codebook", "ResidualQuantizer", "SplitResidualQuantizer"]


class Codebook(nn.Module):
    """Nearest of ``bins`` vectors.

    Attributes
    ----------
    embedding : mx.array [bins, dim]
    """

    def __init__(self, bins: int, dim: int):
        super().__init__()
        self.embedding = mx.random.normal((bins, dim))
        self._measured: tuple[mx.array, mx.array] | None = None

    def half_norms(self) -> mx.array:
        """``|e|^2 / 2`` of each entry, [bins]; computed once per embedding and at once: any thread may read it."""
        embedding = self.embedding
        if self._measured is None or self._measured[0] is not embedding:
            norms = 0.5 * mx.sum(mx.square(embedding), axis=-1)
            mx.eval(norms)
            self._measured = (embedding, norms)
        return self._measured[1]

    def encode(self, x: mx.array) -> mx.array:
        """Index of the entry nearest to each vector of ``x`` [..., dim]; the lowest of equals. int32 [...]."""
        # |x - e|^2 / 2 = |x|^2 / 2 - (x.e - |e|^2 / 2), and the first term is the same for every entry.
        return mx.argmax(x @ self.embedding.T - self.half_norms(), axis=-1).astype(mx.int32)

    def decode(self, codes: mx.array) -> mx.array:
        """Entries [..., dim] of ``codes`` [...]."""
        return self.embedding[codes]


class ResidualQuantizer(nn.Module):
    """A chain of codebooks between two projections.

    Parameters
    ----------
    input_dim, dim, output_dim : int
        Widths of the latent, of the codebooks, and of what is decoded.
    num_codebooks, bins : int
    """

    def __init__(self, input_dim: int, dim: int, output_dim: int, num_codebooks: int, bins: int):
        super().__init__()
        self.input_proj = nn.Linear(input_dim, dim, bias=False)
        self.output_proj = nn.Linear(dim, output_dim, bias=False)
        self.codebooks = [Codebook(bins, dim) for _ in range(num_codebooks)]

    def encode(self, x: mx.array) -> mx.array:
        """Codes [batch, codebooks, time] of a latent ``x`` [batch, time, input_dim]."""
        residual = self.input_proj(x)
        codes = []
        for codebook in self.codebooks:
            codes.append(codebook.encode(residual))
            residual = residual - codebook.decode(codes[-1])
        return mx.stack(codes, axis=1)

    def decode(self, codes: mx.array) -> mx.array:
        """Latent [batch, time, output_dim] of ``codes`` [batch, n, time]; n may be fewer than there are codebooks."""
        total = self.codebooks[0].decode(codes[:, 0])
        for index in range(1, codes.shape[1]):
            total = total + self.codebooks[index].decode(codes[:, index])
        out: mx.array = self.output_proj(total)
        return out


class SplitResidualQuantizer(nn.Module):
    """``semantic`` codebooks first, then acoustic ones; each group quantizes the same latent.

    Parameters
    ----------
    input_dim, dim, output_dim, bins : int
        See :class:`ResidualQuantizer`.
    num_codebooks : int
        Of both groups together.
    semantic : int
        How many of them are in the first group.
    """

    def __init__(self, input_dim: int, dim: int, output_dim: int, num_codebooks: int, bins: int, semantic: int = 1):
        super().__init__()
        self.semantic = semantic
        self.rvq_first = ResidualQuantizer(input_dim, dim, output_dim, semantic, bins)
        if num_codebooks > semantic:
            self.rvq_rest = ResidualQuantizer(input_dim, dim, output_dim, num_codebooks - semantic, bins)

    def encode(self, x: mx.array) -> mx.array:
        """Codes [batch, codebooks, time], int32, of a latent ``x`` [batch, time, input_dim]."""
        first = self.rvq_first.encode(x)
        return mx.concatenate([first, self.rvq_rest.encode(x)], axis=1) if "rvq_rest" in self else first

    def decode(self, codes: mx.array) -> mx.array:
        """Latent [batch, time, output_dim] of ``codes`` [batch, n, time], n up to the number of codebooks."""
        latent = self.rvq_first.decode(codes[:, : self.semantic])
        if codes.shape[1] > self.semantic:
            latent = latent + self.rvq_rest.decode(codes[:, self.semantic :])
        return latent
