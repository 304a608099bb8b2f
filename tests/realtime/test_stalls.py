"""A hundred stalls on a virtual clock: minutes of a conversation whose parts stand still at random, in seconds."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moshi_mlx.realtime import Conversation
from tests.realtime.test_conversation import FRAME, RATE, _threads, parts  # noqa: F401

STALLS = int(os.environ.get("MOSHI_STALLS", "100"))
TICK = 0.04  # seconds of a sound device's block
TAKES = {"encoder": 0.010, "generator": 0.040, "decoder": 0.010}  # of virtual time, for a frame
BOUND = 0.16  # seconds after a frame's end in which its answer is ready: nothing is late then
WITHIN = 12  # frames after a stall's end by which it must be so again
PLAYED = 26  # ... and by which what piled up to be played is gone: the player looks for a second before it cuts


class World:
    """Time that passes only when everybody has done what can be done by now."""

    def __init__(self) -> None:
        self.now = 0.0
        self.changed = threading.Condition()
        self.asleep: dict[str, float] = {}
        self.extra: dict[str, float] = {}  # seconds that a stage's next frame takes longer
        self.over = False

    def clock(self) -> float:
        return self.now

    def work(self, name: str) -> None:
        """A stage works on a frame."""
        with self.changed:
            until = self.now + TAKES[name] + self.extra.pop(name, 0.0)
            self.asleep[name] = until
            self.changed.wait_for(lambda: self.now >= until - 1e-9 or self.over)
            del self.asleep[name]

    def pass_to(self, now: float) -> None:
        with self.changed:
            self.now = now
            self.changed.notify_all()


def settled(world: World, conversation: Any, fed: int) -> bool:
    """Whether every thread sleeps in virtual time, or has nothing to do, or no room for what it has done."""
    with world.changed:
        if any(until <= world.now + 1e-9 for until in world.asleep.values()):
            return False  # it is just waking up
        first, second = conversation._driver.codes_in, conversation._driver.codes_out
        waiting, asleep = conversation._pcm_in.available, len(world.asleep)
        awake = {name: name not in world.asleep for name in TAKES}
        if awake["encoder"] and first.free and waiting >= FRAME:
            return False
        if awake["generator"] and second.free and first.available:
            return False
        if awake["decoder"] and second.available:
            return False
        blocked = (awake["encoder"] and not first.free) + (awake["generator"] and not second.free)
        inside = first.available + second.available + asleep + conversation.stats.latency.count
        missing = (fed - waiting - conversation.stats.dropped_in) // FRAME - inside
        return bool(0 <= missing <= blocked)


def wait_settled(world: World, conversation: Any, fed: int) -> None:
    until = time.monotonic() + 20
    while not settled(world, conversation, fed):
        assert conversation.running, conversation.error
        assert time.monotonic() < until, "the conversation hangs"
        time.sleep(0.0002)


@pytest.mark.parametrize("seed", [0])
def test_a_hundred_stalls(parts: SimpleNamespace, seed: int) -> None:  # noqa: F811
    """If this fails, some stall of codec, model, microphone or loudspeaker hangs the talk, shuffles it, loses sound
    that nobody counts, or leaves it late."""
    rng = np.random.default_rng(seed)
    world = World()
    for name in TAKES:
        monkey = getattr(parts, name)
        monkey.tick = lambda name=name: world.work(name)
    lags: dict[int, float] = {}  # by the frame's number: from its end to its answer
    per_frame = round(FRAME / RATE / TICK)
    ended: dict[int, int] = {}

    decode = parts.decoder.decode

    def timed(codes: np.ndarray) -> np.ndarray:
        sound = decode(codes)
        number = int(codes[0])
        lags[number] = world.now - ended[number] * TICK
        return sound

    parts.decoder.decode = timed
    block = FRAME // per_frame
    stalls: list[tuple[str, float, int, int]] = []  # who, for how long, the frames fed as it began and as it was over
    fed = tick = late_ticks = deaf_ticks = 0
    said: list[int] = []
    piles: list[float] = []
    out = np.empty(block, np.float32)
    quiet_until = 20
    with Conversation(parts.model, backlog=0.32, clock=world.clock) as conversation:
        while len(stalls) < STALLS or tick < quiet_until:
            if tick >= quiet_until and len(stalls) < STALLS:
                if stalls and tick // per_frame - stalls[-1][3] >= PLAYED:
                    piles.append(conversation.delay)
                who = str(rng.choice([*TAKES, "microphone", "loudspeaker"]))
                seconds = float(rng.uniform(0.05, 2.0))
                if who in TAKES:
                    world.extra[who] = seconds
                elif who == "microphone":
                    late_ticks = round(seconds / TICK)
                else:
                    deaf_ticks = round(seconds / TICK)
                over = tick + round(seconds / TICK) + per_frame  # a stage stalls with its next frame
                stalls.append((who, seconds, tick // per_frame, over // per_frame + 1))
                quiet_until = over + per_frame * int(rng.integers(WITHIN + 4, WITHIN + 25))
            tick += 1
            # A microphone that stood still hands over all of it at once; a loudspeaker leaves its sound where it is.
            late_ticks = max(late_ticks - 1, 0)
            while fed < tick * block and not late_ticks:
                number = fed // FRAME
                ended[number] = (number + 1) * per_frame
                conversation.feed(np.full(block, number / 1e6, np.float32))
                fed += block
            deaf_ticks = max(deaf_ticks - 1, 0)
            if not deaf_ticks:
                conversation.read_into(out)
                middle = out[block // 2 - 60 : block // 2 + 60]  # where it fades or changes, it spells no number
                value = round(float(middle[0]) * 1e6) if np.ptp(middle) < 1e-9 else 0
                if value and (not said or said[-1] != value):
                    said.append(value)
            wait_settled(world, conversation, fed)
            world.pass_to(tick * TICK)
            wait_settled(world, conversation, fed)
        world.over = True
        world.pass_to(tick * TICK)
        events = conversation.events()
    heard = parts.generator.heard
    stats = conversation.stats
    assert heard == sorted(set(heard)), "order"
    dropped = stats.dropped_in // FRAME
    assert stats.dropped_in % FRAME == 0 and 0 <= fed // FRAME - dropped - len(heard) <= 8, "counted"
    told = sum(event.samples for event in events if event.kind == "dropped")
    assert told == stats.dropped_in or len(events) == 1000
    assert said == sorted(said) and len(said) > 0.8 * len(heard)
    compared = 0
    for (who, seconds, _, over), (_, _, following, _) in zip(stalls, [*stalls[1:], ("", 0.0, fed // FRAME, 0)]):
        after = [lag for number, lag in lags.items() if over + WITHIN <= number < following - 2]
        worst = max(after, default=0.0)
        compared += len(after)
        assert worst <= BOUND, (
            f"{who} stood still for {seconds:.2f} s, and {WITHIN} frames later {worst:.2f} s are missing"
        )
    assert compared > 5 * STALLS
    assert len(piles) > STALLS // 5 and max(piles) < 0.8, "what waits, half of it the player's target delay"
    assert not _threads()
