"""Conversations that join, wait and leave: each says what it says alone, and leaves nothing behind.

MOSHI_TEST_TICKS=10000 is the long form: about ten minutes for each of the two ways to compute.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moshi_mlx.config import UNGENERATED
from moshi_mlx.cpu.lm import Backend
from moshi_mlx.engine import generator as generate
from moshi_mlx.engine import rows
from moshi_mlx.engine.generator import GenerationConfig, Generator, Step
from moshi_mlx.errors import ConfigError, StateError, TokenError
from moshi_mlx.layers.conditioning import TensorCondition
from moshi_mlx.models.lm import Lm
from moshi_mlx.models.sampling import GREEDY, Sampling
from moshi_mlx.state import (
    State,
    concatenate_rows,
    count_rows,
    describe_state,
    load_state,
    save_state,
    state_bytes,
    take_rows,
)

from .helpers.golden_lm import small_model

TICKS = int(os.environ.get("MOSHI_TEST_TICKS", "60"))
MOST = 64 if TICKS > 1000 else 20
TINY: dict[str, Any] = {
    "dim": 32,
    "num_heads": 1,
    "num_layers": 1,
    "n_q": 2,
    "dep_q": 1,
    "delays": [0, 0, 1],
    "context": 12,
    "depformer_dim": 8,
    "depformer_num_layers": 1,
    "depformer_dim_feedforward": 12,
}
CONFIGS = [
    GenerationConfig(),
    GenerationConfig(GREEDY, GREEDY),
    GenerationConfig(Sampling(0.9), Sampling(1.1, top_k=7)),
    GenerationConfig(Sampling(0.6, top_k=5), GREEDY),
    GenerationConfig(Sampling(0.8, top_p=0.9), Sampling(1.0, min_p=0.05)),
    GenerationConfig(Sampling(1.2), repetition_penalty=1.4, repetition_context=9, padding_bonus=-1.0),
    GenerationConfig(repetition_penalty=1.1, repetition_context=3, padding_bonus=0.5),
]
CONDITIONED: dict[str, Any] = {
    "cross_attention": True,
    "conditioners": {
        "mood": {"type": "lut", "lut": {"n_bins": 2, "dim": 16, "tokenizer": "noop", "possible_values": ["a", "b"]}},
        "voice": {"type": "tensor", "tensor": {"dim": 32}},
    },
    "fuser": {"sum": ["mood"], "cross": ["voice"], "cross_attention_pos_emb": True},
}


@pytest.fixture(params=["as chosen here", "modules"])
def backends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test twice: with what this machine would use, and with the model's modules, as a Mac does."""
    if request.param == "modules":
        monkeypatch.setattr(generate, "make_backend", lambda lm, kv_bits: Backend(lm))


