"""The rings between threads."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from moshi_mlx.realtime import Ring
from moshi_mlx.realtime.ring import Signal


def test_order_across_many_wraps() -> None:
    """If this fails, sound is lost, doubled or shuffled where the ring begins again."""
    ring, rng = Ring(97), np.random.default_rng(0)
    written = read = 0
    while read < 20_000:
        block = np.arange(written, written + rng.integers(0, 60), dtype=np.float32)
        written += ring.write(block)
        out = np.full(rng.integers(0, 60), -1, np.float32)
        got = ring.read_into(out)
        assert np.array_equal(out[:got], np.arange(read, read + got))
        assert (out[got:] == -1).all()
        read += got
        assert ring.available == written - read
        assert ring.free == 97 - ring.available


def test_a_full_ring_takes_what_fits() -> None:
    """If this fails, a writer overwrites sound that has not been read."""
    ring = Ring(5)
    assert ring.write(np.arange(8, dtype=np.float32)) == 5
    assert ring.write(np.ones(1, np.float32)) == 0
    out = np.zeros(5, np.float32)
    assert ring.read_into(out) == 5
    assert out.tolist() == [0, 1, 2, 3, 4]


def test_peek_and_skip() -> None:
    """If this fails, looking ahead eats sound, or dropping drops the wrong end."""
    ring, out = Ring(8), np.zeros(3, np.float32)
    ring.write(np.arange(6, dtype=np.float32))
    assert ring.peek_into(out) == 3
    assert ring.skip(2) == 2
    ring.read_into(out)
    assert out.tolist() == [2, 3, 4]
    mark = ring.written
    ring.write(np.array([6, 7], np.float32))
    ring.skip_to(mark)
    assert ring.read_into(out) == 2
    assert out[:2].tolist() == [6, 7]
    ring.skip_to(mark)
    assert ring.skip(-3) == 0
    assert ring.available == 0


def test_records() -> None:
    """If this fails, a frame's codes and its times can come apart."""
    kind = np.dtype([("came", np.float64), ("codes", np.int32, (4,))])
    ring, record = Ring(2, dtype=kind), np.zeros(1, kind)
    record["came"], record["codes"][0] = 1.5, [1, 2, 3, 4]
    assert ring.write(record) == 1
    out = np.zeros(1, kind)
    ring.read_into(out)
    assert out["came"][0] == 1.5
    assert out["codes"][0].tolist() == [1, 2, 3, 4]


def test_two_threads() -> None:
    """If this fails, a writer and a reader in different threads see each other's half-done work."""
    ring, total = Ring(64), 20_000

    def write() -> None:
        sent = 0
        while sent < total:
            count = ring.write(np.arange(sent, min(sent + 37, total), dtype=np.float32))
            sent += count
            if not count:
                time.sleep(0)  # let the other thread run

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    out, read, until = np.zeros(41, np.float32), 0, time.monotonic() + 30
    while read < total and time.monotonic() < until:
        got = ring.read_into(out)
        assert np.array_equal(out[:got], np.arange(read, read + got))
        read += got
        if not got:
            time.sleep(0)
    assert read == total


def test_no_room_is_refused() -> None:
    """If this fails, a wrong size shows only when the first sample is lost."""
    with pytest.raises(ValueError, match="at least one"):
        Ring(0)


def test_bell() -> None:
    """If this fails, a worker sleeps through a frame, or ringing twice blocks an audio callback."""
    bell = Signal()
    assert not bell.wait(0.01)
    bell.ring()
    bell.ring()
    assert bell.wait(0.01)
    assert not bell.wait(0.01)
    threading.Timer(0.05, bell.ring).start()
    assert bell.wait(5)
