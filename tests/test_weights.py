"""Loading weights: one model from every layout, quantization found from the files, nothing missing or left over."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import moshi_mlx
from moshi_mlx.checkpoint.fit import fit_lm, flat_parameters, load_config, load_lm
from moshi_mlx.checkpoint.layouts import detect_layout, from_internal, to_internal
from moshi_mlx.checkpoint.lora import merge_lora
from moshi_mlx.checkpoint.mimi import load_mimi
from moshi_mlx.checkpoint.quantization import unpack_modules
from moshi_mlx.checkpoint.readers import read_tensors
from moshi_mlx.checkpoint.resolve import CheckpointFiles, resolve
from moshi_mlx.checkpoint.voices import list_voices, load_voice_prompt
from moshi_mlx.config import ModelConfig
from moshi_mlx.errors import CheckpointError, ConfigError
from moshi_mlx.layers.conditioning import TensorCondition
from moshi_mlx.models.lm import Lm

from .helpers.checkpoints import (
    LAYOUTS,
    conditioned_config,
    helium_config,
    q8_0,
    quantized_params,
    random_params,
    small_config,
    write_checkpoint,
    write_lora,
)
from .helpers.load_memory import measure

GOLDEN = Path(__file__).parent / "golden"
Q4 = {"bits": 4, "group_size": 32}
BITS8 = {"bits": 8, "group_size": 32}
MODES = [
    *({"bits": bits, "group_size": group} for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64)),
    {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    {"bits": 4, "group_size": 16, "mode": "nvfp4"},
    {"bits": 8, "group_size": 32, "mode": "mxfp8"},
]


@pytest.fixture(autouse=True)
def cpu() -> Iterator[None]:
    """Types depend on the device; these tests state the CPU's."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def load(folder: Path, **options: Any) -> Lm:
    files: CheckpointFiles = resolve(folder)
    return load_lm(load_config(files.config, files.weights), files.weights, lora=files.lora, **options)


def params_of(folder: Path, **options: Any) -> dict[str, mx.array]:
    return flat_parameters(load(folder, **options))


def logits(model: Lm) -> list[mx.array]:
    """Text and audio logits of fixed tokens."""
    rng = np.random.default_rng(3)
    tokens = mx.array(rng.integers(4, 60, (2, model.config.num_streams, 9)))
    condition = None
    if model.config.conditioners:
        voice = TensorCondition(rng.standard_normal((5, 24)).astype(np.float32))
        condition = model.condition([{"voice": voice, "mood": "glad"}, {"voice": None, "mood": "calm"}])
    out = model(tokens, condition)
    return [out.text_logits, out.logits]


def equal(a: dict[str, mx.array], b: dict[str, mx.array]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and mx.array_equal(a[name], b[name]), name


def dense(params: dict[str, mx.array], name: str, q: dict[str, Any]) -> mx.array:
    parts = [params.get(f"{name}.{part}") for part in ("weight", "scales", "biases")]
    return mx.dequantize(*parts, **q)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("make_config", [small_config, conditioned_config])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("helium", "gguf")])
def test_layouts_give_one_model(tmp_path: Path, layout: str, make_config: Callable[..., dict[str, Any]]) -> None:
    """Broken: a layout's names, stacking or copies are misread, so that a published model speaks nonsense."""
    config = make_config()
    folder = write_checkpoint(tmp_path, config, layout, tokenizer=False)
    model = load(folder)
    expected = random_params(ModelConfig.from_dict(config))
    equal(flat_parameters(model), expected)
    direct = fit_lm(ModelConfig.from_dict(config), from_internal(expected, "mlx", model.config))
    for a, b in zip(logits(model), logits(direct), strict=True):
        assert mx.array_equal(a, b) and bool(mx.isfinite(a).all())


def test_helium_layout(tmp_path: Path) -> None:
    """Broken: separate query, key, value, gate and up projections are joined in a wrong order."""
    folder = write_checkpoint(tmp_path, layout="helium")
    equal(params_of(folder), random_params(load_config(folder / "config.json")))


