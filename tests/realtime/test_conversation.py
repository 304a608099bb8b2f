"""The conversation's threads, with a codec and a model that do next to nothing, and once with real ones."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

import moshi_mlx
from moshi_mlx import AudioError, StateError
from moshi_mlx.engine.generator import Step
from moshi_mlx.realtime import Conversation
from moshi_mlx.realtime.conversation import ConversationError
from moshi_mlx.realtime.workers import end_idle
from tests.helpers.engines import FakeEngine

FRAME, RATE, BOOKS = 1_920, 24_000, 8


def resident() -> int:
    """Bytes of this process in memory now: its peak would hide what this test adds."""
    return int(psutil.Process().memory_info().rss)


class Stage:
    """What a test can do to a stage: make it slow, or make it fail, at a frame of its own count."""

    def __init__(self) -> None:
        self.count = self.begun = 0
        self.stalls: dict[int, float] = {}
        self.fails_at = -1
        self.resets = 0

    def tick(self) -> None:
        self.begun += 1
        if self.count == self.fails_at:
            raise RuntimeError("broken on purpose")
        time.sleep(self.stalls.get(self.count, 0.0))
        self.count += 1


class FakeEncoder(Stage):
    """Codes carry the number that the frame's samples spell."""

    def encode(self, frame: np.ndarray) -> np.ndarray:
        self.tick()
        return np.full(BOOKS, round(float(frame[0]) * 1e6), np.int32)

    def reset(self) -> None:
        self.resets += 1


class FakeDecoder(Stage):
    def decode(self, codes: np.ndarray) -> np.ndarray:
        self.tick()
        return np.full(FRAME, codes[0] / 1e6, np.float32)

    def reset(self) -> None:
        self.resets += 1


