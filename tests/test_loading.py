"""Folders in which something is missing or broken: the message names the file, and what to do."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import moshi_mlx
from moshi_mlx.checkpoint.finite import check_finite
from moshi_mlx.checkpoint.readers import read_tensors
from moshi_mlx.codec.base import RustMimi
from moshi_mlx.errors import CheckpointError, ConfigError, MoshiError

from .helpers.checkpoints import small_config, write_checkpoint

DTYPES = (mx.float32, mx.bfloat16, mx.float16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint with everything that a conversation needs."""
    return write_checkpoint(tmp_path / "checkpoint", mimi=True)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensor(path: Path, name: str, change: Callable[[mx.array], mx.array]) -> None:
    tensors = dict(read_tensors(path))
    tensors[name] = change(tensors[name])
    mx.eval(list(tensors.values()))
    mx.save_safetensors(str(path), tensors)


def spoil(value: float) -> Callable[[mx.array], mx.array]:
    """Put one value into the middle of an array."""

    def change(array: mx.array) -> mx.array:
        flat = array.reshape(-1)
        flat[flat.size // 2] = value
        return flat.reshape(array.shape)

    return change


def refusal(folder: Path, kind: type[MoshiError] = CheckpointError) -> str:
    with pytest.raises(kind) as raised:
        moshi_mlx.load(folder, codec="mlx")
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_fixture_loads(folder: Path) -> None:
    """If this fails, the tests below are refused for another reason than theirs."""
    assert moshi_mlx.load(folder, codec="mlx").frame_size == 1920


def test_a_task_is_asked_for(folder: Path) -> None:
    """If this fails, a program gets a model without the methods that it calls, and fails somewhere else."""
    assert isinstance(moshi_mlx.load(folder, task=moshi_mlx.Moshi), moshi_mlx.Moshi)
    with pytest.raises(ConfigError, match=r"is for dialogue \(Moshi\), and SpeechToText was asked for"):
        moshi_mlx.load(folder, task=moshi_mlx.SpeechToText)


def test_missing_configurations_are_named(folder: Path) -> None:
    """If this fails, a file that was not copied along is blamed on shapes or sizes."""
    (folder / "mimi.json").rename(folder / "hidden.json")
    assert f"{folder}: config.json names mimi.json (mimi_config_name), which is missing" in refusal(folder)
    edit_config(folder, mimi_config_name=None)
    message = refusal(folder, ConfigError)
    assert re.search(r"2048 entries per codebook, .* 64. config\.json names no mimi_config\.json", message), message
    (folder / "config.json").unlink()
    assert refusal(folder).startswith(f"{folder} has no config.json, ")


def test_a_codec_of_other_sizes(tmp_path: Path) -> None:
    """If this fails, a codec that lost its mimi_config.json is called broken, and its file is not named."""
    folder = write_checkpoint(tmp_path / "checkpoint", small_config(card=2048), mimi=True)
    edit_config(folder, mimi_config_name=None)
    codec = next(folder.glob("tokenizer-*.safetensors"))
    message = refusal(folder)
    assert message.startswith(f"{codec}: ") and "needs a mimi_config.json" in message, message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_codec_that_is_not_numbers(folder: Path, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a damaged codec answers with silence, and nothing says why."""
    codec = next(folder.glob("tokenizer-*.safetensors"))
    edit_tensor(codec, "decoder.model.0.conv.conv.weight", spoil(value))
    message = refusal(folder)
    damaged = "in decoder.first.weight: the file is damaged, fetch it again"
    assert message == f"{codec} holds values that are not finite numbers, {damaged}"
    # The Rust codec reads the file by itself, and does not look.
    monkeypatch.setattr("moshi_mlx.loading.make_codec", lambda path, *_: RustMimi(path))
    assert "in decoder.model.0.conv.conv.weight:" in refusal(folder)


def test_codebooks_that_are_not_numbers(folder: Path) -> None:
    """If this fails, what a file's sums and counts are divided to is not looked at."""
    codec = next(folder.glob("tokenizer-*.safetensors"))
    edit_tensor(codec, "quantizer.rvq_first.vq.layers.0._codebook.cluster_usage", spoil(math.nan))
    assert "quantizer.rvq_first.codebooks.0.embedding" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["out_norm.weight", "audio_embs.5.weight", "depformer.slices.2.linear_out.weight", "text_linear.scales"]
)
def test_a_language_model_that_is_not_numbers(tmp_path: Path, name: str) -> None:
    """If this fails, a damaged language model says one thing for ever, or nothing."""
    quantize = {"bits": 4, "group_size": 32} if name.endswith("scales") else None
    folder = write_checkpoint(tmp_path / "checkpoint", mimi=True, quantize=quantize)
    edit_tensor(folder / "model.safetensors", name, spoil(math.nan))
    ours = name.replace("depformer.slices.2.linear_out", "depformer.linear_out.2")
    assert refusal(folder).startswith(
        f"{folder / 'model.safetensors'} holds values that are not finite numbers, in {ours}"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_check_finds_every_kind_and_nothing_else(dtype: mx.Dtype) -> None:
    """If this fails, a weight of a type passes as NaN, or the largest finite ones are refused."""
    largest = mx.finfo(dtype).max
    fine = mx.array([0.0, -0.0, 1e-7, largest, -largest]).astype(dtype)
    check_finite(
        {"fine": fine, "empty": mx.zeros((0,), dtype), "one": fine[3], "packed": mx.array([2**32 - 1], mx.uint32)}, "x"
    )
    for value in (math.nan, -math.nan, math.inf, -math.inf):
        spoiled = mx.concatenate([fine, mx.array([value]).astype(dtype), fine])
        for shaped in (spoiled, mx.stack([fine, spoiled[2:7]]).T):
            with pytest.raises(CheckpointError, match=r"^x holds values that are not finite numbers, in bad:"):
                check_finite({"fine": fine, "bad": shaped}, "x")
