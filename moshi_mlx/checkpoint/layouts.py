"""The names that each program gives to the same weights, as tables that are read in both directions.

A row pairs a name in a file with a name in :class:`moshi_mlx.models.lm.Lm`. In a row, ``{n}`` is a layer or stream,
``{s}`` a weight set of the depth transformer, ``{k}`` a depth step, ``{x}`` whatever follows (``weight``, ``scales``,
``low_rank.weight``, ...). Layouts that unroll the depth transformer into one slice per step repeat what steps share:
there a row with ``{k}`` on the left and ``{s}`` (or neither) on the right stands for several equal copies.

    torch    Kyutai's PyTorch: projections of all weight sets stacked (older) or split (newer)
    mlx      Kyutai's MLX: one slice per depth step
    candle   Kyutai's Rust: PyTorch's backbone, one slice per depth step
    helium   Hugging Face's Helium: separate query, key, value, gate and up projections

Functions here are pure: a dict of arrays in, another out. Arrays stay lazy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import mlx.core as mx

from ..config import LmConfig
from ..errors import CheckpointError
from .readers import shown

__all__ = ["LAYOUTS", "detect_layout", "from_internal", "stored_names", "to_internal"]

MISMATCH = ". Do config.json and the weights belong together?"

Tensors = Mapping[str, mx.array]
Rows = list[tuple[str, str]]

_COMMON: Rows = [
    ("text_emb.{x}", "text_emb.{x}"),
    ("text_linear.{x}", "text_linear.{x}"),
    ("out_norm.{x}", "out_norm.{x}"),
    ("extra_heads.{n}.{x}", "extra_heads.{n}.{x}"),
    ("transformer.layers.{n}.{x}", "transformer.layers.{n}.{x}"),
    ("condition_provider.{x}", "condition_provider.{x}"),
]

_TORCH: Rows = [
    *_COMMON,
    ("emb.{n}.{x}", "audio_embs.{n}.{x}"),
    ("depformer_in.{s}.{x}", "depformer.linear_in.{s}.{x}"),
    ("depformer_text_emb.{x}", "depformer.embs.0.{x}"),
    ("depformer_emb.{j}.{x}", "depformer.embs.{j+1}.{x}"),
    ("depformer_norms.{n}.{x}", "depformer.norms.{n}.{x}"),
    ("linears.{n}.{x}", "depformer.linear_out.{n}.{x}"),
    ("depformer.layers.{n}.norm1.{x}", "depformer.layers.{n}.norm1.{x}"),
    ("depformer.layers.{n}.norm2.{x}", "depformer.layers.{n}.norm2.{x}"),
    ("depformer.layers.{n}.self_attn.in_projs.{s}.{x}", "depformer.layers.{n}.in_proj.{s}.{x}"),
    ("depformer.layers.{n}.self_attn.out_projs.{s}.{x}", "depformer.layers.{n}.out_proj.{s}.{x}"),
    ("depformer.layers.{n}.gating.{s}.{x}", "depformer.layers.{n}.gating.{s}.{x}"),
]


def _slices(prefix: str) -> Rows:
    layer = prefix + ".{k}.transformer.layers.{n}"
    return [
        (prefix + ".{k}.emb.{x}", "depformer.embs.{k}.{x}"),
        (prefix + ".{k}.linear_in.{x}", "depformer.linear_in.{s}.{x}"),
        (prefix + ".{k}.linear_out.{x}", "depformer.linear_out.{k}.{x}"),
        (prefix + ".{k}.norm.{x}", "depformer.norms.{k}.{x}"),
        (layer + ".norm1.{x}", "depformer.layers.{n}.norm1.{x}"),
        (layer + ".norm2.{x}", "depformer.layers.{n}.norm2.{x}"),
        (layer + ".self_attn.in_proj.{x}", "depformer.layers.{n}.in_proj.{s}.{x}"),
        (layer + ".self_attn.out_proj.{x}", "depformer.layers.{n}.out_proj.{s}.{x}"),
        (layer + ".gating.{x}", "depformer.layers.{n}.gating.{s}.{x}"),
    ]


_MLX: Rows = [*_COMMON, ("audio_embs.{n}.{x}", "audio_embs.{n}.{x}"), *_slices("depformer.slices")]
_CANDLE: Rows = [*_COMMON, ("emb.{n}.{x}", "audio_embs.{n}.{x}"), *_slices("depformer")]
_HELIUM: Rows = [
    ("model.embed_tokens.{x}", "text_emb.{x}"),
    ("model.norm.{x}", "out_norm.{x}"),
    ("lm_head.{x}", "text_linear.{x}"),
    ("model.layers.{n}.input_layernorm.{x}", "transformer.layers.{n}.norm1.{x}"),
    ("model.layers.{n}.post_attention_layernorm.{x}", "transformer.layers.{n}.norm2.{x}"),
    ("model.layers.{n}.self_attn.qkv_proj.{x}", "transformer.layers.{n}.self_attn.in_proj.{x}"),
    ("model.layers.{n}.self_attn.o_proj.{x}", "transformer.layers.{n}.self_attn.out_proj.{x}"),
    ("model.layers.{n}.mlp.gate_up_proj.{x}", "transformer.layers.{n}.gating.linear_in.{x}"),
    ("model.layers.{n}.mlp.down_proj.{x}", "transformer.layers.{n}.gating.linear_out.{x}"),
]

LAYOUTS: dict[str, Rows] = {"torch": _TORCH, "mlx": _MLX, "candle": _CANDLE, "helium": _HELIUM}

# Rows of one fused projection that Hugging Face keeps apart.
_HELIUM_FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
_HELIUM_PART = re.compile(r"(model\.layers\.\d+)\.(self_attn|mlp)\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.(\w+)")


def detect_layout(names: Iterable[str]) -> str:
    """Which program wrote a file with these tensors: a key of ``LAYOUTS``.

    Raises
    ------
    CheckpointError
        If the names are none that a language model of this family has.
    """
    names = set(names)
    if "model.embed_tokens.weight" in names:
        return "helium"
    if any(name.startswith("depformer.slices.") for name in names) or "audio_embs.0.weight" in names:
        return "mlx"
    if any(re.match(r"depformer\.\d+\.linear_in\.", name) for name in names):
        return "candle"
    if names & {"out_norm.alpha", "emb.0.weight", "transformer.layers.0.self_attn.in_proj_weight"}:
        return "torch"
    if "out_norm.weight" in names:
        return "mlx"
    raise CheckpointError(
        f"no layout of a Moshi language model has these tensors: {shown(names) or 'none at all'}. "
        "Is this the codec's file, or another model's?"
    )


# ------------------------------------------------------------------------------------------ rows as code


def _pattern(template: str) -> re.Pattern[str]:
    def group(match: re.Match[str]) -> str:
        field = match[1]
        return "(?P<x>.+)" if field == "x" else rf"(?P<{field[0]}{'_next' if '+' in field else ''}>0|[1-9]\d{{0,3}})"

    pieces = re.split(r"\{([^}]+)\}", template)
    text = "".join(
        re.escape(piece) if i % 2 == 0 else group(re.match("(.+)", piece))  # type: ignore[arg-type]
        for i, piece in enumerate(pieces)
    )
    return re.compile(text)


def _fill(template: str, fields: Mapping[str, str]) -> str:
    return re.sub(
        r"\{([^}]+)\}",
        lambda m: str(int(fields["j"]) + 1) if m[1] == "j+1" else fields[m[1]],
        template,
    )


def _match(pattern: re.Pattern[str], name: str) -> dict[str, str] | None:
    found = pattern.fullmatch(name)
    if found is None:
        return None
    fields = found.groupdict()
    if "j_next" in fields:
        fields["j"] = str(int(fields.pop("j_next")) - 1)
        if fields["j"] == "-1":
            return None
    return fields


_COMPILED = {
    layout: [(_pattern(theirs), theirs, _pattern(ours), ours) for theirs, ours in rows]
    for layout, rows in LAYOUTS.items()
}


def _internal_name(name: str, layout: str, config: LmConfig) -> str | None:
    """Our name for a file's tensor; None if the layout has no such tensor."""
    for pattern, theirs, _, ours in _COMPILED[layout]:
        fields = _match(pattern, name)
        if fields is None:
            continue
        if "{k}" in theirs:
            step = int(fields["k"])
            if step >= config.dep_q:
                return None
            fields["s"] = str(config.schedule[step])
        return _fill(ours, fields)
    return None


