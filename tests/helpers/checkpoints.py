"""Complete small checkpoints with random weights, in every layout that can be loaded."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from moshi_mlx.checkpoint.layouts import from_internal
from moshi_mlx.config import DEFAULT_MIMI, DEFAULT_TOKENIZER, ModelConfig
from moshi_mlx.models.lm import Lm

from .tokenizer import train_tokenizer

DATA = Path(__file__).resolve().parent.parent / "data"
LAYOUTS = ("mlx", "torch", "torch-split", "candle", "sharded", "helium", "gguf")

NO_FUSER = {"cross_attention_pos_emb": False, "cross_attention_pos_emb_scale": 1, "sum": [], "prepend": [], "cross": []}


def small_config(**changes: Any) -> dict[str, Any]:
    """A config.json like Moshi 7B's with all widths multiples of 64, so that every part can be quantized."""
    config: dict[str, Any] = {
        "moshi_name": "model.safetensors",
        "mimi_name": DEFAULT_MIMI,
        "tokenizer_name": DEFAULT_TOKENIZER,
        "model_type": "moshi",
        "dim": 128,
        "text_card": 600,
        "existing_text_padding_id": 3,
        "n_q": 6,
        "dep_q": 3,
        "card": 64,
        "num_heads": 2,
        "num_layers": 2,
        "hidden_scale": 4.5,
        "causal": True,
        "layer_scale": None,
        "context": 32,
        "max_period": 10000,
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
        "depformer_dim": 64,
        "depformer_dim_feedforward": 192,
        "depformer_num_heads": 2,
        "depformer_num_layers": 2,
        "depformer_context": 8,
        "depformer_pos_emb": "none",
        "delays": [0, 0, 1, 1, 0, 1, 1],
    }
    return config | changes


def conditioned_config(**changes: Any) -> dict[str, Any]:
    """Everything at once: schedule, muxed text, low-rank tables, depth norms, conditions, cross-attention, heads."""
    voice = {"type": "tensor", "tensor": {"dim": 24}}
    mood = {"type": "lut", "lut": {"n_bins": 3, "dim": 16, "tokenizer": "noop", "possible_values": ["calm", "glad"]}}
    return small_config(
        dep_q=4,
        depformer_weights_per_step_schedule=[0, 1, 1, 2],
        depformer_low_rank_embeddings=32,
        depformer_norm="layer_norm",
        demux_second_stream=True,
        cross_attention=True,
        conditioners={"voice": voice, "mood": mood},
        fuser=NO_FUSER | {"sum": ["mood"], "cross": ["voice"], "cross_attention_pos_emb": True},
        extra_heads_num_heads=2,
        **changes,
    )


