"""Attention: the streaming contract over a ring, causality, position embeddings, the 8-bit cache."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from moshi_mlx.errors import ConfigError, StateError
from moshi_mlx.layers.attention import Attention, CrossAttention, Rope, resize_rings, trim_rings, window_mask
from moshi_mlx.state import (
    State,
    as_mlx,
    as_numpy,
    concatenate_rows,
    copy_state,
    describe_state,
    load_state,
    save_state,
    state_bytes,
)

from ..helpers.rings import LOUD, fill_rings

BATCH, TIME, DIM, CONTEXT = 2, 29, 64, 6

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rope": {"rope": Rope()},
    "rope_concat": {"rope": Rope(interleaved=False, max_period=100.0)},
    "grouped": {"rope": Rope(), "kv_repeat": 2},
    "one key head": {"kv_repeat": 2, "rope": Rope(interleaved=False)},
}
RAGGED = [5, 1, 7, 6, 9, 1]
CUTS = [[1] * TIME, [2] * 14 + [1], RAGGED, [TIME], [CONTEXT] * 4 + [5], [CONTEXT + 1] * 4 + [1], [3, 20, 6]]


def make(seed: int = 0, **options: Any) -> Attention:
    mx.random.seed(seed)
    layer = Attention(DIM, 2, context=CONTEXT, **options)
    layer.in_proj.weight = mx.random.normal(layer.in_proj.weight.shape) * DIM**-0.5 * 1.5
    return layer


def draw(seed: int = 1, time: int = TIME, batch: int = BATCH) -> mx.array:
    return mx.random.normal((batch, time, DIM), key=mx.random.key(seed))


def stream(layer: Any, x: mx.array, cut: list[int], state: State) -> mx.array:
    """The input in pieces of the given lengths."""
    pieces, start = [], 0
    for length in cut:
        pieces.append(layer.step(x[:, start : start + length], state))
        start += length
    return mx.concatenate(pieces, axis=1)


def difference(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return float(mx.abs(a - b).max().item())


def by_hand(layer: Attention, x: np.ndarray) -> np.ndarray:
    """Attention in numpy, float64, from its definition."""
    weight, out = np.array(layer.in_proj.weight, np.float64), np.array(layer.out_proj.weight, np.float64)
    heads, kv_heads, width = layer.num_heads, layer.kv_heads, layer.head_dim
    projected = x.astype(np.float64) @ weight.T
    result = np.zeros_like(projected[..., : heads * width])
    rope = layer.rope

    def turned(vector: np.ndarray, position: int) -> np.ndarray:
        if rope is None:
            return vector
        half = width // 2
        angle = position * rope.max_period ** (-np.arange(half) * 2 / width)
        first = np.arange(half) * 2 if rope.interleaved else np.arange(half)
        second = first + 1 if rope.interleaved else first + half
        rotated = vector.copy()
        rotated[first] = vector[first] * np.cos(angle) - vector[second] * np.sin(angle)
        rotated[second] = vector[first] * np.sin(angle) + vector[second] * np.cos(angle)
        return rotated

    for b, sequence in enumerate(projected):
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            at_key = (heads + kv_head) * width
            at_value = (heads + kv_heads + kv_head) * width
            for t in range(len(sequence)):
                query = turned(sequence[t, head * width : (head + 1) * width], t)
                seen = range(max(0, t - layer.context + 1), t + 1)
                keys = [turned(sequence[s, at_key : at_key + width], s) for s in seen]
                scores = np.array([query @ key for key in keys]) / math.sqrt(width)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                values = sequence[list(seen), at_value : at_value + width]
                result[b, t, head * width : (head + 1) * width] = weights @ values
    return result @ out.T


@pytest.mark.parametrize("kind", KINDS)
def test_definition(kind: str) -> None:
    """Heads, scale, rotation, grouping or window differ from the definition of attention."""
    layer = make(**KINDS[kind])
    x = draw(time=15)
    assert np.abs(np.array(layer(x)) - by_hand(layer, np.array(x))).max() < 1e-5


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(map(str, cut[:3])))
@pytest.mark.parametrize("kind", KINDS)
def test_stepwise_equals_whole(kind: str, cut: list[int]) -> None:
    """Frame by frame, with wraps or chunks longer than the ring, attention sees other keys than at once."""
    layer = make(**KINDS[kind])
    x = draw()
    state = layer.init_state(BATCH)
    assert difference(stream(layer, x, cut, state), layer(x)) < 1e-5
    assert state["offset"].tolist() == [TIME] * BATCH


@pytest.mark.parametrize("kind", KINDS)
def test_unwritten_slots_are_invisible(kind: str) -> None:
    """A stray read of a slot that holds nothing yet: NaN there, and values whose weight must be exactly zero, tell."""
    layer = make(**KINDS[kind])
    x = draw(time=8)
    for cut in ([1] * 8, [3, 3, 2], [8]):
        state = layer.init_state(BATCH)
        state["keys"] = mx.full(state["keys"].shape, mx.nan)
        state["values"] = mx.full(state["values"].shape, LOUD)
        assert difference(stream(layer, x, cut, state), layer(x)) < 1e-5


def test_unwritten_slots_are_invisible_in_8_bits() -> None:
    """The same for the quantized ring."""
    layer = make(rope=Rope())
    x = draw(time=8)
    clean = stream(layer, x, [1] * 8, layer.init_state(BATCH, kv_bits=8))
    for cut in ([1] * 8, [3, 3, 2], [8]):
        state = layer.init_state(BATCH, kv_bits=8)
        for name in ("keys", "values"):
            state[name] = mx.full(state[name].shape, 0xFFFFFFFF, mx.uint32)
            for part in ("scales", "biases"):
                state[f"{name}_{part}"] = mx.full(state[f"{name}_{part}"].shape, mx.nan if name == "keys" else LOUD)
        assert difference(stream(layer, x, cut, state), clean) < 1e-5


def test_causality_by_gradient() -> None:
    """An output depends on a later input, or on one ``context`` or more positions back, or not on one between."""
    layer = make(**KINDS["grouped"])
    x = draw(batch=1, time=16)
    for t in (0, 4, 5, 6, 15):
        gradient = mx.grad(lambda x, t=t: layer(x)[:, t].square().sum())(x)
        reach = np.abs(np.array(gradient))[0].max(axis=-1) > 0
        assert reach.tolist() == [t - CONTEXT < s <= t for s in range(16)]


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_causality_inside_a_chunk(kv_bits: int | None) -> None:
    """Several positions fed at once see each other's future, or positions that have left the window."""
    layer = make(rope=Rope())
    past, x = draw(5, time=9, batch=1), draw(6, time=8, batch=1)
    state = layer.init_state(1, kv_bits=kv_bits)
    stream(layer, past, [4, 5], state)
    plain = np.array(layer.step(x, copy_state(state)))
    for changed in range(8):
        other = np.array(x)
        other[:, changed] += 1
        moved = np.abs(np.array(layer.step(mx.array(other), copy_state(state))) - plain)[0].max(axis=-1) > 0
        assert moved.tolist() == [changed <= t < changed + CONTEXT for t in range(8)]


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_save_restore_replay(kv_bits: int | None, tmp_path: Any) -> None:
    """A session that is put away and taken up again, in memory or on disk, goes on differently."""
    layer = make(rope=Rope())
    x = draw()
    state = layer.init_state(BATCH, kv_bits=kv_bits)
    stream(layer, x, [1] * 11, state)
    kept = copy_state(state)
    save_state(tmp_path / "state.safetensors", state)
    rest = stream(layer, x[:, 11:], [1, 3, 8, 1, 1, 1, 1, 1, 1], state)
    assert kept["offset"].tolist() == [11] * BATCH
    loaded = load_state(tmp_path / "state.safetensors", layer.init_state(BATCH, kv_bits=kv_bits))
    for again in (kept, loaded):
        assert mx.array_equal(stream(layer, x[:, 11:], [1, 3, 8, 1, 1, 1, 1, 1, 1], again), rest).item()


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_batch_equals_singles(kv_bits: int | None) -> None:
    """A sequence in a batch hears its neighbours."""
    layer = make(rope=Rope(), kv_repeat=2)
    x = draw()
    together = stream(layer, x, [1] * TIME, layer.init_state(BATCH, kv_bits=kv_bits))
    for row in range(BATCH):
        alone = stream(layer, x[row : row + 1], [1] * TIME, layer.init_state(1, kv_bits=kv_bits))
        assert difference(alone, together[row : row + 1]) < 1e-5