@pytest.fixture
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings of 3 slots, then 6, then the context: a short test sees them grow."""
    monkeypatch.setattr(rows, "SLOTS", 3)


@dataclass
class Talk:
    """One conversation: what it was begun with, what it heard and forced, and what it said."""

    options: dict[str, Any]
    heard: list[np.ndarray] = field(default_factory=list)
    forced: list[dict[str, Any]] = field(default_factory=list)
    said: list[Step] = field(default_factory=list)

    def alone(self, lm: Lm, kv_bits: int | None = None) -> None:
        """Compare what was said with the same conversation in a generator of its own."""
        generator = Generator(lm, seeds=None, kv_bits=kv_bits)
        name = generator.join(**self.options)
        for index, step in enumerate(self.said):
            codes = None if index == 0 else self.heard[index - 1][None]
            (expected,) = generator.step_rows([name], codes, **self.forced[index])
            assert_equal(step, expected)


def assert_equal(one: Step, other: Step) -> None:
    assert (one.index, one.frame) == (other.index, other.frame)
    for name in ("text", "codes", "aligned_text"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert (ours is None) == (theirs is None), name
        assert ours is None or np.array_equal(ours, theirs), (name, one.index)


def tick(generator: Generator, talks: dict[int, Talk], names: list[int], rng: np.random.Generator) -> None:
    """One position of some conversations: random frames, and now and then tokens that are given."""
    lm = generator.lm.config
    codes = rng.integers(-1, lm.card + 1, (len(names), lm.user_q), dtype=np.int32)
    text = np.full(len(names), UNGENERATED)
    own = np.full((len(names), lm.own_q), UNGENERATED)
    for index, name in enumerate(names):
        talk = talks[name]
        if generator.position_of(name) == 0:
            codes[index] = UNGENERATED
        else:
            talk.heard.append(codes[index])
        if rng.random() < 0.05:
            text[index] = rng.integers(lm.text_card)
        if rng.random() < 0.05:
            own[index] = rng.integers(-1, lm.card, lm.own_q)
        talk.forced.append({"text": text[index : index + 1], "own_codes": own[index : index + 1]})
    for name, step in zip(names, generator.step_rows(names, codes, text=text, own_codes=own)):
        talks[name].said.append(step)


def crowd(generator: Generator, ticks: int, most: int, seed: int = 0) -> list[Talk]:
    """Conversations come, wait and go at random; all that there were."""
    rng = np.random.default_rng(seed)
    talks: dict[int, Talk] = {}
    aim = 1
    for number in range(ticks):
        if number % 25 == 0:
            aim = int(rng.choice([1, 2, 3, most // 4, most // 2, most]))
        for _ in range(3):
            if generator.batch < aim and rng.random() < 0.9:
                config = CONFIGS[int(rng.integers(len(CONFIGS)))]
                talk = Talk({"seed": int(rng.integers(2**60)), "config": config})
                talks[generator.join(**talk.options)] = talk
            elif generator.batch > aim or (generator.batch and rng.random() < 0.03):
                generator.leave(int(rng.choice(generator.rows)))
        here = list(generator.rows)
        names = here if rng.random() < 0.5 else [name for name in here if rng.random() < 0.7]
        rng.shuffle(names)
        tick(generator, talks, names, rng)
    for name in generator.rows:
        generator.leave(name)
    return list(talks.values())


@pytest.mark.timeout(300 if TICKS < 1000 else 0)
@pytest.mark.usefixtures("backends", "small_rings")
def test_rows_that_come_and_go_say_what_they_say_alone() -> None:
    """If this fails, a conversation hears its neighbours, or one who left, or loses a frame while it waits."""
    lm = small_model(**TINY)
    crowd(Generator(lm, seeds=None), 30, 6, seed=5)  # what is made once and kept
    gc.collect()
    before = mx.get_active_memory()
    generator = Generator(lm, seeds=None)
    talks = crowd(generator, TICKS, MOST)
    assert generator.batch == generator.capacity == generator.slots == 0
    assert max(len(talk.said) for talk in talks) > 20 and len(talks) > MOST
    del generator
    gc.collect()
    assert mx.get_active_memory() == before
    for talk in talks:
        talk.alone(lm)


@pytest.mark.usefixtures("small_rings")
def test_kept_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the graph that a GPU keeps differs from the step that is built again, or serves another shape.

    For a CPU, MLX asks a C++ compiler for each operation that it fuses, and keeps what it makes: the first run is slow.
    """
    monkeypatch.setattr(generate, "make_backend", lambda lm, kv_bits: Backend(lm, compiled=True))
    mood = {"conditioners": {"mood": CONDITIONED["conditioners"]["mood"]}, "fuser": {"sum": ["mood"], "cross": []}}
    lm, rng = small_model(**TINY, **mood), np.random.default_rng(0)
    generator, talks = Generator(lm, seeds=None), {}
    for number in range(14):
        if number % 4 == 0 and len(talks) < 3:
            options = {"seed": number, "config": CONFIGS[1], "condition": {"mood": "ab"[number % 2]}}
            talks[generator.join(**options)] = Talk(options)
        names = list(generator.rows) if number % 3 else list(generator.rows[-1:])
        codes = rng.integers(-1, 30, (len(names), lm.config.user_q), dtype=np.int32)
        for index, name in enumerate(names):
            talks[name].forced.append({})
            if generator.position_of(name) == 0:
                codes[index] = UNGENERATED
            else:
                talks[name].heard.append(codes[index])
        for name, step in zip(names, generator.step_rows(names, codes)):
            talks[name].said.append(step)
    backend: Any = generator._numpy_backend
    assert len(backend._compiled) == 2
    monkeypatch.setattr(generate, "make_backend", lambda lm, kv_bits: Backend(lm))
    for talk in talks.values():
        talk.alone(lm)


@pytest.mark.usefixtures("small_rings")
def test_rows_of_an_8_bit_cache() -> None:
    """If this fails, the packed ring of one conversation is written by another's waiting."""
    lm = small_model(**TINY)
    for talk in crowd(Generator(lm, seeds=None, kv_bits=8), 60, 12, seed=1):
        talk.alone(lm, kv_bits=8)


def positions_later(snapshot: State, frames: int) -> State:
    """The same conversation, so many frames later: a multiple of the ring's and the delays' lengths."""
    later = {**snapshot, "position": snapshot["position"] + frames}
    rings = snapshot["lm"]["transformer"]
    return {**later, "lm": {**snapshot["lm"], "transformer": {**rings, "offset": rings["offset"] + frames}}}


