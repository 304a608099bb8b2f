"""Configuration: what is read, what is refused, and that refusals name the key."""

from __future__ import annotations

import json
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from moshi_mlx.config import ConditionerConfig, FuserConfig, LmConfig, ModelConfig, gated_hidden
from moshi_mlx.errors import ConfigError

from .fuzz.configs import GOLDEN, PUBLISHED, broken

TESTS = Path(__file__).parent


def read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def small(**changes: Any) -> dict[str, Any]:
    """A small model with every part, so that any key can be broken."""
    return read(TESTS / "golden" / "lm" / "tts" / "config.json") | changes


@pytest.mark.parametrize("path", PUBLISHED + GOLDEN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_published_configs_are_read(path: Path) -> None:
    """A checkpoint family whose config.json is refused cannot be loaded at all."""
    data = read(path)
    config = ModelConfig.from_dict(data)
    for key in {field.name for field in fields(LmConfig)} & data.keys() - {"conditioners", "fuser"}:
        expected = tuple(data[key]) if isinstance(data[key], list) else data[key]
        assert getattr(config.lm, key) == expected, key
    for key in {field.name for field in fields(ModelConfig)} & data.keys() - {"quantization"}:
        assert getattr(config, key) == data[key], key


# Temporal and depth width per branch, rows of the text head, weight sets, own streams, max delay: SPEC of each family.
DERIVED = {
    "moshi_7b": (11264, 2816, 32000, 8, 8, 1),
    "personaplex_7b": (11264, 2816, 32000, 16, 8, 1),
    "hibiki_1b": (5632, 2816, 48000, 8, 8, 2),
    "hibiki_2b": (7040, 2816, 48000, 9, 16, 2),
    "stt_1b": (5632, None, 8000, 0, 0, 0),
    "stt_2.6b": (5632, None, 4000, 0, 0, 0),
    "tts_1.6b": (5632, 2048, None, 11, 32, 2),
    "helium_1_preview_2b": (7040, None, 48000, 0, 0, 0),
    "helium_1_2b": (8192, None, 64000, 0, 0, 0),
}


@pytest.mark.parametrize("name", DERIVED)
def test_derived_sizes(name: str) -> None:
    """Widths that no key states are computed wrongly: weights of that family would not fit."""
    hidden, depth_hidden, text_out, sets, own_q, max_delay = DERIVED[name]
    lm = ModelConfig.from_dict(read(TESTS / "data" / "configs" / f"{name}.json")).lm
    assert lm.hidden == hidden
    assert set(lm.depth_hidden) == ({depth_hidden} if depth_hidden else set())
    assert text_out is None or lm.text_out == text_out
    assert (lm.num_weight_sets, lm.own_q, lm.max_delay) == (sets, own_q, max_delay)
    assert lm.user_q == lm.n_q - own_q
    assert lm.num_streams == len(lm.delays) == lm.n_q + 1


def test_moshi_7b_without_config() -> None:
    """A folder without config.json is taken for another model than Moshi 7B."""
    lm = ModelConfig.moshi_7b().lm
    written = ModelConfig.from_dict(read(TESTS / "data" / "configs" / "moshi_7b.json")).lm
    for name in ("dim", "num_layers", "num_heads", "n_q", "dep_q", "card", "text_card", "context", "delays"):
        assert getattr(lm, name) == getattr(written, name), name
    assert (lm.hidden, lm.depth_hidden) == (written.hidden, written.depth_hidden)
    assert (lm.text_start_id, lm.audio_start_id) == (32000, 2048)


def test_personaplex_bare() -> None:
    """PersonaPlex's config.json holds no architecture; it must mean 16 depth steps of which 8 are the own voice."""
    config = ModelConfig.from_dict({"model_type": "personaplex", "version": "7b-v1"})
    assert (config.lm.dep_q, config.lm.n_q, config.lm.own_q, config.lm.user_q) == (16, 16, 8, 8)
    assert config.lm.delays == (0, 0, *(1,) * 7, 0, *(1,) * 7)
    assert config == ModelConfig.personaplex()
    named = ModelConfig.from_dict({"model_type": "personaplex", "moshi_name": "other.safetensors"})
    assert (named.moshi_name, named.lm) == ("other.safetensors", config.lm)


def test_personaplex_with_architecture() -> None:
    """A PersonaPlex config.json that does state its sizes is read, and half of its streams are the user's."""
    lm = ModelConfig.from_dict(read(TESTS / "golden" / "lm" / "personaplex" / "config.json")).lm
    assert (lm.dep_q, lm.own_q, lm.user_q) == (4, 2, 2)
    with pytest.raises(ConfigError, match="own voice has 2 streams, but dep_q predicts only 1"):
        ModelConfig.from_dict(read(TESTS / "golden" / "lm" / "personaplex" / "config.json") | {"dep_q": 1})


def test_helium_from_hugging_face() -> None:
    """Hugging Face's names for the text model are mapped to the wrong fields."""
    config = ModelConfig.from_dict(read(TESTS / "golden" / "lm" / "helium" / "config.json"))
    lm = config.lm
    assert (lm.dim, lm.num_heads, lm.kv_repeat, lm.hidden, lm.text_card) == (32, 4, 2, 72, 56)
    assert (lm.max_period, lm.context, lm.norm) == (20000.0, 4096, "rms_norm_f32")
    assert (lm.n_q, lm.dep_q, lm.delays, lm.text_start_row, lm.text_start_id) == (0, 0, (0,), False, 1)
    assert config.mimi_name is None and not config.tied_text_head


@pytest.mark.parametrize("dim", [32, 48, 176, 208, 2048, 2560])
def test_helium_keeps_every_width(dim: int) -> None:
    """A feed-forward width loses one to rounding, or falls into the special rule for four times the width."""
    for hidden in {72, 128, 283, 508, dim, 2 * dim, 8 * dim // 3 & ~1, 11 * dim // 4, 4 * dim}:
        data = {
            "hidden_size": dim,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "intermediate_size": hidden,
            "vocab_size": 50,
        }
        assert ModelConfig.from_dict(data).lm.hidden == hidden


def test_feed_forward_rule() -> None:
    """Two thirds of the nominal width, but 21/8 of the model's where that is four times it (modules/gating.py)."""
    assert gated_hidden(4096, int(4.125 * 4096)) == 11264
    assert gated_hidden(1024, 4224) == 2816
    assert gated_hidden(1024, 3072) == 2048
    assert gated_hidden(1024, 4096) == 2688
    assert gated_hidden(32, 128) == 84


def test_unknown_keys_are_named() -> None:
    """A setting that this version does not know is silently ignored: the model would run, and be wrong."""
    with pytest.raises(ConfigError, match="'future_key'"):
        ModelConfig.from_dict(small(future_key=1))
    with pytest.raises(ConfigError, match="keys 'a_key', 'b_key'"):
        ModelConfig.from_dict(small(a_key=1, b_key=None))
    with pytest.raises(ConfigError, match=r"fuser.*'post'"):
        ModelConfig.from_dict(small(fuser={"post": []}))
    with pytest.raises(ConfigError, match=r"conditioners.x.*'extra'"):
        ModelConfig.from_dict(small(conditioners={"x": {"type": "lut", "extra": 1}}))
    with pytest.raises(ConfigError, match=r"conditioners.x.lut.*'size'"):
        ModelConfig.from_dict(small(conditioners={"x": {"type": "lut", "lut": {"size": 1}}}))
    helium = read(TESTS / "golden" / "lm" / "helium" / "config.json")
    with pytest.raises(ConfigError, match="'sliding_window'"):
        ModelConfig.from_dict(helium | {"sliding_window": 4})


UNSUPPORTED: list[tuple[str, Any, str]] = [
    ("causal", False, "causal"),
    ("layer_scale", 0.01, "layer_scale"),
    ("depformer_layer_scale", 0.01, "layer_scale"),
    ("gating", "none", "gating 'none'"),
    ("depformer_gating", "gelu", "gelu"),
    ("norm", "real_rms_norm", "norm 'real_rms_norm'"),
    ("depformer_norm", "batch_norm", "depformer_norm 'batch_norm'"),
    ("positional_embedding", "sin", "positional_embedding 'sin'"),
    ("depformer_pos_emb", "sin_rope", "depformer_pos_emb"),
    ("norm_emb", True, "norm_emb"),
    ("bias_proj", True, "bias_proj"),
    ("depformer_weights_per_step", False, "depformer_weights_per_step"),
    ("depformer_multi_linear", False, "depformer_multi_linear"),
    ("fuser", {"prepend": ["x"]}, "prepend"),
    ("model_type", "whisper", "'whisper'"),
]


@pytest.mark.parametrize(("key", "value", "said"), UNSUPPORTED)
def test_unsupported_values_are_named(key: str, value: Any, said: str) -> None:
    """A value that the code does not implement is accepted, and the model computes something else."""
    with pytest.raises(ConfigError, match=said):
        ModelConfig.from_dict(small(**{key: value}))


WRONG: list[tuple[str, Any]] = [
    ("dim", "32"),
    ("dim", None),
    ("dim", 32.5),
    ("dim", True),
    ("dim", [32]),
    ("dim", 0),
    ("dim", -32),
    ("dim", 2**40),
    ("dim", 10**400),
    ("dim", float("nan")),
    ("dim", float("inf")),
    ("num_heads", 0),
    ("num_heads", 3),
    ("num_layers", 0),
    ("num_layers", 10**9),
    ("context", 0),
    ("context", None),
    ("max_period", -1),
    ("max_period", float("inf")),
    ("hidden_scale", 0),
    ("hidden_scale", 1e308),
    ("hidden_scale", 0.01),
    ("causal", 1),
    ("card", 0),
    ("text_card", 0),
    ("text_card_out", 0),
    ("text_card_out", 50),
    ("existing_text_padding_id", -1),
    ("existing_text_padding_id", 40),
    ("n_q", -1),
    ("n_q", 5),
    ("dep_q", 5),
    ("dep_q", -1),
    ("delays", None),
    ("delays", 1),
    ("delays", [0, 0, 2, 2]),
    ("delays", [0, 0, 2, 2, -1]),
    ("delays", [0, 0, 2, 2, "2"]),
    ("delays", [0, 0, 2, 2, 1.5]),
    ("delays", [0, 0, 2, 2, 10**8]),
    ("kv_repeat", 0),
    ("kv_repeat", 3),
    ("kv_repeat", 2),  # not with cross-attention
    ("norm", 1),
    ("depformer_dim", 0),
    ("depformer_dim", 15),
    ("depformer_num_heads", 0),
    ("depformer_num_layers", 0),
    ("depformer_num_layers", 10**9),
    ("depformer_kv_repeat", 3),
    ("depformer_max_period", 0),
    ("depformer_dim_feedforward", 0),
    ("depformer_dim_feedforward", [48, 48]),
    ("depformer_dim_feedforward", [48, 48, 0]),
    ("depformer_dim_feedforward", "48"),
    ("depformer_low_rank_embeddings", 0),
    ("depformer_weights_per_step_schedule", [0, 1, 2]),
    ("depformer_weights_per_step_schedule", [0, 1, 3, 3]),
    ("depformer_weights_per_step_schedule", [0, 1, 2, 2**30]),
    ("depformer_weights_per_step_schedule", [-1, 0, 1, 2]),
    ("depformer_weights_per_step_schedule", {}),
    ("extra_heads_num_heads", -1),
    ("cross_attention", False),
    ("cross_attention", None),
    ("conditioners", []),
    ("conditioners", {}),
    ("conditioners", {"x": None}),
    ("conditioners", {"x": {"type": "lut", "lut": {"n_bins": 0, "dim": 4}}}),
    ("conditioners", {"x": {"type": "lut", "lut": {"n_bins": 1, "dim": 4, "possible_values": ["a", "b"]}}}),
    ("conditioners", {"x": {"type": "lut", "lut": {"n_bins": 1, "dim": 4, "possible_values": 1}}}),
    ("conditioners", {"x": {"type": "lut", "lut": {"n_bins": 1, "dim": 4, "tokenizer": "words"}}}),
    ("conditioners", {"x": {"type": "lut"}}),
    ("conditioners", {"x": {"type": "tensor", "tensor": {}}}),
    ("conditioners", {"x": {"type": "video"}}),
    ("fuser", None),
    ("fuser", []),
    ("fuser", {"sum": 1}),
    ("fuser", {"sum": "control"}),
    ("fuser", {"sum": [["control"]]}),
    ("fuser", {"sum": ["nobody"], "cross": ["speaker_wavs"]}),
    ("fuser", {"sum": ["control"], "cross": []}),
    ("fuser", {"cross": ["speaker_wavs"], "cross_attention_pos_emb": "yes"}),
    ("fuser", {"cross": ["speaker_wavs"], "cross_attention_pos_emb_scale": "x"}),
    ("moshi_name", 3),
    ("lm_gen_config", [1]),
    ("stt_config", {"audio_delay_seconds": "2.5"}),
    ("stt_config", {"audio_delay_seconds": 1e308}),
    ("stt_config", {"audio_silence_prefix_seconds": -0.5}),
    ("lora", "yes"),
    ("lora_rank", None),
    ("lora_scaling", float("nan")),
    ("quantization", 4),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_values_name_their_key(key: str, value: Any) -> None:
    """A wrong type or a contradiction ends in a traceback from the depths, or is not noticed at all."""
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(small(**{key: value}))
    # A contradiction may be told by its other side; one of the two must be named.
    others = {"n_q": "delays", "cross_attention": "fuser", "conditioners": "fuser", "fuser": "cross_attention"}
    assert key in str(error.value) or others.get(key, key) in str(error.value)


def test_whole_must_be_an_object() -> None:
    """A config.json that holds a list is reported as such."""
    for data in ([], None, "x", 3):
        with pytest.raises(ConfigError, match="object"):
            ModelConfig.from_dict(data)  # type: ignore[arg-type]


HELIUM_WRONG: list[tuple[str, Any]] = [
    ("hidden_size", 0),
    ("hidden_size", None),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 0),
    ("num_key_value_heads", 3),
    ("intermediate_size", 0),
    ("head_dim", 16),
    ("vocab_size", -1),
    ("hidden_act", "gelu"),
    ("mlp_bias", True),
    ("attention_bias", True),
    ("rms_norm_eps", 1e-6),
    ("rope_theta", None),
    ("rope_scaling", {"factor": 2}),
    ("rope_parameters", [1]),
    ("rope_parameters", {"rope_type": "yarn"}),
    ("tie_word_embeddings", 1),
    ("tokenizer_name", 1),
    ("quantization", [1]),
    ("model_type", "llama"),
]


@pytest.mark.parametrize(("key", "value"), HELIUM_WRONG, ids=lambda value: str(value)[:40])
def test_helium_wrong_values(key: str, value: Any) -> None:
    """The same for Hugging Face's form: unsupported or broken values must not pass."""
    helium = read(TESTS / "golden" / "lm" / "helium" / "config.json")
    said = {"rope_parameters": "rope_", "rms_norm_eps": "eps"}.get(key, key)
    with pytest.raises(ConfigError, match=said):
        ModelConfig.from_dict(helium | {key: value})


def test_aliases_and_ignored_keys() -> None:
    """Harmless keys of older or training configs must not refuse a good checkpoint."""
    config = ModelConfig.from_dict(
        small(depformer_causal=True, quantize=False, gradient_checkpointing=True, norm_emb=False, bias_proj=None)
    )
    assert config.lm.demux_second_stream
    data = small()
    data["demux_second_text_stream"] = data.pop("demux_second_stream")
    assert ModelConfig.from_dict(data) == config


def test_nulls_mean_defaults_where_the_reference_says_so() -> None:
    """Published configs hold nulls; each must mean what it means in the reference."""
    data = read(TESTS / "golden" / "lm" / "moshi" / "config.json")
    nulls = ["depformer_dim_feedforward", "fuser", "conditioners", "depformer_norm", "text_card_out", "lm_gen_config"]
    config = ModelConfig.from_dict(data | dict.fromkeys(nulls))
    assert config.lm.depth_hidden == (gated_hidden(16, int(4.125 * 16)),) * 3
    assert config.lm.fuser is None and config.lm.text_out == data["text_card"]


def test_quantization_block_is_kept() -> None:
    """What a quantized checkpoint says about itself is lost."""
    block = {"group_size": 32, "bits": 4, "transformer.layers.0": {"bits": 8, "group_size": 64}}
    assert ModelConfig.from_dict(small(quantization=block)).quantization == block
    assert ModelConfig.from_dict(small(quantization_config=block)).quantization == block
    assert ModelConfig.from_dict(small()).quantization is None


def test_fuser_and_conditioners_are_read() -> None:
    """Conditions are read under another role or order than the checkpoint's."""
    lm = ModelConfig.from_dict(small()).lm
    assert lm.fuser == FuserConfig(("control", "cfg"), ("speaker_wavs",), True, 1.0)
    assert lm.conditioners["speaker_wavs"] == ConditionerConfig("tensor", 12)
    assert lm.conditioners["cfg"].possible_values[2] == "2.0"


def test_broken_configs_raise_config_errors_only() -> None:
    """Some broken value of some key ends in another exception than ConfigError (or makes derived sizes fail)."""
    rng = random.Random(20)
    sources = [read(path) for path in PUBLISHED + GOLDEN]
    accepted = 0
    for _ in range(8000):
        data = broken(rng.choice(sources), rng)
        try:
            lm = ModelConfig.from_dict(data).lm
        except ConfigError as error:
            assert str(error)
            continue
        accepted += 1
        assert lm.hidden > 0 and lm.text_out > 0 and lm.max_delay >= 0
        if lm.dep_q:
            assert len(lm.schedule) == lm.dep_q and len(lm.depth_hidden) == lm.num_weight_sets
    assert 400 < accepted < 4000