class FakeGenerator(Stage):
    """Says back what it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[int] = []

    def step(self, codes: np.ndarray) -> Step:
        self.tick()
        self.heard.append(int(codes[0]))
        return Step(self.count, np.array([3], np.int32), self.count, codes[None].copy(), None)

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture
def parts() -> SimpleNamespace:
    """An engine made of fakes, and the fakes."""
    made = SimpleNamespace(encoder=FakeEncoder(), decoder=FakeDecoder(), generator=FakeGenerator())
    made.model = FakeEngine(lambda: made.encoder, lambda: made.decoder, lambda **_: made.generator, BOOKS)
    return made


def _frame(number: int) -> np.ndarray:
    return np.full(FRAME, number / 1e6, np.float32)


def _until(condition, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return bool(condition())


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("moshi ")]


@pytest.mark.parametrize("voice", [0, BOOKS], ids=["writes", "speaks"])
def test_silence_comes_first_where_the_checkpoint_asks_for_it(parts: SimpleNamespace, voice: int) -> None:
    """If this fails, live speech-to-text misses the first words, or its recording and its times begin with silence."""
    parts.model.config.stt_config["audio_silence_prefix_seconds"] = 0.38  # 4.75 frames
    parts.model.own_q = voice
    parts.generator.stalls = dict.fromkeys(range(5), 0.05)
    taped: list[tuple[int, int]] = []
    with Conversation(
        parts.model, backlog=1.0, tap=lambda heard, frame: taped.append((frame.index, round(heard[0] * 1e6)))
    ) as conversation:
        assert len(parts.generator.heard) >= 2, "nobody can speak before it"
        for number in (1, 2):
            conversation.feed(_frame(number))
        assert _until(lambda: len(taped) == 2) and conversation.stats.frames == 2
        conversation.reset()
        assert _until(lambda: parts.generator.resets == 1)
        conversation.feed(_frame(7))
        assert _until(lambda: len(taped) == 3)
    assert parts.generator.heard == [*[0] * 5, 1, 2, *[0] * 5, 7]
    assert taped == [(0, 1), (1, 2), (0, 7)]
    assert conversation.stats.dropped_in == 0 and not _threads()


def test_an_hour_in_order_and_flat(parts: SimpleNamespace) -> None:
    """If this fails, a long conversation loses frames, shuffles them, or grows in memory."""
    out, said, burst = np.empty(480, np.float32), [], 10
    with Conversation(parts.model, backlog=1.0) as conversation:
        memory = 0
        for number in range(0, 45_000, burst):
            sound = np.concatenate([_frame(number + index) for index in range(burst)])
            conversation.feed(sound[:700])
            conversation.feed(sound[700:])
            # The virtual clock: time goes on when the frames are through.
            if not _until(lambda done=number + burst: conversation.stats.latency.count >= done):
                break
            for _ in range(4 * burst):
                conversation.read_into(out)
                if out[0] and (not said or out[0] != said[-1]):
                    said.append(float(out[0]))
            if number == 5_000:
                memory = resident()
    assert parts.generator.heard == list(range(45_000))
    assert conversation.stats.dropped_in == conversation.stats.dropped_out == 0
    assert conversation.stats.underruns == 0
    assert said == sorted(said)
    assert len(said) > 44_000
    assert resident() - memory < 20e6
    assert not _threads()


def test_a_stall_is_made_up_for(parts: SimpleNamespace) -> None:
    """If this fails, one hiccup of the machine leaves the answer seconds late for the rest of the talk."""
    over, tick = threading.Event(), parts.generator.tick

    def stall() -> None:
        if parts.generator.count == 10:
            parts.generator.begun += 1
            over.wait(30)
        tick()

    parts.generator.tick = stall
    with Conversation(parts.model, backlog=0.32) as conversation:
        for number in range(11):
            conversation.feed(_frame(number))
            assert _until(lambda number=number: parts.generator.begun > number)
        for number in range(11, 40):  # 2.3 s of sound come while it stands still
            conversation.feed(_frame(number))
        over.set()
        assert _until(lambda: parts.generator.heard and parts.generator.heard[-1] == 39)
        assert _until(lambda: conversation.stats.latency.count == len(parts.generator.heard))
        events = conversation.events()
    heard = parts.generator.heard
    assert heard == sorted(set(heard))
    dropped = 40 - len(heard)
    assert 40 - 15 - 3 <= dropped <= 40 - 15 and heard[:11] == list(range(11))
    assert conversation.stats.dropped_in == dropped * FRAME
    assert sum(event.samples for event in events if event.kind == "dropped") == dropped * FRAME
    # What was already inside the rings is heard late; after that, at most the backlog waits: four frames.
    assert set(heard) >= {36, 37, 38, 39} and len(set(heard) & set(range(11, 36))) <= 3


def test_random_stalls_everywhere(parts: SimpleNamespace) -> None:
    """If this fails, some pattern of delays in the three threads deadlocks or shuffles the conversation."""
    rng = np.random.default_rng(0)
    for stage in (parts.encoder, parts.generator, parts.decoder):
        stage.stalls = {int(at): float(rng.uniform(0, 0.03)) for at in rng.integers(0, 300, 34)}
    with Conversation(parts.model, backlog=2.0) as conversation:
        for number in range(300):
            assert _until(lambda: conversation._pcm_in.free >= FRAME), "it is only fed what it can hold"
            conversation.feed(_frame(number))
            conversation.read(1_920)
            time.sleep(0.004)
        assert _until(lambda: parts.generator.heard and parts.generator.heard[-1] == 299)
    assert parts.generator.heard == sorted(set(parts.generator.heard))
    dropped = conversation.stats.dropped_in // FRAME
    assert len(parts.generator.heard) + dropped == 300


@pytest.mark.parametrize("stage", ["encoder", "generator", "decoder"])
def test_a_failure_reaches_the_owner(parts: SimpleNamespace, stage: str) -> None:
    """If this fails, a broken stage leaves a silent program with no reason given."""
    getattr(parts, stage).fails_at = 3
    conversation = Conversation(parts.model).start()
    for number in range(8):
        conversation.feed(_frame(number))
        time.sleep(0.01)
    assert _until(lambda: conversation.error is not None)
    assert any(event.kind == "error" for event in conversation.events())
    assert conversation.stop()
    assert not conversation.read(100).any() or stage == "decoder"
    with pytest.raises(ConversationError, match="broken on purpose") as caught:
        conversation.check()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert not _threads()


@pytest.mark.parametrize("end", ["stop", "error"])
def test_what_was_answered_is_kept(parts: SimpleNamespace, end: str) -> None:
    """If this fails, a recording misses the last frames that the model heard and answered before the end."""
    parts.decoder.stalls = dict.fromkeys(range(9), 0.05)
    parts.generator.fails_at = 5 if end == "error" else -1
    taken: list[int] = []
    conversation = Conversation(parts.model, backlog=2.0, tap=lambda _, frame: taken.append(frame.index)).start()
    for number in range(9):
        conversation.feed(_frame(number))
    assert _until(lambda: parts.generator.begun >= 6)
    assert conversation.stop()
    assert taken == list(range(conversation.stats.frames)) and len(taken) >= 5
    if end == "error":
        assert len(taken) == 5


def test_interrupted_while_starting(parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, Ctrl-C during the start leaves threads that nobody ends."""

    def interrupted(self: threading.Semaphore) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Semaphore, "acquire", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Conversation(parts.model).start()
    assert not _threads()


