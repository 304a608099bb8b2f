"""Runs Kyutai's Python client as it is, with devices made of files in place of ``sounddevice``.

    PYTHON kyutai_client.py QUESTION.npy HEARD.npy -- ARGUMENTS OF moshi.client

``PYTHON`` is an environment with ``moshi``, ``sphn`` and ``aiohttp``. The client's own module is imported without the
rest of its package, which would want PyTorch and has no part in it. Its microphone gives the frames of QUESTION,
float32, one every 80 ms, over and over; what its loudspeaker plays is kept in HEARD, and the same way what it decoded.
When as much has come back as the question is long, or nothing has for a minute, it is interrupted as by Ctrl-C.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

played: list[np.ndarray] = []
decoded: list[np.ndarray] = []


class Stream:
    """What the client opens twice."""

    def __init__(self, **options: Any):
        self.options, self.index, self.running = options, 0, False

    def __enter__(self) -> Stream:
        self.running = True
        threading.Thread(target=self.pump, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running = False

    def pump(self) -> None:
        size = self.options["blocksize"]
        began = time.monotonic()
        while self.running:
            time.sleep(max(0.0, began + self.index * size / self.options["samplerate"] - time.monotonic()))
            self.call(size)
            self.index += 1


class Microphone(Stream):
    question: np.ndarray

    def call(self, size: int) -> None:
        frames = len(self.question) // size
        start = self.index % frames * size
        frame = self.question[start : start + size]
        if sum(map(len, decoded)) >= frames * size or self.index > frames + 750:
            self.running = False
            os.kill(os.getpid(), signal.SIGINT)
            return
        self.options["callback"](frame[:, None].copy(), size, None, None)


class Loudspeaker(Stream):
    def call(self, size: int) -> None:
        out = np.zeros((size, 1), np.float32)
        self.options["callback"](out, size, None, None)
        played.append(out[:, 0])


def main() -> None:
    question, heard, _, *arguments = sys.argv[1:]
    Microphone.question = np.load(question)
    devices: Any = types.ModuleType("sounddevice")
    devices.InputStream, devices.OutputStream = Microphone, Loudspeaker
    sys.modules["sounddevice"] = devices
    found = importlib.util.find_spec("moshi")
    assert found is not None and found.origin is not None, "Kyutai's package is not installed here"
    package = types.ModuleType("moshi")
    package.__path__ = [str(Path(found.origin).parent)]
    sys.modules["moshi"] = package
    client = importlib.import_module("moshi.client")
    decode = client.Connection._decode

    async def keep(self: Any, pcm: np.ndarray) -> None:
        decoded.append(pcm.copy())
        await decode(self, pcm)

    client.Connection._decode = keep
    sys.argv = ["moshi.client", *arguments]
    client.main()
    np.savez(heard, decoded=np.concatenate([*decoded, np.zeros(0)]), played=np.concatenate([*played, np.zeros(0)]))


if __name__ == "__main__":
    main()
