"""Weights from files into a model: layout and quantization are found from the files, and everything must fit.

Loading reads each tensor once, straight into the memory where it stays: headers are checked, names are translated,
modules are replaced by quantized ones where the file has scales, shapes and types are compared with the model, and
only then are the tensors read, a few at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import EOS_ID, PAD_ID, LmConfig, ModelConfig
from ..errors import CheckpointError, ConfigError, MoshiError
from ..models.lm import Lm
from .finite import check_finite
from .layouts import MISMATCH, detect_layout, stored_names, to_internal
from .lora import LowRank, attach_lora, merge_lora
from .quantization import FLOATS, dequantize_tables, find_quantization, module_widths, quantize_modules
from .readers import read_json, read_shapes, read_tensors, shown

__all__ = ["fit_lm", "flat_parameters", "guess_config", "load_config", "load_lm"]

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

_BATCH_BYTES = 16 * 2**20


def load_config(path: str | os.PathLike[str] | None, weights: Paths = ()) -> ModelConfig:
    """Read config.json; without one, recognize the model by its weights' shapes.

    Raises
    ------
    CheckpointError, ConfigError
        If the file is broken, or says something unknown or unsupported, or is missing and the weights are not those of
        a model that comes without one; the message names the file.
    """
    if path is None:
        shapes = read_shapes(weights)
        config = guess_config(shapes)
        if not _resembles(shapes, config.lm):
            first = weights if isinstance(weights, (str, os.PathLike)) else next(iter(weights), "")
            raise CheckpointError(
                f"{Path(first).parent} has no config.json, and its weights are not those of Moshi 7B, PersonaPlex 7B "
                "or Helium preview, which come without one: put the config.json that belongs to them beside them"
            )
        return config
    data = read_json(path)
    try:
        return ModelConfig.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def guess_config(shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """The published model without a config.json that has these tensors: Moshi 7B, PersonaPlex or Helium preview."""
    audio = any(re.match(r"(audio_embs|emb)\.", name) for name in shapes)
    if not audio and shapes.get("text_emb.weight", (0,))[0] == 48000:
        return ModelConfig.helium_preview()
    sixteen = {"linears.15.weight", "depformer.15.linear_out.weight", "depformer.slices.15.linear_out.weight"}
    return ModelConfig.personaplex() if sixteen & shapes.keys() else ModelConfig.moshi_7b()


def _resembles(shapes: Mapping[str, tuple[int, ...]], config: LmConfig) -> bool:
    """Whether tensors of any layout and quantization have this model's width, layers, tokens and streams."""
    norm = shapes.get("out_norm.weight") or shapes.get("out_norm.alpha") or (0,)
    tokens = shapes.get("text_emb.weight") or (0,)
    layers = {int(m[1]) for name in shapes if (m := re.match(r"transformer\.layers\.(\d+)\.", name))}
    streams = {int(m[2]) for name in shapes if (m := re.match(r"(audio_embs|emb)\.(\d+)\.", name))}
    return (
        norm[-1] == config.dim
        and tokens[0] == config.text_card + config.text_start_row
        and layers == set(range(config.num_layers))
        and streams == set(range(config.n_q))
    )


def load_lm(
    config: ModelConfig | LmConfig,
    paths: Paths,
    *,
    lora: str | os.PathLike[str] | None = None,
    lora_scaling: float | None = None,
    dtype: mx.Dtype | None = None,
    prepare: Callable[[Lm], object] | None = None,
) -> Lm:
    """A language model with the weights of a checkpoint.

    Parameters
    ----------
    config : ModelConfig or LmConfig
    paths : path or paths
        Safetensors or GGUF files, or the index of a sharded checkpoint; in PyTorch's, MLX's, candle's or (Helium)
        Hugging Face's layout.
    lora : path, optional
        ``lora.safetensors`` of moshi-finetune, merged into the weights; beside quantized ones it stays on its own.
    lora_scaling : float, optional
        Factor on it; by default the configuration's.
    dtype : mx.Dtype, optional
        Type of dense weights, scales and norms. By default the file's; but float32 for a quantized model on the CPU,
        whose bfloat16 matrix products are slow and inexact in MLX. Conditioners are float32 in any case.
    prepare : callable, optional
        Called with the model before its tensors are read: what it drops is never in memory.

    Raises
    ------
    CheckpointError
        If a file is broken, or a tensor is missing, left over, misshapen, of a wrong type or not finite; the first few
        are named.
    """
    listed = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]
    where = ", ".join(str(path) for path in listed)
    tensors = read_tensors(listed)
    update = None if lora is None else read_tensors(lora)
    try:
        model = fit_lm(config, tensors, update=update, lora_scaling=lora_scaling, dtype=dtype, beside=True)
    except CheckpointError as error:
        raise CheckpointError(f"{where}{'' if lora is None else f' with {lora}'}: {error}") from error
    tensors.clear()  # the model holds what it needs; the rest must not stay in memory
    if update is not None:
        update.clear()
    try:
        if prepare is not None:
            prepare(model)
        _read(model, where)
    except MoshiError:
        raise
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from error
    return model


