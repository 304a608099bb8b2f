"""Quantizing whole checkpoints: every mode, every layout, what the files say, and what they compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from moshi_mlx_quantize.cli import main

from moshi_mlx.checkpoint.fit import flat_parameters, load_config, load_lm
from moshi_mlx.checkpoint.quantization import MODES, Quantization
from moshi_mlx.checkpoint.readers import read_safetensors
from moshi_mlx.checkpoint.resolve import resolve
from moshi_mlx.models.lm import Lm

from ..helpers.checkpoints import LAYOUTS, conditioned_config, small_config, write_checkpoint

KINDS = [Quantization(b, g, mode) for mode, (bits, groups) in MODES.items() for b in bits for g in groups]


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint whose widths are multiples of 128."""
    config = small_config(depformer_dim=128, depformer_dim_feedforward=192, num_layers=1)
    return write_checkpoint(tmp_path_factory.mktemp("dense"), config, "torch")


def load(folder: Path, **options: Any) -> Lm:
    files = resolve(folder)
    return load_lm(load_config(files.config, files.weights), files.weights, lora=files.lora, **options)


def logits(lm: Lm) -> np.ndarray:
    config = lm.config
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, min(config.card, config.text_card), (1, config.num_streams, 6))
    rows = [{name: "calm" if c.type == "lut" else None for name, c in config.conditioners.items()}]
    out = lm(mx.array(tokens), lm.condition(rows if config.conditioners else None))
    return np.concatenate([np.array(x.astype(mx.float32)).ravel() for x in (out.text_logits, out.logits)])


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("q", KINDS, ids=lambda q: f"{q.mode}-{q.bits}-{q.group_size}")
def test_every_mode_there_and_back(bf16: Path, q: Quantization, tmp_path: Path) -> None:
    """Broken: a mode does not survive being saved, loaded and run on the CPU, or --dequantize gives other weights."""
    small, back = tmp_path / "small", tmp_path / "back"
    how = ["--q-bits", str(q.bits), "--q-group-size", str(q.group_size), "--q-mode", q.mode]
    assert main([str(bf16), str(small), "--quiet", *how]) == 0
    lm = load(small)
    assert (lm.text_linear.bits, lm.text_linear.group_size, lm.text_linear.mode) == (q.bits, q.group_size, q.mode)
    assert lm.dtype == mx.float32  # activations, on the CPU
    quantized = logits(lm)
    assert np.isfinite(quantized).all()
    error = relative(quantized, logits(load(bf16, dtype=mx.float32)))
    assert error < {2: 1.6, 3: 1.2, 4: 0.7, 5: 0.35, 6: 0.2, 8: 0.3 if q.mode == "mxfp8" else 0.06}[q.bits]
    assert main([str(small), str(back), "--quiet", "--dequantize", "--dtype", "float32"]) == 0
    config = json.loads((back / "config.json").read_text())
    assert "quantization" not in config and config["moshi_name"] == "model.safetensors"
    assert relative(logits(load(back)), quantized) < 1e-4
    assert load_config(small / "config.json").quantization == {
        "group_size": q.group_size,
        "bits": q.bits,
        "mode": q.mode,
    }


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "helium"])
def test_every_layout_gives_the_same_file(layout: str, tmp_path: Path) -> None:
    """Broken: a source in another layout is read as other weights."""
    write_checkpoint(tmp_path / "mlx", layout="mlx")
    write_checkpoint(tmp_path / layout, layout=layout)
    for name in {"mlx", layout}:
        assert main([str(tmp_path / name), str(tmp_path / f"{name}-q8"), "--quiet", "--recipe", "q8"]) == 0
    expected = read_safetensors(tmp_path / "mlx-q8" / "model.q8.safetensors")[0]
    found = read_safetensors(tmp_path / f"{layout}-q8" / "model.q8.safetensors")[0]
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in expected.items()}
    if layout == "gguf":  # its source has 8 bits itself
        a, b = logits(load(tmp_path / "gguf-q8")), logits(load(tmp_path / "mlx-q8"))
        assert relative(a, b) < 0.05
    else:
        assert all(mx.array_equal(found[name], expected[name]).item() for name in expected)


def test_helium(tmp_path: Path) -> None:
    """Broken: the text model cannot be quantized, or its config.json is no longer read."""
    source = write_checkpoint(tmp_path / "helium", layout="helium")
    assert main([str(source), str(tmp_path / "out"), "--quiet", "--q-bits", "8"]) == 0
    assert (tmp_path / "out" / "model.q8.safetensors").is_file()
    assert relative(logits(load(tmp_path / "out")), logits(load(source, dtype=mx.float32))) < 0.05


