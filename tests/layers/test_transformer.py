"""The transformer: the streaming contract for a stack of layers with everything switched on, and its parts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from moshi_mlx.errors import ConfigError
from moshi_mlx.layers.transformer import (
    GatedFeedForward,
    LayerScale,
    PlainFeedForward,
    Transformer,
    make_norm,
    make_rope,
)
from moshi_mlx.state import copy_state, describe_state, load_state, save_state, state_arrays

from ..helpers.rings import fill_rings

BATCH, TIME, DIM, CONTEXT = 2, 23, 64, 5
SLOTS = 4

KINDS: dict[str, dict[str, Any]] = {
    "moshi": {"rope": make_rope("rope", 10000)},
    "grouped": {"rope": make_rope("rope_concat", 500), "kv_repeat": 2, "norm": "rms_norm"},
    "codec": {"rope": make_rope("rope", 10000), "gated": False, "norm": "layer_norm", "layer_scale": 0.4},
    "cross": {"rope": make_rope("rope", 10000), "cross_attention": True},
    "cross, scaled": {"rope": None, "cross_attention": True, "layer_scale": 0.4, "norm": "layer_norm_f32"},
}
CUTS = [[1] * TIME, [2] * 11 + [1], [4, 1, 6, 5, 7], [TIME]]


def make(kind: str, layers: int = 2) -> Transformer:
    mx.random.seed(2)
    model = Transformer(layers, DIM, 2, 96, context=CONTEXT, **KINDS[kind])
    # Away from the initial values, where norms and scales are the same for every channel.
    model.update(tree_map(lambda p: p * (1 + 0.3 * mx.random.normal(p.shape)), model.parameters()))
    return model


def draw(seed: int = 1, time: int = TIME, batch: int = BATCH) -> mx.array:
    return mx.random.normal((batch, time, DIM), key=mx.random.key(seed))


def source_for(kind: str, batch: int = BATCH) -> mx.array | None:
    return draw(9, SLOTS, BATCH)[:batch] if kind.startswith("cross") else None


def stream(model: Transformer, x: mx.array, cut: list[int], state: Any) -> mx.array:
    pieces, start = [], 0
    for length in cut:
        pieces.append(model.step(x[:, start : start + length], state))
        start += length
    return mx.concatenate(pieces, axis=1)


def difference(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return float(mx.abs(a - b).max().item())


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(map(str, cut[:3])))
@pytest.mark.parametrize("kind", KINDS)
def test_stepwise_equals_whole(kind: str, cut: list[int]) -> None:
    """A session frame by frame says something else than the training pass over the same sequence."""
    model, x, source = make(kind), draw(), source_for(kind)
    state = model.init_state(BATCH, source=source)
    assert difference(stream(model, x, cut, state), model(x, source)) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_causality_by_gradient(kind: str) -> None:
    """An output depends on a later input, or on one beyond the reach of one layer's window."""
    x, source = draw(batch=1), source_for(kind, 1)
    for layers in (1, 2):
        model, t = make(kind, layers), 14
        gradient = mx.grad(lambda x, model=model: model(x, source)[:, 14].square().sum())(x)
        reach = np.abs(np.array(gradient))[0].max(axis=-1) > 0
        first = t - layers * (CONTEXT - 1)
        assert reach.tolist() == [first <= s <= t for s in range(TIME)]


@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("kind", ["grouped", "cross"])
def test_save_restore_replay(kind: str, kv_bits: int | None, tmp_path: Any) -> None:
    """A session that was put away goes on differently; with a condition, its keys must come back too."""
    model, x, source = make(kind), draw(), source_for(kind)
    state = model.init_state(BATCH, kv_bits=kv_bits, source=source)
    stream(model, x, [1] * 9, state)
    kept = copy_state(state)
    save_state(tmp_path / "state.safetensors", state)
    rest = stream(model, x[:, 9:], [1, 6, 1, 1, 1, 1, 1, 1, 1], state)
    loaded = load_state(tmp_path / "state.safetensors", model.init_state(BATCH, kv_bits=kv_bits, source=source))
    for again in (kept, loaded):
        assert mx.array_equal(stream(model, x[:, 9:], [1, 6, 1, 1, 1, 1, 1, 1, 1], again), rest).item()


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_singles(kind: str) -> None:
    """A sequence in a batch depends on its neighbours."""
    model, x, source = make(kind), draw(), source_for(kind)
    together = stream(model, x, [1] * TIME, model.init_state(BATCH, source=source))
    for row in range(BATCH):
        own = None if source is None else source[row : row + 1]
        alone = stream(model, x[row : row + 1], [1] * TIME, model.init_state(1, source=own))
        assert difference(alone, together[row : row + 1]) < 2e-5