def fit_lm(
    config: ModelConfig | LmConfig,
    tensors: Mapping[str, mx.array],
    *,
    update: Mapping[str, mx.array] | None = None,
    lora_scaling: float | None = None,
    dtype: mx.Dtype | None = None,
    beside: bool = False,
) -> Lm:
    """Like :func:`load_lm`, from a file's tensors; they stay unread (lazy) in the model returned.

    Without ``beside``, an update of quantized modules is refused.
    """
    whole = config if isinstance(config, ModelConfig) else ModelConfig(lm=config)
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    layout = detect_layout(tensors)
    params = to_internal(tensors, layout, whole.lm)
    scaling = whole.lora_scaling if lora_scaling is None else lora_scaling
    pairs: LowRank = {}
    if update is not None:
        params = merge_lora(params, update, scaling, whole.lm, pairs if beside else None)
    model = _build(whole.lm, len(tensors))
    if whole.tied_text_head and not any(name.startswith("text_linear.") for name in params):
        params.update(
            {f"text_linear.{name.split('.', 1)[1]}": v for name, v in params.items() if name.startswith("text_emb.")}
        )

    def names_in_file(module: str) -> list[str]:
        names = stored_names(f"{module}.weight", layout, whole.lm)
        return [name.removesuffix(".weight") for name in names]

    found = find_quantization(params, module_widths(model), whole.quantization, names_in_file)
    replaced = quantize_modules(model, found)
    target = dtype or _file_dtype(params, bool(found))
    params = dequantize_tables(params, {name: q for name, q in found.items() if name not in replaced}, target)
    _check_fit(params, model, replaced, lambda name: (stored_names(name, layout, whole.lm) or [name])[0])
    params = {name: _cast(name, value, replaced, target) for name, value in params.items()}
    if whole.model_type == "hibiki":
        _pad_ends_the_text(params)
    model.load_weights(list(params.items()), strict=True)
    attach_lora(model, pairs, scaling, target)
    model.eval()
    return model


def flat_parameters(model: Lm) -> dict[str, mx.array]:
    """The model's tensors by name, quantized parts included: what ``from_internal`` takes."""
    return dict(tree_flatten(model.parameters()))


def _build(config: LmConfig, count: int) -> Lm:
    """The model without weights, unless its configuration is too large for a file with ``count`` tensors to fill."""
    sizes = {
        "num_layers": config.num_layers,
        "n_q": config.n_q,
        "extra_heads_num_heads": config.extra_heads_num_heads,
        "depformer_num_layers": config.depformer_num_layers * config.num_weight_sets,
    }
    for key, size in sizes.items():
        if size > count:
            raise CheckpointError(f"the file has {count} tensors, too few for {key} in config.json{MISMATCH}")
    try:
        return Lm(config)
    except MoshiError:
        raise
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ConfigError(f"config.json describes a model of impossible sizes ({reason})") from error


def _file_dtype(params: Mapping[str, mx.array], quantized: bool) -> mx.Dtype:
    """The type that activations will have: the file's, unless a quantized model runs on the CPU."""
    if quantized and mx.default_device() == mx.cpu:
        return mx.float32
    for name in ("text_emb.scales", "text_emb.weight", "out_norm.weight"):
        if name in params and params[name].dtype in FLOATS:
            return params[name].dtype
    return mx.bfloat16


def _cast(name: str, value: mx.array, quantized: set[str], target: mx.Dtype) -> mx.array:
    """Floats become ``target``; packed integers and the scales of the fp modes stay."""
    if value.dtype not in FLOATS:
        return value
    if name.startswith("condition_provider.") and name.rsplit(".", 1)[0] not in quantized:
        return value.astype(mx.float32)
    return value.astype(target)


def _check_fit(params: Mapping[str, mx.array], model: Lm, quantized: set[str], file_name: Callable[[str], str]) -> None:
    """Compare names, shapes and types with the model's."""
    expected = flat_parameters(model)
    missing = [file_name(name) for name in expected.keys() - params.keys()]
    extra = [file_name(name) for name in params.keys() - expected.keys()]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {shown(missing)}")
    if extra:
        problems.append(f"{len(extra)} tensors are not part of this model: {shown(extra)}")
    misshapen = [
        f"{file_name(name)} is {list(params[name].shape)}, should be {list(value.shape)}"
        for name, value in expected.items()
        if name in params and params[name].shape != value.shape
    ]
    if misshapen:
        problems.append(f"{len(misshapen)} tensors have another shape: {shown(misshapen)}")
    wrong = [
        f"{file_name(name)} is {value.dtype}"
        for name, value in params.items()
        if value.dtype not in FLOATS
        and not (name.rsplit(".", 1)[0] in quantized and name.rsplit(".", 1)[1] in ("weight", "scales"))
    ]
    if wrong:
        problems.append(f"{len(wrong)} tensors should be floats: {shown(wrong)}")
    if problems:
        raise CheckpointError("; ".join(problems) + MISMATCH)


def _pad_ends_the_text(params: dict[str, mx.array]) -> None:
    """Hibiki: an early end of text reads as padding, so that translation goes on (moshi ``models/loaders.py``)."""
    for part in ("weight", "scales", "biases"):
        name = f"text_emb.{part}"
        if name in params and params[name].shape[0] > PAD_ID:
            table = params[name]
            params[name] = mx.concatenate([table[:EOS_ID], table[PAD_ID : PAD_ID + 1], table[PAD_ID:]])


def _read(model: Lm, where: str) -> None:
    """Evaluate all weights, a bounded number of bytes at a time, so that nothing is held twice."""
    batch: dict[str, mx.array] = {}
    size = 0
    for name, value in flat_parameters(model).items():
        batch[name] = value
        size += value.nbytes
        if size >= _BATCH_BYTES:
            check_finite(batch, where)
            batch, size = {}, 0
    check_finite(batch, where)
    mx.clear_cache()