def test_helium_heads(tmp_path: Path) -> None:
    """Broken: a tied text head is missed, or a missing one is invented."""
    folder = write_checkpoint(tmp_path, helium_config(tie_word_embeddings=True), "helium")
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    del tensors["lm_head.weight"]
    tied = fit_lm(load_config(folder / "config.json"), tensors)
    assert mx.array_equal(tied.text_linear.weight, tied.text_emb.weight)
    with pytest.raises(CheckpointError, match=r"1 tensors are missing: lm_head\.weight"):
        fit_lm(ModelConfig.from_dict(helium_config()), tensors)


def test_layouts_round_trip() -> None:
    """Broken: saving and loading again changes names, shapes or values."""
    config = ModelConfig.from_dict(conditioned_config())
    params = random_params(config)
    for layout in ("mlx", "torch", "candle"):
        stored = from_internal(params, layout, config.lm)
        assert detect_layout(stored) == layout
        equal(to_internal(stored, layout, config.lm), params)
    stored = from_internal(params, "torch", config.lm)
    assert stored["depformer.layers.0.self_attn.in_proj_weight"].shape == (3 * 3 * 64, 64)
    assert stored["out_norm.alpha"].shape == (1, 1, 128)
    sliced = from_internal(params, "mlx", config.lm)
    assert sliced["depformer.slices.1.linear_in.weight"] is sliced["depformer.slices.2.linear_in.weight"]


@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("lm/*/config.json")))
def test_reference_files(name: str) -> None:
    """Broken: a file that the reference program accepts is refused."""
    folder = GOLDEN / "lm" / name
    model = load(folder)
    assert all(bool(mx.isfinite(value).all()) for value in flat_parameters(model).values())


def test_copies_are_checked(tmp_path: Path) -> None:
    """Broken: slices that do not share what the model shares are taken for copies, and some are thrown away."""
    config = ModelConfig.from_dict(conditioned_config())
    for layout, prefix in (("mlx", "depformer.slices"), ("candle", "depformer")):
        good = from_internal(random_params(config), layout, config.lm)
        norm = next(n for n in good if n.startswith(f"{prefix}.2.") and "norm1" in n)
        with pytest.raises(CheckpointError, match=r"should be equal copies, but differ"):
            fit_lm(config, {**good, norm: good[norm] + 1})
        shared = f"{prefix}.2.linear_in.weight"
        with pytest.raises(CheckpointError, match=r"which it repeats"):
            fit_lm(config, {**good, shared: good[shared][:-1]})
        with pytest.raises(CheckpointError, match=r"1 tensors are missing: .*2\.linear_in\.weight"):
            fit_lm(config, {name: value for name, value in good.items() if name != shared})


def test_unknown_files_are_named() -> None:
    """Broken: the codec's file given as the model's ends in a traceback."""
    config = ModelConfig.from_dict(small_config())
    for tensors in ({}, {"encoder.model.0.conv.conv.weight": mx.zeros((1,))}):
        with pytest.raises(CheckpointError, match="no layout of a Moshi language model"):
            fit_lm(config, tensors)


def test_models_without_configuration(tmp_path: Path) -> None:
    """Broken: a folder with weights alone is taken for another model, and its shapes are blamed."""
    for layout in ("mlx", "torch", "helium", "gguf", "sharded"):
        folder = write_checkpoint(tmp_path / layout, layout=layout, tokenizer=False, mimi=layout != "helium")
        (folder / "config.json").unlink()
        files = resolve(folder)
        with pytest.raises(CheckpointError, match=rf"^{re.escape(str(folder))} has no config\.json, .* put the config"):
            load_config(files.config, files.weights)
        with pytest.raises(CheckpointError, match=r"has no config\.json"):
            moshi_mlx.load(folder)


# ----------------------------------------------------------------------------------------------- strictness