@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("cut", [[1] * 9, [2, 1, 4, 2], [7, 2]], ids=str)
def test_rows_have_positions_of_their_own(kv_bits: int | None, cut: list[int]) -> None:
    """If this fails, a conversation that joined later is rotated, kept or masked by another's position."""
    layer = make(rope=Rope(), kv_repeat=2)
    starts, states, parts = (0, 3, 6, 14), [], []
    for row, start in enumerate(starts):
        x, state = draw(row, start + 9, 1), layer.init_state(1, kv_bits=kv_bits)
        stream(layer, x[:, :start], [1] * start, state) if start else None
        states.append(state)
        parts.append(x[:, start:])
    together = concatenate_rows(states)
    made = stream(layer, mx.concatenate(parts), cut, together)
    assert together["offset"].tolist() == [start + 9 for start in starts]
    for row, (x, state) in enumerate(zip(parts, states)):
        assert difference(stream(layer, x, cut, state), made[row : row + 1]) < 1e-5


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_ring_begins_small(kv_bits: int | None) -> None:
    """If this fails, a ring that is given more slots while it fills loses a key, or shows one that is none."""
    layer, x = make(rope=Rope()), draw()
    whole = stream(layer, x, [1] * TIME, layer.init_state(BATCH, kv_bits=kv_bits))
    for sizes in ([2, 4], [1, 2, 3, 5], [3]):
        state = layer.init_state(BATCH, kv_bits=kv_bits, slots=sizes[0])
        pieces, ring = [], {"0": state}
        for t in range(TIME):
            if t == state["keys"].shape[2] < CONTEXT:
                resize_rings(ring, next((size for size in sizes if size > t), CONTEXT))
            pieces.append(layer.step(x[:, t : t + 1], state))
        assert difference(mx.concatenate(pieces, axis=1), whole) < 1e-5
        assert state["values"].shape[2] == CONTEXT
    with pytest.raises(StateError, match="2 slots cannot take 3"):
        layer.step(x[:, :3], layer.init_state(BATCH, slots=2))


