"""Many conversations on one thread: each as if it were alone, whatever the others do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from moshi_mlx.engine.generator import GenerationConfig
from moshi_mlx.errors import CodecError, ConfigError, StateError
from moshi_mlx.models.sampling import Sampling
from moshi_mlx.realtime import Conversation, Scheduler, Trace
from moshi_mlx.realtime.conversation import ConversationError
from tests.helpers.engines import FakeEngine
from tests.helpers.tiny import sound, tiny_model
from tests.realtime.test_conversation import BOOKS, FRAME, FakeDecoder, FakeEncoder, FakeGenerator, _frame, _until

SAMPLED = GenerationConfig(Sampling(0.9), Sampling(1.0, 20))


class Client:
    """One conversation, all that it was told, and what its parts heard."""

    def __init__(self, scheduler: Scheduler, **options: Any):
        self.said: list[Any] = []
        self.heard: list[int] = []
        self.fed = 0
        options.setdefault("backlog", 2.0)
        self.conversation = Conversation(scheduler, tap=self.tap, **options)

    def tap(self, heard: np.ndarray, frame: Any) -> None:
        self.heard.append(round(float(heard[0]) * 1e6))
        self.said.append(frame)

    def feed(self, *frames: np.ndarray) -> None:
        for frame in frames:
            self.conversation.feed(frame)
            self.fed += 1

    @property
    def answered(self) -> bool:
        return len(self.said) == self.fed


@pytest.fixture
def fakes() -> tuple[FakeEngine, list[FakeGenerator]]:
    """An engine that says back what it hears, and its conversations' generators in the order of their joining."""
    minds: list[FakeGenerator] = []

    def mind(**_: Any) -> FakeGenerator:
        minds.append(FakeGenerator())
        return minds[-1]

    return FakeEngine(FakeEncoder, FakeDecoder, mind, BOOKS), minds


def alone(model: Any, seed: int, frames: list[np.ndarray]) -> list[Any]:
    session = model.session(seed=seed, generation=SAMPLED)
    return [session.step(pcm) for pcm in frames]


def check_alone(model: Any, seed: int, frames: list[np.ndarray], said: list[Any]) -> None:
    expected = alone(model, seed, frames)
    assert [frame.index for frame in said] == [frame.index for frame in expected]
    for mine, its in zip(said, expected, strict=True):
        assert np.array_equal(mine.pcm, its.pcm) and mine.text == its.text and mine.words == its.words
        assert np.array_equal(mine.step.text, its.step.text)


def test_a_crowd_that_comes_and_goes() -> None:
    """If this fails, other conversations change an answer, or threads and memory leak."""
    model, rng = tiny_model(), np.random.default_rng(1)
    speech = sound(model, 50)
    process = psutil.Process()
    before = 0
    with Scheduler(model) as scheduler:
        there: list[tuple[Client, int, int]] = []
        count = 0
        for round_ in range(30):
            crowd = 40 if 10 <= round_ < 20 else 3
            while len(there) < crowd:
                count += 1
                client = Client(scheduler, seed=count, generation=SAMPLED)
                client.conversation.start()
                there.append((client, count, int(rng.integers(25))))
            for client, _, first in there:
                client.feed(*speech[first + client.fed :][: int(rng.integers(3))])  # none, one or two frames
                client.conversation.read(300)
            assert _until(lambda: all(client.answered for client, _, _ in there))
            for client, seed, first in list(there):
                if client.fed >= 20 or len(there) > crowd or rng.random() < 0.05:
                    there.remove((client, seed, first))
                    assert client.conversation.stop()
                    client.conversation.check()
                    check_alone(model, seed, speech[first : first + client.fed], client.said)
            if round_ == 9:
                before = process.num_threads()
            assert scheduler.rows == len(there)
        for client, _, _ in there:
            assert client.conversation.stop()
        assert count > 50 and process.num_threads() <= before
    assert not scheduler.rows and not scheduler.running
    assert "moshi scheduler" not in [thread.name for thread in threading.enumerate()]