@pytest.mark.usefixtures("backends")
def test_a_new_row_beside_an_old_one() -> None:
    """If this fails, a conversation that begins beside one at position 40,000 begins there, too."""
    lm = small_model(**TINY)
    rng = np.random.default_rng(0)
    old = Generator(lm, seeds=[4])
    for _ in range(20):
        old.step(rng.integers(0, 30, (1, 1)))
    far = positions_later(old.snapshot(), 12 * 5 * 700)
    alone, both = Generator(lm, seeds=None), Generator(lm, seeds=None)
    (name,), (first,) = alone.adopt(far), both.adopt(far)
    assert both.position_of(first) == 42_021
    young, talk = both.join(seed=9), Talk({"seed": 9})
    for index in range(25):
        codes = rng.integers(0, 30, (2, 1))
        (expected,) = alone.step_rows([name], codes[:1])
        if index == 0:
            codes[1] = UNGENERATED
        else:
            talk.heard.append(codes[1])
        talk.forced.append({})
        made = both.step_rows([first, young], codes)
        assert_equal(made[0], expected)
        talk.said.append(made[1])
    assert [step.index for step in talk.said] == list(range(-1, 24))
    talk.alone(lm)


@pytest.mark.usefixtures("backends")
def test_unequal_conditions_and_guidance() -> None:
    """If this fails, a conversation attends to the padding of another's longer condition, or to another's guidance."""
    lm = small_model(**CONDITIONED)
    rng = np.random.default_rng(3)
    guided = GenerationConfig(Sampling(0.9), Sampling(0.9), cfg_coef=2.0)
    voices = [None, *(TensorCondition(rng.normal(size=(slots, 32))) for slots in (1, 7, 3, 5))]
    talks: dict[int, Talk] = {}
    generator = Generator(lm, seeds=None)

    def join(index: int) -> None:
        options: dict[str, Any] = {"seed": index, "config": CONFIGS[index % len(CONFIGS)]}
        options["condition"] = {"mood": "ab"[index % 2], "voice": voices[index % 5]}
        if index % 3 == 2:
            options.update(config=guided, null_condition={"mood": None, "voice": None})
        talks[generator.join(**options)] = Talk(options)

    for index in range(6):
        join(index)
    for number in range(27):
        names = [name for name in generator.rows if number % 4 or rng.random() < 0.5]
        tick(generator, talks, names, rng)
        if number % 6 == 5:
            generator.leave(generator.rows[int(rng.integers(generator.batch))])
            join(6 + number)
    assert {2, 5} <= set(talks) and all(talk.said for talk in talks.values())
    for talk in talks.values():
        talk.alone(lm)


