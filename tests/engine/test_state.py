"""A conversation that is saved and continued elsewhere, as if it had never stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import moshi_mlx
from moshi_mlx.codec.base import MimiCodec, MlxMimi, RustMimi
from moshi_mlx.engine import Session, SessionFrame
from moshi_mlx.engine.generator import GenerationConfig
from moshi_mlx.errors import CodecError, StateError
from moshi_mlx.models.sampling import Sampling
from moshi_mlx.realtime import Conversation
from moshi_mlx.state import save_state, state_arrays
from tests.helpers.tiny import WAYS, sound, tiny_model, use

ROOT = Path(__file__).resolve().parent.parent.parent
FRAMES = int(os.environ.get("MOSHI_TEST_RESUMED_FRAMES", "0"))
"""0: 2,000 in numpy, and 400 in MLX, where they take a minute."""
SAMPLED = GenerationConfig(Sampling(0.9), Sampling(1.0, 20), repetition_penalty=1.2, repetition_context=20)


def load(name: str, way: str) -> moshi_mlx.Moshi:
    if name == "tiny":
        return tiny_model(way)
    model = moshi_mlx.load("small")
    if way == "mlx":
        assert isinstance(model.codec, MimiCodec)
        model.codec = MlxMimi(model.codec.mimi)
    return model


def record(frames: list[SessionFrame]) -> dict[str, np.ndarray]:
    """All that a conversation gave."""
    steps = [frame.step for frame in frames if frame.step is not None]
    return {
        "pcm": np.concatenate([frame.pcm for frame in frames]),
        "text": np.array([int(step.text[0]) for step in steps]),
        "codes": np.stack([np.full(1, -9) if step.codes is None else step.codes.sum(axis=1) for step in steps]),
        "index": np.array([frame.index for frame in frames]),
        "said": np.array("".join(frame.text for frame in frames)),
        "words": np.array(str([word for frame in frames for word in frame.words])),
    }


def go_on(name: str, way: str, kept: str, start: int, frames: int, out: str) -> None:
    """In a new process: the rest of a conversation."""
    use(way)
    model = load(name, way)
    with model.session(seed=1) as session:
        session.load(kept)
        assert session.frames == start
        said = [session.step(pcm) for pcm in sound(model, frames)[start:]]
        said.append(session.finish())
    np.savez(out, **record(said))


@pytest.mark.parametrize(("name", "frames"), [("tiny", FRAMES), ("small", 60)])
@pytest.mark.parametrize("way", WAYS)
def test_goes_on_in_another_process(
    name: str, frames: int, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, a conversation that was kept answers otherwise than one that never stopped."""
    use(way, monkeypatch)
    frames = frames or (2000 if way == "numpy" else 400)
    model = load(name, way)
    stop = int(np.random.default_rng(len(name) + frames + len(way)).integers(1, frames))
    kept, out = str(tmp_path / "kept.moshi"), str(tmp_path / "out.npz")
    with model.session(seed=7, generation=SAMPLED) as session:
        said = []
        for index, pcm in enumerate(sound(model, frames)):
            if index == stop:
                session.save(kept)
            said.append(session.step(pcm))
        said.append(session.finish())
    code = f"from tests.engine.test_state import go_on; go_on({name!r}, {way!r}, {kept!r}, {stop}, {frames}, {out!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = record(said[stop:]), np.load(out)
    for key, value in expected.items():
        assert np.array_equal(found[key], value), (key, stop)
    assert len(np.unique(expected["text"])) > 1 and np.abs(expected["pcm"]).max() > 0


