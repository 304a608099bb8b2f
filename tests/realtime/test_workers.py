"""Threads that are kept: as many after many conversations as after a few."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from moshi_mlx.realtime import workers

ROOT = Path(__file__).resolve().parent.parent.parent
MANY = """
import gc, json, sys, time
import numpy as np, psutil
import moshi_mlx
from moshi_mlx.realtime import Conversation

model, process = moshi_mlx.load("small"), psutil.Process()

def talk(count):
    for _ in range(count):
        with Conversation(model) as conversation:
            conversation.feed(np.zeros(model.frame_size, np.float32))
            while not conversation.stats.latency.count:
                time.sleep(0.001)
    gc.collect()
    return process.num_threads(), process.num_fds(), process.memory_info().rss / 1e6

print(json.dumps([talk(5), talk(int(sys.argv[1]))]))
"""


@pytest.fixture(autouse=True)
def nobody() -> None:
    """Other tests' threads are not found by these."""
    workers.end_idle()


def test_many_conversations_leave_no_threads() -> None:
    """If this fails, a server leaks an operating-system thread, and memory, with every conversation."""
    done = subprocess.run([sys.executable, "-c", MANY, "40"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and not done.stderr, done.stderr
    few, many = json.loads(done.stdout)
    print(f"threads, descriptors, MB: after 5 conversations {few}, after 45 {many}")
    assert many[:2] == few[:2]
    assert many[2] < few[2] + 3


def test_a_thread_is_used_again_and_keeps_nothing() -> None:
    """If this fails, a thread that waits holds a conversation's memory, or every piece of work costs a thread."""

    class Large:
        def work(self) -> None:
            names.append(threading.current_thread().name)

    names: list[str] = []
    large = Large()
    gone, threads = weakref.ref(large), set()
    for _ in range(20):
        work = workers.run("moshi test", large.work)
        threads.add(work.thread)
        work.join(10)
        assert not work.alive
    del large
    gc.collect()
    assert gone() is None and len(threads) == 1 and names == ["moshi test"] * 20
    assert work.thread.is_alive() and work.thread.name == "idle moshi test"
    workers.end_idle()
    assert not work.thread.is_alive()
    workers.run("moshi test", lambda: names.append("again")).join(10)
    assert names[-1] == "again"


def test_work_at_the_same_time_has_threads_of_its_own() -> None:
    """If this fails, one conversation waits for another to end."""
    over = threading.Event()
    several = [workers.run("moshi test", lambda: over.wait(30)) for _ in range(3)]
    assert len({work.thread for work in several}) == 3 and all(work.alive for work in several)
    over.set()
    for work in several:
        work.join(10)
    assert not any(work.alive for work in several)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_work_that_raises() -> None:
    """If this fails, waiting for work that failed never ends."""

    def broken() -> None:
        raise RuntimeError("on purpose")

    work = workers.run("moshi test", broken)
    work.join(10)
    assert not work.alive
    until = time.monotonic() + 10
    while work.thread.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    done: list[int] = []
    workers.run("moshi test", lambda: done.append(1)).join(10)
    assert done == [1]


def test_the_process_ends_at_once() -> None:
    """If this fails, threads that wait keep the program from ending, or abort it as it ends."""
    code = """
import mlx.core as mx
from moshi_mlx.realtime import workers
for number in range(4):
    workers.run(f"moshi {number}", lambda: mx.eval(mx.ones(4) + 1)).join()
print("done")
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert time.monotonic() - began < 60
