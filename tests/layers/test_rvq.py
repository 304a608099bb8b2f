"""The quantizer against its definition."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from moshi_mlx.layers.rvq import Codebook, SplitResidualQuantizer


def test_the_nearest_entry_is_found_and_the_lowest_of_equals() -> None:
    """If this fails, codes are not those that the model was trained on."""
    mx.random.seed(0)
    book = Codebook(40, 6)
    x = np.random.default_rng(0).standard_normal((3, 7, 6)).astype(np.float32)
    distances = np.square(x[:, :, None] - np.array(book.embedding)).sum(-1)
    np.testing.assert_array_equal(np.array(book.encode(mx.array(x))), distances.argmin(-1))
    book.embedding = mx.concatenate([book.embedding, book.embedding])
    np.testing.assert_array_equal(np.array(book.encode(mx.array(x))), distances.argmin(-1))


def test_new_entries_are_used_at_once() -> None:
    """If this fails, a codec encodes with norms of the weights that it had before loading."""
    book = Codebook(2, 1)
    book.embedding = mx.array([[0.0], [10.0]])
    assert book.encode(mx.array([[1.0]])).item() == 0
    book.embedding = mx.array([[10.0], [0.0]])
    assert book.encode(mx.array([[1.0]])).item() == 1


def test_both_groups_quantize_the_same_latent() -> None:
    """If this fails, acoustic codes quantize what the semantic ones left over: audible, and foreign to the model."""
    mx.random.seed(1)
    rvq = SplitResidualQuantizer(8, 4, 8, 5, 16, semantic=2)
    x = mx.random.normal((2, 6, 8))
    expected = []
    latent = np.zeros((2, 6, 8))
    for group, count in ((rvq.rvq_first, 2), (rvq.rvq_rest, 3)):
        residual = np.array(group.input_proj(x))
        total = np.zeros_like(residual)
        for codebook in group.codebooks[:count]:
            entries = np.array(codebook.embedding)
            codes = np.square(residual[:, :, None] - entries).sum(-1).argmin(-1)
            expected.append(codes)
            residual = residual - entries[codes]
            total = total + entries[codes]
        latent += np.array(group.output_proj(mx.array(total)))
    codes = rvq.encode(x)
    assert codes.dtype == mx.int32
    np.testing.assert_array_equal(np.array(codes), np.stack(expected, axis=1))
    np.testing.assert_allclose(np.array(rvq.decode(codes)), latent, atol=1e-5)


def test_fewer_codebooks_are_a_prefix() -> None:
    """If this fails, a model with 8 codebooks hears other codes than one with 32."""
    mx.random.seed(2)
    rvq = SplitResidualQuantizer(8, 4, 8, 4, 16)
    x = mx.random.normal((1, 6, 8))
    codes = rvq.encode(x)
    short = SplitResidualQuantizer(8, 4, 8, 1, 16)
    short.rvq_first = rvq.rvq_first
    np.testing.assert_array_equal(np.array(short.encode(x)), np.array(codes[:, :1]))
    np.testing.assert_array_equal(np.array(short.decode(codes[:, :1])), np.array(rvq.decode(codes[:, :1])))