def test_strict() -> None:
    """Broken: a checkpoint of another model loads, with parts of it random or unused."""
    config = ModelConfig.from_dict(small_config())
    good = from_internal(random_params(config), "torch", config.lm)
    cases = [
        ({"out_norm.alpha": None, "emb.3.weight": None}, r"2 tensors are missing: emb\.3\.weight, out_norm"),
        ({"extra_heads.0.weight": mx.zeros((6, 128))}, r"1 tensors are not part of this model: extra_heads\.0"),
        ({f"nonsense.{i}": mx.zeros((1,)) for i in range(9)}, r"9 tensors are not part.*nonsense\.3 and 5 more"),
        ({"text_linear.weight": mx.zeros((601, 128))}, r"text_linear\.weight is \[601, 128\], should be \[600, 128\]"),
        ({"text_emb.weight": mx.zeros((601, 128), mx.int32)}, r"should be floats: text_emb\.weight is .*int32"),
        ({"text_emb.weight": mx.zeros((601, 128), mx.uint8)}, r"should be floats: text_emb\.weight is .*uint8"),
        ({"linears.3.weight": mx.zeros((64, 64))}, r"not part of this model: linears\.3"),
        ({"depformer_in.3.weight": mx.zeros((64, 128))}, r"not part of this model: depformer_in\.3"),
        ({"depformer.layers.0.self_attn.in_proj_weight": mx.zeros((577, 64))}, r"not a multiple of 3 weight sets"),
        ({"text_emb.biases": mx.zeros((601, 4))}, r"text_emb\.biases comes without scales"),
        ({"out_norm.scales": mx.zeros((1, 4))}, r"not a module that can be quantized"),
        ({"transformer.layers.0.self_attn.in_proj.weight": mx.zeros((1,))}, r"two tensors stand for the same weight"),
    ]
    for change, message in cases:
        tensors = {name: value for name, value in {**good, **change}.items() if value is not None}
        with pytest.raises(CheckpointError, match=message):
            fit_lm(config, tensors)
    fit_lm(config, good)


def test_errors_name_the_file(tmp_path: Path) -> None:
    """Broken: with several files about, the message does not say which one is wrong."""
    folder = write_checkpoint(tmp_path, tokenizer=False)
    config = ModelConfig.from_dict(small_config(num_layers=3))
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(folder))}.*tensors are missing"):
        load_lm(config, folder / "model.safetensors")
    (folder / "config.json").write_text('{"dim": "wide"}')
    with pytest.raises(ConfigError, match=rf"{re.escape(str(folder))}.*dim"):
        load_config(folder / "config.json")


def test_sharded_checkpoints_are_whole(tmp_path: Path) -> None:
    """Broken: a missing shard, a tensor in two shards, or an index that climbs out of its folder goes unnoticed."""
    folder = write_checkpoint(tmp_path, layout="sharded", tokenizer=False)
    index = folder / "model.safetensors.index.json"
    config = load_config(folder / "config.json")
    good = json.loads(index.read_text())
    first = "model-00001-of-00003.safetensors"
    cases = [
        (
            {**good["weight_map"], "x": "model-00004-of-00003.safetensors"},
            r"00004-of-00003\.safetensors, which is missing",
        ),
        ({**good["weight_map"], "x": first}, r"lack x"),
        ({**good["weight_map"], "x": "../other.safetensors"}, r"outside its folder"),
        ({**good["weight_map"], "x": "/etc/passwd"}, r"outside its folder"),
        ({}, r"no weight_map"),
        ({"x": 3}, r"no weight_map"),
    ]
    for weight_map, message in cases:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            load_lm(config, index)
    index.write_text(json.dumps(good))
    tensors = dict(mx.load(str(folder / first)))
    second = folder / "model-00002-of-00003.safetensors"
    mx.save_safetensors(str(second), {**mx.load(str(second)), **dict(list(tensors.items())[:1])})
    with pytest.raises(CheckpointError, match="another file holds as well"):
        load_lm(config, index)


# -------------------------------------------------------------------------------------------- quantization


@pytest.mark.parametrize("q", MODES, ids=lambda q: "-".join(map(str, q.values())))
def test_quantization_is_found(tmp_path: Path, q: dict[str, Any]) -> None:
    """Broken: bits, group size or mode are misread from the shapes, and weights come out as noise."""
    config = ModelConfig.from_dict(small_config())
    folder = write_checkpoint(tmp_path, quantize=q, tokenizer=False)
    model = load(folder, dtype=mx.bfloat16)
    linear = model.transformer.layers[1].gating.linear_out
    assert (linear.bits, linear.group_size, linear.mode) == (q["bits"], q["group_size"], q.get("mode", "affine"))
    assert (model.audio_embs[0].bits, model.depformer.embs[2].group_size) == (q["bits"], q["group_size"])
    equal(flat_parameters(model), quantized_params(random_params(config), config, lambda _: dict(q)))


