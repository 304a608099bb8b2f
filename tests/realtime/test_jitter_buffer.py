"""Playing at the loudspeaker's own pace."""

from __future__ import annotations

import numpy as np
import pytest

from moshi_mlx.realtime.jitter_buffer import JitterBuffer
from moshi_mlx.realtime.ring import Ring

RATE, FRAME, BLOCK = 24_000, 1_920, 480


def _play(seconds: float, drift: float, *, jitter: float = 0.0, until: float = 1e9, block: int = BLOCK):
    """Simulate: frames come every 80 ms (stretched by ``drift``, shaken by ``jitter`` s), blocks leave evenly."""
    ring = Ring(4 * RATE)
    tone = (0.5 * np.sin(np.arange(FRAME) * (2 * np.pi * 200 / RATE))).astype(np.float32)  # whole periods
    player, rng = JitterBuffer(ring, RATE), np.random.default_rng(0)
    out, waiting, played = np.empty(block, np.float32), [], []
    frames, blocks = 0, 0
    shake = 0.0
    while blocks * block / RATE < seconds:
        now = blocks * block / RATE
        while frames * FRAME / RATE * (1 + drift) + shake <= now:
            ring.write(tone)
            frames += 1
            shake = rng.uniform(0, jitter) if now < until else 0.0
        player.read_into(out)
        waiting.append(player.filling)
        played.append(out.copy())
        blocks += 1
    return player, np.array(waiting), np.concatenate(played)


@pytest.mark.parametrize("drift", [200e-6, -200e-6])
def test_an_hour_of_drifting_clocks(drift: float) -> None:
    """If this fails, an hour's talk with clocks 200 ppm apart clicks, stutters, or answers later and later."""
    player, waiting, played = _play(3600, drift, block=2 * BLOCK)
    assert player.underruns == 0
    assert player.skipped == 0
    assert waiting.max() < 0.16
    sound = played[np.argmax(played != 0) + 2 * BLOCK :]
    # A 200 Hz tone at half amplitude steps by at most 0.0262 a sample; a click would by more.
    assert np.abs(np.diff(sound)).max() < 0.027


def test_underruns_raise_the_target_delay() -> None:
    """If this fails, frames that come unevenly make the voice stutter for ever."""
    player, waiting, _ = _play(25, 0.0, jitter=0.06)
    early = player.underruns
    assert 1 <= early <= 10
    assert 0.02 < player.target_delay <= 0.4
    assert waiting.max() < 0.3


def test_a_target_delay_that_is_not_needed_falls_again() -> None:
    """If this fails, a minute of stalls makes everything later for the rest of the talk."""
    player, waiting, played = _play(250, 0.0, jitter=0.8, until=30, block=2 * BLOCK)
    assert player.underruns >= 4
    assert player.target_delay == 0.02
    assert waiting[-200:].max() < 0.1
    calm = played[60 * RATE :]
    assert np.abs(np.diff(calm)).max() < 0.027  # 0.0262 is the tone's own steepest step: no gap, no click


def test_narrowing_too_early_becomes_rare() -> None:
    """If this fails, a machine that stalls now and then stutters every half minute for as long as one talks."""
    player, _, _ = _play(1200, 0.0, jitter=0.1, block=2 * BLOCK)
    assert player.underruns < 15


def test_silence_before_and_between() -> None:
    """If this fails, an empty ring gives noise, or an end of sound that clicks."""
    ring = Ring(RATE)
    player, out = JitterBuffer(ring, RATE), np.ones(BLOCK, np.float32)
    player.read_into(out)
    assert not out.any()
    ring.write(np.ones(BLOCK + 1000, np.float32))
    blocks = []
    while len(blocks) < 10 and (not blocks or blocks[-1][-1] == 0):
        player.read_into(out)
        blocks.append(out.copy())
    assert 1 <= len(blocks) <= 3, "the target_delay is held first, and it is small"
    for _ in range(2):
        assert (out == 1).all()
        player.read_into(out)
    player.read_into(out)
    assert player.underruns == 1
    assert out[0] == 1
    assert out[39] == 0
    assert (np.diff(out) <= 0).all()
    assert np.abs(np.diff(out[:40])).max() < 0.05
    player.read_into(out)
    assert not out.any()


def test_what_piles_up_is_skipped() -> None:
    """If this fails, a loudspeaker that stood still leaves the voice seconds behind for the rest of the talk."""
    ring = Ring(4 * RATE)
    player, out = JitterBuffer(ring, RATE), np.empty(BLOCK, np.float32)
    ring.write(np.ones(4 * RATE, np.float32))
    for _ in range(3):
        player.read_into(out)
    assert player.skipped > 2 * RATE
    assert player.filling < 1.0


def test_a_second_that_waits_is_left_out_without_a_click() -> None:
    """If this fails, a loudspeaker that starts late leaves the answers late by as much for minutes."""
    ring = Ring(4 * RATE)
    player, out = JitterBuffer(ring, RATE), np.empty(BLOCK, np.float32)
    tone = (0.5 * np.sin(np.arange(12 * RATE) * (2 * np.pi * 210 / RATE))).astype(np.float32)
    ring.write(tone[: round(0.7 * RATE)])
    written, played, waiting = round(0.7 * RATE), [], []
    for block in range(6 * RATE // BLOCK):
        if block % 4 == 0:
            ring.write(tone[written : written + FRAME])
            written += FRAME
        player.read_into(out)
        played.append(out.copy())
        waiting.append(player.filling)
    assert max(waiting[:20]) > 0.5 and max(waiting[60:]) < 0.16
    assert 0.4 * RATE < player.skipped < 0.7 * RATE and player.underruns == 0
    sound = np.concatenate(played)
    sound = sound[np.argmax(sound != 0) :]
    assert np.abs(np.diff(sound)).max() < 0.036, "the tone steps by 0.0275, and the fade adds a little"


def test_clear() -> None:
    """If this fails, a new conversation begins with the end of the old one."""
    ring = Ring(RATE)
    player, out = JitterBuffer(ring, RATE), np.empty(BLOCK, np.float32)
    ring.write(np.ones(5000, np.float32))
    player.clear()
    ring.write(np.full(3 * BLOCK, 0.5, np.float32))
    heard = []
    for _ in range(4):
        player.read_into(out)
        heard.append(out.copy())
    assert set(np.unique(heard)) == {0, 0.5}
