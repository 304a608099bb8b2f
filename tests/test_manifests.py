"""Every published checkpoint's list of tensors, without its data: 29 files that must be consumed to the last tensor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from moshi_mlx.checkpoint.fit import (
    fit_lm,
    flat_parameters,
    guess_config,
    load_config,
)
from moshi_mlx.checkpoint.layouts import detect_layout, from_internal
from moshi_mlx.checkpoint.lora import merge_lora
from moshi_mlx.checkpoint.mimi import mimi_weights
from moshi_mlx.checkpoint.readers import read_shapes, read_tensors
from moshi_mlx.checkpoint.voices import load_speaker, load_voice_prompt
from moshi_mlx.config import ModelConfig
from moshi_mlx.errors import CheckpointError

from .helpers.checkpoints import DATA, manifest_tensors, read_manifest, write_gguf, write_sparse
from .helpers.torch_files import write_pt

# The configuration that belongs to each language model; None: recognized by its shapes.
LANGUAGE_MODELS = {
    "helium_1_2b_hf": "helium_1_2b",
    "helium_1_preview_2b_hf": "helium_1_preview_2b",
    "helium_1_preview_2b_mlx_bf16": None,
    "helium_1_preview_2b_mlx_q4": None,
    "helium_1_preview_2b_mlx_q8": None,
    "hibiki_1b_mlx_bf16": "hibiki_1b",
    "hibiki_1b_pytorch_bf16": "hibiki_1b",
    "hibiki_2b_mlx_bf16": "hibiki_2b",
    "hibiki_2b_pytorch_bf16": "hibiki_2b",
    "moshiko_candle_bf16": None,
    "moshiko_mlx_bf16": None,
    "moshiko_mlx_q4": None,
    "moshiko_mlx_q8": None,
    "moshiko_pytorch_bf16": "moshi_7b",
    "personaplex_7b_mlx_param_tree": "personaplex_7b",
    "personaplex_7b_v1_pytorch": "personaplex_7b",
    "stt_1b_en_fr_candle": "stt_1b_vad",
    "stt_1b_en_fr_mlx": "stt_1b",
    "stt_1b_en_fr_pytorch": "stt_1b",
    "stt_2.6b_en_mlx": "stt_2.6b",
    "stt_2.6b_en_pytorch": "stt_2.6b",
    "tts_1.6b_en_fr_pytorch": "tts_1.6b",
    "tts_1.6b_mlx_param_tree": "tts_1.6b",
}
CODECS = ("mimi_e351c8d8", "mimi_mlx_param_tree")
OTHERS = ("moshiko_candle_q8_gguf", "moshi_finetune_lora_r128", "personaplex_voice_pt", "tts_voice")

FEW_BYTES = 32 * 2**20
"""What may be allocated while a 16 GB model is fitted; norms that are repeated are compared, hence not zero."""


def config_for(name: str, tensors: dict[str, mx.array]) -> ModelConfig:
    file = LANGUAGE_MODELS[name]
    if file is None:
        return guess_config({key: tuple(value.shape) for key, value in tensors.items()})
    return ModelConfig.from_dict(json.loads((DATA / "configs" / f"{file}.json").read_text()))


def signature(tensors: dict[str, mx.array]) -> dict[str, Any]:
    return {name: (tuple(value.shape), str(value.dtype)) for name, value in tensors.items()}


def test_every_manifest_is_tested() -> None:
    """Broken: a manifest was added or renamed, and no test reads it."""
    files = {path.stem for path in (DATA / "manifests").glob("*.json")}
    assert files == {*LANGUAGE_MODELS, *CODECS, *OTHERS} and len(files) == 29
    configs = {path.stem for path in (DATA / "configs").glob("*.json")}
    assert {name for name in LANGUAGE_MODELS.values() if name} == configs


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_model(name: str) -> None:
    """Broken: a published checkpoint does not load, or a tensor of it is lost, left over or misshapen on the way."""
    manifest = read_manifest(name)
    tensors = manifest_tensors(manifest)
    assert len(tensors) == manifest["count"]
    config = config_for(name, tensors)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model = fit_lm(config, tensors, dtype=mx.bfloat16)
    params = flat_parameters(model)
    # Back to the file: the same names, shapes and types, so nothing was dropped or invented.
    layout = detect_layout(tensors)
    back = signature(from_internal(params, layout, config.lm))
    expected = signature(tensors)
    for key in expected:
        if key.startswith("condition_provider."):  # float32 in any case
            assert back[key][0] == expected[key][0]
            back[key] = expected[key]
    assert back == expected
    quantization = manifest.get("quantization")
    assert quantization is None or (model.text_linear.bits, model.text_linear.group_size) == (
        quantization["bits"],
        quantization["group_size"],
    )
    assert mx.get_peak_memory() - before < FEW_BYTES


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_without_a_configuration(name: str, tmp_path: Path) -> None:
    """Broken: a published folder without a config.json is refused, or any other is taken for a model that it is not."""
    tensors = manifest_tensors(read_manifest(name))
    path = tmp_path / "model.safetensors"
    write_sparse(path, tensors)
    if name.startswith(("moshiko", "personaplex", "helium_1_preview_2b_mlx")):
        fit_lm(load_config(None, path), tensors, dtype=mx.bfloat16)
    else:
        assert LANGUAGE_MODELS[name] is not None
        with pytest.raises(CheckpointError, match=r"has no config\.json"):
            load_config(None, path)


def test_hibiki_2b_without_schedule() -> None:
    """Broken: an unrolled checkpoint whose configuration names no shared weights does not load."""
    tensors = manifest_tensors(read_manifest("hibiki_2b_mlx_bf16"))
    config = config_for("hibiki_2b_mlx_bf16", tensors)
    config = replace(config, lm=replace(config.lm, depformer_weights_per_step_schedule=None))
    params = flat_parameters(fit_lm(config, tensors))
    assert "depformer.linear_in.15.weight" in params


@pytest.mark.parametrize("name", ["moshiko_mlx_q4", "tts_1.6b_en_fr_pytorch", "moshiko_candle_bf16"])
def test_through_a_file(name: str, tmp_path: Path) -> None:
    """Broken: fitting a model reads all of its file, which takes its memory twice where types are changed."""
    path = tmp_path / "model.safetensors"
    write_sparse(path, manifest_tensors(read_manifest(name)))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tensors = read_tensors(path)
    model = fit_lm(config_for(name, tensors), tensors)
    assert sum(value.nbytes for value in flat_parameters(model).values()) > 3e9
    assert mx.get_peak_memory() - before < FEW_BYTES


def test_gguf(tmp_path: Path) -> None:
    """Broken: candle's Q8_0 file of Moshi is not recognized, or would be expanded on loading."""
    manifest = read_manifest("moshiko_candle_q8_gguf")
    plain = manifest_tensors(manifest)
    path = tmp_path / "model.q8.gguf"
    write_gguf(path, plain, data=False)  # a hole of 8 GB behind a true header
    assert read_shapes(path) == {name: tuple(value.shape) for name, value in plain.items()}
    # What reading it gives, not read: every matrix in three parts.
    tensors: dict[str, mx.array] = {}
    for name, value in plain.items():
        if value.ndim != 2:
            tensors[name] = mx.zeros(value.shape)
            continue
        rows, width = value.shape
        stem = name.removesuffix("weight")
        tensors[stem + "weight"] = mx.zeros((rows, width // 4), mx.uint32)
        tensors[stem + "scales"] = tensors[stem + "biases"] = mx.zeros((rows, width // 32), mx.float16)
    config = guess_config({name: tuple(value.shape) for name, value in tensors.items()})
    assert load_config(None, path) == config
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model = fit_lm(config, tensors, dtype=mx.float16)
    back = from_internal(flat_parameters(model), "candle", config.lm)
    assert {name for name in back if not name.endswith(("scales", "biases"))} == plain.keys()
    assert (model.text_emb.bits, model.text_emb.group_size) == (8, 32)
    assert mx.get_peak_memory() - before < FEW_BYTES


def test_lora() -> None:
    """Broken: moshi-finetune's update is not understood, or does not fit Moshi 7B."""
    update = manifest_tensors(read_manifest("moshi_finetune_lora_r128"))
    base = manifest_tensors(read_manifest("moshiko_mlx_bf16"))
    config = ModelConfig.moshi_7b()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    merged = flat_parameters(fit_lm(config, base, update=update))
    plain = flat_parameters(fit_lm(config, base))
    assert signature(merged) == signature(plain)
    assert mx.get_peak_memory() - before < FEW_BYTES
    with pytest.raises(CheckpointError, match="which the model does not have"):
        merge_lora({"text_emb.weight": plain["text_emb.weight"]}, update, 2.0, config.lm)


@pytest.mark.parametrize("name", CODECS)
def test_codec(name: str) -> None:
    """Broken: the published codec, or Kyutai's MLX form of it, does not load."""
    tensors = manifest_tensors(read_manifest(name))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert len(mimi_weights(tensors)) > 200
    assert mx.get_peak_memory() - before < FEW_BYTES


def test_voice_prompt(tmp_path: Path) -> None:
    """Broken: PersonaPlex's voices cannot be read."""
    write_pt(tmp_path / "NATF0.pt", manifest_tensors(read_manifest("personaplex_voice_pt")))
    prompt = load_voice_prompt(tmp_path / "NATF0.pt")
    assert prompt.embeddings.shape == (1, 4096) and prompt.embeddings.dtype == mx.bfloat16
    assert prompt.cache.shape == (17, 4) and prompt.cache.dtype == mx.int64


def test_speaker(tmp_path: Path) -> None:
    """Broken: the text-to-speech model's voices cannot be read."""
    path = tmp_path / "robert.wav.1e68beda@240.safetensors"
    write_sparse(path, manifest_tensors(read_manifest("tts_voice")))
    speaker = load_speaker(path)
    assert speaker.shape == (125, 512) and speaker.dtype == mx.float32