def stored_names(name: str, layout: str, config: LmConfig) -> list[str]:
    """All names under which a layout keeps one of our tensors: several where slices repeat what they share."""
    for _, theirs, pattern, _ in _COMPILED[layout]:
        fields = _match(pattern, name)
        if fields is None:
            continue
        if "{k}" not in theirs or "k" in fields:
            return [_fill(theirs, fields)]
        steps = [k for k in range(config.dep_q) if "s" not in fields or config.schedule[k] == int(fields["s"])]
        return [_fill(theirs, {**fields, "k": str(k)}) for k in steps]
    return []


# ------------------------------------------------------------------------------------------- file to us


def to_internal(tensors: Tensors, layout: str, config: LmConfig) -> dict[str, mx.array]:
    """Rename a file's tensors to those of :class:`moshi_mlx.models.lm.Lm`, quantized parts included.

    Parameters
    ----------
    tensors : mapping of str to mx.array
        As in the file.
    layout : str
        From :func:`detect_layout`.
    config : LmConfig
        Its schedule says which slices share weights.

    Raises
    ------
    CheckpointError
        If a tensor has no place, copies differ, or a part of a stack or of a group of copies is missing.
    """
    if layout == "helium":
        plain = _join_helium(tensors)
    elif layout == "mlx":
        plain = dict(tensors)
    else:
        plain = _split_stacks(_plain_torch(tensors), config) if layout == "torch" else _plain_torch(tensors)
    result: dict[str, mx.array] = {}
    unknown: list[str] = []
    for name, value in plain.items():
        ours = _internal_name(name, layout, config)
        if ours is None:
            unknown.append(name)
        elif ours in result:
            _check_copy(name, value, result[ours], stored_names(ours, layout, config))
        else:
            result[ours] = value
    if unknown:
        raise CheckpointError(f"{len(unknown)} tensors are not part of this model: {shown(unknown)}{MISMATCH}")
    if layout in ("mlx", "candle"):
        lost = {copy for ours in result for copy in stored_names(ours, layout, config)} - plain.keys()
        if lost:
            raise CheckpointError(f"{len(lost)} tensors are missing: {shown(lost)}{MISMATCH}")
    return result


