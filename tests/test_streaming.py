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
from moshi_mlx.streaming import (
    State,
    StateEntry,
    copy_state,
    describe_state,
    load_state,
    save_state,
    state_arrays,
    state_bytes,
    update_state,
)


def example() -> State:
    return {
        "layer": {"keys": mx.random.normal((2, 3), key=mx.random.key(1)), "offset": 7},
        "half": mx.ones((4,), mx.bfloat16),
        "bits": mx.array([1, 2**32 - 1], mx.uint32),
        "position": 2**40,
    }


def test_schema_and_bytes() -> None:
    """A state's size or schema is reported wrongly."""
    state = example()
    assert state_bytes(state) == 2 * 3 * 4 + 4 * 2 + 2 * 4
    assert len(state_arrays(state)) == 3
    assert describe_state(state) == [
        StateEntry("layer.keys", "float32", (2, 3)),
        StateEntry("layer.offset", "int", ()),
        StateEntry("half", "bfloat16", (4,)),
        StateEntry("bits", "uint32", (2,)),
        StateEntry("position", "int", ()),
    ]


def test_only_arrays_and_ints() -> None:
    """A leaf that cannot be saved is found when it is too late to name it."""
    with pytest.raises(StateError, match=r"'a\.b' is a float"):
        describe_state({"a": {"b": 0.5}})


def test_copy_is_a_snapshot() -> None:
    """Writing into a ring changes a snapshot taken before, or the other way round."""
    state = example()
    kept = copy_state(state)
    before = state["layer"]["keys"].tolist()
    state["layer"]["keys"][:, 0] = 9.0
    state["layer"]["offset"] = 8
    assert kept["layer"]["keys"].tolist() == before and kept["layer"]["offset"] == 7
    kept["half"][0] = 5.0
    assert state["half"].tolist() == [1.0] * 4


def test_update_in_place() -> None:
    """Restoring does not reach the state that the session holds, or ties it to the snapshot."""
    state, other = example(), example()
    inner = state["layer"]
    other["layer"]["keys"] = mx.zeros((2, 3))
    other["layer"]["offset"] = 1
    update_state(state, other)
    assert inner["offset"] == 1 and inner["keys"].tolist() == [[0.0] * 3] * 2
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
    assert state["layer"]["offset"] == 7 and state["layer"]["keys"].tolist() == example()["layer"]["keys"].tolist()


def equal(a: State, b: State) -> bool:
    assert describe_state(a) == describe_state(b)
    arrays = zip(state_arrays(a), state_arrays(b))
    return all(mx.array_equal(x, y).item() for x, y in arrays)


def test_file_round_trip(tmp_path: Path) -> None:
    """A saved session comes back with other numbers, types or counters."""
    state = example()
    save_state(tmp_path / "state.safetensors", state, {"note": "kept"})
    like = example()
    like["position"] = 0
    loaded = load_state(tmp_path / "state.safetensors", like)
    assert equal(loaded, state) and loaded["position"] == 2**40 and like["position"] == 0
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
        load_state(path, {**example(), "extra": 1})
    with pytest.raises(StateError, match="'position' is not part"):
        load_state(path, {key: value for key, value in example().items() if key != "position"})
    with pytest.raises(StateError, match=r"'layer\.keys'"):
        load_state(path, {**example(), "layer": {"keys": mx.zeros((1, 3)), "offset": 0}})


def rewrite(path: Path, change: Any) -> None:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def set_counters(text: str | None) -> Any:
    def change(header: dict[str, Any]) -> None:
        header["__metadata__"].pop("counters")
        if text is not None:
            header["__metadata__"]["counters"] = text

    return change


@pytest.mark.parametrize("counters", [None, "", "garbled", "[]", "3", "{}", '{"layer.offset": "x", "position": 1}'])
def test_broken_counters(tmp_path: Path, counters: str | None) -> None:
    """A damaged header ends in a traceback from the JSON reader."""
    path = tmp_path / "state.safetensors"
    save_state(path, example())
    rewrite(path, set_counters(counters))
    with pytest.raises(StateError):
        load_state(path, example())


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
