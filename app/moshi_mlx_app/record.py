"""Live conversations on disk, as they happen, in the layout that moshi-finetune trains on.

For each conversation three things in one folder (kyutai-labs/moshi-finetune, README, "Prepare dataset")::

    2026-11-22_14-05-33.wav     stereo, 16 bits: left Moshi, right the user as the model heard it
    2026-11-22_14-05-33.json    {"alignments": [["word", [start, end], "SPEAKER_MAIN"], ...]}, seconds in the wav
    recordings.jsonl            {"path": "2026-11-22_14-05-33.wav", "duration": 83.2}, a line for each finished one

Every frame is written as it comes, with the lengths in the wav's header, and every word leaves valid JSON behind: if
the program is killed, what is missing is what was still on its way, a fraction of a second (and the line in
recordings.jsonl). When the disk is full, frames are kept in memory and written once there is room.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.model import SessionFrame
from moshi_mlx.realtime.ring import Bell
from moshi_mlx.text import Word

__all__ = ["Recorder"]

Pcm = NDArray[np.float32]

_LARGEST_WAV = (1 << 32) - 4096  # a wav's sizes are 32 bits wide
_HELD = 300.0  # seconds that are kept in memory while the disk is full
_RETRY = 0.5
_LAST_TRIES = 1.5  # seconds in which the end is written when the disk is full to the last
_HEAD, _TAIL = b'{"alignments": [', b"]}\n"


class Recorder:
    """Takes a conversation's frames and writes them in a thread of its own.

    Parameters
    ----------
    folder : path
        Made if it is missing, at the first :meth:`start`.
    sample_rate, frame_size : int
    """

    def __init__(self, folder: Path, sample_rate: int, frame_size: int):
        self.folder = folder
        self._rate, self._size = sample_rate, frame_size
        self._queue: deque[tuple[int, Pcm, Pcm, tuple[Word, ...]]] = deque()
        self._bell = Bell()
        self._thread: threading.Thread | None = None
        self._part: _Part | None = None
        self._ending = False
        self._trouble = ""
        self._notices: deque[str] = deque(maxlen=100)
        self.files: list[Path] = []

    @property
    def running(self) -> bool:
        """Whether frames are being taken."""
        return self._thread is not None and not self._ending

    @property
    def seconds(self) -> float:
        """Of the wav that is being written."""
        part = self._part
        return 0.0 if part is None else part.samples / self._rate

    def start(self) -> None:
        """Begin to record with the next frame.

        Raises
        ------
        OSError
            If the folder cannot be made or written to.
        """
        if self.running:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise PermissionError(
                errno.EACCES, "nothing can be recorded there; choose another folder", str(self.folder)
            )
        self._ending = False
        self._queue.clear()
        self._thread = threading.Thread(target=self._write, name="moshi recorder", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what is on its way and close the files; takes at most two seconds."""
        thread = self._thread
        if thread is None:
            return
        self._ending = True
        self._bell.ring()
        thread.join(_LAST_TRIES + 0.5)
        self._thread = None

    def tap(self, heard: Pcm, frame: SessionFrame) -> None:
        """One frame of a conversation (see :class:`moshi_mlx.realtime.Conversation`); never waits, never raises."""
        if not self.running:
            return
        if len(self._queue) * self._size > _HELD * self._rate:
            self._ending = True
            self._notices.append(
                f"recording has ended: nothing could be written for {_HELD / 60:.0f} minutes ({self._trouble}); "
                "what was recorded before is complete"
            )
        else:
            self._queue.append((frame.index, frame.pcm, heard.copy(), frame.words))
        self._bell.ring()

    def notices(self) -> list[str]:
        """What a person should know since the last call."""
        news = []
        while self._notices:
            news.append(self._notices.popleft())
        return news

    def _write(self) -> None:
        """The thread: from the queue to the files, again and again where the disk refuses."""
        until = float("inf")
        while True:
            if self._ending and until == float("inf"):
                until = time.monotonic() + _LAST_TRIES
            try:
                while self._queue:
                    self._frame(*self._queue[0])
                    self._queue.popleft()
                    if self._trouble:
                        self._trouble = ""
                        self._notices.append("recording goes on, and nothing of it is lost")
                if self._ending:
                    self._finish()
                    return
            except OSError as error:
                if not self._trouble:
                    self._trouble = _reason(error)
                    self._notices.append(
                        f"recording waits: {self._trouble}. Make room: {_HELD / 60:.0f} minutes are kept in memory"
                    )
                if time.monotonic() >= until:
                    lost = len(self._queue) * self._size / self._rate
                    self._notices.append(f"the last {lost:.1f} s could not be recorded: {self._trouble}")
                    if self._part is not None:
                        self._part.close()
                        self._part = None
                    return
            self._bell.wait(_RETRY)

    def _frame(self, index: int, voice: Pcm, heard: Pcm, words: tuple[Word, ...]) -> None:
        part = self._part
        if part is not None and (index != part.next_index or part.full):
            self._finish()
            part = None
        if part is None:
            part = self._part = _Part(self.folder, self._rate, self._size, index)
            self.files.append(part.path)
        part.write(index, voice, heard, words)

    def _finish(self) -> None:
        part = self._part
        if part is not None:
            part.finish()
            self._part = None


