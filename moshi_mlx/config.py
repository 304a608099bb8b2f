"""What a checkpoint's config.json says, checked.

Fields bear the checkpoint's own names. A key that no field reads is an error that names the key: silently ignored
settings are how ports go wrong. Three sources are understood: Kyutai's config.json, a folder without one (Moshi 7B),
and Hugging Face's config.json of the text model Helium.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal

from .errors import ConfigError

__all__ = ["ConditionerConfig", "FuserConfig", "LmConfig", "ModelConfig"]

DEFAULT_WEIGHTS = "model.safetensors"
DEFAULT_MIMI = "tokenizer-e351c8d8-checkpoint125.safetensors"
DEFAULT_TOKENIZER = "tokenizer_spm_32k_3.model"

PAD_ID = 3
"""Text token: nothing is said in this frame."""
END_PAD_ID = 0
"""Text token EPAD: a word starts in the next frame. In the SentencePiece model this id is ``<unk>``."""
BOS_ID = 1
EOS_ID = 2

ZERO_TOKEN = -1
"""Input token that embeds to exact zeros."""
UNGENERATED = -2
"""Marks a value that the model has to produce itself."""


@dataclass(frozen=True)
class ConditionerConfig:
    """One entry of ``conditioners``.

    Attributes
    ----------
    type : {"lut", "tensor"}
        A table of named values, or a projection of a given sequence of vectors.
    dim : int
        Width before the output projection.
    n_bins : int
        Rows of the table, not counting the last one, which stands for "no value".
    possible_values : tuple of str
        Names of the rows, in order. Empty: any text is taken, its row is a hash of it.
    """

    type: Literal["lut", "tensor"]
    dim: int
    n_bins: int = 0
    possible_values: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, name: str, data: Mapping[str, Any]) -> ConditionerConfig:
        """Read ``{"type": "lut", "lut": {...}}`` or ``{"type": "tensor", "tensor": {...}}``."""
        where = f"conditioners.{name}"
        _expect_keys(where, data, {"type", "lut", "tensor"})
        kind = data.get("type")
        if kind == "lut":
            body = _mapping(f"{where}.lut", data.get("lut"))
            _expect_keys(f"{where}.lut", body, {"n_bins", "dim", "tokenizer", "possible_values", "init_scale"})
            if body.get("tokenizer", "noop") != "noop":
                raise ConfigError(f"{where}.lut.tokenizer: only 'noop' is supported, found {body['tokenizer']!r}")
            config = cls(
                "lut",
                _positive(f"{where}.lut.dim", body.get("dim")),
                _positive(f"{where}.lut.n_bins", body.get("n_bins")),
                _strings(f"{where}.lut.possible_values", body.get("possible_values")),
            )
            if len(config.possible_values) > config.n_bins:
                raise ConfigError(f"{where}.lut: {len(config.possible_values)} values, but n_bins is {config.n_bins}")
            return config
        if kind == "tensor":
            body = _mapping(f"{where}.tensor", data.get("tensor"))
            _expect_keys(f"{where}.tensor", body, {"dim"})
            return cls("tensor", _positive(f"{where}.tensor.dim", body.get("dim")))
        raise ConfigError(f"{where}.type: 'lut' or 'tensor' is supported, found {kind!r}")


@dataclass(frozen=True)
class FuserConfig:
    """How conditions enter the model: added to every input (``sum``) or attended to (``cross``)."""

    sum: tuple[str, ...] = ()
    cross: tuple[str, ...] = ()
    cross_attention_pos_emb: bool = False
    cross_attention_pos_emb_scale: float = 1.0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FuserConfig:
        known = {"sum", "cross", "prepend", "cross_attention_pos_emb", "cross_attention_pos_emb_scale"}
        _expect_keys("fuser", data, known)
        if data.get("prepend"):
            raise ConfigError("fuser.prepend is not supported: no published model prepends a condition")
        return cls(
            _strings("fuser.sum", data.get("sum")),
            _strings("fuser.cross", data.get("cross")),
            _boolean("fuser.cross_attention_pos_emb", data.get("cross_attention_pos_emb", False)),
            _number("fuser.cross_attention_pos_emb_scale", data.get("cross_attention_pos_emb_scale", 1.0)),
        )


@dataclass(frozen=True)
class LmConfig:
    """The language model: a temporal transformer over frames and a depth transformer over one frame's codes.

    Defaults are Moshi 7B's (moshi ``models/loaders.py``). ``None`` for a ``depformer_*`` field means that it follows
    the temporal transformer's.

    Attributes
    ----------
    dim, num_heads, num_layers, hidden_scale, kv_repeat, context, max_period
        The temporal transformer.
    n_q : int
        Audio streams read, both speakers' together.
    dep_q : int
        Audio streams that the depth transformer predicts.
    card, text_card : int
        Audio codes, and text tokens, that can be sampled; each embedding table has one row more, for the start.
    delays : tuple of int
        Frames by which each stream is shifted: text first, then ``n_q`` audio streams.
    own_q : int
        Audio streams that are the model's own voice; the rest of ``n_q`` comes from the user.
    """

    dim: int = 4096
    text_card: int = 32000
    text_card_out: int | None = None
    existing_text_padding_id: int = PAD_ID
    existing_text_end_padding_id: int = END_PAD_ID
    n_q: int = 16
    dep_q: int = 8
    card: int = 2048
    num_heads: int = 32
    num_layers: int = 32
    hidden_scale: float = 4.125
    causal: bool = True
    layer_scale: float | None = None
    context: int = 3000
    max_period: float = 10000
    gating: str = "silu"
    norm: str = "rms_norm_f32"
    positional_embedding: str = "rope"
    kv_repeat: int = 1
    depformer_dim: int = 1024
    depformer_dim_feedforward: int | tuple[int, ...] | None = None
    depformer_num_heads: int = 16
    depformer_num_layers: int = 6
    depformer_layer_scale: float | None = None
    depformer_multi_linear: bool = True
    depformer_context: int | None = 8
    depformer_max_period: float | None = None
    depformer_gating: str | None = None
    depformer_pos_emb: str = "none"
    depformer_norm: str | None = None
    depformer_kv_repeat: int | None = None
    depformer_weights_per_step: bool = True
    depformer_weights_per_step_schedule: tuple[int, ...] | None = None
    depformer_low_rank_embeddings: int | None = None
    delays: tuple[int, ...] = (0, 0, *(1,) * 7, 0, *(1,) * 7)
    demux_second_stream: bool = False
    cross_attention: bool = False
    conditioners: Mapping[str, ConditionerConfig] = field(default_factory=dict)
    fuser: FuserConfig | None = None
    extra_heads_num_heads: int = 0
    extra_heads_dim: int = 6
    text_start_row: bool = True
    own_q: int = -1

    # Not keys of config.json: what the code derives or sets for a model family.
    _INTERNAL = ("own_q", "text_start_row")
    # Keys that carry nothing that inference needs.
    _IGNORED = ("depformer_causal", "norm_emb", "bias_proj", "quantize", "gradient_checkpointing")

    def __post_init__(self) -> None:
        if self.own_q < 0:
            object.__setattr__(self, "own_q", self.dep_q)
        self._check()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LmConfig:
        """Read the language model's part of a config.json.

        Raises
        ------
        ConfigError
            Names the first key that is unknown, of a wrong type, unsupported, or contradicts another.
        """
        known = {f.name: f for f in fields(cls) if f.name not in cls._INTERNAL}
        aliases = {"demux_second_text_stream": "demux_second_stream"}
        values: dict[str, Any] = {}
        unknown = [key for key in data if aliases.get(key, key) not in known and key not in cls._IGNORED]
        if unknown:
            raise ConfigError(
                f"config.json has unknown key{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}: "
                "this checkpoint needs something that this version does not know"
            )
        for key in ("norm_emb", "bias_proj"):
            if data.get(key):
                raise ConfigError(f"{key}: true is not supported")
        for raw, value in data.items():
            key = aliases.get(raw, raw)
            if key in known:
                values[key] = _read_field(key, known[key], value)
        if values.get("layer_scale") is not None or values.get("depformer_layer_scale") is not None:
            raise ConfigError("layer_scale is not supported in the language model: no published model has it")
        return cls(**values)

    def _check(self) -> None:
        self._check_positive("dim", "text_card", "card", "num_heads", "num_layers", "context", "max_period")
        if self.context > _LONGEST:
            raise ConfigError(f"context must be at most {_LONGEST} positions, found {self.context}")
        if not 0 < self.hidden_scale <= _MOST or not self.hidden:
            raise ConfigError(f"hidden_scale {self.hidden_scale} gives no usable width of the feed-forward layers")
        for name in ("n_q", "dep_q", "extra_heads_num_heads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, found {getattr(self, name)}")
        for name in ("num_layers", "extra_heads_num_heads"):
            if getattr(self, name) > _MOST:
                raise ConfigError(f"{name} must be at most {_MOST}, found {getattr(self, name)}")
        if self.extra_heads_num_heads:
            self._check_positive("extra_heads_dim")
        rows = self.text_card + self.text_start_row
        if not 0 < self.text_out <= rows:
            raise ConfigError(f"text_card_out {self.text_out}: only tokens below {rows} have an embedding")
        for name in ("existing_text_padding_id", "existing_text_end_padding_id"):
            if not 0 <= getattr(self, name) < self.text_card:
                raise ConfigError(f"{name} must be a text token below {self.text_card}, found {getattr(self, name)}")
        if self.dep_q > self.n_q:
            raise ConfigError(f"dep_q {self.dep_q} predicts more streams than the n_q {self.n_q} that exist")
        if self.own_q > self.dep_q:
            raise ConfigError(f"the own voice has {self.own_q} streams, but dep_q predicts only {self.dep_q}")
        if len(self.delays) != self.n_q + 1:
            raise ConfigError(f"delays needs {self.n_q + 1} entries (text and n_q streams), found {len(self.delays)}")
        if min(self.delays) < 0:
            raise ConfigError(f"delays must not be negative: {list(self.delays)}")
        if max(self.delays) > _MOST:
            raise ConfigError(f"delays must be at most {_MOST} frames, found {max(self.delays)}")
        if not self.causal:
            raise ConfigError("causal: false is not supported: a conversation cannot read the future")
        _check_heads("", self.dim, self.num_heads, self.kv_repeat)
        if self.gating != "silu" or self.depformer_gating not in (None, "silu"):
            raise ConfigError(f"gating {self.gating!r} / {self.depformer_gating!r} is not supported; only 'silu' is")
        for name in ("norm", "depformer_norm"):
            if getattr(self, name) not in (*_NORMS, *((None,) if name == "depformer_norm" else ())):
                raise ConfigError(f"{name}: {getattr(self, name)!r} is not supported; use one of {', '.join(_NORMS)}")
        for name in ("positional_embedding", "depformer_pos_emb"):
            if getattr(self, name) not in ("rope", "rope_concat", "none"):
                raise ConfigError(
                    f"{name}: {getattr(self, name)!r} is not supported; use 'rope', 'rope_concat' or 'none'"
                )
        if self.cross_attention and self.kv_repeat != 1:
            raise ConfigError("cross_attention with kv_repeat above 1 is not supported")
        if self.cross_attention and not (self.fuser and self.fuser.cross):
            raise ConfigError("cross_attention is true, but fuser.cross names no condition to attend to")
        named = set(self.fuser.sum + self.fuser.cross) if self.fuser else set()
        if not named <= set(self.conditioners):
            raise ConfigError(f"fuser names {sorted(named - set(self.conditioners))}, which conditioners lacks")
        if self.fuser and self.fuser.cross and not self.cross_attention:
            raise ConfigError("fuser.cross is given, but cross_attention is false")
        if self.dep_q:
            self._check_depformer()

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, found {getattr(self, name)}")

    def _check_depformer(self) -> None:
        self._check_positive("depformer_dim", "depformer_num_heads", "depformer_num_layers")
        if self.depformer_num_layers > _MOST:
            raise ConfigError(f"depformer_num_layers must be at most {_MOST}, found {self.depformer_num_layers}")
        for name in ("depformer_low_rank_embeddings", "depformer_max_period"):
            if getattr(self, name) is not None:
                self._check_positive(name)
        _check_heads("depformer_", self.depformer_dim, self.depformer_num_heads, self.depth_kv_repeat)
        if not self.depformer_weights_per_step or not self.depformer_multi_linear:
            raise ConfigError(
                "depformer_weights_per_step and depformer_multi_linear must be true: all models have them"
            )
        schedule = self.depformer_weights_per_step_schedule
        if schedule is not None:
            if len(schedule) != self.dep_q:
                raise ConfigError(
                    f"depformer_weights_per_step_schedule needs dep_q = {self.dep_q} entries, found {len(schedule)}"
                )
            if min(schedule) < 0 or len(set(schedule)) != max(schedule) + 1:
                raise ConfigError(f"depformer_weights_per_step_schedule skips a weight set: {list(schedule)}")
        ff = self.depformer_dim_feedforward
        if isinstance(ff, tuple) and len(ff) != self.num_weight_sets:
            raise ConfigError(
                f"depformer_dim_feedforward needs {self.num_weight_sets} entries, one per weight set, found {len(ff)}"
            )
        if min(self.depth_hidden) <= 0:
            raise ConfigError(f"depformer_dim_feedforward {ff} gives no usable width of the feed-forward layers")

    @property
    def num_streams(self) -> int:
        """Text and audio streams read at every position."""
        return self.n_q + 1

    @property
    def user_q(self) -> int:
        """Audio streams that come from the user."""
        return self.n_q - self.own_q

    @property
    def text_out(self) -> int:
        """Rows of the text head."""
        return self.text_card if self.text_card_out is None else self.text_card_out

    @property
    def text_start_id(self) -> int:
        """Text token at position 0: the extra row, or BOS where the table has none (Helium)."""
        return self.text_card if self.text_start_row else BOS_ID

    @property
    def audio_start_id(self) -> int:
        """Audio token before a stream begins."""
        return self.card

    @property
    def max_delay(self) -> int:
        """Largest delay of a stream that the model produces: how long a frame takes to be complete."""
        return max(self.delays[: 1 + self.own_q])

    @property
    def hidden(self) -> int:
        """Width of the temporal feed-forward layer, per branch."""
        return gated_hidden(self.dim, int(self.hidden_scale * self.dim))

    @property
    def schedule(self) -> tuple[int, ...]:
        """Weight set of every depth step."""
        return self.depformer_weights_per_step_schedule or tuple(range(self.dep_q))

    @property
    def num_weight_sets(self) -> int:
        return max(self.schedule) + 1 if self.dep_q else 0

    @property
    def depth_hidden(self) -> tuple[int, ...]:
        """Width of the depth transformer's feed-forward layers, per weight set."""
        ff = self.depformer_dim_feedforward
        if ff is None:
            ff = int(self.hidden_scale * self.depformer_dim)
        widths = (ff,) * self.num_weight_sets if isinstance(ff, int) else ff
        return tuple(gated_hidden(self.depformer_dim, width) for width in widths)

    @property
    def depth_kv_repeat(self) -> int:
        return self.kv_repeat if self.depformer_kv_repeat is None else self.depformer_kv_repeat

    @property
    def depth_max_period(self) -> float:
        return self.max_period if self.depformer_max_period is None else self.depformer_max_period


