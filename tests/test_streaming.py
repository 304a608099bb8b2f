"""States: counted, copied, written and read, and refused where they do not fit."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moshi_mlx.errors import StateError
from moshi_mlx.state import (
    State,
    StateEntry,
    as_mlx,
    as_numpy,
    concatenate_rows,
    copy_state,
    count_rows,
    describe_state,
    load_state,
    put_rows,
    save_state,
    state_arrays,
    state_bytes,
    take_rows,
    update_state,
)


def example() -> State:
    return {
        "layer": {"keys": mx.random.normal((2, 3), key=mx.random.key(1)), "offset": mx.array([7, 9], mx.int32)},
        "half": mx.ones((2, 2), mx.bfloat16),
        "bits": mx.array([1, 2**32 - 1], mx.uint32),
        "position": np.array([2**30, 5], np.int32),
    }


def numbered(rows: int, start: int = 0, kind: str = "mlx") -> State:
    """A state whose every row is told from the others."""
    offset = np.arange(start, start + rows, dtype=np.int32)
    state: State = {
        "layer": {"keys": (offset[:, None, None] + np.ones((rows, 2, 3))).astype(np.float32)},
        "offset": offset,
    }
    return state if kind == "numpy" else as_mlx(state)


def numbers(state: State) -> list[int]:
    """The numbers of a numbered state's rows, after a look at every leaf."""
    offset, keys = np.array(state["offset"]), np.array(state["layer"]["keys"])
    assert (keys == offset[:, None, None] + 1).all() and keys.shape[1:] == (2, 3)
    found: list[int] = offset.tolist()
    return found


def test_schema_and_bytes() -> None:
    """If this fails, a state's size or schema is reported wrongly."""
    state = example()
    assert state_bytes(state) == 2 * 3 * 4 + 2 * 4 + 4 * 2 + 2 * 4 + 2 * 4
    assert len(state_arrays(state)) == 5 and count_rows(state) == 2
    assert describe_state(state) == [
        StateEntry("layer.keys", "float32", (2, 3)),
        StateEntry("layer.offset", "int32", (2,)),
        StateEntry("half", "bfloat16", (2, 2)),
        StateEntry("bits", "uint32", (2,)),
        StateEntry("position", "int32", (2,)),
    ]


@pytest.mark.parametrize("leaf", [0.5, 3, mx.array(3), np.array(3)], ids=str)
def test_only_arrays_with_a_batch(leaf: Any) -> None:
    """If this fails, a leaf without rows, such as a counter, is found when it is too late to name it."""
    with pytest.raises(StateError, match=r"'a\.b' is a"):
        describe_state({"a": {"b": leaf}})


def test_rows_must_agree() -> None:
    """If this fails, a state whose leaves have different batches is taken for one with rows."""
    with pytest.raises(StateError, match=r"\[2, 3\]"):
        count_rows({"a": mx.zeros((2, 3)), "b": mx.zeros((3,))})
    with pytest.raises(StateError, match="batch axis"):
        count_rows({})


@pytest.mark.parametrize("kind", ["mlx", "numpy"])
def test_rows_are_taken_put_and_joined(kind: str) -> None:
    """If this fails, a conversation that joins, leaves or moves gets another one's state."""
    state = numbered(4, kind=kind)
    part = take_rows(state, [2, 0])
    assert numbers(part) == [2, 0] and numbers(state) == [0, 1, 2, 3]
    assert isinstance(part["offset"], mx.array if kind == "mlx" else np.ndarray)
    kept = copy_state(state)
    for other_kind in ("mlx", "numpy"):
        put_rows(state, [3, 1], numbered(2, 10, other_kind))
        assert numbers(state) == [0, 11, 2, 10] and numbers(kept) == [0, 1, 2, 3]
        assert type(state["offset"]) is type(part["offset"])
        joined = concatenate_rows([part, numbered(1, 7, other_kind), kept])
        assert numbers(joined) == [2, 0, 7, 0, 1, 2, 3] and type(joined["offset"]) is type(part["offset"])
    assert numbers(part) == [2, 0]
    assert count_rows(take_rows(state, [])) == 0


