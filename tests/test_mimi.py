"""The codec: numbers of the reference, the streaming contract, configurations and weight files."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from moshi_mlx.checkpoint.mimi import load_mimi, mimi_weights, published_mimi_weights
from moshi_mlx.errors import AudioError, CheckpointError, ConfigError, StateError, TokenError
from moshi_mlx.models.mimi import Mimi, MimiConfig
from moshi_mlx.state import State, copy_state, describe_state, load_state, save_state, state_bytes
from tests.helpers.mimi import TINY, tiny_mimi, unproven_differences
from tests.helpers.rings import fill_rings
from tests.helpers.signal import speechlike

GOLDEN = Path(__file__).parent / "golden" / "mimi"
CASES = sorted(path.name for path in GOLDEN.iterdir())
MANIFESTS = Path(__file__).parent / "data" / "manifests"


class Golden:
    def __init__(self, name: str):
        self.path = GOLDEN / name / "mimi.safetensors"
        self.config = MimiConfig.from_dict(json.loads((GOLDEN / name / "config.json").read_text()))
        self.mimi = load_mimi(self.path, self.config)
        arrays = mx.load(str(GOLDEN / name / "golden.safetensors"))
        self.pcm = np.array(arrays["pcm"]).astype(np.float32) / 32768
        self.codes, self.codes_stream = np.array(arrays["codes"]), np.array(arrays["codes_stream"])
        self.decoded, self.decoded_stream = np.array(arrays["decoded"]), np.array(arrays["decoded_stream"])


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module")
def mimi() -> Mimi:
    return tiny_mimi()


@pytest.fixture(scope="module")
def pcm() -> np.ndarray:
    return speechlike(24 * 160, 24000)


def encode(mimi: Mimi, pcm: np.ndarray) -> np.ndarray:
    return np.array(mimi.encode(mx.array(pcm)[None, None]))[0]


def decode(mimi: Mimi, codes: np.ndarray) -> np.ndarray:
    return np.array(mimi.decode(mx.array(codes)[None]))[0, 0]


def encode_stepwise(mimi: Mimi, pcm: np.ndarray, frames: int = 1, state: State | None = None) -> np.ndarray:
    state = mimi.init_encoder_state(1) if state is None else state
    size = frames * mimi.frame_size
    return np.concatenate(
        [
            np.array(mimi.encode_step(mx.array(pcm[at : at + size])[None, None], state))[0]
            for at in range(0, len(pcm), size)
        ],
        axis=1,
    )


def decode_stepwise(mimi: Mimi, codes: np.ndarray, frames: int = 1, state: State | None = None) -> np.ndarray:
    state = mimi.init_decoder_state(1) if state is None else state
    return np.concatenate(
        [
            np.array(mimi.decode_step(mx.array(codes[:, at : at + frames])[None], state))[0, 0]
            for at in range(0, codes.shape[1], frames)
        ]
    )


# The reference


def test_codes_equal_the_reference(golden: Golden) -> None:
    """If this fails, models hear other codes than those they were trained on."""
    for codes in (encode(golden.mimi, golden.pcm), encode_stepwise(golden.mimi, golden.pcm)):
        assert codes.dtype == np.int32
        assert unproven_differences(golden.mimi, golden.pcm, codes, golden.codes) == []
        assert (codes == golden.codes).mean() > 0.99


def test_codes_equal_the_references_stream_until_its_ring_is_full(golden: Golden) -> None:
    """If this fails, the first frames of a conversation are heard otherwise than by the reference's server."""
    config = golden.config
    frames = config.transformer.context // config.resample_stride
    codes = encode_stepwise(golden.mimi, golden.pcm[: frames * config.frame_size])
    assert unproven_differences(golden.mimi, golden.pcm, codes, golden.codes_stream[:, :frames]) == []
    samples = decode_stepwise(golden.mimi, golden.codes[:, :frames])
    assert np.abs(samples - golden.decoded_stream[: len(samples)]).max() < 1e-4


def test_samples_equal_the_reference(golden: Golden) -> None:
    """If this fails, the voice sounds otherwise than the reference's."""
    for samples in (decode(golden.mimi, golden.codes), decode_stepwise(golden.mimi, golden.codes)):
        assert samples.dtype == np.float32 and np.abs(golden.decoded).max() > 0.1
        assert np.abs(samples - golden.decoded).max() < 1e-4


# The streaming contract