@dataclass(frozen=True)
class ModelConfig:
    """A whole checkpoint: the language model, and where its parts are.

    Attributes
    ----------
    lm : LmConfig
    model_type : str
        ``moshi``, ``hibiki``, ``stt``, ``tts``, ``personaplex`` or ``helium``.
    moshi_name, mimi_name, mimi_config_name, tokenizer_name, lora_name
        File names, relative to the checkpoint, or ``hf://org/repo/path``, or ``file://path``.
    lora_scaling : float
        Factor on the low-rank update (moshi-finetune: 2.0, not alpha/rank).
    lm_gen_config, tts_config, stt_config, model_id : mapping
        As saved.
    quantization : mapping or None
        Quantization block as mlx-lm saves it: ``group_size``, ``bits``, ``mode``, and per-module overrides.
    tied_text_head : bool
        Whether the text head may be the text embedding itself.
    """

    lm: LmConfig = field(default_factory=LmConfig)
    model_type: str = "moshi"
    moshi_name: str = DEFAULT_WEIGHTS
    mimi_name: str | None = DEFAULT_MIMI
    mimi_config_name: str | None = None
    tokenizer_name: str | None = DEFAULT_TOKENIZER
    lora_name: str | None = None
    lora: bool = False
    lora_rank: int = 128
    lora_scaling: float = 2.0
    lm_gen_config: Mapping[str, Any] = field(default_factory=dict)
    tts_config: Mapping[str, Any] = field(default_factory=dict)
    stt_config: Mapping[str, Any] = field(default_factory=dict)
    model_id: Mapping[str, Any] = field(default_factory=dict)
    quantization: Mapping[str, Any] | None = None
    tied_text_head: bool = False

    _NAMES = ("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name")
    _BLOCKS = ("lm_gen_config", "tts_config", "stt_config", "model_id")
    MODEL_TYPES = ("moshi", "hibiki", "stt", "tts", "personaplex", "helium")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json: Kyutai's, PersonaPlex's bare one, or Hugging Face's for Helium.

        Raises
        ------
        ConfigError
            Names the key and what is wrong with it.
        """
        data = _mapping("config.json", data)
        if data.get("model_type") == "helium" or "hidden_size" in data:
            return _helium_from_hf(data)
        rest = dict(data)
        values: dict[str, Any] = {}
        for key in cls._NAMES:
            if key in rest:
                value = rest.pop(key)
                if value is not None and not isinstance(value, str):
                    raise ConfigError(f"{key} must be a file name, found {value!r}")
                if value is not None:
                    values[key] = value
        for key in cls._BLOCKS:
            if key in rest:
                values[key] = dict(_mapping(key, rest.pop(key) or {}))
        kind = rest.pop("model_type", None) or "moshi"
        if kind not in cls.MODEL_TYPES:
            raise ConfigError(f"model_type {kind!r} is not known; known are {', '.join(cls.MODEL_TYPES)}")
        values["model_type"] = kind
        rest.pop("version", None)
        for key in ("quantization", "quantization_config"):
            if rest.get(key) is not None:
                values["quantization"] = dict(_mapping(key, rest[key]))
            rest.pop(key, None)
        values["lora"] = _boolean("lora", rest.pop("lora", False))
        values["lora_rank"] = _integer("lora_rank", rest.pop("lora_rank", 128))
        values["lora_scaling"] = _number("lora_scaling", rest.pop("lora_scaling", 2.0))
        if kind == "personaplex" and not rest:
            lm = cls.personaplex().lm
        else:
            lm = LmConfig.from_dict(rest)
            if kind == "personaplex":
                lm = replace(lm, own_q=lm.n_q // 2)
        return cls(lm=lm, **values)

    @classmethod
    def moshi_7b(cls) -> ModelConfig:
        """Moshiko and Moshika: what a folder without a config.json is taken for."""
        return cls(lm=LmConfig(depformer_dim_feedforward=4224))

    @classmethod
    def personaplex(cls) -> ModelConfig:
        """PersonaPlex 7B v1, whose config.json names only the model type."""
        lm = replace(cls.moshi_7b().lm, dep_q=16, own_q=8, depformer_context=16)
        return cls(lm=lm, model_type="personaplex")

    @classmethod
    def helium_preview(cls) -> ModelConfig:
        """Helium-1-preview 2B in MLX's layout, which comes without a config.json."""
        lm = LmConfig(
            dim=2560,
            text_card=48000,
            n_q=0,
            dep_q=0,
            num_heads=20,
            num_layers=24,
            context=4096,
            max_period=100000,
            delays=(0,),
            text_start_row=False,
        )
        return cls(lm=lm, model_type="helium", mimi_name=None, tokenizer_name="tokenizer_spm_48k_multi6_2.model")


