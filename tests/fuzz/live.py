"""What happens while things run: operations on conversations in any order, and a process killed while it writes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import wave
from pathlib import Path

import numpy as np

from moshi_mlx.checkpoint.readers import read_safetensors
from moshi_mlx.realtime import Conversation
from tests.helpers import parrot

from . import ROOT, Attack, Attempt, fuzzer

FRAME = parrot.FRAME
_SOUNDS = [
    ("float32", 0), ("float32", 1), ("float32", FRAME), ("float32", FRAME + 1), ("float32", 30 * FRAME),
    ("float64", 100), ("int16", FRAME), ("uint8", FRAME), ("complex64", 10), ("object", 10), ("bool", 10), ("str", 3),
]  # fmt: skip
_KEPT = 8  # threads that may wait for the next conversation
_SHAPES: list[tuple[int, ...]] = [(1, 100), (100, 1), (2, 2, 2), ()]
_OPERATIONS = ["feed"] * 8 + ["read"] * 6 + ["events", "wait", "mute", "unmute", "pause", "resume", "reset", "start"]
_OPERATIONS += ["stop", "check", "ask", "sleep", "read_into", "thread", "odd", "shape"]


@fuzzer(seconds=5.0, megabytes=50.0)
def conversations(folder: Path) -> Attack:
    """Operations on a conversation in any order, some from another thread; it ends when it is stopped."""
    parrot.install(model := parrot.Parrot())

    def make(rng: random.Random) -> Attempt:
        plan = [(rng.choice(_OPERATIONS), rng.randrange(10**6)) for _ in range(rng.choice([5, 20, 60]))]
        said: list[str] = []

        def operate(conversation: Conversation, plan: list[tuple[str, int]]) -> None:
            for operation, number in plan:
                try:
                    _operate(conversation, operation, number)
                except (ValueError, TypeError) as error:
                    # What is not sound may be refused by numpy; nothing else may.
                    if operation not in ("odd", "shape"):
                        raise AssertionError(f"{operation}: {error!r}") from error
                except Exception as error:
                    said.append(f"{type(error).__name__}: {error}")
                    if not type(error).__module__.startswith("moshi_mlx"):
                        raise

        def call() -> None:
            conversation = Conversation(model, tap=lambda heard, frame: None)
            with conversation:
                threads = []
                for start in range(0, len(plan), 10):
                    part = plan[start : start + 10]
                    if part[0][0] == "thread":
                        threads.append(threading.Thread(target=operate, args=(conversation, part[1:])))
                        threads[-1].start()
                    else:
                        operate(conversation, part)
                for thread in threads:
                    thread.join(20)
                    assert not thread.is_alive(), "an operation does not come back"
            until = time.monotonic() + 10
            while (left := sum(each.name.startswith("moshi ") for each in threading.enumerate())) > _KEPT:
                assert time.monotonic() < until, f"{left} threads are left"
                time.sleep(0.01)
            assert not conversation.running

        return json.dumps(plan).encode(), call

    return make


def _operate(conversation: Conversation, operation: str, number: int) -> None:
    if operation == "feed":
        kind, count = _SOUNDS[number % 5]
        conversation.feed(np.full(count, number / 1e6, kind))
    elif operation == "odd":
        kind, count = _SOUNDS[number % len(_SOUNDS)]
        conversation.feed(np.full(count, "x" if kind == "str" else number % 100, kind))
    elif operation == "shape":
        conversation.feed(np.zeros(_SHAPES[number % len(_SHAPES)], np.float32))
    elif operation == "read":
        sound = conversation.read([0, 1, 480, FRAME, 100_000][number % 5])
        assert sound.dtype == np.float32
    elif operation == "read_into":
        conversation.read_into(np.empty(number % 5000, np.float32))
    elif operation == "wait":
        conversation.wait(0.001)
    elif operation == "unmute":
        conversation.mute(False)
    elif operation == "ask":
        assert conversation.delay >= 0 and conversation.target_delay >= 0 and conversation.backlog >= 0
        assert conversation.error is None and conversation.running in (True, False)
    elif operation == "sleep":
        time.sleep(number / 1e8)
    elif operation != "thread":
        getattr(conversation, operation)()


# A process that says that it is ready, and then writes a file again and again until it is killed.
_WRITER = """
import sys
from pathlib import Path
import numpy as np
from moshi_mlx_app.recording.outputs import Claim
kind, path = sys.argv[1], Path(sys.argv[2])
claim = Claim(path)
def write(number):
    if kind == "safetensors":
        import mlx.core as mx
        from moshi_mlx.checkpoint.readers import write_safetensors
        write_safetensors(path, {"a": mx.full((200_000,), number)}, {"number": str(number)})
    elif kind == "json":
        from moshi_mlx_app.recording.transcript import write_json
        write_json(path, {"number": number, "text": "x" * 100_000})
    else:
        from moshi_mlx_app.recording.wav import AnswerFile
        answer = AnswerFile(path, 24_000, 24_000)
        frame = np.full(1920, number / 1000, np.float32)
        for _ in range(10):
            answer.write(frame, frame)
        answer.finish()
write(0)
print("ready", flush=True)
number = 0
while True:
    number = number % 500 + 1
    write(number)
"""
_KINDS = {"safetensors": "x.safetensors", "json": "x.json", "wav": "x.wav"}


@fuzzer(seconds=5.0, megabytes=100.0)
def kills(folder: Path) -> Attack:
    """A process killed while it writes: what is there is whole, and what it leaves is not in the next one's way."""

    def make(rng: random.Random) -> Attempt:
        kind, wait = rng.choice(list(_KINDS)), rng.random() * 0.05
        path = folder / _KINDS[kind]

        def call() -> None:
            command = [sys.executable, "-c", _WRITER, kind, str(path)]
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                assert process.stdout is not None and process.stderr is not None
                ready = process.stdout.readline()
                time.sleep(wait)
                process.send_signal(signal.SIGKILL)
                said = process.stderr.read().decode()
            assert ready, said
            if kind == "safetensors":
                tensors, metadata = read_safetensors(path)
                assert np.all(np.array(tensors["a"]) == float(metadata["number"]))
            elif kind == "json":
                assert len(json.loads(path.read_text())["text"]) == 100_000
            else:
                with wave.open(str(path)) as file:
                    assert file.getnframes() == 19_200
            for left in os.listdir(folder):  # the next one begins with it
                if left in _KINDS.values():
                    continue
                assert left.startswith(".") or ".partial" in left, left
                if left.endswith(".partial.wav") and (folder / left).stat().st_size:
                    with wave.open(str(folder / left)) as file:
                        count = file.getnframes()
                        assert len(file.readframes(count)) == 4 * count, "its header promises what is not there"

        return json.dumps([kind, wait]).encode(), call

    return make