@pytest.mark.parametrize("frames", [1, 2, 3, 8, 24])
def test_stepwise_equals_whole(mimi: Mimi, pcm: np.ndarray, frames: int) -> None:
    """If this fails, a recording is answered otherwise when it is spoken live, or cut otherwise."""
    codes = encode(mimi, pcm)
    assert all(len(np.unique(row)) > 5 for row in codes), "too uniform to say anything"
    streamed = encode_stepwise(mimi, pcm, frames)
    assert unproven_differences(mimi, pcm, streamed, codes) == [] and (streamed == codes).mean() > 0.99
    np.testing.assert_allclose(decode_stepwise(mimi, codes, frames), decode(mimi, codes), atol=2e-6)


def test_the_encoder_is_causal(mimi: Mimi, pcm: np.ndarray) -> None:
    """If this fails, codes of a frame depend on samples that are not recorded yet."""
    x = mx.array(pcm[: 8 * 160])[None, None]
    gradient = mx.grad(lambda x: mimi.latent(x)[:, 4].square().sum())(x)
    reached = np.abs(np.array(gradient)).reshape(8, 160).max(axis=1) > 0
    assert reached[:5].all() and not reached[5:].any()


def test_the_decoder_is_causal(mimi: Mimi) -> None:
    """If this fails, a frame of sound depends on codes that are not sampled yet."""
    latent = mx.random.normal((1, 8, 16))
    gradient = mx.grad(lambda z: mimi.synthesize(z)[..., 4 * 160 : 5 * 160].square().sum())(latent)
    reached = np.abs(np.array(gradient)).max(axis=(0, 2)) > 0
    assert reached[:5].all() and not reached[5:].any()


def test_one_frame_in_gives_one_column_out_from_the_first_call(mimi: Mimi, pcm: np.ndarray) -> None:
    """If this fails, the codec adds a delay of its own."""
    state = mimi.init_encoder_state(1)
    assert mimi.encode_step(mx.array(pcm[:160])[None, None], state).shape == (1, 4, 1)
    assert mimi.decode_step(mx.zeros((1, 4, 1), mx.int32), mimi.init_decoder_state(1)).shape == (1, 1, 160)


def test_a_saved_state_replays_the_same(mimi: Mimi, pcm: np.ndarray, tmp_path: Path) -> None:
    """If this fails, a conversation that is saved and resumed goes on with a click or with other codes."""
    state = mimi.init_encoder_state(1)
    encode_stepwise(mimi, pcm[: 10 * 160], state=state)
    save_state(tmp_path / "state.safetensors", state)
    snapshot = copy_state(state)
    expected = encode_stepwise(mimi, pcm[10 * 160 :], state=state)
    loaded = load_state(tmp_path / "state.safetensors", mimi.init_encoder_state(1))
    for other in (snapshot, loaded):
        np.testing.assert_array_equal(encode_stepwise(mimi, pcm[10 * 160 :], state=other), expected)

    codes, state = encode(mimi, pcm), mimi.init_decoder_state(1)
    decode_stepwise(mimi, codes[:, :10], state=state)
    save_state(tmp_path / "state.safetensors", state)
    snapshot = copy_state(state)
    expected = decode_stepwise(mimi, codes[:, 10:], state=state)
    loaded = load_state(tmp_path / "state.safetensors", mimi.init_decoder_state(1))
    for other in (snapshot, loaded):
        np.testing.assert_array_equal(decode_stepwise(mimi, codes[:, 10:], state=other), expected)


def test_a_batch_equals_its_members(mimi: Mimi) -> None:
    """If this fails, conversations that share a model hear each other."""
    signals = [speechlike(12 * 160, 24000, seed) for seed in range(3)]
    batch = mx.array(np.stack(signals))[:, None]
    state, steps = mimi.init_encoder_state(3), []
    for frame in mx.split(batch, 12, axis=-1):
        steps.append(np.array(mimi.encode_step(frame, state)))
    streamed, whole = np.concatenate(steps, axis=-1), np.array(mimi.encode(batch))
    spoken = np.array(mimi.decode(mx.array(whole)))
    for index, signal in enumerate(signals):
        alone = encode(mimi, signal)
        for codes in (streamed[index], whole[index]):
            assert unproven_differences(mimi, signal, codes, alone) == []
        np.testing.assert_allclose(spoken[index, 0], decode(mimi, whole[index]), atol=2e-6)