def gated_hidden(dim: int, feedforward: int) -> int:
    """Width per branch of a gated layer of nominal size ``feedforward`` (moshi ``modules/gating.py``)."""
    return 21 * dim // 8 if feedforward == 4 * dim else 2 * feedforward // 3


_NORMS = ("rms_norm_f32", "rms_norm", "layer_norm", "layer_norm_f32")
# Far more layers, or frames of delay, than any model has: beyond it, a broken file would only exhaust the machine.
_MOST = 10_000
_LONGEST = 1_000_000

_HF_HELIUM_IGNORED = {
    "architectures", "attention_bias", "attention_dropout", "bos_token_id", "dtype", "eos_token_id",
    "initializer_range", "model_type", "pad_token_id", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def _helium_from_hf(data: Mapping[str, Any]) -> ModelConfig:
    """Hugging Face's names for the text model (transformers ``models/helium``)."""
    read = {
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
        "head_dim", "rms_norm_eps", "rope_theta", "vocab_size", "max_position_embeddings", "tie_word_embeddings",
        "hidden_act", "mlp_bias", "rope_scaling", "rope_parameters", "quantization", "quantization_config",
        "tokenizer_name",
    }  # fmt: skip
    if data.get("model_type", "helium") != "helium":
        raise ConfigError(f"model_type {data['model_type']!r} in Hugging Face form is not supported; only 'helium' is")
    _expect_keys("config.json", data, read | _HF_HELIUM_IGNORED)
    dim, heads = (
        _positive("hidden_size", data.get("hidden_size")),
        _positive("num_attention_heads", data.get("num_attention_heads")),
    )
    kv_heads = _positive("num_key_value_heads", data.get("num_key_value_heads", heads))
    hidden = _positive("intermediate_size", data.get("intermediate_size"))
    if data.get("head_dim") not in (None, dim // heads):
        raise ConfigError(f"head_dim {data['head_dim']} is not hidden_size / num_attention_heads = {dim // heads}")
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    for key, supported in (("hidden_act", ("silu",)), ("mlp_bias", (False,)), ("attention_bias", (False,))):
        if key in data and data[key] not in supported:
            raise ConfigError(f"{key} {data[key]!r} is not supported; only {supported[0]!r} is")
    rope = _mapping("rope_parameters", data.get("rope_parameters") or {})
    if data.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise ConfigError("rope_scaling is not supported")
    eps = _number("rms_norm_eps", data.get("rms_norm_eps", 1e-8))
    norms = {1e-8: "rms_norm_f32", 1e-5: "rms_norm"}
    if eps not in norms:
        raise ConfigError(f"rms_norm_eps {eps} is not supported; only 1e-8 and 1e-5 are")
    feedforward = -(-3 * hidden // 2)
    if feedforward == 4 * dim:
        feedforward += 1  # the width that has a rule of its own; one more gives the same when `hidden` is even
    vocabulary = _positive("vocab_size", data.get("vocab_size"))
    lm = LmConfig(
        dim=dim,
        text_card=vocabulary,
        n_q=0,
        dep_q=0,
        num_heads=heads,
        num_layers=_integer("num_hidden_layers", data.get("num_hidden_layers")),
        hidden_scale=(feedforward + 0.5) / dim,  # a half more, or rounding could lose one
        context=_integer("max_position_embeddings", data.get("max_position_embeddings", 4096)),
        max_period=_number("rope_theta", data.get("rope_theta", rope.get("rope_theta", 100000))),
        norm=norms[eps],
        kv_repeat=heads // kv_heads,
        delays=(0,),
        text_start_row=False,
    )
    quantization = data.get("quantization") or data.get("quantization_config")
    tokenizer = data.get("tokenizer_name", "tokenizer.model")
    if not isinstance(tokenizer, str):
        raise ConfigError(f"tokenizer_name must be a file name, found {tokenizer!r}")
    if lm.hidden != hidden:
        raise ConfigError(f"intermediate_size {hidden} cannot be expressed as a gated width of hidden_size {dim}")
    return ModelConfig(
        lm=lm,
        model_type="helium",
        mimi_name=None,
        tokenizer_name=tokenizer,
        quantization=dict(_mapping("quantization", quantization)) if quantization else None,
        tied_text_head=_boolean("tie_word_embeddings", data.get("tie_word_embeddings", False)),
    )


def _read_field(key: str, spec: Any, value: Any) -> Any:
    if key == "conditioners":
        return {name: ConditionerConfig.from_dict(name, _mapping(f"conditioners.{name}", body))
                for name, body in _mapping(key, value or {}).items()}  # fmt: skip
    if key == "fuser":
        return None if value is None else FuserConfig.from_dict(_mapping(key, value))
    if key in ("delays", "depformer_weights_per_step_schedule"):
        if value is None and key != "delays":
            return None
        return _integers(key, value)
    if key == "depformer_dim_feedforward":
        return _integers(key, value) if isinstance(value, (list, tuple)) else _optional_integer(key, value)
    default = None if spec.default is MISSING else spec.default
    if value is None:
        if "None" in str(spec.type):
            return None
        raise ConfigError(f"{key} is null, but a value is needed (for instance {default!r})")
    if isinstance(default, bool):
        return _boolean(key, value)
    if "str" in str(spec.type):
        if not isinstance(value, str):
            raise ConfigError(f"{key} must be a string, found {value!r}")
        return value
    if "float" in str(spec.type):
        return _number(key, value)
    return _integer(key, value)


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be an object, found {type(value).__name__}")
    return value


def _boolean(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, found {value!r}")
    return value


def _integer(key: str, value: Any) -> int:
    number = _number(key, value)
    if not number.is_integer() or abs(number) >= 2**31:
        raise ConfigError(f"{key} must be an integer of at most 31 bits, found {number:g}")
    return int(number)


def _positive(key: str, value: Any) -> int:
    number = _integer(key, value)
    if number <= 0:
        raise ConfigError(f"{key} must be positive, found {number}")
    return number


def _strings(key: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{key} must be a list of strings, found {value!r}")
    return tuple(value)


def _optional_integer(key: str, value: Any) -> int | None:
    return None if value is None else _integer(key, value)


def _integers(key: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{key} must be a list of integers, found {value!r}")
    return tuple(_integer(f"{key}[{i}]", item) for i, item in enumerate(value))


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{key} must be a finite number, found {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an integer with hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{key} must be a finite number, found {number}")
    return number


def _expect_keys(where: str, data: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(data) - known)
    if unknown:
        raise ConfigError(f"{where} has unknown key{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}")


def _check_heads(prefix: str, dim: int, heads: int, kv_repeat: int) -> None:
    if heads <= 0 or dim % heads:
        raise ConfigError(f"{prefix}dim {dim} is not a multiple of {prefix}num_heads {heads}")
    if kv_repeat <= 0 or heads % kv_repeat:
        raise ConfigError(f"{prefix}num_heads {heads} is not a multiple of {prefix}kv_repeat {kv_repeat}")
    if dim // heads % 2:
        raise ConfigError(f"{prefix}num_heads: a head of {dim // heads} channels cannot be rotated in pairs")