@pytest.mark.usefixtures("small_rings")
@pytest.mark.parametrize("modules", [False, True])
def test_sizes_are_few_and_go_back(modules: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, memory or kernels grow with every conversation, or stay when the crowd has left."""
    if modules:
        monkeypatch.setattr(generate, "make_backend", lambda lm, kv_bits: Backend(lm))
    lm = small_model(**TINY)
    generator = Generator(lm, seeds=None)

    def step(count: int) -> None:
        for _ in range(count):
            codes = [[UNGENERATED if generator.position_of(name) == 0 else 3] for name in generator.rows]
            generator.step_rows(generator.rows, codes)

    sizes, slots = [], []
    for _ in range(40):
        generator.join()
        sizes.append(generator.capacity)
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16, 32, 64] and sizes[2] == 4 and sizes[32] == 64
    for _ in range(14):
        step(1)
        slots.append(generator.slots)
    assert slots == [3] * 3 + [6] * 3 + [12] * 8
    whole = state_bytes(generator._rows.state)
    last = generator.join(seed=5)
    for name in generator.rows[:30]:
        generator.leave(name)
    assert generator.capacity == 16 and state_bytes(generator._rows.state) == whole / 4
    for name in generator.rows[:-1]:
        generator.leave(name)
    assert (generator.rows, generator.capacity, generator.slots) == ((last,), 1, 3)
    step(1)
    assert state_bytes(generator._rows.state) == state_bytes(Generator(lm, seeds=[5])._rows.state)
    generator.leave(last)
    assert (generator.capacity, generator.slots, generator._rows.state) == (0, 0, None)


def test_a_wide_condition_goes_with_its_row() -> None:
    """If this fails, a voice of many slots is paid for by all, long after it has left."""
    lm = small_model(**CONDITIONED)

    def voice(slots: int) -> dict[str, Any]:
        return {"mood": "a", "voice": TensorCondition(np.ones((slots, 32)))}

    generator = Generator(lm, conditions=[voice(2)])
    alone = state_bytes(generator._rows.state)
    wide = generator.join(condition=voice(50))
    assert state_bytes(generator._rows.state) > 4 * alone
    generator.leave(wide)
    assert generator.capacity == 2 and state_bytes(generator._rows.state) == 2 * alone


# ----------------------------------------------------------------------------------------------- rows as values


@pytest.mark.parametrize("config", CONFIGS[4:6])
def test_a_row_goes_anywhere(config: GenerationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, one conversation of many cannot move: to another batch, to a file, between numpy and MLX."""
    lm = small_model(delays=[1, 0, 2, 0, 3])
    numpy_one = Generator(lm, seeds=None)
    monkeypatch.setattr(generate, "make_backend", lambda lm, kv_bits: Backend(lm))
    modules = Generator(lm, seeds=None)
    monkeypatch.undo()
    rng = np.random.default_rng(1)
    talks: dict[int, Talk] = {}
    for seed in (3, -(2**100), 5):
        options = {"seed": seed, "config": config}
        talks[numpy_one.join(**options)] = Talk(options)
    for _ in range(20):
        tick(numpy_one, talks, list(numpy_one.rows), rng)
    moved = numpy_one.rows[1]
    snapshot = numpy_one.snapshot([moved])
    assert count_rows(snapshot) == 1
    save_state(tmp_path / "row.safetensors", snapshot)
    numpy_one.leave(moved)
    modules.join(seed=77)
    modules.step_rows(modules.rows)
    (name,) = modules.adopt(load_state(tmp_path / "row.safetensors"))
    assert modules.seeds[1] == -(2**100)
    here = {name: talks[moved]}
    for _ in range(10):
        tick(modules, here, [name], rng)
    back = modules.snapshot([name])
    (again,) = numpy_one.adopt(back)
    talks[again] = talks.pop(moved)
    for _ in range(10):
        tick(numpy_one, talks, list(numpy_one.rows), rng)
    numpy_one.restore(back, rows=[again])
    assert numpy_one.position_of(again) == 30
    talks[again].said, talks[again].heard = talks[again].said[:30], talks[again].heard[:29]
    talks[again].forced = talks[again].forced[:30]
    for _ in range(5):
        tick(numpy_one, talks, list(numpy_one.rows), rng)
    for talk in talks.values():
        talk.alone(lm)


def test_guided_rows_are_taken_over() -> None:
    """If this fails, a guided conversation loses the half that it is steered away from when it moves."""
    lm = small_model(**CONDITIONED)
    rng = np.random.default_rng(2)
    guided = GenerationConfig(Sampling(0.9), Sampling(0.9), cfg_coef=1.7)
    options: list[dict[str, Any]] = [
        {"seed": 1, "condition": {"mood": "a", "voice": None}},
        {
            "seed": 2,
            "config": guided,
            "condition": {"mood": "b", "voice": TensorCondition(rng.normal(size=(4, 32)))},
            "null_condition": {"mood": None, "voice": None},
        },
    ]
    generator, other = Generator(lm, seeds=None), Generator(lm, seeds=None)
    talks = {generator.join(**one): Talk(one) for one in options}
    for _ in range(15):
        tick(generator, talks, list(generator.rows), rng)
    snapshot = generator.snapshot()
    moved = dict(zip(other.adopt(take_rows(snapshot, [1, 0])), [talks[1], talks[0]]))
    assert other.capacity == 4
    for _ in range(15):
        tick(other, moved, list(other.rows), rng)
    for talk in moved.values():
        talk.alone(lm)
    with pytest.raises(StateError, match="damaged"):
        other.adopt({name: leaf for name, leaf in snapshot.items() if name != "null"})


def test_rings_of_a_snapshot_fit_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, what a short conversation is saved with depends on how long its neighbours are."""
    monkeypatch.setattr(rows, "SLOTS", 4)
    lm = small_model(context=40)
    generator = Generator(lm, seeds=[1])
    for _ in range(20):
        generator.step([[1, 2]])
    young = generator.join(seed=2)
    generator.step_rows([young])
    generator.step_rows([young], [[3, 4]])
    alone = Generator(lm, seeds=[2])
    alone.step([[3, 4]])
    assert generator.slots == 32 and alone.slots == 4
    assert describe_state(generator.snapshot([young])) == describe_state(alone.snapshot())
    generator.restore(alone.snapshot(), rows=[young])
    alone.adopt(generator.snapshot([generator.rows[0]]))
    assert alone.slots == 32
    joined = concatenate_rows([alone.snapshot([row]) for row in alone.rows[:1] * 2])
    assert len(generator.adopt(joined)) == 2


CHILD = """
import sys
import numpy as np
from moshi_mlx.engine.generator import Generator
from moshi_mlx.state import load_state
from tests.helpers.golden_lm import small_model

generator = Generator(small_model(), seeds=None)
(name,) = generator.adopt(load_state(sys.argv[1]))
rng = np.random.default_rng(8)
for _ in range(30):
    (step,) = generator.step_rows([name], rng.integers(0, 30, (1, 2)))
    print(step.text.tolist(), step.codes.tolist())
"""


def test_another_process_goes_on(tmp_path: Path) -> None:
    """If this fails, a saved conversation cannot be taken up after the program has ended."""
    generator = Generator(small_model(), CONFIGS[5], seeds=[1, 2])
    for _ in range(30):
        generator.step(np.full((2, 2), 7))
    name = generator.rows[1]
    save_state(tmp_path / "talk", generator.snapshot([name]))
    rng = np.random.default_rng(8)
    expected = []
    for _ in range(30):
        (step,) = generator.step_rows([name], rng.integers(0, 30, (1, 2)))
        assert step.codes is not None
        expected.append(f"{step.text.tolist()} {step.codes.tolist()}")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "talk")]
    child = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    assert child.stdout.splitlines() == expected


# ------------------------------------------------------------------------------------------------------ refusals


def test_refusals() -> None:
    """If this fails, a call about a conversation that is not there changes one that is, or ends in a traceback."""
    lm = small_model()
    generator = Generator(lm, CONFIGS[2], seeds=[1])
    (old,) = generator.rows
    young = generator.join(seed=2)
    before = generator.snapshot([old])
    with pytest.raises(StateError, match="no conversation 7"):
        generator.step_rows([7], [[1, 2]])
    with pytest.raises(StateError, match="no conversation 7"):
        generator.leave(7)
    with pytest.raises(StateError, match="named twice"):
        generator.step_rows([old, old], [[1, 2], [1, 2]])
    with pytest.raises(StateError, match="2 positions"):
        generator.step([[1, 2], [1, 2]])
    with pytest.raises(StateError, match="have begun"):
        generator.snapshot()
    with pytest.raises(TokenError, match="-2 for a conversation at position 0"):
        generator.step_rows([old, young], [[1, 2], [1, 2]])
    with pytest.raises(TokenError, match="between -1"):
        generator.step_rows([old], [[UNGENERATED, UNGENERATED]])
    with pytest.raises(TokenError, match="-2 for"):
        generator.step_rows([young, old], [[UNGENERATED, 1], [1, 2]])
    with pytest.raises(TokenError, match="user frame"):
        generator.step_rows([old])
    with pytest.raises(TokenError, match=r"shape \[2, 2\]"):
        generator.step_rows([old, young], [[1, 2]])
    with pytest.raises(ConfigError, match="128 bits"):
        generator.join(seed=2**127)
    with pytest.raises(ConfigError, match="takes no conditions"):
        generator.join(condition={"mood": "a"})
    with pytest.raises(ConfigError, match="guidance"):
        generator.join(config=GenerationConfig(cfg_coef=2.0))
    with pytest.raises(TokenError, match="text"):
        generator.join(text=10**6)
    assert generator.rows == (old, young) and generator.step_rows([]) == []
    with pytest.raises(StateError, match="adopt takes them over"):
        generator.restore(Generator(lm, CONFIGS[3]).snapshot(), rows=[old])
    with pytest.raises(StateError, match="context, vocabularies or delays"):
        generator.adopt(Generator(small_model(delays=[0, 1, 0, 0, 1]), CONFIGS[2]).snapshot())
    with pytest.raises(StateError, match="settings make no sense"):
        generator.adopt({**before, "settings": mx.full(before["settings"].shape, -1.0)})
    with pytest.raises(StateError, match="damaged"):
        generator.adopt({**before, "position": before["position"] + 1})
    with pytest.raises(StateError, match="no conversation"):
        generator.adopt(take_rows(before, []))
    empty = Generator(lm, seeds=None)
    with pytest.raises(StateError, match="no conversation"):
        empty.reset()
    with pytest.raises(StateError, match="without a conversation"):
        assert empty.first
    with pytest.raises(StateError, match="0 conversations"):
        assert empty.position
    for name, leaf in before.items():
        assert name == "lm" or np.array_equal(np.array(leaf), np.array(generator.snapshot([old])[name]))
