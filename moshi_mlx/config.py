"""What a checkpoint's config.json says, checked.

Fields bear the checkpoint's own names. A key that no field reads is an error that names the key: silently ignored
settings are how ports go wrong. Three sources are understood: Kyutai's config.json, a folder without one (Moshi 7B),
and Hugging Face's config.json of the text model Helium.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from .errors import ConfigError
from .schema import Range, check_fields, expect_keys, mapping, read_fields, read_value

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

Whole = Annotated[int, Range(1 - 2**31, 2**31 - 1)]
Count = Annotated[int, Range(0, 2**31 - 1)]
Size = Annotated[int, Range(1, 2**31 - 1)]
# Far more layers, or frames of delay, than any model has: beyond it, a broken file would only exhaust the machine.
Layers = Annotated[int, Range(1, 10_000)]
Delay = Annotated[int, Range(0, 10_000)]
Period = Annotated[float, Range(0, 1e12, above=True)]
Seconds = Annotated[float, Range(0, 3600)]
Norm = Literal["rms_norm_f32", "rms_norm", "layer_norm", "layer_norm_f32"]
Positions = Literal["rope", "rope_concat", "none"]


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
    dim: Size
    n_bins: Count = 0
    possible_values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "conditioners")

    @classmethod
    def from_dict(cls, data: Any, where: str) -> ConditionerConfig:
        """Read ``{"type": "lut", "lut": {...}}`` or ``{"type": "tensor", "tensor": {...}}``."""
        expect_keys(where, data, {"type", "lut", "tensor"})
        kind = read_value(f"{where}.type", data.get("type"), Literal["lut", "tensor"])
        where = f"{where}.{kind}"
        body = {key: value for key, value in mapping(where, data.get(kind)).items() if value is not None}
        if kind == "tensor":
            return cls(kind, **read_fields(cls, body, where, hidden=("type", "n_bins", "possible_values")))
        body.pop("init_scale", None)
        if body.pop("tokenizer", "noop") != "noop":
            raise ConfigError(f"{where}.tokenizer: only 'noop' is supported, found {data['lut']['tokenizer']!r}")
        config = cls(kind, **read_fields(cls, body, where, hidden=("type",)))
        if not len(config.possible_values) <= config.n_bins > 0:
            raise ConfigError(f"{where}: {len(config.possible_values)} values, but n_bins is {config.n_bins}")
        return config


@dataclass(frozen=True)
class FuserConfig:
    """How conditions enter the model: added to every input (``sum``) or attended to (``cross``)."""

    sum: tuple[str, ...] = ()
    cross: tuple[str, ...] = ()
    cross_attention_pos_emb: bool = False
    cross_attention_pos_emb_scale: float = 1.0

    @classmethod
    def from_dict(cls, data: Any, where: str = "fuser") -> FuserConfig:
        """Read the object; null means the default."""
        rest = {key: value for key, value in mapping(where, data).items() if value is not None}
        if rest.pop("prepend", None):
            raise ConfigError(f"{where}.prepend is not supported: no published model prepends a condition")
        return cls(**read_fields(cls, rest, where))


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

    dim: Size = 4096
    text_card: Size = 32000
    text_card_out: Size | None = None
    existing_text_padding_id: Count = PAD_ID
    existing_text_end_padding_id: Count = END_PAD_ID
    n_q: Count = 16
    dep_q: Count = 8
    card: Size = 2048
    num_heads: Size = 32
    num_layers: Layers = 32
    hidden_scale: Annotated[float, Range(0, 10_000, above=True)] = 4.125
    causal: Literal[True] = True  # a conversation cannot read the future
    layer_scale: Literal[None] = None
    context: Annotated[int, Range(1, 1_000_000)] = 3000
    max_period: Period = 10000
    gating: Literal["silu"] = "silu"
    norm: Norm = "rms_norm_f32"
    positional_embedding: Positions = "rope"
    kv_repeat: Size = 1
    depformer_dim: Size = 1024
    depformer_dim_feedforward: Whole | tuple[Whole, ...] | None = None
    depformer_num_heads: Size = 16
    depformer_num_layers: Layers = 6
    depformer_layer_scale: Literal[None] = None
    depformer_multi_linear: Literal[True] = True
    depformer_context: Whole | None = 8
    depformer_max_period: Period | None = None
    depformer_gating: Literal["silu"] | None = None
    depformer_pos_emb: Positions = "none"
    depformer_norm: Norm | None = None
    depformer_kv_repeat: Size | None = None
    depformer_weights_per_step: Literal[True] = True
    depformer_weights_per_step_schedule: tuple[Count, ...] | None = None
    depformer_low_rank_embeddings: Size | None = None
    delays: tuple[Delay, ...] = (0, 0, *(1,) * 7, 0, *(1,) * 7)
    demux_second_stream: bool = False
    cross_attention: bool = False
    conditioners: Mapping[str, ConditionerConfig] = field(default_factory=dict)
    fuser: FuserConfig | None = None
    extra_heads_num_heads: Annotated[int, Range(0, 10_000)] = 0
    extra_heads_dim: Size = 6
    text_start_row: bool = True
    own_q: int = -1

    # Not keys of config.json: what the code derives or sets for a model family.
    _INTERNAL = ("own_q", "text_start_row")
    # Keys that carry nothing that inference needs.
    _IGNORED = ("depformer_causal", "quantize", "gradient_checkpointing")

    def __post_init__(self) -> None:
        if self.own_q < 0:
            object.__setattr__(self, "own_q", self.dep_q)
        check_fields(self)
        self._check()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LmConfig:
        """Read the language model's part of a config.json.

        Raises
        ------
        ConfigError
            Names the first key that is unknown, of a wrong type, unsupported, or contradicts another.
        """
        aliases = {"demux_second_text_stream": "demux_second_stream"}
        values = {aliases.get(key, key): value for key, value in data.items() if key not in cls._IGNORED}
        for key in ("norm_emb", "bias_proj"):
            if values.pop(key, None):
                raise ConfigError(f"{key}: true is not supported")
        if values.get("conditioners", ...) is None:
            del values["conditioners"]
        return cls(**read_fields(cls, values, hidden=cls._INTERNAL))

    def _check(self) -> None:
        if not self.hidden:
            raise ConfigError(f"hidden_scale {self.hidden_scale} gives no usable width of the feed-forward layers")
        rows = self.text_card + self.text_start_row
        if self.text_out > rows:
            raise ConfigError(f"text_card_out {self.text_out}: only tokens below {rows} have an embedding")
        for name in ("existing_text_padding_id", "existing_text_end_padding_id"):
            if getattr(self, name) >= self.text_card:
                raise ConfigError(f"{name} must be a text token below {self.text_card}, found {getattr(self, name)}")
        if self.dep_q > self.n_q:
            raise ConfigError(f"dep_q {self.dep_q} predicts more streams than the n_q {self.n_q} that exist")
        if self.own_q > self.dep_q:
            raise ConfigError(f"the own voice has {self.own_q} streams, but dep_q predicts only {self.dep_q}")
        if len(self.delays) != self.n_q + 1:
            raise ConfigError(f"delays needs {self.n_q + 1} entries (text and n_q streams), found {len(self.delays)}")
        _check_heads("", self.dim, self.num_heads, self.kv_repeat)
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

    def _check_depformer(self) -> None:
        _check_heads("depformer_", self.depformer_dim, self.depformer_num_heads, self.depth_kv_repeat)
        schedule = self.depformer_weights_per_step_schedule
        if schedule is not None:
            if len(schedule) != self.dep_q:
                raise ConfigError(
                    f"depformer_weights_per_step_schedule needs dep_q = {self.dep_q} entries, found {len(schedule)}"
                )
            if len(set(schedule)) != max(schedule) + 1:
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
    model_type: Literal["moshi", "hibiki", "stt", "tts", "personaplex", "helium"] = "moshi"
    moshi_name: str = DEFAULT_WEIGHTS
    mimi_name: str | None = DEFAULT_MIMI
    mimi_config_name: str | None = None
    tokenizer_name: str | None = DEFAULT_TOKENIZER
    lora_name: str | None = None
    lora: bool = False
    lora_rank: Whole = 128
    lora_scaling: float = 2.0
    lm_gen_config: Mapping[str, Any] = field(default_factory=dict)
    tts_config: Mapping[str, Any] = field(default_factory=dict)
    stt_config: Mapping[str, Seconds] = field(default_factory=dict)
    model_id: Mapping[str, Any] = field(default_factory=dict)
    quantization: Mapping[str, Any] | None = None
    tied_text_head: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json: Kyutai's, PersonaPlex's bare one, or Hugging Face's for Helium.

        Raises
        ------
        ConfigError
            Names the key and what is wrong with it.
        """
        data = mapping("config.json", data)
        if data.get("model_type") == "helium" or "hidden_size" in data:
            return _helium_from_hf(data)
        rest = {key: value for key, value in data.items() if key not in ("version", "quantization_config")}
        if rest.get("quantization") is None:
            rest["quantization"] = data.get("quantization_config")
        own = {entry.name for entry in fields(cls)} - {"lm", "tied_text_head"}
        given = {key: rest.pop(key) for key in own & rest.keys()}
        needed = ("lora", "lora_rank", "lora_scaling")  # of the others null means the default
        values = read_fields(cls, {key: value for key, value in given.items() if value is not None or key in needed})
        kind = values.get("model_type", "moshi")
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
    expect_keys("config.json", data, read | _HF_HELIUM_IGNORED)

    def given(key: str, hint: Any, default: Any = None) -> Any:
        return read_value(key, data.get(key, default), hint)

    dim, heads = given("hidden_size", Size), given("num_attention_heads", Size)
    kv_heads, hidden = given("num_key_value_heads", Size, heads), given("intermediate_size", Size)
    if data.get("head_dim") not in (None, dim // heads):
        raise ConfigError(f"head_dim {data['head_dim']} is not hidden_size / num_attention_heads = {dim // heads}")
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    given("hidden_act", Literal["silu"], "silu")
    for key in ("mlp_bias", "attention_bias"):
        given(key, Literal[False], False)
    rope = mapping("rope_parameters", data.get("rope_parameters") or {})
    if data.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise ConfigError("rope_scaling is not supported")
    norm: Norm = "rms_norm_f32" if given("rms_norm_eps", Literal[1e-8, 1e-5], 1e-8) == 1e-8 else "rms_norm"
    feedforward = -(-3 * hidden // 2)
    if feedforward == 4 * dim:
        feedforward += 1  # the width that has a rule of its own; one more gives the same when `hidden` is even
    lm = LmConfig(
        dim=dim,
        text_card=given("vocab_size", Size),
        n_q=0,
        dep_q=0,
        num_heads=heads,
        num_layers=given("num_hidden_layers", Layers),
        hidden_scale=(feedforward + 0.5) / dim,  # a half more, or rounding could lose one
        context=given("max_position_embeddings", Size, 4096),
        max_period=given("rope_theta", Period, rope.get("rope_theta", 100000)),
        norm=norm,
        kv_repeat=heads // kv_heads,
        delays=(0,),
        text_start_row=False,
    )
    if lm.hidden != hidden:
        raise ConfigError(f"intermediate_size {hidden} cannot be expressed as a gated width of hidden_size {dim}")
    quantization = data.get("quantization") or data.get("quantization_config")
    return ModelConfig(
        lm=lm,
        model_type="helium",
        mimi_name=None,
        tokenizer_name=given("tokenizer_name", str, "tokenizer.model"),
        quantization=dict(mapping("quantization", quantization)) if quantization else None,
        tied_text_head=given("tie_word_embeddings", bool, False),
    )


def _check_heads(prefix: str, dim: int, heads: int, kv_repeat: int) -> None:
    if dim % heads:
        raise ConfigError(f"{prefix}dim {dim} is not a multiple of {prefix}num_heads {heads}")
    if heads % kv_repeat:
        raise ConfigError(f"{prefix}num_heads {heads} is not a multiple of {prefix}kv_repeat {kv_repeat}")
    if dim // heads % 2:
        raise ConfigError(f"{prefix}num_heads: a head of {dim // heads} channels cannot be rotated in pairs")