class _Part:
    """One wav and its JSON. Writing the same frame again, after an error, does no harm: places follow from numbers."""

    def __init__(self, folder: Path, rate: int, size: int, first: int):
        self._rate, self._size, self._first = rate, size, first
        stem = time.strftime("%Y-%m-%d_%H-%M-%S")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        for count in range(1, 1000):
            self.path = folder / f"{stem}{'' if count == 1 else f'-{count}'}.wav"
            try:
                self._wav = os.open(self.path, flags, 0o666)
                break
            except FileExistsError:
                continue
        else:
            raise FileExistsError(errno.EEXIST, "too many recordings of the same second", str(folder))
        try:
            self._json = os.open(self.path.with_suffix(".json"), flags, 0o666)
        except OSError:
            os.close(self._wav)
            self.path.unlink()
            raise
        self.samples = 0
        self._entries = b""  # words that are not in the file yet
        self._any = False
        self._taken = first - 1  # the last frame whose words were taken over
        self._end = len(_HEAD)
        self._begun = False

    @property
    def next_index(self) -> int:
        return self._first + self.samples // self._size

    @property
    def full(self) -> bool:
        return self.samples * 4 + self._size * 4 > _LARGEST_WAV

    def write(self, index: int, voice: Pcm, heard: Pcm, words: tuple[Word, ...]) -> None:
        if index > self._taken:
            self._taken = index
            self._entries += b"".join(self._entry(word) for word in words if self._inside(word))
        if not self._begun:
            _write_at(self._wav, _header(self._rate, 0), 0)
            _write_at(self._json, _HEAD + _TAIL, 0)
            self._begun = True
        both = np.stack([voice, heard], axis=1)
        values = np.clip(np.rint(both * np.float32(32768)), -32768, 32767).astype("<i2")
        _write_at(self._wav, values.tobytes(), 44 + 4 * self.samples)
        # The lengths come after the sound: a header never promises what is not there.
        _write_at(self._wav, _header(self._rate, self.samples + self._size), 0)
        if self._entries:
            _write_at(self._json, self._entries + _TAIL, self._end)
            self._end += len(self._entries)
            self._entries = b""
        self.samples += self._size

    def finish(self) -> None:
        line = {"path": self.path.name, "duration": self.samples / self._rate}
        _append(self.path.parent / "recordings.jsonl", f"{json.dumps(line)}\n".encode())
        self.close()

    def close(self) -> None:
        os.close(self._wav)
        os.close(self._json)

    def _inside(self, word: Word) -> bool:
        return bool(word.text.strip()) and word.start >= self._first * self._size / self._rate

    def _entry(self, word: Word) -> bytes:
        shift = self._first * self._size / self._rate
        times = [round(word.start - shift, 3), round(max(word.end, word.start) - shift, 3)]
        entry: list[Any] = [word.text.strip(), times, "SPEAKER_MAIN"]
        text = (",\n " if self._any else "") + json.dumps(entry)
        self._any = True
        return text.encode()


def _write_at(file: int, data: bytes, place: int) -> None:
    """All of ``data`` at ``place``; the system may take less at a time when the disk fills up."""
    while data:
        count = os.pwrite(file, data, place)
        data, place = data[count:], place + count


def _append(path: Path, data: bytes) -> None:
    """All of ``data`` at the end of a file, or nothing of it: half a line would spoil the next one, too."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        before = os.fstat(file).st_size
        try:
            while data:
                data = data[os.write(file, data) :]
        except OSError:
            os.ftruncate(file, before)
            raise
    finally:
        os.close(file)


def _header(rate: int, samples: int) -> bytes:
    """Of a wav with two channels of 16 bits."""
    size = samples * 4
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 2, rate, rate * 4, 4, 16, b"data", size
    )


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