def helium_config(**changes: Any) -> dict[str, Any]:
    """Hugging Face's config.json of a small Helium with grouped keys and values."""
    return {
        "architectures": ["HeliumForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        "head_dim": 32, "hidden_act": "silu", "hidden_size": 128, "intermediate_size": 384,
        "max_position_embeddings": 64, "mlp_bias": False, "model_type": "helium", "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-08, "rope_theta": 20000.0,
        "tie_word_embeddings": False, "vocab_size": 600,
    } | changes  # fmt: skip


def random_params(config: ModelConfig, seed: int = 0, dtype: mx.Dtype = mx.bfloat16) -> dict[str, mx.array]:
    """Weights for a model by its own names, of a size that keeps activations of order one; conditioners in float32."""
    rng = np.random.default_rng(seed)
    params: dict[str, mx.array] = {}
    for name, like in tree_flatten(Lm(config.lm).parameters()):
        if like.ndim == 1:
            value = 0.1 * rng.standard_normal(like.shape, np.float32) + (0 if name.endswith("bias") else 1)
        else:
            value = rng.standard_normal(like.shape, np.float32) / np.float32(np.sqrt(like.shape[-1]))
        params[name] = mx.array(value).astype(mx.float32 if name.startswith("condition_provider.") else dtype)
    return params


def quantized_params(
    params: Mapping[str, mx.array], config: ModelConfig, choose: Callable[[str], dict[str, Any] | bool]
) -> dict[str, mx.array]:
    """Quantize the modules for which ``choose`` returns ``{"bits": ..., "group_size": ..., "mode": ...}``."""
    model = Lm(config.lm)
    model.update(tree_unflatten(list(params.items())))

    def predicate(path: str, module: nn.Module) -> dict[str, Any] | bool:
        return hasattr(module, "to_quantized") and not path.startswith("condition_provider") and choose(path)

    nn.quantize(model, class_predicate=predicate)
    return dict(tree_flatten(model.parameters()))


def write_checkpoint(
    folder: str | Path,
    config: dict[str, Any] | None = None,
    layout: str = "mlx",
    *,
    quantize: dict[str, Any] | Callable[[str], dict[str, Any] | bool] | None = None,
    mimi: bool = False,
    tokenizer: bool = True,
    lora: str | None = None,
    seed: int = 0,
    dtype: mx.Dtype = mx.bfloat16,
    block: bool = False,
) -> Path:
    """Write config.json, weights and whatever else is asked for.

    Parameters
    ----------
    folder : path
        Made if it does not exist.
    config : dict, optional
        config.json; by default :func:`small_config`, or :func:`helium_config` for ``helium``.
    layout : str
        One of ``LAYOUTS``. ``sharded`` is PyTorch's, in three files with an index; ``torch-split`` has
        ``in_projs.S.weight``; ``gguf`` is candle's in Q8_0.
    quantize : dict or callable, optional
        ``{"bits": 4, "group_size": 32}`` for all modules, or a choice for each by its name (layout ``mlx`` only).
    mimi, tokenizer : bool
        Whether to write a small codec with its configuration, and a tokenizer of ``text_card`` pieces.
    lora : {None, "new", "old"}
        Write ``lora.safetensors`` with split or stacked projections, rank 4.
    seed, dtype
        Of the weights. The same seed gives the same weights in every layout.
    block : bool
        Whether config.json says how the file is quantized.

    Returns
    -------
    Path
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = dict(config if config is not None else helium_config() if layout == "helium" else small_config())
    parsed = ModelConfig.from_dict(data)
    params = random_params(parsed, seed, dtype)
    if quantize is not None:
        assert layout == "mlx", "only MLX's layout holds quantized weights"
        fixed = dict(quantize) if isinstance(quantize, dict) else {}
        params = quantized_params(params, parsed, quantize if callable(quantize) else lambda _: dict(fixed))
        if block:
            data["quantization"] = fixed
    name = "model.q8.gguf" if layout == "gguf" else data.get("moshi_name", "model.safetensors")
    if layout == "gguf":
        data["moshi_name"] = name
    _write_weights(folder / name, params, parsed, layout)
    if lora is not None:
        write_lora(folder / "lora.safetensors", params, parsed, stacked=lora == "old", seed=seed + 1)
        data |= {"lora": True, "lora_rank": 4, "lora_scaling": 2.0, "lora_name": "lora.safetensors"}
    if mimi:
        data["mimi_config_name"] = "mimi.json"
        write_mimi(folder / str(data.get("mimi_name", DEFAULT_MIMI)), folder / "mimi.json", seed)
    if tokenizer and layout != "helium":
        train_tokenizer(folder / str(data.get("tokenizer_name", DEFAULT_TOKENIZER)), parsed.lm.text_card)
    (folder / "config.json").write_text(json.dumps(data, indent=1) + "\n")
    return folder


def _write_weights(path: Path, params: Mapping[str, mx.array], config: ModelConfig, layout: str) -> None:
    if layout == "gguf":
        write_gguf(path, from_internal(params, "candle", config.lm))
    elif layout == "sharded":
        tensors = from_internal(params, "torch", config.lm)
        names = sorted(tensors)
        weight_map = {}
        for shard in range(3):
            file = f"model-{shard + 1:05d}-of-00003.safetensors"
            mx.save_safetensors(str(path.with_name(file)), {name: tensors[name] for name in names[shard::3]})
            weight_map |= dict.fromkeys(names[shard::3], file)
        index = {"metadata": {"total_size": sum(v.nbytes for v in tensors.values())}, "weight_map": weight_map}
        path.with_name(path.name + ".index.json").write_text(json.dumps(index))
    else:
        tensors = from_internal(params, layout.removesuffix("-split"), config.lm)
        if layout == "torch-split":
            tensors = _split_projections(tensors, config.lm.num_weight_sets)
        mx.save_safetensors(str(path), tensors)


def _split_projections(tensors: Mapping[str, mx.array], sets: int) -> dict[str, mx.array]:
    """Newer PyTorch names: every attention projection is a list over weight sets."""
    result: dict[str, mx.array] = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"(.*self_attn\.(?:in|out)_proj)[._]weight", name)
        if match is None:
            result[name] = value
            continue
        parts = mx.split(value, sets, axis=0) if name.startswith("depformer.") else [value]
        result |= {f"{match[1]}s.{index}.weight": part for index, part in enumerate(parts)}
    return result


def write_lora(
    path: Path,
    params: Mapping[str, mx.array],
    config: ModelConfig,
    *,
    stacked: bool = False,
    seed: int = 1,
    rank: int = 4,
) -> dict[str, mx.array]:
    """Write an update of all linear layers as moshi-finetune does; returns its tensors."""
    rng = np.random.default_rng(seed)
    sets = config.lm.num_weight_sets
    update: dict[str, mx.array] = {}
    for name, value in _split_projections(from_internal(params, "torch", config.lm), sets).items():
        table = re.search(r"(emb|embed)(\.\d+)?\.weight$", name)
        if value.ndim != 2 or not name.endswith(".weight") or table or name.startswith("condition_provider."):
            continue
        module = name.removesuffix(".weight")
        for part, shape in (("A", (rank, value.shape[1])), ("B", (value.shape[0], rank))):
            array = mx.array(rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[1] * 4)))
            update[f"{module}.lora_{part}.weight"] = array.astype(mx.bfloat16)
    if stacked:
        update = _stack_updates(update)
    mx.save_safetensors(str(path), update)
    return update


def _stack_updates(update: Mapping[str, mx.array]) -> dict[str, mx.array]:
    result: dict[str, mx.array] = {}
    groups: dict[str, list[mx.array]] = {}
    for name, value in update.items():
        match = re.fullmatch(r"(.*self_attn\.(?:in|out)_proj)s\.\d+\.(lora_[AB]\.weight)", name)
        if match is None:
            result[name] = value
        else:
            groups.setdefault(f"{match[1]}.{match[2]}", []).append(value)
    return result | {name: mx.concatenate(parts, axis=0) for name, parts in groups.items()}


def write_mimi(path: Path, config_path: Path | None = None, seed: int = 0) -> None:
    """Write a small random codec (24 kHz, 12.5 Hz, 8 codebooks of 64 entries) in the published layout."""
    from moshi_mlx.checkpoint.mimi import published_mimi_weights
    from moshi_mlx.models.mimi import Mimi, MimiConfig, MimiTransformerConfig, QuantizerConfig, SEANetConfig

    config = MimiConfig(
        seanet=SEANetConfig(dimension=32, n_filters=4),
        quantizer=QuantizerConfig(dimension=16, n_q=8, bins=64, input_dimension=32, output_dimension=32),
        transformer=MimiTransformerConfig(
            d_model=32, num_heads=2, num_layers=1, dim_feedforward=64, input_dimension=32, output_dimensions=(32,)
        ),
    )
    mimi = Mimi(config)
    rng = np.random.default_rng(seed)
    params = {
        name: mx.array(
            rng.standard_normal(value.shape, np.float32) * np.float32(0.2 / np.sqrt(max(1, value.shape[-1])))
        )
        for name, value in tree_flatten(mimi.parameters())
    }
    mimi.update(tree_unflatten(list(params.items())))
    mx.save_safetensors(str(path), published_mimi_weights(mimi))
    if config_path is not None:
        config_path.write_text(json.dumps(config.to_dict(), indent=1) + "\n")


# -------------------------------------------------------------------------------------------------- GGUF


def write_gguf(path: Path, tensors: Mapping[str, mx.array], data: bool = True) -> None:
    """Write candle's GGUF: matrices with a width that is a multiple of 32 in Q8_0, the rest in float32."""
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), 1)
    header += _gguf_string("general.alignment") + struct.pack("<II", 4, 32)
    blobs: list[bytes] = []
    offset = 0
    for name, value in tensors.items():
        quantized = value.ndim == 2 and value.shape[1] % 32 == 0
        size = prod(value.shape) // 32 * 34 if quantized else prod(value.shape) * 4
        dims = value.shape[::-1]
        header += _gguf_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 8 if quantized else 0, offset)
        padded = -(-size // 32) * 32
        offset += padded
        if data:
            plain = np.array(value.astype(mx.float32))
            blobs.append((q8_0(plain) if quantized else plain.tobytes()).ljust(padded, b"\0"))
    header += b"\0" * (-len(header) % 32)
    with path.open("wb") as file:
        file.write(header + b"".join(blobs))
        file.truncate(len(header) + offset)


def q8_0(values: np.ndarray) -> bytes:
    """Blocks of 32: a float16 scale, largest magnitude / 127, and int8 quotients (ggml ``quantize_row_q8_0``)."""
    blocks = values.reshape(-1, 32)
    scales = (np.abs(blocks).max(axis=1) / 127).astype(np.float16)
    safe = np.where(scales == 0, 1, scales.astype(np.float32))
    codes = np.round(blocks / safe[:, None]).clip(-127, 127).astype(np.int8)
    return np.concatenate([scales[:, None].view(np.uint8), codes.view(np.uint8)], axis=1).tobytes()


def _gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


# --------------------------------------------------------------------------------------------- manifests

_DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32, "I64": mx.int64}