def test_rows_that_do_not_fit() -> None:
    """If this fails, a row of another model is put among the others, or half of it."""
    state = numbered(3)
    short = {"layer": {"keys": mx.zeros((1, 2, 2))}, "offset": mx.array([5], mx.int32)}
    with pytest.raises(StateError, match=r"'layer\.keys' should be float32 \[1, 2, 3\]"):
        put_rows(state, [0], short)
    with pytest.raises(StateError, match=r"\[2, 2, 3\]"):
        put_rows(state, [0, 1], numbered(1))
    with pytest.raises(StateError, match=r"'layer\.keys'"):
        concatenate_rows([state, short])
    with pytest.raises(StateError, match="no states"):
        concatenate_rows([])
    assert numbers(state) == [0, 1, 2]


def test_numpy_and_mlx_have_one_schema() -> None:
    """If this fails, a conversation of the numpy path cannot go on in MLX, or the other way round."""
    numpy_one, mlx_one = numbered(2, kind="numpy"), numbered(2, 5)
    assert describe_state(numpy_one) == describe_state(mlx_one) == describe_state(as_numpy(mlx_one))
    update_state(numpy_one, mlx_one)
    assert numbers(numpy_one) == [5, 6] and isinstance(numpy_one["offset"], np.ndarray)
    numpy_one["offset"][0] = 1
    assert numbers(mlx_one) == [5, 6]
    flags = {"fresh": mx.array([[True], [False]])}
    assert describe_state(as_numpy(flags)) == describe_state(flags)


def test_copy_is_a_snapshot() -> None:
    """If this fails, writing into a ring changes a snapshot taken before, or the other way round."""
    state = example()
    kept = copy_state(state)
    before = state["layer"]["keys"].tolist()
    state["layer"]["keys"][:, 0] = 9.0
    state["layer"]["offset"][0] = 8
    state["position"][1] = 6
    assert kept["layer"]["keys"].tolist() == before and kept["layer"]["offset"].tolist() == [7, 9]
    assert kept["position"].tolist() == [2**30, 5]
    kept["half"][0] = 5.0
    assert state["half"].tolist() == [[1.0] * 2] * 2


def test_update_in_place() -> None:
    """If this fails, restoring does not reach the state that the session holds, or ties it to the snapshot."""
    state, other = example(), example()
    inner = state["layer"]
    other["layer"]["keys"] = mx.zeros((2, 3))
    other["layer"]["offset"] = mx.array([1, 2], mx.int32)
    update_state(state, other)
    assert inner["offset"].tolist() == [1, 2] and inner["keys"].tolist() == [[0.0] * 3] * 2
    state["layer"]["keys"][0, 0] = 1.0
    assert other["layer"]["keys"].tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("what", ["missing", "left over", "dtype", "shape", "kind"])
def test_misfits_are_named(what: str) -> None:
    """A state of another model is taken, and the session goes on from nonsense."""
    state, other = example(), example()
    if what == "missing":
        del other["layer"]["keys"]
    elif what == "left over":
        other["layer"]["keys2"] = other["layer"]["keys"]
    elif what == "dtype":
        other["layer"]["keys"] = other["layer"]["keys"].astype(mx.float16)
    elif what == "shape":
        other["layer"]["keys"] = mx.zeros((3, 3))
    else:
        other["layer"]["keys"] = 3
    with pytest.raises(StateError, match=r"'layer\.keys"):
        update_state(state, other)
    assert (
        state["layer"]["offset"].tolist() == [7, 9]
        and state["layer"]["keys"].tolist() == example()["layer"]["keys"].tolist()
    )


def equal(a: State, b: State) -> bool:
    assert describe_state(a) == describe_state(b)
    arrays = zip(state_arrays(a), state_arrays(b))
    return all(mx.array_equal(mx.array(x), mx.array(y)).item() for x, y in arrays)


