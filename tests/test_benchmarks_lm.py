"""The language model's benchmarks: what they compute besides times."""

from __future__ import annotations

import pytest

from benchmarks.cuda_full import FULL, floor_bytes
from benchmarks.lm_kv8 import cache_bytes
from moshi_mlx.config import ModelConfig


def test_floor_of_a_step() -> None:
    """The floor that a GPU's step times are held against is another model's."""
    # 7.69 B parameters less the embeddings: rows of text and of 16 streams, then those of the depth transformer.
    embeddings = (32_001 + 16 * 2_049) * 4_096 + (32_001 + 7 * 2_049) * 1_024
    assert floor_bytes(FULL, 0, 0) == pytest.approx(2 * (7.69e9 - embeddings), rel=0.01)
    assert floor_bytes(FULL, 4, 0) == pytest.approx(4.6e9, rel=0.02)
    assert floor_bytes(FULL, 0, 3000) - floor_bytes(FULL, 0, 0) == cache_bytes(ModelConfig.moshi_7b().lm, None)


def test_bytes_of_the_cache() -> None:
    """Eight bits do not halve the cache of Moshi 7B."""
    moshi = ModelConfig.moshi_7b().lm
    assert cache_bytes(moshi, 8) < 0.54 * cache_bytes(moshi, None)