def read_manifest(name: str) -> dict[str, Any]:
    """A manifest of ``tests/data/manifests``, as it is."""
    manifest: dict[str, Any] = json.loads((DATA / "manifests" / f"{name}.json").read_text())
    return manifest


def manifest_tensors(manifest: Mapping[str, Any]) -> dict[str, mx.array]:
    """The tensors that a manifest lists, as zeros that are never evaluated; ``{a..b}`` is every integer between."""
    return {
        name: mx.zeros(shape, _DTYPES[dtype])
        for pattern, (shape, dtype) in manifest["tensors"].items()
        for name in _expand(pattern)
    }


def _expand(pattern: str) -> Iterator[str]:
    literals = re.split(r"\{\d+\.\.\d+\}", pattern)
    ranges = [range(int(a), int(b) + 1) for a, b in re.findall(r"\{(\d+)\.\.(\d+)\}", pattern)]
    for numbers in product(*ranges):
        yield literals[0] + "".join(f"{number}{text}" for number, text in zip(numbers, literals[1:], strict=True))


def write_sparse(path: Path, tensors: Mapping[str, mx.array]) -> None:
    """A safetensors file of the tensors' names, shapes and types whose data is a hole: no space, all zeros."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header, offset = {}, 0
    for name, value in tensors.items():
        span = [offset, offset + value.nbytes]
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": span}
        offset += value.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