def test_unwritten_keys_are_never_read(mimi: Mimi, pcm: np.ndarray) -> None:
    """If this fails, the first seconds of a conversation attend to whatever lay in memory."""

    def poison(state: State) -> State:
        fill_rings(state["transformer"])
        return state

    encoder, decoder = poison(mimi.init_encoder_state(1)), poison(mimi.init_decoder_state(1))
    encoder["downsample"]["left"] = mx.full(encoder["downsample"]["left"].shape, mx.nan)
    codes = encode_stepwise(mimi, pcm)
    np.testing.assert_array_equal(encode_stepwise(mimi, pcm, state=encoder), codes)
    np.testing.assert_array_equal(decode_stepwise(mimi, codes, state=decoder), decode_stepwise(mimi, codes))


def test_nothing_grows_with_time(mimi: Mimi) -> None:
    """If this fails, a long conversation runs out of memory."""
    encoder, decoder = mimi.init_encoder_state(1), mimi.init_decoder_state(1)
    schemas, sizes = (describe_state(encoder), describe_state(decoder)), (state_bytes(encoder), state_bytes(decoder))
    frame, held = mx.array(speechlike(160, 24000))[None, None], []
    for _ in range(1000):
        samples = mimi.decode_step(mimi.encode_step(frame, encoder), decoder)
        mx.eval(samples)
        held.append(mx.get_active_memory())
    assert (describe_state(encoder), describe_state(decoder)) == schemas
    assert (state_bytes(encoder), state_bytes(decoder)) == sizes
    assert max(held[200:]) <= max(held[100:200]) + 4096


def test_a_loud_start_does_not_come_back(mimi: Mimi) -> None:
    """If this fails, states are not local: silence would go on depending on what was said long ago."""
    loud, quiet = speechlike(4 * 160, 24000), np.zeros(160 * 40, np.float32)
    late = mimi.latent(mx.array(np.concatenate([loud, quiet]))[None, None])[0, -1]
    never = mimi.latent(mx.array(np.concatenate([0 * loud, quiet]))[None, None])[0, -1]
    np.testing.assert_allclose(np.array(late), np.array(never), atol=1e-6)


# What goes in


def test_a_part_of_a_frame_is_filled_with_silence(mimi: Mimi, pcm: np.ndarray) -> None:
    """If this fails, the end of a recording is cut off or padded otherwise than by the reference."""
    padded = np.pad(pcm[:1000], (0, 120))
    np.testing.assert_array_equal(encode(mimi, pcm[:1000]), encode(mimi, padded))
    assert encode(mimi, pcm[:1]).shape == (4, 1)


def test_audio_that_does_not_fit_is_named(mimi: Mimi) -> None:
    """If this fails, a wrong call ends in a traceback from the depths, or in wrong codes."""
    for shape in ((160,), (1, 160), (1, 2, 160), (1, 1, 0)):
        with pytest.raises(AudioError, match=re.escape(str(list(shape)))):
            mimi.encode(mx.zeros(shape))
    with pytest.raises(AudioError, match="int16"):
        mimi.encode(mx.zeros((1, 1, 160), mx.int16))
    with pytest.raises(AudioError, match="whole frames of 160 samples, not 100"):
        mimi.encode_step(mx.zeros((1, 1, 100)), mimi.init_encoder_state(1))


def test_codes_that_do_not_fit_are_named(mimi: Mimi) -> None:
    """If this fails, a wrong call ends in a traceback from the depths, or in noise."""
    for shape in ((4, 1), (1, 5, 1), (1, 0, 1), (1, 4, 0)):
        with pytest.raises(TokenError, match=re.escape(str(list(shape)))):
            mimi.decode(mx.zeros(shape, mx.int32))
    with pytest.raises(TokenError, match="float32"):
        mimi.decode(mx.zeros((1, 4, 1)))


def test_a_state_of_another_batch_is_named(mimi: Mimi) -> None:
    """If this fails, mixed-up sessions end in a shape error from the depths."""
    with pytest.raises(StateError, match="holds 2 sequences, the input 1"):
        mimi.encode_step(mx.zeros((1, 1, 160)), mimi.init_encoder_state(2))
    with pytest.raises(StateError, match="holds 1 sequences, the input 3"):
        mimi.decode_step(mx.zeros((3, 4, 1), mx.int32), mimi.init_decoder_state(1))


