"""Causal convolutions against the definition, however the input is cut."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest

from moshi_mlx.errors import ConfigError
from moshi_mlx.layers.conv import CausalConv, CausalConvTranspose, DepthwiseConvTranspose, elu
from moshi_mlx.state import copy_state, describe_state

IN, OUT, BATCH = 3, 5, 2
SIZES = [
    (kernel, stride, dilation)
    for kernel, stride, dilation in itertools.product((1, 2, 3, 4, 7, 8), (1, 2, 3, 4), (1, 2, 3))
    if (kernel - 1) * dilation + 1 >= stride
]
TRANSPOSED = [
    (kernel, stride) for kernel, stride in itertools.product((1, 2, 3, 4, 7, 8, 11), (1, 2, 3, 4)) if kernel >= stride
]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_definition(conv: CausalConv, x: np.ndarray) -> np.ndarray:
    """Loops over outputs and taps, in float64."""
    weight = np.array(conv.weight, np.float64)
    first = x[:, :1] if conv.replicate else np.zeros_like(x[:, :1])
    x = np.concatenate([np.repeat(first, conv.context, axis=1), x], axis=1).astype(np.float64)
    count = (x.shape[1] - conv.context) // conv.stride
    y = np.zeros((len(x), count, weight.shape[2]))
    for time, tap in itertools.product(range(count), range(len(weight))):
        y[:, time] += x[:, time * conv.stride + tap * conv.dilation] @ weight[tap]
    return y + (np.array(conv.bias) if "bias" in conv else 0)


def transposed_by_definition(conv: CausalConvTranspose | DepthwiseConvTranspose, x: np.ndarray) -> np.ndarray:
    weight = np.array(conv.weight, np.float64)
    if weight.ndim == 2:  # depthwise [kernel, channels]
        weight = np.stack([np.diag(row) for row in weight], axis=1)
    time, kernel = x.shape[1], weight.shape[1]
    y = np.zeros((len(x), time * conv.stride + kernel, weight.shape[2]))
    for index in range(time):
        y[:, index * conv.stride : index * conv.stride + kernel] += np.einsum("bi,iko->bko", x[:, index], weight)
    y = y[:, : time * conv.stride]
    return y + (np.array(conv.bias) if "bias" in conv else 0)


def stepwise(module, x: np.ndarray, chunk: int) -> np.ndarray:
    state = module.init_state(len(x))
    schema = describe_state(state)
    parts = []
    for start in range(0, x.shape[1], chunk):
        parts.append(np.array(module.step(mx.array(x[:, start : start + chunk]), state)))
        assert describe_state(state) == schema, "the state changed its size"
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("padding", ["constant", "replicate"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), SIZES)
def test_convolution(kernel: int, stride: int, dilation: int, bias: bool, padding: str) -> None:
    """If this fails, some combination of sizes gives wrong samples, at once or at the seams between frames."""
    mx.random.seed(kernel * 100 + stride * 10 + dilation)
    conv = CausalConv(IN, OUT, kernel, stride=stride, dilation=dilation, bias=bias, padding=padding)
    x = random(BATCH, 12 * stride, IN)
    expected = by_definition(conv, x)
    np.testing.assert_allclose(np.array(conv(mx.array(x))), expected, atol=2e-5)
    for chunk in (1, 2, 5, 12):
        np.testing.assert_allclose(stepwise(conv, x, chunk * stride), expected, atol=2e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), TRANSPOSED)
def test_transposed_convolution(kernel: int, stride: int, bias: bool) -> None:
    """If this fails, overlaps are added wrongly, or the bias is counted once per overlap instead of once."""
    mx.random.seed(kernel * 10 + stride)
    conv = CausalConvTranspose(IN, OUT, kernel, stride=stride, bias=bias)
    x = random(BATCH, 12, IN)
    expected = transposed_by_definition(conv, x)
    np.testing.assert_allclose(np.array(conv(mx.array(x))), expected, atol=2e-5)
    for chunk in (1, 2, 5):
        np.testing.assert_allclose(stepwise(conv, x, chunk), expected, atol=2e-5)


@pytest.mark.parametrize(("kernel", "stride"), TRANSPOSED)
def test_depthwise_transposed_convolution(kernel: int, stride: int) -> None:
    """If this fails, upsampling mixes channels or adds overlaps wrongly."""
    mx.random.seed(kernel * 10 + stride)
    conv = DepthwiseConvTranspose(IN, kernel, stride=stride)
    x = random(BATCH, 12, IN)
    expected = transposed_by_definition(conv, x)
    np.testing.assert_allclose(np.array(conv(mx.array(x))), expected, atol=2e-5)
    for chunk in (1, 3):
        np.testing.assert_allclose(stepwise(conv, x, chunk), expected, atol=2e-5)


def test_the_bias_is_counted_once() -> None:
    """If this fails, a constant hum is added wherever two frames overlap."""
    conv = CausalConvTranspose(IN, OUT, 8, stride=4)
    conv.weight = mx.zeros_like(conv.weight)
    y = stepwise(conv, random(1, 6, IN), 1)
    np.testing.assert_array_equal(y, np.broadcast_to(np.array(conv.bias), y.shape))


def test_replicate_padding_repeats_the_first_input_of_each_sequence() -> None:
    """If this fails, the first frame of a stream is quantized as if silence came before it: other first codes."""
    conv = CausalConv(1, 1, 4, stride=2, bias=False, padding="replicate")
    conv.weight = mx.ones((4, 1, 1))
    x = np.array([[[3.0], [1.0], [5.0], [7.0]], [[-2.0], [0.5], [1.0], [1.0]]], np.float32)
    assert stepwise(conv, x, 2)[:, 0, 0].tolist() == [10.0, -5.5]
    state = conv.init_state(2)
    state["left"] = mx.full(state["left"].shape, mx.nan)  # nothing was written there yet: it must not be read
    assert np.isfinite(np.array(conv.step(mx.array(x[:, :2]), state))).all()


@pytest.mark.parametrize("module", [CausalConv(IN, OUT, 7), CausalConvTranspose(IN, OUT, 8, stride=4)])
def test_a_gradient_reaches_no_earlier_output(module) -> None:
    """If this fails, an output depends on inputs that a stream has not heard yet."""
    x = mx.array(random(1, 10, IN))
    scale = module(x).shape[1] // 10
    gradient = mx.grad(lambda x: module(x)[:, 4 * scale : 5 * scale].square().sum())(x)
    reached = np.abs(np.array(gradient)).max(axis=(0, 2)) > 0
    assert reached[4] and not reached[5:].any()


def test_a_restored_state_replays_the_same() -> None:
    """If this fails, a saved conversation goes on with a click."""
    conv, x = CausalConv(IN, OUT, 7), random(1, 20, IN)
    state = conv.init_state(1)
    conv.step(mx.array(x[:, :10]), state)
    saved = copy_state(state)
    once = np.array(conv.step(mx.array(x[:, 10:]), state))
    np.testing.assert_array_equal(once, np.array(conv.step(mx.array(x[:, 10:]), saved)))


def test_elu_and_its_gradient_are_finite_everywhere() -> None:
    """If this fails, training or fine-tuning meets NaN at loud activations."""
    x = mx.array([-1e4, -1.0, -1e-6, 0.0, 2.0, 1e4])
    np.testing.assert_allclose(np.array(elu(x)), [-1.0, np.expm1(-1.0), -1e-6, 0.0, 2.0, 1e4], rtol=1e-5)
    assert np.isfinite(np.array(mx.grad(lambda x: elu(x).sum())(x))).all()


def test_sizes_that_make_no_sense_are_refused() -> None:
    """If this fails, a wrong configuration ends in samples that are skipped or left silent."""
    with pytest.raises(ConfigError, match="stride 4"):
        CausalConv(1, 1, 3, stride=4)
    with pytest.raises(ConfigError, match="stride 4"):
        CausalConvTranspose(1, 1, 3, stride=4)
    with pytest.raises(ConfigError, match="stride 4"):
        DepthwiseConvTranspose(1, 3, stride=4)
    with pytest.raises(ConfigError, match="reflect"):
        CausalConv(1, 1, 3, padding="reflect")