def test_rings_are_cut_and_cleared() -> None:
    """If this fails, slots that are given back were in use, or a restored row keeps what was never written."""
    layer = make(rope=Rope())
    for kind in (as_mlx, as_numpy):
        state = layer.init_state(2, kv_bits=8)
        ring = {"offset": state.pop("offset"), "0": fill_rings({"0": state})["0"]}
        ring = kind(ring)
        trim_rings(ring, np.array([2, 9]))
        assert ring["offset"].tolist() == [2, 9]
        for leaf in ring["0"].values():
            values = np.array(leaf)
            assert (values[0, :, 2:] == 0).all() and (values[0, :, :2] != 0).all() and (values[1] != 0).all()
        resize_rings(ring, 3)
        assert {leaf.shape[2] for leaf in ring["0"].values()} == {3}
        assert {type(leaf) for leaf in ring["0"].values()} == {type(ring["offset"])}


def test_fixed_size() -> None:
    """The ring grows with time, or its schema changes: memory of a long conversation would not be bounded."""
    layer = make(rope=Rope(), kv_repeat=2)
    for kv_bits in (None, 8):
        state = layer.init_state(BATCH, mx.bfloat16, kv_bits)
        schema = describe_state(state)
        stream(layer, draw().astype(mx.bfloat16), [5, 1, 7, 6, 9, 1], state)
        assert describe_state(state) == schema
        assert {entry.shape[2] for entry in schema if len(entry.shape) == 4} == {CONTEXT}


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(map(str, cut[:3])))
@pytest.mark.parametrize("kind", ["rope", "grouped"])
def test_8_bits_do_not_depend_on_the_cut(kind: str, cut: list[int]) -> None:
    """With the quantized ring, a chunk gives other numbers than its frames one by one, or ones far from exact."""
    layer = make(**KINDS[kind])
    x = draw()
    single = stream(layer, x, [1] * TIME, layer.init_state(BATCH, kv_bits=8))
    assert difference(stream(layer, x, cut, layer.init_state(BATCH, kv_bits=8)), single) < 1e-5
    error = mx.sqrt((single - layer(x)).square().mean() / layer(x).square().mean()).item()
    assert 0 < error < 0.01


def test_8_bits_halve_the_cache() -> None:
    """The 8-bit cache does not save what it is there for: 8 bits and a scale and bias a group against 16 bits."""
    for head_dim, ratio in ((64, (8 + 2 * 16 / 64) / 16), (128, (8 + 2 * 16 / 64) / 16), (32, (8 + 2 * 16 / 32) / 16)):
        layer = Attention(4 * head_dim, 4, context=50)
        offsets = 3 * 4
        full = state_bytes(layer.init_state(3, mx.bfloat16)) - offsets
        assert full == 2 * 3 * 50 * 4 * head_dim * 2
        assert state_bytes(layer.init_state(3, mx.bfloat16, 8)) - offsets == full * ratio