def test_fewer_codebooks_encode_a_prefix_and_decode(golden: Golden) -> None:
    """If this fails, a model with fewer codebooks hears other codes."""
    for count in (1, 2):
        short = load_mimi(golden.path, golden.config, num_codebooks=count)
        assert short.num_codebooks == count
        np.testing.assert_array_equal(encode(short, golden.pcm), encode(golden.mimi, golden.pcm)[:count])
        np.testing.assert_array_equal(decode(short, golden.codes[:count]), decode(golden.mimi, golden.codes[:count]))
    with pytest.raises(ConfigError, match="num_codebooks 0 is not between 1"):
        Mimi(golden.config, 0)


# Configurations


def changed(path: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(TINY)
    *parents, key = path.split(".")
    node = data
    for parent in parents:
        node = node[parent]
    node[key] = value
    return data


def test_the_default_is_the_published_codec() -> None:
    """If this fails, every size that is derived from it is wrong."""
    config = MimiConfig()
    assert (config.frame_size, config.hop_length, config.resample_stride) == (1920, 960, 2)
    assert MimiConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert MimiConfig.from_dict(TINY).to_dict() == TINY


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("colour", 1, "mimi_config.json has unknown key 'colour'"),
        ("seanet.lstm", 2, "seanet has unknown key 'lstm'"),
        ("quantizer.q_dropout", True, "quantizer has unknown key 'q_dropout'"),
        ("transformer.kv_repeat", 2, "transformer has unknown key 'kv_repeat'"),
        ("seanet", 3, "seanet must be an object"),
        ("seanet.causal", False, "seanet.causal False is not supported"),
        ("seanet.activation", "ReLU", "seanet.activation 'ReLU' is not supported"),
        ("seanet.norm", "layer_norm", "seanet.norm 'layer_norm' is not supported"),
        ("seanet.pad_mode", "reflect", "seanet.pad_mode 'reflect' is not supported"),
        ("seanet.true_skip", False, "seanet.true_skip False is not supported"),
        ("seanet.ratios", [], "seanet.ratios must be a list of positive integers"),
        ("seanet.ratios", [5, 0, 4], "seanet.ratios must be a list of positive integers"),
        ("seanet.ratios", "8654", "seanet.ratios must be a list"),
        ("seanet.ratios", [5, 4, 3], "a whole multiple of the product of seanet.ratios, 60"),
        ("seanet.n_filters", 3, "seanet.n_filters 3 must be a multiple of compress 2"),
        ("seanet.n_filters", 4.0, "seanet.n_filters must be a whole number, not 4.0"),
        ("seanet.n_filters", -4, "seanet.n_filters must be at least 1, not -4"),
        ("seanet.dimension", 18, "differs from seanet.dimension 18"),
        ("seanet.channels", 2, "seanet.channels 2 differs from channels 1"),
        ("quantizer.n_q", 0, "quantizer.n_q must be at least 1"),
        ("quantizer.input_dimension", 8, "quantizer.input_dimension 8 differs"),
        ("transformer.gating", "silu", "transformer.gating 'silu' is not supported"),
        ("transformer.norm", "rms_norm", "transformer.norm 'rms_norm' is not supported"),
        ("transformer.positional_embedding", "sin", "transformer.positional_embedding 'sin' is not supported"),
        ("transformer.num_heads", 3, "transformer.d_model 16 must split into num_heads 3"),
        ("transformer.output_dimensions", [8], "projections are not supported"),
        ("transformer.layer_scale", "no", "transformer.layer_scale must be a number"),
        ("sample_rate", 24000.5, "sample_rate must be a whole number"),
        ("sample_rate", True, "sample_rate must be a whole number"),
        ("frame_rate", float("nan"), "frame_rate must be a number"),
        ("frame_rate", 0, "frame_rate must be above 0"),
        ("frame_rate", 149.0, "24000 / frame_rate 149.0"),
        ("frame_rate", 10**400, "frame_rate must be at most 65536"),
        ("frame_rate", 5e-324, "the samples of a frame, sample_rate / frame_rate, must be at most 1.04858e+06"),
        ("sample_rate", 2**62, "sample_rate must be at most 768000"),
        ("seanet.n_filters", 2**31, "seanet.n_filters must be at most 65536"),
        ("seanet.n_filters", 2**15, "the channels that seanet.n_filters and seanet.ratios make must be at most 65536"),
        ("seanet.n_residual_layers", 10**9, "seanet.n_residual_layers must be at most 64"),
        ("seanet.n_residual_layers", 60, "the dilation that seanet.n_residual_layers and seanet.dilation_base make"),
        ("seanet.kernel_size", 10**9, "seanet.kernel_size must be at most 1024"),
        ("seanet.ratios", [1] * 100, "the number of seanet.ratios must be at most 16"),
        ("seanet.ratios", [2**70], "the largest of seanet.ratios must be at most 1024"),
        ("quantizer.n_q", 10**9, "quantizer.n_q must be at most 1024"),
        ("quantizer.bins", 2**40, "quantizer.bins must be at most 1.04858e+06"),
        ("transformer.num_layers", 10**9, "transformer.num_layers must be at most 256"),
        ("transformer.context", 2**31, "transformer.context must be at most 100000"),
        ("transformer.dim_feedforward", 2**31, "transformer.dim_feedforward must be at most 262144"),
        ("transformer.max_period", 10**400, "transformer.max_period must be at most 1e+12"),
    ],
)
def test_what_a_configuration_says_wrongly_is_named(path: str, value: Any, message: str) -> None:
    """If this fails, a codec of another kind is run as if it were this one, and only the ear can tell."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        MimiConfig.from_dict(changed(path, value))


def test_a_key_that_is_missing_is_named() -> None:
    """If this fails, a default of ours silently stands in for a default of the reference's, which is another."""
    data = copy.deepcopy(TINY)
    del data["seanet"]["kernel_size"]
    with pytest.raises(ConfigError, match=r"lacks seanet\.kernel_size"):
        MimiConfig.from_dict(data)


