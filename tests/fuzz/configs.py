"""Configurations whose values are broken at random, and text that is hardly JSON any more."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx

from moshi_mlx.checkpoint.fit import load_config, load_lm
from moshi_mlx.checkpoint.mimi import mimi_weights, published_mimi_weights
from moshi_mlx.checkpoint.readers import expand_shards, read_json
from moshi_mlx.config import ModelConfig
from moshi_mlx.models.mimi import Mimi, MimiConfig
from tests.helpers.mimi import TINY, tiny_mimi

from . import Attack, Attempt, fuzzer
from .files import mutate, written

TESTS = Path(__file__).resolve().parents[1]
PUBLISHED = sorted((TESTS / "data" / "configs").glob("*.json"))
GOLDEN = sorted((TESTS / "golden" / "lm").glob("*/config.json"))

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 0.5, 1e308, 5e-324, float("nan"), float("inf"), 10**400, 2**40, -(2**70),
    10**4, 10**6, 2**31 - 1, 2**31, 2**62, "", "x", "\u202e\x1b[31m", "x" * 10**5, "silu", "rope", [], [1],
    [0, 0], ["a"], [[1]], [None], [2**40] * 5, [1] * 10**4, {}, {"a": 1}, {"type": "lut"}, {"a": {"type": "lut"}},
    {"type": "tensor", "tensor": {}}, {"a": {"type": "lut", "lut": {}}},
]  # fmt: skip


def broken(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One to three random entries, at any depth, replaced or removed."""
    config = copy.deepcopy(config)
    for _ in range(rng.choice([1, 1, 2, 3])):
        node: Any = config
        while keys := list(node) if isinstance(node, dict) else list(range(len(node))):
            key = rng.choice(keys)
            if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.6:
                node = node[key]
            elif isinstance(node, dict) and rng.random() < 0.1:
                del node[key]
                break
            else:
                node[key] = copy.deepcopy(rng.choice(VALUES))
                break
    return config


def as_json(data: Any) -> bytes:
    return json.dumps(data).encode()


@fuzzer()
def configs(folder: Path) -> Attack:
    """config.json of every family; where it is accepted, its sizes add up, and small weights fit or are refused."""
    sources = [(path, json.loads(path.read_text())) for path in PUBLISHED + GOLDEN]

    def make(rng: random.Random) -> Attempt:
        source, data = rng.choice(sources)
        data = broken(data, rng)

        def call() -> None:
            config = ModelConfig.from_dict(data)
            lm = config.lm
            assert lm.hidden > 0 and lm.text_out > 0 and lm.max_delay >= 0
            if lm.dep_q:
                assert len(lm.schedule) == lm.dep_q and len(lm.depth_hidden) == lm.num_weight_sets
            weights = source.parent / "model.safetensors"
            if weights.exists():
                load_lm(config, weights)

        return as_json(data), call

    return make


@fuzzer()
def codec_configs(folder: Path) -> Attack:
    """mimi_config.json; where it is accepted, a codec can be made of it, and small weights fit or are refused."""
    weights = published_mimi_weights(tiny_mimi())
    mx.eval(list(weights.values()))
    sources = [TINY, MimiConfig().to_dict()]

    def make(rng: random.Random) -> Attempt:
        data = broken(rng.choice(sources), rng)

        def call() -> None:
            config = MimiConfig.from_dict(data)
            mimi = Mimi(config)
            mimi.init_encoder_state(1)
            mimi.init_decoder_state(1)
            mimi_weights(weights, config)

        return as_json(data), call

    return make


@fuzzer()
def texts(folder: Path) -> Attack:
    """config.json and the index of a sharded checkpoint, damaged as text."""
    index = {"metadata": {}, "weight_map": {f"layer.{i}": f"model-{i:05d}-of-00003.safetensors" for i in range(1, 4)}}
    sources = [(path.read_bytes(), "config.json") for path in PUBLISHED + GOLDEN]
    sources += [(as_json(index), "model.safetensors.index.json")] * 3
    nested = [b"[" * 10**5, b'{"a":' * 10**4, b"9" * 10**5, b'"\\ud800"', b"\xff\xfe", b"1e999", b"[" + b"{}," * 10**5]

    def make(rng: random.Random) -> Attempt:
        data, name = rng.choice(sources)
        data = mutate(data, rng)
        if rng.random() < 0.2:
            at = rng.randrange(len(data) + 1)
            data = data[:at] + rng.choice(nested) + data[at:]

        def read(path: Path) -> None:
            read_json(path)
            expand_shards(path) if name.startswith("model") else load_config(path)

        return written(folder / name, data, read)

    return make