def test_quantized_model_computes_the_same(tmp_path: Path) -> None:
    """Broken: a quantized model does not compute what its expanded weights would."""
    folder = write_checkpoint(tmp_path, quantize=Q4, tokenizer=False)
    model = load(folder)
    params = flat_parameters(model)
    expanded = {
        name: dense(params, name.removesuffix(".weight"), Q4)
        if name.removesuffix("weight") + "scales" in params
        else value
        for name, value in params.items()
        if not name.endswith((".scales", ".biases"))
    }
    plain = fit_lm(load_config(folder / "config.json"), from_internal(expanded, "mlx", model.config))
    for a, b in zip(logits(model), logits(plain), strict=True):
        assert a.dtype == mx.float32
        assert float(mx.abs(a - b).max()) < 1e-4 * float(mx.abs(b).max())


@pytest.mark.parametrize("block", [False, True])
def test_mixed_recipes(tmp_path: Path, block: bool) -> None:
    """Broken: a recipe that protects some modules with more bits, or leaves them dense, cannot be loaded."""

    def recipe(path: str) -> dict[str, Any] | bool:
        if path.startswith("depformer"):
            return dict(BITS8)
        return False if "emb" in path or path.endswith("layers.0.self_attn.out_proj") else dict(Q4)

    folder = write_checkpoint(tmp_path, conditioned_config(), quantize=recipe, tokenizer=False)
    if block:
        data = json.loads((folder / "config.json").read_text())
        overrides = {f"depformer.slices.{k}.linear_in": BITS8 for k in range(4)} | {"text_emb": False}
        data["quantization"] = {**overrides, "text_linear": Q4}
        (folder / "config.json").write_text(json.dumps(data))
    model = load(folder)
    assert model.depformer.linear_in[1].bits == 8 and model.text_linear.bits == 4
    assert type(model.audio_embs[0]).__name__ == "Embedding"
    assert type(model.transformer.layers[0].self_attn.out_proj).__name__ == "Linear"
    assert all(bool(mx.isfinite(part).all()) for part in logits(model))


def test_configured_quantization_must_agree(tmp_path: Path) -> None:
    """Broken: config.json and weights of different quantizations are combined in silence."""
    folder = write_checkpoint(tmp_path, quantize=Q4, tokenizer=False, block=True)
    load(folder)
    path = folder / "config.json"
    data = json.loads(path.read_text())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"bits": 8, "group_size": 32}, r"says 8 bits in groups of 32 \(affine\), but the file holds 4 bits"),
        ({"bits": 4, "group_size": 64}, r"says 4 bits in groups of 64"),
        ({**Q4, "mode": "mxfp4"}, r"\(mxfp4\), but the file holds"),
        ({**Q4, "text_emb": False}, r"text_emb: config\.json says not quantized"),
        ({**Q4, "depformer.slices.1.emb": BITS8}, r"depformer\.embs\.1: config\.json says 8 bits"),
    ]
    for block, message in cases:
        path.write_text(json.dumps({**data, "quantization": block}))
        with pytest.raises(CheckpointError, match=message):
            load(folder)
    for block, message in [({**Q4, "mode": "magic"}, "mode 'magic'"), ({**Q4, "bits": "4"}, "must be an integer")]:
        path.write_text(json.dumps({**data, "quantization": block}))
        with pytest.raises(ConfigError, match=message):
            load(folder)
    plain = write_checkpoint(tmp_path / "plain", tokenizer=False)
    config = json.loads((plain / "config.json").read_text()) | {"quantization": {**Q4, "text_linear": Q4}}
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="text_linear: config.json says 4 bits.*not quantized"):
        load(plain)