def test_a_codec_without_a_change_of_frame_rate(pcm: np.ndarray) -> None:
    """If this fails, codecs whose frames are latents cannot be used."""
    mimi = tiny_mimi(frame_rate=300.0)
    assert mimi.frame_size == 80 and "downsample" not in mimi
    codes = encode(mimi, pcm)
    np.testing.assert_array_equal(encode_stepwise(mimi, pcm, 2), codes)
    np.testing.assert_allclose(decode_stepwise(mimi, codes), decode(mimi, codes), atol=2e-6)


# Weight files


def expand(tensors: dict[str, Any]) -> dict[str, mx.array]:
    """A manifest's tensors as zeros that are never allocated; ``{a..b}`` in a name is a range."""
    arrays = {}
    for pattern, (shape, _) in tensors.items():
        span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
        for number in range(int(span[1]), int(span[2]) + 1) if span else [None]:
            name = pattern if span is None else f"{pattern[: span.start()]}{number}{pattern[span.end() :]}"
            arrays[name] = mx.zeros(shape)
    return arrays


@pytest.mark.parametrize("name", ["mimi_e351c8d8", "mimi_mlx_param_tree"])
def test_published_files_are_consumed_whole(name: str) -> None:
    """If this fails, the published codec does not load: a tensor is missing, left over or misshapen."""
    path = MANIFESTS / f"{name}.json"
    arrays = expand(json.loads(path.read_text())["tensors"])
    before = mx.get_active_memory()
    expected = {name: value.shape for name, value in tree_flatten(Mimi().parameters())}
    assert {name: value.shape for name, value in mimi_weights(arrays).items()} == expected
    assert len(mimi_weights(arrays, num_codebooks=8)) == len(expected) - 24
    assert mx.get_active_memory() - before < 1e6, "weights were allocated"
    if name == "mimi_e351c8d8":
        written = {name: value.shape for name, value in published_mimi_weights(Mimi()).items()}
        assert written == {name: value.shape for name, value in arrays.items()}


def raw(golden: Golden) -> dict[str, mx.array]:
    return dict(mx.load(str(golden.path)))


def test_what_we_write_is_what_we_read(golden: Golden) -> None:
    """If this fails, an exported codec is not the one that was exported."""
    written = published_mimi_weights(golden.mimi)
    weights = mimi_weights(written, golden.config)
    for name, array in tree_flatten(golden.mimi.parameters()):
        assert mx.array_equal(weights[name], array), name
    names = {name for name in raw(golden) if not name.endswith(("weight_g", "weight_v"))}
    assert names <= set(written)