def test_one_who_is_late_costs_nothing(fakes: tuple[FakeEngine, list[FakeGenerator]]) -> None:
    """If this fails, a client who sends nothing, or reads nothing, holds up all the others."""
    engine, minds = fakes
    with Scheduler(engine) as scheduler:
        clients = [Client(scheduler) for _ in range(4)]
        for client in clients:
            client.conversation.start()
        silent, deaf, *good = clients
        deaf.conversation.pause()
        for number in range(1, 101):
            for client in (deaf, *good):
                client.feed(_frame(number))
            assert _until(lambda: all(client.answered for client in good))
        assert not silent.said and not deaf.said
        for client in good:
            assert client.heard == list(range(1, 101)) and client.conversation.stats.late == 0
            assert client.conversation.stats.dropped_in == 0 and client.conversation.stats.dropped_out > 0
        silent.feed(_frame(7))
        assert _until(lambda: silent.answered) and silent.heard == [7]
        for client in clients:
            assert client.conversation.stop()
    assert len(minds) == 4


def test_back_within_two_seconds_of_a_stall(fakes: tuple[FakeEngine, list[FakeGenerator]]) -> None:
    """If this fails, a machine that stood still for a while leaves everybody late for the rest of the talk."""
    engine, minds = fakes
    over = threading.Event()
    with Scheduler(engine) as scheduler:
        clients = [Client(scheduler, backlog=0.32) for _ in range(8)]
        for client in clients:
            client.conversation.start()
            client.feed(_frame(1))
        assert _until(lambda: all(client.answered for client in clients))
        for mind in minds:
            mind.tick = lambda mind=mind: (time.sleep(0.003), setattr(mind, "count", mind.count + 1))
        stall = minds[0].tick
        minds[0].tick = lambda: (over.wait(30), stall())
        began, frame = time.monotonic(), 1
        until = began + 4.0
        lags: list[float] = []
        while time.monotonic() < until:  # a microphone each, 80 ms a frame, and nothing is heard for two seconds
            frame += 1
            for client in clients:
                client.feed(_frame(frame))
            if time.monotonic() - began >= 2.0 and not over.is_set():
                over.set()
            if time.monotonic() - began >= 3.0:
                lags += [client.conversation.stats.latency.last for client in clients]
            time.sleep(max(0.0, began + (frame - 1) * 0.08 - time.monotonic()))
        for client in clients:
            assert client.conversation.stop()
            client.conversation.check()
    assert lags and np.percentile(lags, 95) < 0.16
    for client in clients:
        assert client.heard == sorted(set(client.heard)) and frame - client.heard[-1] <= 2
        dropped = client.conversation.stats.dropped_in // FRAME
        assert 10 <= dropped <= 25, "what nobody could hear, and no more"


@pytest.mark.parametrize("where", ["encoder", "generator", "decoder", "tap"])
def test_one_who_fails_ends_alone(fakes: tuple[FakeEngine, list[FakeGenerator]], where: str) -> None:
    """If this fails, one broken conversation takes the others with it, or nobody says why it ended."""
    engine, minds = fakes
    made = {"encoder": list[Any](), "decoder": list[Any]()}
    for name, kind in (("encoder", FakeEncoder), ("decoder", FakeDecoder)):
        setattr(engine, name, lambda name=name, kind=kind: made[name].append(kind()) or made[name][-1])
    with Scheduler(engine) as scheduler:
        clients = [Client(scheduler) for _ in range(3)]
        for client in clients:
            client.conversation.start()
        bad = clients[1]
        if where == "tap":
            bad.conversation._tap = lambda *_: (_ for _ in ()).throw(RuntimeError("broken on purpose"))
        else:
            (minds if where == "generator" else made[where])[1].fails_at = 0
        for number in range(1, 6):
            for client in clients:
                client.feed(_frame(number))
            assert _until(lambda: clients[0].answered and clients[2].answered)
        assert _until(lambda: scheduler.rows == 2)
        assert clients[0].heard == clients[2].heard == [1, 2, 3, 4, 5]
        with pytest.raises(ConversationError, match="broken on purpose") as caught:
            bad.conversation.check()
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert [event.kind for event in bad.conversation.events()].count("error") == 1
        assert bad.conversation.stop() and not bad.conversation.running
        clients[0].conversation.check()


def test_who_cannot_begin(fakes: tuple[FakeEngine, list[FakeGenerator]]) -> None:
    """If this fails, a conversation that cannot begin hangs, or ends the scheduler."""
    model = tiny_model()
    with Scheduler(model) as scheduler:
        with pytest.raises(ConversationError, match="guidance"):
            Conversation(scheduler, generation=GenerationConfig(cfg_coef=2.0)).start()
        with pytest.raises(ConfigError, match="kv_bits 8"):
            Conversation(scheduler, kv_bits=8)
        with Conversation(scheduler) as conversation, pytest.raises(StateError, match="once"):
            conversation.start()
        left = Conversation(scheduler).start()
    assert not left.running and "was stopped" in str(left.error)
    with pytest.raises(StateError, match="does not run"):
        Conversation(scheduler).start()
    with pytest.raises(StateError, match="once"):
        scheduler.start()


