"""Translation: what the model reads at the end, when it stops, and that a file and the same sound live are one."""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moshi_mlx.config import EOS_ID
from moshi_mlx.engine import choose
from moshi_mlx.engine import generator as generate
from moshi_mlx.engine.generator import GenerationConfig
from moshi_mlx.engine.pipeline import SessionFrame
from moshi_mlx.errors import AudioError, ConfigError
from moshi_mlx.models.sampling import GREEDY
from moshi_mlx.realtime import Conversation, Scheduler
from moshi_mlx.tasks.translate import WAIT, Hibiki, finished
from tests.helpers.coded import Coded
from tests.helpers.golden_lm import model as golden_model
from tests.helpers.tiny import WAYS, use

FOLDER = Path(__file__).parent / "golden" / "translate"
TOLD: dict[str, Any] = json.loads((FOLDER / "golden.json").read_text())
RUNS = sorted(set(TOLD) - {"codec"})
CARD, BOOKS = 28, 3
GREEDILY = GenerationConfig(GREEDY, GREEDY)


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    loaded: Any = mx.load(str(FOLDER / f"{name}.safetensors"))
    return {key: np.array(value) for key, value in loaded.items()}


def hibiki(memory: bool = False) -> Hibiki:
    """The golden model with the stand-in for a codec."""
    lm, config = golden_model("hibiki")
    return Hibiki(config, lm, Coded(CARD, BOOKS, memory=memory), None, name="tiny")


def recording(model: Hibiki, codes: np.ndarray) -> np.ndarray:
    return np.concatenate([model.codec.frame(one) for one in codes])


def rows(frames: list[SessionFrame]) -> np.ndarray:
    """Aligned text and codes of the frames that have some, as the reference returns them."""
    steps = [frame.step for frame in frames if frame.step is not None and frame.step.codes is not None]
    return np.array([[step.aligned_text[0], *step.codes[0]] for step in steps])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RUNS)