@pytest.mark.parametrize("there", WAYS)
def test_from_one_way_to_the_other(there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a conversation from a Mac cannot go on where there is no GPU, or the other way round."""
    here = WAYS[there == WAYS[0]]
    with monkeypatch.context() as patch:
        use(here, patch)
        first = tiny_model(here).session(seed=3)
        frames = sound(tiny_model(), 40)
        for pcm in frames[:20]:
            first.step(pcm)
        snapshot = first.snapshot()
        expected = [first.step(pcm) for pcm in frames[20:]]
    use(there, monkeypatch)
    second = tiny_model(there).session()
    second.restore(snapshot)
    for pcm, frame in zip(frames[20:], expected, strict=True):
        found = second.step(pcm)
        assert found.text == frame.text and np.allclose(found.pcm, frame.pcm, atol=1e-4)


def test_at_the_beginning_and_again() -> None:
    """If this fails, a conversation kept before its first frame loses what came before, or a snapshot serves once."""
    model = tiny_model()
    session, frames = model.session(seed=2, generation=SAMPLED), sound(model, 30)
    beginning = session.snapshot()
    expected = record([session.step(pcm) for pcm in frames])
    end = session.snapshot()
    for _ in range(2):
        session.restore(beginning)
        assert session.frames == 0
        found = record([session.step(pcm) for pcm in frames])
        assert all(np.array_equal(found[key], value) for key, value in expected.items())
    session.restore(end)
    assert session.frames == 30 and session.step(frames[0]).index == 30
    session.reset()
    found = record([session.step(pcm) for pcm in frames])
    assert all(np.array_equal(found[key], value) for key, value in expected.items())


def test_every_leaf_is_a_row() -> None:
    """If this fails, a conversation's state is more than one row, or not all of it is arrays."""
    model = tiny_model()
    session = model.session()
    session.step(sound(model, 1)[0])
    snapshot = session.snapshot()
    assert set(snapshot) == {"encoder", "generator", "text", "early", "frames", "decoder"}
    assert all(array.shape[0] == 1 for array in state_arrays(snapshot))


def test_what_is_refused(tmp_path: Path) -> None:
    """If this fails, a damaged file, or one of another model or an older version, is continued with nonsense."""
    model = tiny_model()
    session, (first, *frames) = model.session(), sound(model, 12)
    session.step(first)
    good, bad = tmp_path / "good.moshi", tmp_path / "bad.moshi"
    session.save(good)
    assert sorted(tmp_path.iterdir()) == [good]
    data = good.read_bytes()

    def refused(contents: bytes, said: str, into: Session = session) -> None:
        bad.write_bytes(contents)
        with pytest.raises(StateError, match=f"bad.moshi.*{said}"):
            into.load(bad)

    refused(data[:-100], "not a readable state")
    middle = len(data) * 3 // 4
    refused(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], "is damaged")
    refused(b"RIFF" + bytes(1000), "not a readable state")
    refused(data.replace(b"moshi-mlx-local state 2", b"moshi-mlx-local state 1"), "another version of this package")
    refused(data, "with the model tiny, and this is other: load that model", tiny_model(seed=1, name="other").session())
    refused(data, "another version of the model tiny", tiny_model(seed=1).session())
    save_state(bad, {"a": np.zeros((1, 1), np.float32)})
    with pytest.raises(StateError, match="not that of a conversation"):
        session.load(bad)
    with pytest.raises(StateError, match="no such state file"):
        session.load(tmp_path / "none.moshi")
    with pytest.raises(StateError, match="kv_bits=None, and this session has 8"):
        model.session(kv_bits=8).load(good)
    with pytest.raises(StateError, match=r"cannot write the state to .*nowhere"):
        session.save(tmp_path / "nowhere" / "x.moshi")
    assert session.frames == 1, "it is as it was"
    expected = model.session()
    expected.step(first)
    for pcm in frames:
        assert np.array_equal(session.step(pcm).pcm, expected.step(pcm).pcm)


@pytest.mark.parametrize("part", ["encoder", "generator", "text", "early", "frames", "decoder"])
@pytest.mark.parametrize("how", ["missing", "other"])
def test_a_part_that_does_not_fit(part: str, how: str) -> None:
    """If this fails, a snapshot that was put together wrongly raises something else than StateError, or goes on."""
    model = tiny_model()
    session, frames = model.session(), sound(model, 3)
    session.step(frames[0])
    snapshot = session.snapshot()
    if how == "missing":
        del snapshot[part]
    else:
        snapshot[part] = {"x": np.zeros((1, 2), np.float32)} if isinstance(snapshot[part], dict) else np.full((2, 3), 9)
    with pytest.raises(StateError):
        session.restore(snapshot)
    assert session.step(frames[1]).index == 1