def test_file_round_trip(tmp_path: Path) -> None:
    """If this fails, a saved session comes back with other numbers or types."""
    state = example()
    save_state(tmp_path / "state.safetensors", state, {"note": "kept"})
    like = example()
    like["position"][:] = 0
    loaded = load_state(tmp_path / "state.safetensors", like)
    assert equal(loaded, state) and loaded["position"].tolist() == [2**30, 5] and like["position"].tolist() == [0, 0]
    assert isinstance(loaded["position"], np.ndarray) and isinstance(loaded["half"], mx.array)
    alone = load_state(tmp_path / "state.safetensors")
    update_state(like, alone)
    assert equal(like, state)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_saving_over_a_loaded_file(tmp_path: Path) -> None:
    """Saving to the file a state was read from destroys what was not read yet."""
    path = tmp_path / "state"
    save_state(path, example())
    loaded = load_state(path, example())
    save_state(path, {key: value for key, value in example().items() if key != "half"})
    path.write_bytes(b"")
    assert equal(loaded, example())


def test_loading_into_another_model(tmp_path: Path) -> None:
    """A file of another model or batch size is taken."""
    path = tmp_path / "state.safetensors"
    save_state(path, example())
    with pytest.raises(StateError, match="'extra' is missing"):
        load_state(path, {**example(), "extra": mx.zeros((2,))})
    with pytest.raises(StateError, match="'position' is not part"):
        load_state(path, {key: value for key, value in example().items() if key != "position"})
    with pytest.raises(StateError, match=r"'layer\.keys'"):
        load_state(path, {**example(), "layer": {**example()["layer"], "keys": mx.zeros((1, 3))}})


def rewrite(path: Path, change: Any) -> None:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def set_metadata(name: str, text: str | None) -> Any:
    def change(header: dict[str, Any]) -> None:
        header["__metadata__"].pop(name)
        if text is not None:
            header["__metadata__"][name] = text

    return change


@pytest.mark.parametrize("digest", [None, "", "garbled", "0" * 64])
def test_broken_digest(tmp_path: Path, digest: str | None) -> None:
    """If this fails, a damaged header is trusted."""
    path = tmp_path / "state.safetensors"
    save_state(path, example())
    rewrite(path, set_metadata("digest", digest))
    with pytest.raises(StateError, match=r"state\.safetensors is damaged"):
        load_state(path, example())


def test_other_versions_are_named(tmp_path: Path) -> None:
    """If this fails, a file of the format with counters is called damaged, or read."""
    path = tmp_path / "state.safetensors"
    save_state(path, example())
    rewrite(path, set_metadata("format", "moshi-mlx-local state 1"))
    with pytest.raises(StateError, match=r"state\.safetensors was written by another version"):
        load_state(path)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """If this fails, a conversation goes on from values that a disk or a network has changed."""
    path = tmp_path / "state.safetensors"
    save_state(path, example())
    whole = bytearray(path.read_bytes())
    size = struct.unpack("<Q", whole[:8])[0]
    for at in range(8 + size, len(whole), 5):
        damaged = whole.copy()
        damaged[at] ^= 16
        path.write_bytes(damaged)
        with pytest.raises(StateError, match=r"state\.safetensors is damaged"):
            load_state(path, example())


def test_a_name_below_an_array(tmp_path: Path) -> None:
    """If this fails, a file whose names contradict one another ends in a traceback."""
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": mx.zeros((1,)), "a.b": mx.zeros((1,))})
    with pytest.raises(StateError, match=r"'a\.b'"):
        load_state(path)


def test_broken_files(tmp_path: Path) -> None:
    """A truncated or foreign file ends in a traceback, or is read as a state of zeros."""
    path = tmp_path / "state.safetensors"
    with pytest.raises(StateError, match="no such state file"):
        load_state(path, example())
    save_state(path, example())
    whole = path.read_bytes()
    for length in [0, 3, 8, 50, len(whole) - 20, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(StateError, match=r"state\.safetensors"):
            load_state(path, example())
    rng = np.random.default_rng(0)
    path.write_bytes(rng.integers(0, 256, 500, np.uint8).tobytes())
    with pytest.raises(StateError):
        load_state(path, example())
    mx.save_safetensors(str(path), {"a": mx.zeros((2,))})
    with pytest.raises(StateError, match="not a state written by this package"):
        load_state(path, example())
    with pytest.raises(StateError, match="cannot write"):
        save_state(tmp_path / "no folder" / "state", example())
