"""Conditions: values to vectors, as the reference makes them, and clear words about wrong ones."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moshi_mlx.config import ConditionerConfig, FuserConfig
from moshi_mlx.errors import ConfigError
from moshi_mlx.layers.conditioning import ConditionProvider, TensorCondition, match_slots

from ..helpers import golden_lm

CONDITIONED = [
    (name, file)
    for name in golden_lm.MOSHI
    for file in ("golden", *golden_lm.runs_of(name))
    if golden_lm.condition_rows(name, file) is not None
]


@pytest.mark.parametrize(("name", "file"), CONDITIONED)
def test_golden_conditions(name: str, file: str) -> None:
    """A table row, a padded slot, a position or the order of joined conditions differs from the reference."""
    made, data = golden_lm.condition(name, file), golden_lm.arrays(name, file)
    assert made is not None
    for part, key in ((made.sum, "condition_sum"), (made.cross, "condition_cross")):
        assert (part is not None) == (key in data)
        if part is not None:
            assert golden_lm.relative_error(part, data[key]) < 1e-5


def test_goldens_cover_conditions() -> None:
    """The comparison above has lost its cases."""
    assert {name for name, _ in CONDITIONED} == {"conditions", "hibiki", "tts"}


def provider(**fuser: Any) -> ConditionProvider:
    mx.random.seed(1)
    configs = {
        "mood": ConditionerConfig("lut", 4, 3, ("calm", "glad")),
        "voice": ConditionerConfig("tensor", 5),
    }
    made = ConditionProvider(configs, FuserConfig(sum=("mood",), cross=("voice",), **fuser), 8)
    for conditioner in made.conditioners.values():
        conditioner.learnt_padding = mx.random.normal((1, 1, 8))
    return made


def test_rows_do_not_depend_on_each_other() -> None:
    """A row's condition changes with the longer sequence of another row, apart from padded slots at its end."""
    made = provider(cross_attention_pos_emb=True)
    short = TensorCondition(np.random.default_rng(0).normal(size=(2, 5)))
    long = TensorCondition(np.random.default_rng(1).normal(size=(6, 5)), np.array([1, 1, 0, 1, 1, 1], bool))
    alone = made([{"mood": "glad", "voice": short}])
    together = made([{"mood": None, "voice": long}, {"mood": "glad", "voice": short}])
    assert alone.cross is not None and together.cross is not None and together.cross.shape == (2, 6, 8)
    assert alone.sum is not None and together.sum is not None
    assert mx.allclose(together.cross[1, :2], alone.cross[0], atol=1e-6).item()
    assert together.cross_slots is not None and together.cross_slots.tolist() == [6, 2]
    assert mx.allclose(together.sum[1], alone.sum[0], atol=1e-6).item()


def test_several_sequences_keep_their_positions() -> None:
    """If this fails, a row's second sequence moves when another row's first one is longer."""
    configs = {"a": ConditionerConfig("tensor", 5), "b": ConditionerConfig("tensor", 5)}
    made = ConditionProvider(configs, FuserConfig(cross=("a", "b"), cross_attention_pos_emb=True), 8)
    rng = np.random.default_rng(0)
    short, long = (
        {"a": TensorCondition(rng.normal(size=(n, 5))), "b": TensorCondition(rng.normal(size=(2, 5)))} for n in (1, 4)
    )
    alone, together = made([short]), made([long, short])
    assert alone.cross is not None and together.cross is not None and together.cross_slots is not None
    assert together.cross_slots.tolist() == [6, 3]
    assert mx.allclose(together.cross[1, :3], alone.cross[0], atol=1e-6).item()


def test_matched_slots() -> None:
    """If this fails, guidance steers away from fewer slots of padding than the model was trained with."""
    voice = TensorCondition(np.ones((3, 5), np.float32), np.array([True, False, True]))
    row, null = match_slots({"mood": "glad", "voice": voice}, {"mood": None, "voice": None})
    assert (row["mood"], null["mood"]) == ("glad", None) and row["voice"].mask.tolist() == [True, False, True]
    assert null["voice"].tensor.shape == (3, 5) and not null["voice"].mask.any()
    row, null = match_slots({"voice": voice}, {"voice": TensorCondition(np.zeros((5, 5)))})
    assert row["voice"].mask.tolist() == [True, False, True, False, False] and null["voice"].mask.all()
    made = provider()
    both = made(
        [
            dict(zip(("mood", "voice"), (None, v)))
            for v in (voice, match_slots({"voice": voice}, {"voice": None})[1]["voice"])
        ]
    )
    assert both.cross is not None and both.cross_slots is not None and both.cross_slots.tolist() == [3, 3]
    padding = made.conditioners["voice"].learnt_padding
    assert mx.array_equal(both.cross[1], mx.broadcast_to(padding[0], (3, 8))).item()
    assert match_slots({"mood": "a"}, {"mood": None}) == ({"mood": "a"}, {"mood": None})