def _check_copy(name: str, value: mx.array, first: mx.array, copies: list[str]) -> None:
    if len(copies) < 2:
        raise CheckpointError(f"two tensors stand for the same weight; one of them is {name}")
    if value.shape != first.shape or value.dtype != first.dtype:
        raise CheckpointError(
            f"{name} is {list(value.shape)} {value.dtype}, but {copies[0]}, which it repeats, is "
            f"{list(first.shape)} {first.dtype}"
        )
    # Norms are small enough to compare; large copies are taken on trust.
    if value.ndim == 1 and not mx.array_equal(value, first, equal_nan=True).item():
        raise CheckpointError(
            f"{name} and {copies[0]} should be equal copies, but differ: norms of the depth transformer belong to all "
            "steps. This checkpoint needs a model that this version does not know"
        )


def _plain_torch(tensors: Tensors) -> dict[str, mx.array]:
    """Undo PyTorch's and candle's habits: ``alpha`` [1, 1, D], ``in_proj_weight``, int8 rows with a scale."""
    result: dict[str, mx.array] = {}
    for name, value in _dequantize_int8(tensors).items():
        name = re.sub(r"\.in_proj_(\w+)$", r".in_proj.\1", name)
        name = re.sub(r"^(transformer\..*\.)(in|out)_projs\.0\.", r"\1\2_proj.", name)
        if name.endswith(".alpha"):
            name, value = name.removesuffix("alpha") + "weight", value.reshape(-1)
        if name in result:
            raise CheckpointError(f"two tensors stand for the same weight; one of them is {name}")
        result[name] = value
    return result


def _dequantize_int8(tensors: Tensors) -> dict[str, mx.array]:
    """bitsandbytes int8: row i of ``X.weight`` is ``int8 * X.weight_scb[i] / 127``."""
    result = dict(tensors)
    floats = next((v.dtype for k, v in tensors.items() if k in ("out_norm.alpha", "out_norm.weight")), mx.bfloat16)
    for name in [name for name in tensors if name.endswith("weight_scb")]:
        scale = result.pop(name)
        target = name.removesuffix("_scb")
        weight = result.get(target)
        if weight is None or weight.dtype != mx.int8 or scale.shape != weight.shape[:1]:
            raise CheckpointError(f"{name} needs an int8 tensor {target} with as many rows")
        result[target] = (weight * (scale.astype(mx.float32) / 127)[:, None]).astype(floats)
    return result


def _split_stacks(tensors: Tensors, config: LmConfig) -> dict[str, mx.array]:
    """Cut the depth transformer's stacked projections: weight set s has rows s * R to (s + 1) * R."""
    result: dict[str, mx.array] = {}
    sets = config.num_weight_sets
    for name, value in tensors.items():
        match = re.fullmatch(r"(depformer\.layers\.\d+\.self_attn\.(?:in|out)_proj)\.(.+)", name)
        if match is None or not sets:
            parts = {name: value}
        elif value.ndim == 0 or value.shape[0] % sets:
            raise CheckpointError(f"{name} has {list(value.shape)[:1]} rows, not a multiple of {sets} weight sets")
        else:
            rows = value.shape[0] // sets
            parts = {f"{match[1]}s.{s}.{match[2]}": value[s * rows : (s + 1) * rows] for s in range(sets)}
        for part, array in parts.items():
            if part in result:
                raise CheckpointError(f"two tensors stand for the same weight; one of them is {part}")
            result[part] = array
    return result