@pytest.mark.parametrize("lora", ["new", "old"])
def test_lora_is_merged_first(lora: str, tmp_path: Path) -> None:
    """Broken: an update is lost, applied twice, or applied after quantizing."""
    source = write_checkpoint(tmp_path / "source", layout="torch", lora=lora)
    assert main([str(source), str(tmp_path / "out"), "--quiet", "--recipe", "q8"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"lora", "lora_rank", "lora_scaling", "lora_name"} & config.keys()
    merged = logits(load(source, dtype=mx.float32))
    plain = load_lm(load_config(source / "config.json"), source / "model.safetensors", dtype=mx.float32)
    result = logits(load(tmp_path / "out"))
    assert relative(result, merged) < 0.05 < 0.2 < relative(result, logits(plain))


def test_conditions_schedules_and_muxed_text(tmp_path: Path) -> None:
    """Broken: the rarer parts of a model (shared weight sets, tables inside modules, voices) do not come through."""
    source = write_checkpoint(tmp_path / "source", conditioned_config(), "torch")
    assert main([str(source), str(tmp_path / "out"), "--quiet", "--recipe", "q8", "--rule", "extra heads=keep"]) == 0
    tensors = read_safetensors(tmp_path / "out" / "model.safetensors")[0]
    assert "condition_provider.conditioners.mood.embed.scales" not in tensors
    assert tensors["condition_provider.conditioners.mood.embed.weight"].dtype == mx.float32
    # One weight set, two steps: written twice, as Kyutai's layout wants it.
    one, two = (tensors[f"depformer.slices.{k}.linear_in.weight"] for k in (1, 2))
    assert mx.array_equal(one, two).item()
    assert relative(logits(load(tmp_path / "out")), logits(load(source, dtype=mx.float32))) < 0.05


def test_a_mixed_file_says_so_itself(tmp_path: Path) -> None:
    """Broken: a mixed recipe needs to be told at load, or config.json and file disagree."""
    source = write_checkpoint(tmp_path / "source", mimi=True)
    rules = ["--rule", "depformer=8", "--rule", "text head=keep", "--rule", "audio_embs.*=mxfp4"]
    assert main([str(source), str(tmp_path / "out"), "--quiet", "--q-bits", "3", *rules]) == 0
    lm = load(tmp_path / "out")
    assert (lm.transformer.layers[0].gating.linear_in.bits, lm.depformer.linear_in[1].bits) == (3, 8)
    assert lm.audio_embs[0].mode == "mxfp4" and not hasattr(lm.text_linear, "bits")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    entries = [block, *(entry for entry in block.values() if isinstance(entry, dict))]
    assert block["text_linear"] is False and block["audio_embs.0"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert {(entry["bits"], entry["mode"]) for entry in entries} == {(3, "affine"), (8, "affine"), (4, "mxfp4")}
    # The other files came along, and the whole opens without a word about quantization.
    import moshi_mlx

    model = moshi_mlx.load(tmp_path / "out")
    reply = model.reply(np.zeros(3 * model.frame_size, np.float32), model.sample_rate, tail=0)
    assert reply.frames == 3


def test_a_quantized_source_is_read_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken: quantizing twice is refused or hidden, or what stays as it was is rounded once more."""
    source = write_checkpoint(tmp_path / "source", quantize={"bits": 8, "group_size": 64})
    assert main([str(source), str(tmp_path / "same"), "--recipe", "q8"]) == 0
    assert "quantized already" in capsys.readouterr().err
    before = read_safetensors(source / "model.safetensors")[0]
    after = read_safetensors(tmp_path / "same" / "model.q8.safetensors")[0]
    assert before.keys() == after.keys() and all(mx.array_equal(before[k], after[k]).item() for k in before)
    assert main([str(source), str(tmp_path / "q4"), "--quiet", "--recipe", "q4"]) == 0
    assert load(tmp_path / "q4").text_linear.bits == 4


def test_float_types(bf16: Path, tmp_path: Path) -> None:
    """Broken: --dtype does not reach norms and scales, or the source's type is not kept."""
    assert main([str(bf16), str(tmp_path / "a"), "--quiet", "--recipe", "q4"]) == 0
    assert main([str(bf16), str(tmp_path / "b"), "--quiet", "--recipe", "q4", "--dtype", "float16"]) == 0
    for folder, dtype in (("a", mx.bfloat16), ("b", mx.float16)):
        tensors = read_safetensors(tmp_path / folder / "model.q4.safetensors")[0]
        assert {v.dtype for v in tensors.values()} == {dtype, mx.uint32}


def test_a_published_folder_without_config(tmp_path: Path) -> None:
    """Broken: the config.json made for a published model without one is not the model's."""
    from moshi_mlx_quantize.source import _without_file

    from moshi_mlx.config import ModelConfig

    for config in (ModelConfig.moshi_7b(), ModelConfig.personaplex(), ModelConfig.helium_preview()):
        made = ModelConfig.from_dict(json.loads(json.dumps(_without_file(config))))
        assert made.model_type == config.model_type
        if config.model_type == "helium":
            assert (made.lm.hidden, made.lm.context, made.lm.dim) == (config.lm.hidden, 4096, 2560)
        else:
            assert made.lm == config.lm


def test_parameters_are_those_of_mlx(bf16: Path, tmp_path: Path) -> None:
    """Broken: the same recipe gives other numbers than mlx.nn.quantize."""
    import mlx.nn as nn

    assert main([str(bf16), str(tmp_path / "out"), "--quiet", "--recipe", "q4"]) == 0
    reference = load(bf16)
    nn.quantize(reference, bits=4, group_size=32)
    found = flat_parameters(load(tmp_path / "out", dtype=mx.bfloat16))
    expected = flat_parameters(reference)
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]).item() for name in expected)