def test_a_recording_is_translated_as_by_the_reference(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the model reads its end elsewhere than it was trained to, or stops too early or too late.

    The index of the end frame, the silence after it, guidance and the stop are PyTorch's, token by token.
    """
    use(way, monkeypatch)
    about, expected = TOLD[name], golden(name)
    model, frames = hibiki(), []
    read: list[np.ndarray] = []
    step_rows = generate.Generator.step_rows

    def reading(self: Any, names: Any, codes: Any = None, **more: Any) -> Any:
        read.append(np.array(codes[0]))
        return step_rows(self, names, codes, **more)

    monkeypatch.setattr(generate.Generator, "step_rows", reading)
    wait = WAIT if about["stopped"] else about["limit"] / model.frame_rate
    done = model.translate(
        recording(model, expected["codes"]), 24000, generation=GREEDILY, cfg=about["cfg_coef"], wait=wait,
        on_frame=frames.append,
    )  # fmt: skip
    fed = np.stack(read[1:])  # position 0 reads nothing
    count = min(len(fed), len(expected["fed"]))
    assert count == len(expected["fed"]) > about["end_frame"]
    np.testing.assert_array_equal(fed[:count], expected["fed"][:count])
    assert (fed[about["end_frame"]] == CARD).all() and done.end_frame == about["end_frame"]
    assert (fed == CARD).all(axis=1).sum() == 1
    np.testing.assert_array_equal(rows(frames)[: len(expected["out"])], expected["out"])
    assert done.complete is about["stopped"]
    if about["stopped"]:
        assert len(rows(frames)) == len(expected["out"]) == len(done.pcm) // model.frame_size
        assert rows(frames)[-1, 0] == EOS_ID
        assert done.early_ends == about["early_ends"]
    codes = np.rint(done.pcm.reshape(-1, model.frame_size)[:, :BOOKS] * CARD).astype(int)
    np.testing.assert_array_equal(codes, rows(frames)[:, 1:])


@pytest.mark.parametrize("way", WAYS)
def test_guided_logits(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, guidance is not null + cfg * (conditioned - null) between very_good and very_bad."""
    use(way, monkeypatch)
    expected = golden("guided")
    model, seen = hibiki(), []
    inner = choose._guide

    def watched(logits: Any, kind: Any, given: Any, xp: Any, *others: Any) -> Any:
        guided = inner(logits, kind, given, xp, *others)
        if guided.shape[-1] == model.lm.config.text_out:
            lane = np.flatnonzero(np.array(given["twin"]) != np.arange(2))[0]  # the other is the unconditioned half
            seen.append(np.array(guided)[lane])
        return guided

    monkeypatch.setattr(choose, "_guide", watched)
    model.translate(recording(model, expected["codes"]), 24000, generation=GREEDILY, cfg=3.0)
    tail = expected["last_text_logits"]
    np.testing.assert_allclose(np.stack(seen[-len(tail) :]), tail, atol=2e-4)


def test_no_guidance_is_one_row() -> None:
    """If this fails, a translation without guidance costs twice as much as it must."""
    model = hibiki()
    for cfg, lanes in ((None, 1), (1.0, 1), (3.0, 2)):
        with model.session(generation=model.guided(GREEDILY, cfg)) as session:
            assert session._batch._predict._generator.capacity == lanes


def test_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a model that never ends its text goes on for ever, or an unfinished translation looks complete."""
    model, expected = hibiki(), golden("endless")
    for wait, frames in ((0.0, 1), (0.8, 11), (4.0, 51)):
        done = model.translate(recording(model, expected["codes"]), 24000, generation=GREEDILY, wait=wait)
        # With delays of two frames the last but one frame of the voice is the last that is whole.
        assert len(done.pcm) // model.frame_size == len(expected["codes"]) + frames - 1
        assert not done.complete and done.end_frame == 12
    assert model.patience(1.0) == WAIT == 20.0


def test_an_incomplete_last_frame_is_heard() -> None:
    """If this fails, up to 80 ms at the end of a recording are lost, as they are in the reference."""
    model, expected = hibiki(), golden("plain")
    sound = recording(model, expected["codes"])
    whole = model.translate(sound, 24000, generation=GREEDILY)
    cut = model.translate(sound[: -model.frame_size + BOOKS], 24000, generation=GREEDILY)
    assert cut.end_frame == whole.end_frame
    np.testing.assert_array_equal(cut.pcm, whole.pcm)


def live(model: Hibiki, on: Any, sound: np.ndarray, feeds: int = 700) -> list[SessionFrame]:
    """The same sound through a conversation, in pieces of no whole frames, then its end, then silence."""
    frames: list[SessionFrame] = []
    talk = Conversation(
        on, generation=model.guided(GREEDILY, 3.0), backlog=3.0, tap=lambda heard, frame: frames.append(frame)
    )

    def wait() -> None:
        until = time.monotonic() + 20
        while talk.backlog > 0.5 and time.monotonic() < until:
            time.sleep(0.001)
        talk.read(4 * model.frame_size)

    with talk:
        for start in range(0, len(sound), feeds):
            talk.feed(sound[start : start + feeds])
            wait()
        talk.end()
        until = time.monotonic() + 60
        while not any(map(finished, frames)) and time.monotonic() < until:
            talk.feed(np.zeros(feeds, np.float32))
            wait()
    assert not talk.stats.dropped_in
    return frames


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("memory", [False, True])
def test_a_file_and_the_same_sound_live_are_one(shared: bool, memory: bool) -> None:
    """If this fails, `translate mic` and `web` translate otherwise than `translate FILE`: the end is read elsewhere, or
    the codec hears something else around it."""
    model, expected = hibiki(memory=memory), golden("guided")
    sound = recording(model, expected["codes"])
    told: list[SessionFrame] = []
    model.translate(sound, 24000, generation=GREEDILY, cfg=3.0, on_frame=told.append, wait=60)
    if shared:
        with Scheduler(model) as scheduler:
            frames = live(model, scheduler, sound)
    else:
        frames = live(model, model, sound)
    expected_rows = rows(told)
    np.testing.assert_array_equal(rows(frames)[: len(expected_rows)], expected_rows)
    assert [frame.ended for frame in frames].index(True) == len(expected["codes"])


def test_a_resumed_translation_knows_that_the_sound_has_ended() -> None:
    """If this fails, a translation that is saved while it ends never stops when it is continued."""
    model, expected = hibiki(), golden("plain")
    with model.session(generation=GREEDILY) as session:
        for one in expected["codes"]:
            assert not session.step(model.codec.frame(one)).ended
        assert session.end().ended
        kept = session.snapshot()
    with model.session(generation=GREEDILY) as other:
        other.restore(kept)
        assert other.step(np.zeros(model.frame_size, np.float32)).ended


# ------------------------------------------------------------------------------------------------- Hibiki-Zero


def zero() -> Hibiki:
    """A model with Hibiki-Zero's traits: its rotary positions, repeated keys, a schedule, norms; no conditions."""
    lm, config = golden_model("rope_concat")
    return Hibiki(config, lm, Coded(lm.config.card, lm.config.user_q, memory=True), None, name="zero")


def test_hibiki_zero_is_recognised() -> None:
    """If this fails, Hibiki-Zero is run by the rules of Hibiki, or the other way round."""
    assert zero().zero and not hibiki().zero
    assert zero().lm.config.kv_repeat == 2 and zero().patience(50.0) == 70.0 and zero().patience(200.0) == WAIT


def test_hibiki_zero_hears_what_its_program_lets_it_hear(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, Hibiki-Zero starts or ends otherwise than hibiki_zero.inference: encode_inputs and add_input_eos.

    The codes that reach the generator there are those of ``max_delay`` frames of silence by themselves, of which it
    does not read the first, then those of the padded recording by itself, one of which is replaced.
    """
    model = zero()
    card, books = model.lm.config.card, model.lm.config.user_q
    rng = np.random.default_rng(0)
    codes = rng.integers(0, card, (9, books))
    fresh = model.codec.init_encoder_state()
    warm = [model.codec.encode_step(np.zeros((1, model.frame_size), np.float32), fresh)[0, :, 0] for _ in range(2)]
    padded = [*codes, *np.zeros((6, books), int)]
    state = model.codec.init_encoder_state()
    file = [model.codec.encode_step(model.codec.frame(one)[None], state)[0, :, 0] for one in padded]
    file[len(codes)] = np.full(books, card)
    expected = np.stack([*warm[1:], *file])
    read: list[np.ndarray] = []
    step_rows = generate.Generator.step_rows

    def reading(self: Any, names: Any, given: Any = None, **more: Any) -> Any:
        read.append(np.array(given[0]))
        return step_rows(self, names, given, **more)

    monkeypatch.setattr(generate.Generator, "step_rows", reading)
    frames: list[SessionFrame] = []
    model.translate(recording(model, codes), 24000, generation=GREEDILY, wait=1.0, on_frame=frames.append)
    np.testing.assert_array_equal(np.stack(read[1:])[: len(expected)], expected)
    # Its program pairs frame f of the sound with frame f of the voice.
    assert frames[0].step.frame == 0 and frames[0].voiced


def test_hibiki_zero_cannot_be_guided() -> None:
    """If this fails, guidance without conditions ends in an error that does not name it."""
    with pytest.raises(ConfigError, match="no conditions"):
        zero().translate(np.zeros(1920), 24000, cfg=3.0)


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("wait", [-1, np.nan, 1e9, "long", np.inf])
def test_a_wait_that_is_no_time(wait: Any) -> None:
    """If this fails, a translation waits for ever, or fails after the whole recording has been translated."""
    with pytest.raises(AudioError, match="wait is the time"):
        hibiki().translate(np.zeros(1920), 24000, wait=wait)


def test_sound_that_is_no_sound() -> None:
    """If this fails, NaN in a recording reaches the codec."""
    model = hibiki()
    with pytest.raises(AudioError, match="finite"):
        model.translate(np.full(4000, np.nan, np.float32), 24000)
    with pytest.raises(AudioError, match="no samples"):
        model.translate(np.zeros(0, np.float32), 24000)


def test_three_hours_are_played_frame_by_frame() -> None:
    """If this fails, a long recording is held in memory: its frames and its answers come and go one at a time."""
    model = hibiki()
    asked = 0

    def frames() -> Any:
        nonlocal asked
        for _ in range(3 * 3600 * 25 // 2):
            asked += 1
            yield np.zeros(model.frame_size, np.float32)

    with model.session(generation=GREEDILY) as session:
        playing = model.interpret(session, frames())
        for count in range(1, 80):
            next(playing)
            assert asked == count  # nothing is read ahead
        size = sum(leaf.nbytes for leaf in _leaves(session.snapshot()))
        for _ in range(60):
            next(playing)
        assert sum(leaf.nbytes for leaf in _leaves(session.snapshot())) == size


def _leaves(state: Any) -> Any:
    for value in state.values():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield np.asarray(value)