def test_no_thread_to_be_had(parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a machine without room for threads is left with half a conversation, or hangs."""
    start, count = threading.Thread.start, [0]

    def refuse(self: threading.Thread) -> None:
        count[0] += 1
        if count[0] == 3:
            raise RuntimeError("can't start new thread")
        start(self)

    end_idle()  # threads of earlier conversations would do
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        Conversation(parts.model).start()
    assert not _threads()


def test_a_failure_at_the_start(parts: SimpleNamespace) -> None:
    """If this fails, a codec that cannot be made hangs the program before it begins."""

    def broken() -> None:
        raise RuntimeError("no codec today")

    parts.model.encoder = broken
    with pytest.raises(ConversationError, match="no codec today"):
        Conversation(parts.model).start()
    assert not _threads()


def test_stop_is_quick_and_final(parts: SimpleNamespace) -> None:
    """If this fails, quitting hangs, or threads go on after the end."""
    parts.generator.stalls = {0: 0.4}
    conversation = Conversation(parts.model).start()
    conversation.feed(_frame(1))
    assert _until(lambda: parts.generator.begun == 1)
    began = time.monotonic()
    assert conversation.stop()
    assert time.monotonic() - began < 1.0
    assert not _threads()
    with pytest.raises(StateError, match="once"):
        conversation.start()
    over = threading.Event()
    parts.generator.tick = lambda: (setattr(parts.generator, "begun", 2), over.wait(60))
    stuck = Conversation(parts.model).start()
    stuck.feed(_frame(1))
    assert _until(lambda: parts.generator.begun == 2)
    began = time.monotonic()
    assert not stuck.stop()
    assert time.monotonic() - began < 2.0
    over.set()
    assert _until(lambda: not _threads())


def test_pause_mute_reset(parts: SimpleNamespace) -> None:
    """If this fails, a paused program listens, a muted one hears, or a new talk remembers the old one."""
    with Conversation(parts.model) as conversation:
        conversation.pause()
        conversation.feed(_frame(5))
        assert not conversation.read(480).any()
        conversation.resume()
        conversation.mute()
        conversation.feed(_frame(6))
        assert _until(lambda: parts.generator.count == 1)
        conversation.mute(False)
        conversation.feed(_frame(7))
        assert _until(lambda: parts.decoder.count == 2)
        conversation.reset()
        assert _until(lambda: parts.decoder.resets == 1)
        assert parts.encoder.resets == parts.generator.resets == 1
        conversation.feed(_frame(8))
        assert _until(lambda: parts.decoder.count == 3)
        heard = np.concatenate([conversation.read(480) for _ in range(12)])
    assert parts.generator.heard == [0, 7, 8]
    assert set(np.unique(np.round(heard * 1e6))) <= {0, 8}
    assert any(event.kind == "reset" for event in conversation.events())


def test_the_tap_pairs_what_was_heard_with_what_was_said(parts: SimpleNamespace) -> None:
    """If this fails, a recording has the two voices shifted against each other, or misses the beginning."""
    taken: list[tuple[float, int, float]] = []
    step = parts.generator.step  # as with the acoustic delays: the first frames have no codes yet

    def late_voice(codes: np.ndarray) -> Step:
        made = step(codes)
        return made if made.index > 2 else Step(made.index, made.text, made.index, np.full((1, BOOKS), -1), None)

    parts.generator.step = late_voice
    with Conversation(
        parts.model,
        backlog=2.0,
        tap=lambda heard, frame: taken.append((float(heard[0]), frame.index, float(frame.pcm[0]))),
    ) as conversation:
        for number in (1, 2, 3, 4):
            conversation.feed(_frame(number))
        assert _until(lambda: len(taken) == 4)
        conversation.reset()
        assert _until(lambda: parts.decoder.resets == 1)
        conversation.feed(_frame(7))
        assert _until(lambda: len(taken) == 5)
    assert [round(heard * 1e6) for heard, _, _ in taken] == [1, 2, 3, 4, 7]
    assert [index for _, index, _ in taken] == [0, 1, 2, 3, 0]
    assert [round(voice * 1e6) for _, _, voice in taken] == [0, 0, 3, 4, 7]


def test_nobody_reads(parts: SimpleNamespace) -> None:
    """If this fails, an app that does not play the sound blocks the model or fills the memory."""
    with Conversation(parts.model, backlog=4.0) as conversation:
        for number in range(120):
            conversation.feed(_frame(number))
            assert _until(lambda number=number: conversation.stats.latency.count > number)
    assert conversation.stats.dropped_out > 0


def test_bad_sound(parts: SimpleNamespace) -> None:
    """If this fails, a wrong shape corrupts the ring, or a microphone's NaN ends the talk."""
    with Conversation(parts.model) as conversation:
        with pytest.raises(AudioError, match="one channel"):
            conversation.feed(np.zeros((10, 2), np.float32))
        conversation.feed(np.full(FRAME, np.nan, np.float32))
        conversation.feed(np.zeros(0, np.float32))
        assert _until(lambda: parts.generator.count == 1)


def test_the_built_in_model_says_what_it_says_alone() -> None:
    """If this fails, a live conversation answers differently from a recording of the same sound."""
    model = moshi_mlx.load("small")
    pcm = (np.random.default_rng(0).standard_normal(6 * FRAME) * 0.1).astype(np.float32)
    reply = model.reply(pcm, RATE, seed=3)
    conversations = [Conversation(model, seed=3, backlog=2.0).start() for _ in range(2)]
    for conversation in conversations:
        conversation.feed(pcm)
    for conversation in conversations:
        assert _until(lambda conversation=conversation: conversation.stats.latency.count == 6, 30)
        said = np.concatenate([conversation.read(480) for _ in range(30)])
        assert conversation.stop()
        conversation.check()
        start = int(np.argmax(said != 0))
        first = int(np.argmax(reply.pcm != 0))
        assert np.array_equal(said[start : start + 6_000], reply.pcm[first : first + 6_000])
        text = "".join(event.text for event in conversation.events())
        assert reply.text.startswith(text.strip())