def test_broken_quantization() -> None:
    """Broken: quantized tensors that cannot be right are fed to the matrix product."""
    config = ModelConfig.from_dict(small_config())
    good = from_internal(quantized_params(random_params(config), config, lambda _: dict(Q4)), "mlx", config.lm)
    w, s = good["text_linear.weight"], good["text_linear.scales"]
    cases = [
        ({"text_linear.biases": None}, r"text_linear\.biases is missing"),
        ({"text_linear.weight": None}, r"not a packed uint32 matrix"),
        ({"text_linear.weight": w.astype(mx.float32)}, r"not a packed uint32 matrix"),
        ({"text_linear.scales": s[:, :3], "text_linear.biases": s[:, :3]}, r"do not fit the width 128"),
        ({"text_linear.scales": s[:, :1], "text_linear.biases": s[:, :1]}, None),  # groups of 128: possible
        ({"text_linear.scales": s[:-1]}, r"do not fit"),
        ({"text_linear.weight": w[:, :4]}, r"shapes say 1 bits"),
        ({"text_linear.biases": s[:, :2]}, r"scales and biases differ"),
        ({"text_linear.scales": s.astype(mx.int32), "text_linear.biases": s.astype(mx.int32)}, r"floats are needed"),
        ({"text_linear.scales": s.astype(mx.uint8), "text_linear.biases": None}, None),  # then it is mxfp4
        ({"text_linear.weight": w[:-1], "text_linear.scales": s[:-1], "text_linear.biases": s[:-1]}, r"another shape"),
    ]
    for change, message in cases:
        tensors = {name: value for name, value in {**good, **change}.items() if value is not None}
        if message is None:
            fit_lm(config, tensors)
        else:
            with pytest.raises(CheckpointError, match=message):
                fit_lm(config, tensors)


def test_gguf_blocks(tmp_path: Path) -> None:
    """Broken: Q8_0 weights change on the way into MLX's 8-bit form."""
    folder = write_checkpoint(tmp_path, layout="gguf", tokenizer=False, dtype=mx.float32)
    params = params_of(folder)
    config = load_config(folder / "config.json")
    original = random_params(config, dtype=mx.float32)
    for name in ("text_emb", "transformer.layers.1.gating.linear_in", "depformer.layers.0.in_proj.2"):
        blocks = np.frombuffer(q8_0(np.array(original[f"{name}.weight"])), np.uint8).reshape(-1, 34)
        exact = blocks[:, 2:].view(np.int8).astype(np.float32) * blocks[:, :2].copy().view(np.float16)
        ours = np.array(dense(params, name, {"bits": 8, "group_size": 32}))
        np.testing.assert_allclose(ours, exact.reshape(ours.shape), atol=1e-5 * np.abs(exact).max())
    assert params["out_norm.weight"].dtype == mx.float32


def test_bitsandbytes_rows() -> None:
    """Broken: Kyutai's 8-bit PyTorch files load with wrong scales, or not at all."""
    config = ModelConfig.from_dict(small_config())
    good = from_internal(random_params(config, dtype=mx.float16), "torch", config.lm)
    names = ["text_linear.weight", "depformer.layers.1.self_attn.in_proj_weight", "linears.0.weight"]
    quantized = dict(good)
    for name in names:
        rows = np.array(good[name].astype(mx.float32))
        scale = np.abs(rows).max(axis=1)
        quantized[name] = mx.array(np.round(rows / scale[:, None] * 127).astype(np.int8))
        quantized[name + "_scb"] = mx.array(scale)
    params = flat_parameters(fit_lm(config, quantized))
    exact = flat_parameters(fit_lm(config, good))
    for name in exact:
        assert params[name].dtype == mx.float16
        assert float(mx.abs(params[name] - exact[name]).max()) < 0.02, name
    assert not mx.array_equal(params["text_linear.weight"], exact["text_linear.weight"])
    del quantized["text_linear.weight_scb"]
    with pytest.raises(CheckpointError, match="should be floats: text_linear"):
        fit_lm(config, quantized)
    with pytest.raises(CheckpointError, match="needs an int8 tensor"):
        fit_lm(config, {**good, "linears.0.weight_scb": mx.zeros((64,))})


# ---------------------------------------------------------------------------------------------------- types


def test_types(tmp_path: Path) -> None:
    """Broken: a quantized model runs with bfloat16 activations on the CPU (slow and inexact), or types get mixed."""
    folder = write_checkpoint(tmp_path, conditioned_config(), tokenizer=False)
    assert load(folder).dtype == mx.bfloat16
    for dtype in (mx.float32, mx.float16):
        params = params_of(folder, dtype=dtype)
        types = {value.dtype for name, value in params.items() if not name.startswith("condition_provider.")}
        assert types == {dtype}
    assert params_of(folder)["condition_provider.conditioners.mood.embed.weight"].dtype == mx.float32
    with pytest.raises(ConfigError, match="dtype must be"):
        load(folder, dtype=mx.int32)
    quantized = write_checkpoint(tmp_path / "q", conditioned_config(), quantize=Q4, tokenizer=False)
    types = {value.dtype for value in params_of(quantized).values()}
    assert types == {mx.float32, mx.uint32}
    assert {value.dtype for value in params_of(quantized, dtype=mx.bfloat16).values()} == {
        mx.bfloat16,
        mx.uint32,
        mx.float32,  # conditioners
    }