def test_weight_norm_and_the_names_of_its_parts() -> None:
    """If this fails, a codec straight from training loads with wrong gains, or not at all."""
    golden = Golden("weight_norm")
    assert any(name.endswith("weight_g") for name in raw(golden)), "the golden file has no weight norm"
    renamed = {
        name.replace(".weight_g", ".parametrizations.weight.original0").replace(
            ".weight_v", ".parametrizations.weight.original1"
        ): array
        for name, array in raw(golden).items()
    }
    folded = published_mimi_weights(golden.mimi)
    for arrays in (renamed, folded):
        for name, array in mimi_weights(arrays, golden.config).items():
            expected = dict(tree_flatten(golden.mimi.parameters()))[name]
            assert mx.allclose(array, expected, rtol=1e-6, atol=1e-7), name


def test_attention_under_its_newer_names() -> None:
    """If this fails, files saved by the current reference code do not load."""
    golden = Golden("published_shape")
    renamed = {
        name.replace("in_proj_weight", "in_projs.0.weight").replace("out_proj.weight", "out_projs.0.weight")
        if "self_attn" in name
        else name: array
        for name, array in raw(golden).items()
    }
    assert renamed.keys() != raw(golden).keys()
    weights = mimi_weights(renamed, golden.config)
    assert all(mx.array_equal(weights[name], array) for name, array in tree_flatten(golden.mimi.parameters()))


def test_half_precision_files_are_cast_up() -> None:
    """If this fails, a codec stored in 16 bits runs in 16 bits, or not at all."""
    golden = Golden("published_shape")
    for dtype in (mx.float16, mx.bfloat16):
        weights = mimi_weights({name: array.astype(dtype) for name, array in raw(golden).items()}, golden.config)
        assert all(array.dtype == mx.float32 for array in weights.values())
        codes = weights["quantizer.rvq_first.codebooks.0.embedding"]
        assert mx.allclose(codes, golden.mimi.quantizer.rvq_first.codebooks[0].embedding, rtol=0.02, atol=0.02)


def test_a_rarely_used_entry_is_not_divided_by_zero() -> None:
    """If this fails, one unused entry of a codebook makes every code NaN's."""
    golden = Golden("published_shape")
    arrays = raw(golden)
    stem = "quantizer.rvq_first.vq.layers.0._codebook."
    arrays[stem + "cluster_usage"] = mx.zeros_like(arrays[stem + "cluster_usage"])
    entries = mimi_weights(arrays, golden.config)["quantizer.rvq_first.codebooks.0.embedding"]
    assert mx.allclose(entries, arrays[stem + "embedding_sum"] / 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("encoder.model.0.conv.conv.bias"), "lacks encoder.model.0.conv.conv.bias"),
        (lambda a: a.pop("upsample.convtr.convtr.convtr.weight"), "lacks upsample.convtr.convtr.convtr.weight"),
        (lambda a: a.pop("quantizer.rvq_rest.vq.layers.3._codebook.cluster_usage"), "layers.3._codebook.cluster_usage"),
        (lambda a: a.update({"encoder.model.99.conv.conv.bias": mx.zeros(3)}), "does not know: encoder.model.99"),
        (lambda a: a.update({"downsample.conv.conv.conv.bias": mx.zeros(32)}), "does not know: downsample"),
        (lambda a: a.update({"decoder.model.14.conv.conv.bias": mx.zeros(2)}), r"decoder.model.14.conv.conv.bias has"),
        (lambda a: a.update({"encoder.model.3.conv.conv.weight": mx.zeros((8, 4))}), r"has shape \[8, 4\]"),
        (lambda a: a.update({"decoder.model.14.conv.conv.bias": mx.zeros(1, mx.int32)}), "not a floating type"),
        (lambda a: a.update({"encoder.model.0.conv.conv.weight_g": mx.zeros((4, 1, 1))}), "weight_v, the partner"),
        (lambda a: a.clear(), "not a Mimi file"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change: Any, message: str) -> None:
    """If this fails, a codec runs with weights that were never read."""
    golden = Golden("published_shape")
    arrays = raw(golden)
    change(arrays)
    with pytest.raises(CheckpointError, match=message):
        mimi_weights(arrays, golden.config)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    """If this fails, a broken download ends in a traceback from the depths."""
    path = tmp_path / "mimi.safetensors"
    with pytest.raises(CheckpointError, match="mimi.safetensors"):
        load_mimi(path)
    path.write_bytes(Golden("published_shape").path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="mimi.safetensors"):
        load_mimi(path)