def test_refusals() -> None:
    """A setting that cannot work is noticed at the first frame, or never."""
    layer = make()
    with pytest.raises(ConfigError, match="kv_bits"):
        layer.init_state(1, kv_bits=4)
    with pytest.raises(ConfigError, match="multiple of 32"):
        Attention(80, 4, context=5).init_state(1, kv_bits=8)
    with pytest.raises(ConfigError, match="context"):
        Attention(32, 4, context=None).init_state(1)
    with pytest.raises(ConfigError, match="num_heads"):
        Attention(30, 4, context=5)
    with pytest.raises(ConfigError, match="kv_repeat"):
        Attention(32, 4, context=5, kv_repeat=3)
    with pytest.raises(StateError, match="state holds 3"):
        layer.step(draw(time=1), layer.init_state(3))


def test_window_mask() -> None:
    """The window is off by one, or unwritten positions (negative) are visible."""
    mask = window_mask(np.array([4, 5]), np.array([-1, 1, 2, 3, 4, 5, 6]), 3)
    assert mask.tolist() == [[False, False, True, True, True, False, False], [False] * 3 + [True] * 3 + [False]]
    unlimited = window_mask(np.array([4]), np.array([-1, 0, 4, 5]), None)
    assert unlimited.tolist() == [[False, True, True, False]]


def test_positions_do_not_lose_precision() -> None:
    """Far into a long conversation the rotation is no longer that of the difference of positions.

    Two hours are 90,000 frames; the angle of the fastest pair is then known to about 4e-3 in float32.
    """
    x = draw(time=6, batch=1)
    layer = make(rope=Rope())
    near, far = layer.init_state(1), layer.init_state(1)
    far["offset"] = np.array([90_000], np.int32)
    # The window of the last of six positions holds nothing older, so only their distances count.
    assert difference(stream(layer, x, [1] * 6, near)[:, -1], stream(layer, x, [1] * 6, far)[:, -1]) < 2e-2


def test_cross_attention_definition() -> None:
    """Attention to a condition uses the wrong rows of the fused projection, or masks or rotates."""
    mx.random.seed(4)
    layer = CrossAttention(DIM, 4)
    x, source = draw(7), draw(8, time=5)
    weight = layer.in_proj.weight
    split = [
        part.reshape(BATCH, -1, 4, 16).transpose(0, 2, 1, 3)
        for part in (x @ weight[:DIM].T, source @ weight[DIM : 2 * DIM].T, source @ weight[2 * DIM :].T)
    ]
    weights = mx.softmax(split[0] @ split[1].swapaxes(-1, -2) / 4, axis=-1)
    expected = layer.out_proj((weights @ split[2]).transpose(0, 2, 1, 3).reshape(BATCH, TIME, DIM))
    projected = layer.project_source(source)
    assert difference(layer(x, projected), expected) < 1e-5
    one = layer(x[:, 3:4], projected)
    assert difference(one, expected[:, 3:4]) < 1e-5


def test_cross_attention_does_not_see_padding() -> None:
    """If this fails, a row's condition changes with the length of another row's."""
    layer = CrossAttention(DIM, 4)
    x, source = draw(7), draw(8, time=5)
    counts = mx.array([5, 2])
    mask = (mx.arange(5) < counts[:, None])[:, None, None]
    made = layer(x, layer.project_source(source), mask)
    for row, count in enumerate(counts.tolist()):
        one = slice(row, row + 1)
        assert difference(made[one], layer(x[one], layer.project_source(source[one, :count]))) < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_cross_attention(bits: int) -> None:
    """Slices of a quantized fused projection are taken wrongly: TTS models could not be quantized whole."""
    mx.random.seed(4)
    layer = CrossAttention(DIM, 4)
    x, source = draw(7), draw(8, time=5)
    weight = mx.dequantize(*mx.quantize(layer.in_proj.weight, group_size=32, bits=bits), group_size=32, bits=bits)
    out = mx.dequantize(*mx.quantize(layer.out_proj.weight, group_size=32, bits=bits), group_size=32, bits=bits)
    nn.quantize(layer, group_size=32, bits=bits)
    assert isinstance(layer.in_proj, nn.QuantizedLinear)
    quantized = layer(x, layer.project_source(source))
    dense = CrossAttention(DIM, 4)
    dense.in_proj.weight, dense.out_proj.weight = weight, out
    assert difference(quantized, dense(x, dense.project_source(source))) < 1e-4