def test_hibiki_end_of_text(tmp_path: Path) -> None:
    """Broken: Hibiki stops translating at the first end of a sentence, as the reference would not."""
    for name, quantize in (("plain", None), ("q4", Q4)):
        params = {
            kind: params_of(write_checkpoint(tmp_path / name / kind, small_config(model_type=kind), quantize=quantize))
            for kind in ("moshi", "hibiki")
        }
        for key, value in params["moshi"].items():
            changed = params["hibiki"][key]
            if key.startswith("text_emb."):
                assert mx.array_equal(changed[2], value[3]) and not mx.array_equal(value[2], value[3])
                assert mx.array_equal(changed[3:], value[3:]) and mx.array_equal(changed[:2], value[:2])
            else:
                assert mx.array_equal(changed, value)


# ----------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("layout", ["torch", "mlx", "candle"])
@pytest.mark.parametrize("form", ["new", "old"])
def test_lora_is_merged(tmp_path: Path, layout: str, form: str) -> None:
    """Broken: a fine-tuned voice is added to the wrong weights, or with the wrong factor."""
    folder = write_checkpoint(tmp_path, conditioned_config(), layout, lora=form, tokenizer=False)
    config = load_config(folder / "config.json")
    base, merged = random_params(config), params_of(folder)
    update = write_lora(tmp_path / "again.safetensors", base, config)
    pairs = {
        "transformer.layers.1.self_attn.in_proj": "transformer.layers.1.self_attn.in_projs.0",
        "depformer.layers.0.in_proj.2": "depformer.layers.0.self_attn.in_projs.2",
        "depformer.layers.1.out_proj.1": "depformer.layers.1.self_attn.out_projs.1",
        "depformer.layers.0.gating.1.linear_in": "depformer.layers.0.gating.1.linear_in",
        "depformer.linear_out.3": "linears.3",
        "depformer.embs.0.out1": "depformer_text_emb.out1",
        "text_linear": "text_linear",
    }
    for ours, theirs in pairs.items():
        a, b = (np.array(update[f"{theirs}.lora_{part}.weight"].astype(mx.float32)) for part in "AB")
        expected = np.array(base[f"{ours}.weight"].astype(mx.float32)) + 2.0 * (b @ a)
        rounded = mx.array(expected).astype(mx.bfloat16)
        gap = mx.abs(merged[f"{ours}.weight"].astype(mx.float32) - rounded.astype(mx.float32))
        assert float(gap.max()) <= 0.01 * float(np.abs(expected).max())
        assert not mx.array_equal(merged[f"{ours}.weight"], base[f"{ours}.weight"])
    assert mx.array_equal(merged["text_emb.weight"], base["text_emb.weight"])
    assert mx.array_equal(merged["out_norm.weight"], base["out_norm.weight"])


def test_lora_details(tmp_path: Path) -> None:
    """Broken: whole tables in an update are ignored, the factor is, or an update that does not fit is."""
    folder = write_checkpoint(tmp_path, small_config(), "torch", tokenizer=False)
    config = load_config(folder / "config.json")
    weights, path = folder / "model.safetensors", tmp_path / "lora.safetensors"
    base = random_params(config)
    update = write_lora(path, base, config)
    none = flat_parameters(load_lm(config, weights, lora=path, lora_scaling=0.0))
    equal(none, base)
    one, two = (load_lm(config, weights, lora=path, lora_scaling=s, dtype=mx.float32) for s in (1.0, 2.0))
    step = one.text_linear.weight - base["text_linear.weight"].astype(mx.float32)
    twice = two.text_linear.weight - base["text_linear.weight"].astype(mx.float32)
    assert float(mx.abs(twice - 2 * step).max()) < 1e-5 and float(mx.abs(step).max()) > 0.1

    table = mx.random.normal((601, 128))
    mx.save_safetensors(str(path), {**update, "text_emb.weight": table, "depformer_text_emb.weight": table[:, :64]})
    merged = flat_parameters(load_lm(config, weights, lora=path))
    assert mx.array_equal(merged["text_emb.weight"], table.astype(mx.bfloat16))
    assert mx.array_equal(merged["depformer.embs.0.weight"], table[:, :64].astype(mx.bfloat16))

    half = {name: value for name, value in update.items() if name != "text_linear.lora_B.weight"}
    cases: list[tuple[dict[str, mx.array], str]] = [
        ({**update, "nonsense.lora_A.weight": table}, r"not part of this model: nonsense"),
        ({**update, "linears.7.lora_A.weight": table}, r"linear_out\.7\.weight, which the model does not have"),
        ({**update, "text_linear.lora_A.weight": table}, r"does not fit"),
        ({**update, "text_emb.weight": table[1:]}, r"holds text_emb\.weight \[600, 128\]"),
        (half, r"only one of lora_A and lora_B for text_linear"),
    ]
    for tensors, message in cases:
        mx.save_safetensors(str(path), tensors)
        with pytest.raises(CheckpointError, match=message):
            load_lm(config, weights, lora=path)