def test_the_rust_codec_says_that_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a conversation with rustymimi is kept without its codec, or ends in a traceback."""
    model = tiny_model()

    class Rust(RustMimi):
        def __init__(self, mimi: Any):
            self.__dict__.update(mimi.__dict__)

        def init_encoder_state(self, batch: int = 1) -> Any:
            return {"streams": np.array([object()] * batch, object)}

        init_decoder_state = init_encoder_state

    assert isinstance(model.codec, MimiCodec)
    good = model.session().snapshot()
    model.codec = Rust(model.codec)
    session = model.session()
    for work in (session.snapshot, lambda: session.save(tmp_path / "x"), lambda: session.restore(good)):
        with pytest.raises(CodecError, match="choose the codec mlx or numpy"):
            work()
    assert not list(tmp_path.iterdir())


def test_the_silence_that_comes_first() -> None:
    """If this fails, a session of speech-to-text misses the first words, or they have wrong times."""
    stt = {"audio_silence_prefix_seconds": 3.4 * 160 / 24000, "audio_delay_seconds": 0.0}
    model, plain = tiny_model(stt=stt), tiny_model(stt={})
    assert model.engine.lead == 4
    frames = sound(model, 40)
    session, by_hand = model.session(seed=1), plain.session(seed=1)
    for _ in range(4):
        by_hand.step(np.zeros(160, np.float32))
    words: list[Any] = []
    others: list[Any] = []
    for pcm in frames:
        ours, theirs = session.step(pcm), by_hand.step(pcm)
        assert ours.step is not None and theirs.step is not None and ours.step.text == theirs.step.text
        assert not ours.pcm.any() and not ours.voiced and ours.index == theirs.index - 4
        words += ours.words
        others += theirs.words
    lead = 4 / model.frame_rate
    late = [word for word in others if word.start >= lead]
    assert late and [word.text for word in words[-len(late) :]] == [word.text for word in late]
    assert np.allclose([word.start + lead for word in words[-len(late) :]], [word.start for word in late])


def test_a_live_conversation_is_kept(tmp_path: Path) -> None:
    """If this fails, the key that keeps a talk keeps something else than the talk, or disturbs it."""
    model = tiny_model()
    frames = sound(model, 60)
    session = model.session(seed=5, generation=SAMPLED)
    expected = record([session.step(pcm) for pcm in frames])
    said: list[SessionFrame] = []
    path = tmp_path / "talk.moshi"

    def answered(count: int) -> bool:
        return len(said) >= count

    def talk(conversation: Conversation, upto: int) -> None:
        for pcm in frames[len(said) : upto]:
            conversation.feed(pcm)
        assert wait(lambda: answered(upto))

    first = Conversation(
        model, seed=5, generation=SAMPLED, backlog=2.0, tap=lambda _, frame: said.append(frame), target_delay=0.0
    )
    with first:
        talk(first, 25)
        first.save(path)
        talk(first, 40)
    assert [frame.index for frame in said] == list(range(40))
    del said[25:]
    with Conversation(model, resume=path, backlog=2.0, tap=lambda _, frame: said.append(frame)) as second:
        talk(second, 60)
        with pytest.raises(StateError, match="does not run"):
            first.snapshot()
    found = record(said)
    assert all(np.array_equal(found[key], value) for key, value in expected.items())
    other = tiny_model(seed=1, name="other")
    with pytest.raises(StateError, match="with the model tiny, and this is other"):
        Conversation(other, resume=path)


def wait(condition: Any, seconds: float = 30.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.002)
    return bool(condition())


def test_nothing_grows() -> None:
    """If this fails, keeping a conversation now and then fills the memory."""
    model = tiny_model("mlx")
    session, frames = model.session(), sound(model, 2)
    for _ in range(3):
        session.step(frames[0])
        session.snapshot()
    held = mx.get_active_memory()
    for _ in range(30):
        session.step(frames[1])
        session.snapshot()
    assert mx.get_active_memory() <= held + 1e5
