"""A checkpoint as the quantizer sees it: every tensor of the model, unread, under the model's own names.

Whatever the library loads can be a source: PyTorch, candle, MLX and Hugging Face layouts, shards, GGUF, a LoRA on top,
and checkpoints that are quantized already. Fitting is the library's, so a file that lacks a tensor is refused here with
the same words as there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from moshi_mlx.checkpoint.fit import fit_lm, flat_parameters, load_config
from moshi_mlx.checkpoint.gguf import iterate_gguf, read_gguf_header
from moshi_mlx.checkpoint.layouts import stored_names
from moshi_mlx.checkpoint.quantization import FLOATS, Quantization
from moshi_mlx.checkpoint.readers import expand_shards, read_json, read_shapes, read_tensors
from moshi_mlx.checkpoint.resolve import CheckpointFiles
from moshi_mlx.config import LmConfig, ModelConfig
from moshi_mlx.errors import CheckpointError

from .plan.recipes import Module, modules_of
from .write.writer import Entry, StreamingWriter

__all__ = ["Source", "any_conditions", "open_source", "scratch_bytes"]


@dataclass
class Source:
    """An open checkpoint.

    Attributes
    ----------
    config : ModelConfig
    data : dict
        config.json as it is; made from the model's sizes where the checkpoint has none.
    tensors : dict of str to mx.array
        By the names of :class:`moshi_mlx.models.lm.Lm`, unread; whoever takes one should also remove it.
    modules : list of Module
        What can be quantized.
    quantized : mapping of str to Quantization
        What is quantized already.
    dtype : mx.Dtype
        Type of what is not quantized.
    merged : bool
        Whether a LoRA was merged.
    size : int
        Bytes of the files that were read.
    """

    config: ModelConfig
    data: dict[str, Any]
    tensors: dict[str, mx.array]
    modules: list[Module]
    quantized: Mapping[str, Quantization]
    dtype: mx.Dtype
    merged: bool
    size: int = 0

    def parts(self, module: str) -> dict[str, mx.array]:
        """What a module is made of: ``weight``, and ``scales`` and ``biases`` where it is quantized."""
        names = {part: f"{module}.{part}" for part in ("weight", "scales", "biases")}
        return {part: self.tensors[name] for part, name in names.items() if name in self.tensors}


def any_conditions(config: LmConfig) -> list[dict[str, str | None]] | None:
    """Conditions for one conversation: the first that each table has."""
    tables = config.conditioners.items()
    rows = {name: (c.possible_values or (None,))[0] if c.type == "lut" else None for name, c in tables}
    return [rows] if rows else None


def scratch_bytes(files: CheckpointFiles) -> int:
    """Disk space that :func:`open_source` needs: GGUF has to be unpacked first."""
    gguf = [path for path in files.weights if path.suffix == ".gguf"]
    return sum(int(path.stat().st_size * 1.1) for path in gguf)


def open_source(
    files: CheckpointFiles,
    scratch: Path,
    *,
    lora: str | Path | None = None,
    lora_scaling: float | None = None,
    dtype: mx.Dtype | None = None,
) -> Source:
    """Read the headers of a checkpoint and fit it to its configuration; nothing large is read.

    Parameters
    ----------
    files : CheckpointFiles
        From :func:`moshi_mlx.checkpoint.resolve.resolve`.
    scratch : path
        A folder for what has to be unpacked.
    lora, lora_scaling
        An update to merge; by default what the checkpoint names.
    dtype : mx.Dtype, optional
        Type of what is not quantized; by default the file's.

    Raises
    ------
    CheckpointError, ConfigError
        If a file is broken or does not fit.
    """
    if not files.weights:
        raise CheckpointError(f"{files.source} has no weights yet: there is nothing to quantize")
    config = load_config(files.config, files.weights)
    data = _without_file(config) if files.config is None else dict(read_json(files.config))
    names = set(read_shapes(files.weights))
    paths = [_unpack(path, scratch) if path.suffix == ".gguf" else path for path in files.weights]
    raw = read_tensors(paths)
    gguf = any(path.suffix == ".gguf" for path in files.weights)
    target = dtype or (mx.bfloat16 if gguf else _float_type(raw))
    update_path = lora or files.lora
    update = None if update_path is None else read_tensors(update_path)
    # Hibiki's padding row is copied when a checkpoint is loaded; the file keeps the original.
    fitting = replace(config, model_type="moshi") if config.model_type == "hibiki" else config
    try:
        model = fit_lm(fitting, raw, update=update, lora_scaling=lora_scaling, dtype=target)
    except CheckpointError as error:
        where = ", ".join(map(str, files.weights))
        raise CheckpointError(f"{where}{'' if update is None else f' with {update_path}'}: {error}") from error
    tensors = flat_parameters(model)
    for name, value in tensors.items():
        if name.startswith("condition_provider.") and value.dtype == mx.float32:
            tensors[name] = value.astype(_stored_type(name, raw, names))
    quantized = {
        name: Quantization(module.bits, module.group_size, module.mode)
        for name, module in model.named_modules()
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    }

    def aliases(module: str) -> list[str]:
        return [name.removesuffix(".weight") for name in stored_names(f"{module}.weight", "mlx", config.lm)]

    read = [file for path in files.weights for file in expand_shards(path)]
    size = sum(Path(path).stat().st_size for path in [*read, *([] if update_path is None else [update_path])])
    return Source(config, data, tensors, modules_of(model, aliases), quantized, target, update is not None, size)


def _float_type(tensors: Mapping[str, mx.array]) -> mx.Dtype:
    """The type of most of the weights that are floats."""
    sizes = dict.fromkeys(FLOATS, 0)
    for name, value in tensors.items():
        if value.dtype in sizes and not name.endswith("weight_scb"):
            sizes[value.dtype] += value.nbytes
    return max(FLOATS, key=lambda dtype: sizes[dtype])


def _stored_type(name: str, raw: Mapping[str, mx.array], names: set[str]) -> mx.Dtype:
    """Conditioners keep the type that the file has for them; loading them always gives float32."""
    found = raw[name].dtype if name in names else mx.float32
    return found if found in FLOATS else mx.float32


def _unpack(path: Path, scratch: Path) -> Path:
    """GGUF as safetensors, tensor by tensor: MLX cannot read single tensors of candle's files when they are needed."""
    entries: dict[str, Entry] = {}
    types = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
    for tensor in read_gguf_header(path)[0]:
        if tensor.kind == "Q8_0":
            *rows, width = tensor.shape
            stem = tensor.name.removesuffix("weight")
            entries[stem + "weight"] = Entry((*rows, width // 4), mx.uint32)
            for part in ("scales", "biases"):
                entries[stem + part] = Entry((*rows, width // 32), mx.float16)
        else:
            entries[tensor.name] = Entry(tensor.shape, types[tensor.kind])
    target = scratch / "unpacked.safetensors"
    if target.exists():  # when it was measured
        return target
    with StreamingWriter(target, entries) as writer:
        for name, array in iterate_gguf(path):
            writer.write(name, array)
    return target


def _without_file(config: ModelConfig) -> dict[str, Any]:
    """A config.json for the published folders that have none."""
    lm = asdict(config.lm)
    for key in LmConfig._INTERNAL:
        lm.pop(key)
    if config.model_type == "personaplex":
        return {"model_type": "personaplex"}
    data = {key: list(value) if isinstance(value, tuple) else value for key, value in lm.items()}
    if not config.lm.text_start_row:
        return _helium(config.lm, config.tokenizer_name)
    empty = [key for key, value in data.items() if value is None and not re.search(r"layer_scale", key)]
    for key in ("conditioners", *empty):
        data.pop(key, None)
    return {"model_type": config.model_type, **data}


def _helium(lm: LmConfig, tokenizer: str | None) -> dict[str, Any]:
    """Hugging Face's names: the text model without extra rows can be told in no other way."""
    return {
        "model_type": "helium",
        "hidden_size": lm.dim,
        "intermediate_size": lm.hidden,
        "num_attention_heads": lm.num_heads,
        "num_key_value_heads": lm.num_heads // lm.kv_repeat,
        "head_dim": lm.dim // lm.num_heads,
        "num_hidden_layers": lm.num_layers,
        "max_position_embeddings": lm.context,
        "rope_theta": lm.max_period,
        "rms_norm_eps": 1e-8,
        "vocab_size": lm.text_card,
        "tie_word_embeddings": False,
        "tokenizer_name": tokenizer,
    }