def test_lora_with_trained_embeddings(tmp_path: Path) -> None:
    """Broken: an update that was trained with ``ft_embed`` is refused, or added to the old tables.

    PyTorch's program wraps each linear layer of an embedding (``low_rank``, ``out1``, ``out2``) and saves all of the
    wrapper: its new base, ``frozen_W``, and the factors that are added to it.
    """
    folder = write_checkpoint(tmp_path, conditioned_config(), "torch", tokenizer=False)
    config = load_config(folder / "config.json")
    base, path = random_params(config), tmp_path / "lora.safetensors"
    update = write_lora(path, base, config)
    layers = {
        "depformer.embs.0.out1": "depformer_text_emb.out1",
        "depformer.embs.2.low_rank": "depformer_emb.1.low_rank",
        "text_emb.out2": "text_emb.out2",
    }
    rng = np.random.default_rng(3)
    new = {
        theirs: mx.array(rng.standard_normal(base[f"{ours}.weight"].shape, np.float32)).astype(mx.bfloat16)
        for ours, theirs in layers.items()
    }
    update |= {f"{theirs}.frozen_W.weight": value for theirs, value in new.items()}
    mx.save_safetensors(str(path), update)
    merged = flat_parameters(
        load_lm(config, folder / "model.safetensors", lora=path, lora_scaling=2.0, dtype=mx.float32)
    )
    for ours, theirs in layers.items():
        a, b, frozen = (
            np.array(update[f"{theirs}.{part}.weight"].astype(mx.float32)) for part in ("lora_A", "lora_B", "frozen_W")
        )
        expected = frozen + 2.0 * (b @ a)
        assert np.abs(np.array(merged[f"{ours}.weight"]) - expected).max() < 1e-5 * np.abs(expected).max()
        assert np.abs(frozen - np.array(base[f"{ours}.weight"].astype(mx.float32))).max() > 1
    # By hand: 1 x 2 factors of rank 1 on a new base of a 2 x 2 layer.
    params = {"text_linear.weight": mx.array([[9.0, 9.0], [9.0, 9.0]])}
    by_hand = {
        "text_linear.frozen_W.weight": mx.array([[1.0, 2.0], [3.0, 4.0]]),
        "text_linear.lora_A.weight": mx.array([[10.0, 20.0]]),
        "text_linear.lora_B.weight": mx.array([[1.0], [0.5]]),
    }
    assert merge_lora(params, by_hand, 2.0, config.lm)["text_linear.weight"].tolist() == [[21, 42], [13, 24]]

    cases = [
        ({"text_emb.out2.weight": new["text_emb.out2"]}, r"holds text_emb\.out2\.weight twice"),
        ({"text_emb.out2.frozen_W.weight": new["text_emb.out2"][1:]}, r"holds text_emb\.out2\.weight \[127, \d+\]"),
        ({"nothing.frozen_W.weight": new["text_emb.out2"]}, r"not part of this model: nothing"),
    ]
    for change, message in cases:
        mx.save_safetensors(str(path), update | change)
        with pytest.raises(CheckpointError, match=message):
            load_lm(config, folder / "model.safetensors", lora=path)