def test_no_value() -> None:
    """None is not the learnt padding: the unconditional half of guidance would be wrong."""
    made = provider()
    empty = made([{"mood": None, "voice": None}])
    assert empty.sum is not None and empty.cross is not None
    assert mx.array_equal(empty.sum, made.conditioners["mood"].learnt_padding).item()
    assert mx.array_equal(empty.cross, made.conditioners["voice"].learnt_padding).item()


def test_masked_slots_become_the_padding() -> None:
    """Content of masked slots leaks."""
    made = provider()
    mask = np.array([True, False, True])
    values = np.ones((3, 5), np.float32)
    one = made([{"mood": None, "voice": TensorCondition(values, mask)}]).cross
    values[1] = 99
    other = made([{"mood": None, "voice": TensorCondition(mx.array(values), mask)}]).cross
    assert one is not None and other is not None
    assert mx.array_equal(one, other).item()
    assert mx.array_equal(one[0, 1], made.conditioners["voice"].learnt_padding[0, 0]).item()


VOICE = TensorCondition(np.zeros((3, 5)))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"mood": "calm"}, r"\['voice'\] not given"),
        ({"mood": "calm", "voice": VOICE, "speed": "x"}, r"\['speed'\] not known"),
        ({"mood": "angry", "voice": VOICE}, "'angry' is not one of"),
        ({"mood": 3, "voice": VOICE}, "must be a string or None"),
        ({"mood": VOICE, "voice": VOICE}, "must be a string or None"),
        ({"mood": "calm", "voice": "someone.wav"}, "'voice' must be a TensorCondition"),
        ({"mood": "calm", "voice": np.zeros((3, 5))}, "'voice' must be a TensorCondition"),
        ({"mood": "calm", "voice": TensorCondition(np.zeros((3, 4)))}, r"shape \[slots, 5\]"),
        ({"mood": "calm", "voice": TensorCondition(np.zeros((1, 3, 5)))}, r"shape \[slots, 5\]"),
        ({"mood": "calm", "voice": TensorCondition(np.zeros(5))}, r"shape \[slots, 5\]"),
        ({"mood": "calm", "voice": TensorCondition(np.zeros((3, 5)), np.ones(2, bool))}, "one mask entry per slot"),
    ],
)
def test_wrong_values(row: dict[str, Any], said: str) -> None:
    """A wrong condition ends in a traceback from the depths, or conditions on something else."""
    with pytest.raises(ConfigError, match=said):
        provider()([row])


def test_sum_of_a_sequence() -> None:
    """A sequence that a configuration adds to every input would be broadcast over time."""
    made = ConditionProvider({"voice": ConditionerConfig("tensor", 5)}, FuserConfig(sum=("voice",)), 8)
    with pytest.raises(ConfigError, match="one slot"):
        made([{"voice": VOICE}])


def test_tables_without_names_hash() -> None:
    """Without possible_values any text is taken; equal texts must share a row, and only those of the table be used."""
    made = ConditionProvider({"place": ConditionerConfig("lut", 4, 3)}, FuserConfig(sum=("place",)), 8)
    texts = [f"place {i}" for i in range(20)]
    sums = made([{"place": text} for text in texts]).sum
    again = made([{"place": text} for text in texts]).sum
    assert sums is not None and again is not None and mx.array_equal(sums, again).item()
    assert len({tuple(row) for row in np.array(sums)[:, 0].round(5).tolist()}) == 3


def test_only_weights_are_parameters() -> None:
    """The module's configuration is taken for weights: loading would be refused."""
    names = set(dict(provider().parameters())["conditioners"]["mood"])
    assert names == {"embed", "output_proj", "learnt_padding"}