def test_a_fault_of_the_thread_reaches_everybody(
    fakes: tuple[FakeEngine, list[FakeGenerator]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, clients wait for ever for a thread that has ended."""
    engine, _ = fakes
    with Scheduler(engine) as scheduler:
        conversations = [Conversation(scheduler).start() for _ in range(3)]
        monkeypatch.setattr(scheduler, "_hear", lambda batch: (_ for _ in ()).throw(RuntimeError("out of order")))
        conversations[0].feed(np.zeros(FRAME, np.float32))
        assert _until(lambda: all(each.error is not None for each in conversations))
        assert not scheduler.running and all("out of order" in str(each.error) for each in conversations)
        assert all(each.stop() for each in conversations)


def test_mute_reset_and_snapshot(tmp_path: Path) -> None:
    """If this fails, what one client asks for does not happen, or happens to another."""
    model = tiny_model()
    speech = sound(model, 40)
    with Scheduler(model) as scheduler:
        one, other = (Client(scheduler, seed=seed, generation=SAMPLED) for seed in (1, 2))
        for client in (one, other):
            client.conversation.start()

        def both(frames: list[np.ndarray]) -> None:
            for pcm in frames:
                for client in (one, other):
                    client.feed(pcm)
            assert _until(lambda: one.answered and other.answered)

        both(speech[:10])
        one.conversation.save(tmp_path / "one.moshi")
        both(speech[10:15])
        one.conversation.reset()
        assert _until(lambda: any(event.kind == "reset" for event in list(one.conversation._events)))
        both(speech[:10])
        check_alone(model, 2, [*speech[:15], *speech[:10]], other.said)
        check_alone(model, 1, speech[:15], one.said[:15])
        check_alone(model, 1, speech[:10], one.said[15:])
        assert one.conversation.stop()
        again = Client(scheduler, seed=9, resume=tmp_path / "one.moshi")
        again.conversation.start()
        again.feed(*speech[10:])
        other.conversation.mute()
        other.feed(*speech[10:12])
        assert _until(lambda: again.answered and other.answered)
        assert again.said[0].index == 10
        check_alone(model, 1, speech, one.said[:10] + again.said)
        check_alone(model, 2, [*speech[:15], *speech[:10], *2 * [np.zeros(160, np.float32)]], other.said)
        assert again.conversation.stop() and other.conversation.stop()


def test_a_codec_that_cannot_be_kept(fakes: tuple[FakeEngine, list[FakeGenerator]]) -> None:
    """If this fails, asking for a snapshot that is not to be had ends the conversation."""
    engine, _ = fakes
    with Scheduler(engine) as scheduler:
        for model in (engine, scheduler):
            client = Client(model)  # type: ignore[arg-type]
            with client.conversation:
                client.feed(_frame(1))
                with pytest.raises(CodecError, match="cannot be kept"):
                    client.conversation.snapshot()
                client.feed(_frame(2))
                assert _until(lambda client=client: client.answered)


def test_the_trace_shows_ticks() -> None:
    """If this fails, nobody sees what the thread of a busy server does."""
    model, trace = tiny_model(), Trace()
    with Scheduler(model, trace=trace) as scheduler, Conversation(scheduler) as conversation:
        conversation.feed(np.concatenate(sound(model, 5)))
        assert _until(lambda: conversation.stats.frames == 5)
    names = {event[1] for event in trace._events}
    assert {"tick", "encode", "model", "decode"} <= names and scheduler.ticks.count >= 5


def test_silence_first_beside_others() -> None:
    """If this fails, the leading silence of a joining speech-to-text conversation delays all others."""
    model = tiny_model(stt={"audio_silence_prefix_seconds": 4 * 160 / 24000})
    speech = sound(model, 12)
    done: Callable[[], bool]
    with Scheduler(model) as scheduler:
        clients = [Client(scheduler, seed=seed, generation=SAMPLED) for seed in (1, 2)]
        for index, client in enumerate(clients):
            client.conversation.start()
            client.feed(*speech[index:])
            done = lambda client=client: client.answered  # noqa: E731
            assert _until(done)
        for index, client in enumerate(clients):
            check_alone(model, index + 1, speech[index:], client.said)
            assert client.conversation.stop()