def test_lora_beside_packed_weights(tmp_path: Path) -> None:
    """Broken: an update is rounded into 4-bit weights, is lost, or computes something else than the merged one."""
    folder = write_checkpoint(tmp_path, quantize=Q4, tokenizer=False)
    config, path = load_config(folder / "config.json"), tmp_path / "lora.safetensors"
    write_lora(path, random_params(config), config)
    plain, tuned = (load_lm(config, folder / "model.safetensors", lora=lora) for lora in (None, path))
    weight = tuned.transformer.layers[0].gating.linear_in.linear.weight
    assert mx.array_equal(weight, plain.transformer.layers[0].gating.linear_in.weight)
    unpack_modules(plain)
    merged = merge_lora(flat_parameters(plain), read_tensors(path), config.lora_scaling, config.lm)
    plain.load_weights(list(merged.items()))
    tokens = mx.array(np.random.default_rng(0).integers(0, 60, (1, config.lm.num_streams, 9)))
    for one, other in (
        (tuned(tokens).text_logits, plain(tokens).text_logits),
        (tuned(tokens).logits, plain(tokens).logits),
    ):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=2e-3)


def test_lora_is_not_merged_into_packed_weights(tmp_path: Path) -> None:
    """Broken: the quantizer rounds an update into 4-bit weights, or the reason why not is not told."""
    folder = write_checkpoint(tmp_path, quantize=Q4, tokenizer=False)
    config, path = load_config(folder / "config.json"), tmp_path / "lora.safetensors"
    write_lora(path, random_params(config), config)
    with pytest.raises(CheckpointError, match=r"quantized: merge it into the bf16 checkpoint"):
        fit_lm(config, read_tensors(folder / "model.safetensors"), update=read_tensors(path))


# ------------------------------------------------------------------------------------ the rest of a checkpoint


def test_complete_checkpoint(tmp_path: Path) -> None:
    """Broken: the helper that other tests rely on writes checkpoints with parts missing."""
    files = resolve(write_checkpoint(tmp_path, mimi=True, lora="new"))
    assert files.mimi is not None and files.mimi_config is not None and files.tokenizer is not None
    assert files.lora is not None
    from moshi_mlx.models.mimi import MimiConfig

    mimi = load_mimi(files.mimi, MimiConfig.from_dict(json.loads(files.mimi_config.read_text())))
    codes = mimi.encode(mx.zeros((1, 1, 1920)))
    assert codes.shape == (1, 8, 1)
    import sentencepiece

    assert sentencepiece.SentencePieceProcessor(model_file=str(files.tokenizer)).vocab_size() == 600


def test_voice_prompts(tmp_path: Path) -> None:
    """Broken: a voice saved by torch itself is misread."""
    from_torch = load_voice_prompt(GOLDEN / "voice" / "voice.pt")
    plain = load_voice_prompt(GOLDEN / "voice" / "voice.safetensors")
    assert from_torch.embeddings.shape == (5, 16) and from_torch.embeddings.dtype == mx.bfloat16
    assert mx.array_equal(from_torch.embeddings, plain.embeddings)
    assert mx.array_equal(from_torch.cache, plain.cache) and from_torch.cache.dtype == mx.int64
    import tarfile

    with tarfile.open(tmp_path / "voices.tgz", "w:gz") as archive:
        for name in ("NATF0", "VARM3"):
            archive.add(GOLDEN / "voice" / "voice.pt", f"voices/{name}.pt")
    assert list_voices(tmp_path / "voices.tgz") == ["NATF0", "VARM3"]
    packed = load_voice_prompt(tmp_path / "voices.tgz", "VARM3")
    assert mx.array_equal(packed.embeddings, plain.embeddings)
    with pytest.raises(CheckpointError, match="no voice 'X'; it has NATF0, VARM3"):
        load_voice_prompt(tmp_path / "voices.tgz", "X")


@pytest.mark.parametrize("case", ["torch", "candle", "gguf"])
def test_loading_holds_the_model_once(tmp_path: Path, case: str) -> None:
    """Broken: loading takes twice the model's memory, and a model that would fit does not load.

    For checkpoints of 600 MB and more: ``python -m tests.helpers.load_memory 600``.
    """
    result = measure(tmp_path, case, 45)
    assert result["model"] > 35e6
    assert result["peak"] < 1.15 * result["model"] + 16e6