@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("cut", [[1] * 12, [2] * 6, [5, 1, 6], [4, 8]], ids=lambda cut: "-".join(map(str, cut)))
@pytest.mark.parametrize("kind", ["grouped", "cross"])
def test_rows_that_wait(kind: str, cut: list[int], kv_bits: int | None) -> None:
    """If this fails, a conversation that had no frame for a while has lost keys, or its place."""
    model, source = make(kind), source_for(kind)
    counts = None if source is None else mx.array([SLOTS, 2])
    state = model.init_state(BATCH, kv_bits=kv_bits, source=source, source_slots=counts)
    parts = [draw(row, 24, 1) for row in range(BATCH)]
    rows: list[list[mx.array]] = [[] for _ in range(BATCH)]
    done = [0] * BATCH
    for turn, length in enumerate([*cut, *cut]):
        active = [True, False] if turn % 3 == 0 else [False, True] if turn % 3 == 1 else [True, True]
        x = mx.concatenate([part[:, at : at + length] for part, at in zip(parts, done)])
        out = model.step(x, state, mx.array(active))
        for row in range(BATCH):
            if active[row]:
                rows[row].append(out[row : row + 1])
                done[row] += length
    assert state["offset"].tolist() == done
    for row in range(BATCH):
        own = None if source is None else source[row : row + 1, : SLOTS if row == 0 else 2]
        alone = model.init_state(1, kv_bits=kv_bits, source=own)
        cuts = [piece.shape[1] for piece in rows[row]]
        expected = stream(model, parts[row][:, : done[row]], cuts, alone)
        assert difference(mx.concatenate(rows[row], axis=1), expected) < 2e-5


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_unwritten_slots_are_invisible(kv_bits: int | None) -> None:
    """What is in slots that hold nothing yet, NaN or a value that only a weight of zero hides, reaches an output."""
    model, x = make("moshi"), draw()
    clean = stream(model, x, [1] * TIME, model.init_state(BATCH, kv_bits=kv_bits))
    for cut in CUTS:
        state = model.init_state(BATCH, kv_bits=kv_bits)
        fill_rings(state)
        assert difference(stream(model, x, cut, state), clean) < 2e-5


def test_weights_do_not_change() -> None:
    """Streaming writes into the model: two sessions on one model would meet."""
    model, x = make("cross"), draw()
    before = [(name, np.array(value)) for name, value in tree_flatten(model.parameters())]
    stream(model, x, [1] * TIME, model.init_state(BATCH, source=source_for("cross")))
    after = tree_flatten(model.parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all((np.array(value) == old).all() for (_, value), (_, old) in zip(after, before))


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_state_has_a_fixed_schema(kv_bits: int | None) -> None:
    """The state grows while the session lasts."""
    model, x = make("grouped"), draw()
    state = model.init_state(BATCH, kv_bits=kv_bits)
    schema = describe_state(state)
    stream(model, x, [1] * 12, state)
    mx.eval(state_arrays(state))
    assert describe_state(state) == schema


@pytest.mark.parametrize(("kind", "eps"), [("rms_norm_f32", 1e-8), ("rms_norm", 1e-5)])
def test_rms_norms(kind: str, eps: float) -> None:
    """A norm has another epsilon than its name says: it shows where activations are small."""
    norm = make_norm(kind, 8)
    norm.weight = mx.arange(1, 9).astype(mx.float32)
    x = mx.random.normal((3, 8), key=mx.random.key(0)) * 1e-3
    expected = norm.weight * x * mx.rsqrt(x.square().mean(axis=-1, keepdims=True) + eps)
    assert difference(norm(x), expected) < 1e-5


@pytest.mark.parametrize(("kind", "eps"), [("layer_norm", 1e-5), ("layer_norm_f32", 1e-8)])
def test_layer_norms(kind: str, eps: float) -> None:
    """The same for the layer norms; they have a bias."""
    norm = make_norm(kind, 8)
    norm.bias = mx.arange(8).astype(mx.float32)
    x = mx.random.normal((3, 8), key=mx.random.key(0)) * 1e-3
    centred = x - x.mean(axis=-1, keepdims=True)
    expected = centred * mx.rsqrt(centred.square().mean(axis=-1, keepdims=True) + eps) + norm.bias
    assert difference(norm(x), expected) < 1e-5


def test_feed_forward_halves() -> None:
    """The gate and the value of SwiGLU are swapped, or GELU is the tanh approximation."""
    gated = GatedFeedForward(4, 3)
    x = draw(time=1)[..., :4]
    weight = gated.linear_in.weight
    expected = gated.linear_out(nn.silu(x @ weight[:3].T) * (x @ weight[3:].T))
    assert difference(gated(x), expected) < 1e-6
    plain = PlainFeedForward(1, 1)
    plain.linear1.weight = plain.linear2.weight = mx.ones((1, 1))
    assert abs(plain(mx.ones((1, 1))).item() - 0.8413447) < 1e-6  # the tanh form gives 0.841192
    assert LayerScale(2, 0.5)(mx.ones((2,))).tolist() == [0.5, 0.5]


def test_unknown_names() -> None:
    """A misspelt norm or position embedding means silently none."""
    with pytest.raises(ConfigError, match="'rmsnorm'"):
        make_norm("rmsnorm", 4)
    with pytest.raises(ConfigError, match="'alibi'"):
        make_rope("alibi", 1.0)
    assert make_rope("none", 1.0) is None
    interleaved, split = make_rope("rope", 7), make_rope("rope_concat", 7)
    assert interleaved is not None and interleaved.interleaved and interleaved.max_period == 7
    assert split is not None and not split.interleaved