def _join_helium(tensors: Tensors) -> dict[str, mx.array]:
    """Stack query, key and value rows, and gate and up rows."""
    result: dict[str, mx.array] = {}
    groups: dict[str, dict[str, mx.array]] = {}
    for name, value in tensors.items():
        match = _HELIUM_PART.fullmatch(name)
        if match is None:
            result[name] = value
            continue
        block, part = match[2], match[3]
        fused = next(key for key, parts in _HELIUM_FUSED.items() if key.startswith(block) and part in parts)
        groups.setdefault(f"{match[1]}.{fused}.{match[4]}", {})[part] = value
    for name, found in groups.items():
        layer, fused, leaf = re.fullmatch(r"(.+?\.\d+)\.(\w+\.\w+)\.(\w+)", name).groups()  # type: ignore[union-attr]
        parts = _HELIUM_FUSED[fused]
        missing = [part for part in parts if part not in found]
        if missing:
            raise CheckpointError(f"{layer}.{fused.split('.')[0]}.{missing[0]}.{leaf} is missing")
        arrays = [found[part] for part in parts]
        if len({(array.ndim, array.shape[1:], array.dtype) for array in arrays}) != 1:
            raise CheckpointError(f"{layer}: {', '.join(parts)} differ in width or type, and cannot be joined")
        result[name] = mx.concatenate(arrays, axis=0)
    return result


# ------------------------------------------------------------------------------------------- us to file


def from_internal(params: Tensors, layout: str, config: LmConfig) -> dict[str, mx.array]:
    """The inverse of :func:`to_internal`: names, shapes and copies as the layout's own program writes them.

    Raises
    ------
    CheckpointError
        If the layout has no place for a tensor: a quantized one in ``torch`` or ``helium``, for instance.
    """
    if layout in ("torch", "helium") and any(name.endswith(".scales") for name in params):
        raise CheckpointError(f"the {layout} layout cannot hold quantized weights: write the mlx layout")
    result: dict[str, mx.array] = {}
    for name, value in params.items():
        copies = stored_names(name, layout, config)
        if not copies:
            raise CheckpointError(f"{name} has no name in the {layout} layout")
        result.update(dict.fromkeys(copies, value))
    if layout == "helium":
        return _split_helium(result, config)
    if layout == "mlx":
        return result
    return _to_torch_habits(result, layout, config)


def _to_torch_habits(tensors: Tensors, layout: str, config: LmConfig) -> dict[str, mx.array]:
    result: dict[str, mx.array] = {}
    stacks: dict[str, dict[int, mx.array]] = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"(depformer\.layers\.\d+\.self_attn\.(?:in|out)_proj)s\.(\d+)\.weight", name)
        if match:
            stacks.setdefault(f"{match[1]}.weight", {})[int(match[2])] = value
            continue
        if _is_rms_norm(name, config):
            name, value = name.removesuffix("weight") + "alpha", value.reshape(1, 1, -1)
        result[re.sub(r"\.in_proj\.(\w+)$", r".in_proj_\1", name)] = value
    for name, parts in stacks.items():
        stacked = mx.concatenate([parts[s] for s in range(len(parts))], axis=0)
        result[name.replace("in_proj.weight", "in_proj_weight")] = stacked
    return result


def _is_rms_norm(name: str, config: LmConfig) -> bool:
    if re.fullmatch(r"depformer(_norms\.\d+|\.\d+\.norm)\.weight", name):
        return (config.depformer_norm or "").startswith("rms_norm")
    return config.norm.startswith("rms_norm") and re.search(r"(^out_norm|\.norm[12])\.weight$", name) is not None


def _split_helium(tensors: Tensors, config: LmConfig) -> dict[str, mx.array]:
    head = config.dim // config.num_heads
    keys = config.num_heads // config.kv_repeat * head
    result: dict[str, mx.array] = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"(model\.layers\.\d+)\.(self_attn\.qkv_proj|mlp\.gate_up_proj)\.(\w+)", name)
        if match is None:
            result[name] = value
            continue
        cuts = [config.dim, config.dim + keys] if match[2].startswith("self_attn") else [value.shape[0] // 2]
        block = match[2].split(".")[0]
        for part, array in zip(_HELIUM_FUSED[match[2]], mx.split(value, cuts, axis=0), strict=True):
            result[f"{match[1]}.{block}.{part}.{match[3]}"] = array
    return result
