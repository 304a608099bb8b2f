"""Recording live conversations in the layout that moshi-finetune trains on.

For each conversation, in one folder (kyutai-labs/moshi-finetune, README, "Prepare dataset")::

    2026-11-22_14-05-33.wav     stereo, 16 bits: left Moshi, right the user as the model heard it
    2026-11-22_14-05-33.json    {"alignments": [["word", [start, end], "SPEAKER_MAIN"], ...], ...}, seconds in the wav
    recordings.jsonl            {"path": "2026-11-22_14-05-33.wav", "duration": 83.2}, a line for each finished one

Every frame is written as it comes, with the lengths in the wav's header, and the JSON is valid after every word: if
the program is killed, only what was still in the queue is missing, a fraction of a second. The next recording in the
folder, by any program, adds what the killed one could not: the line in recordings.jsonl and the JSON's last keys
(docs/recordings.md). When the disk is full, frames are kept in memory and written once there is space.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.engine.text import Word
from moshi_mlx.realtime.ring import Signal
from moshi_mlx.tasks.dialogue import SessionFrame
from moshi_mlx_app.recording.outputs import Claim, check_folder, named, replace_text
from moshi_mlx_app.recording.transcript import VERSION, Transcript, aligned, read_json, spoken, unaligned, write_json
from moshi_mlx_app.recording.wav import HEADER, LARGEST, WavFile, header, write_at

__all__ = ["LIST", "Recorder"]

Pcm = NDArray[np.float32]

LIST = "recordings.jsonl"
_LARGEST_WAV = LARGEST
_HELD = 300.0  # seconds that are kept in memory while the disk is full
_RETRY = 0.5
_LAST_TRIES = 1.5  # seconds to try writing the end when the disk stays full
_HEAD, _TAIL = '"alignments": [\n', "\n]}\n"
_OURS = re.compile(r"\.(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(?:-\d+)?\.wav)\.lock")


class Recorder:
    """Receives a conversation's frames and writes them in its own thread.

    Parameters
    ----------
    folder : path
        Created at the first :meth:`start` if it is missing.
    sample_rate, frame_size : int
    about : Transcript, optional
        What is known of the conversation before it begins, for the JSON.
    """

    def __init__(self, folder: Path, sample_rate: int, frame_size: int, about: Transcript | None = None):
        self.folder, self._about = folder, about
        self._rate, self._size = sample_rate, frame_size
        self._queue: deque[tuple[int, Pcm, Pcm, tuple[Word, ...]]] = deque()
        self._said: deque[Word] = deque()  # by the user
        self._bell = Signal()
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
        """Length of the wav that is being written."""
        part = self._part
        return 0.0 if part is None else part.samples / self._rate

    def start(self) -> None:
        """Start recording with the next frame.

        Raises
        ------
        OSError
            If the folder cannot be created or written to.
        """
        if self.running:
            return
        check_folder(self.folder, "--record")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._ending = False
        self._queue.clear()
        self._said.clear()
        self._thread = threading.Thread(target=self._write, name="moshi recorder", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what is in the queue and close the files; takes at most two seconds."""
        thread = self._thread
        if thread is None:
            return
        self._ending = True
        self._bell.ring()
        thread.join(_LAST_TRIES + 0.5)
        self._thread = None

    def tap(self, heard: Pcm, frame: SessionFrame) -> None:
        """Queue one frame of a conversation (see :class:`moshi_mlx.realtime.Conversation`); never blocks or raises."""
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

    def caption(self, words: Iterable[Word]) -> None:
        """Add words of the user, in seconds of the conversation; never blocks or raises."""
        if self.running:
            self._said.extend(words)
            self._bell.ring()

    def notices(self) -> list[str]:
        """Notices since the last call."""
        news = []
        while self._notices:
            news.append(self._notices.popleft())
        return news

    def _write(self) -> None:
        """The thread: writes the queue to the files, retrying on disk errors."""
        self._recover()
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
                        self._notices.append("recording continues, and nothing was lost")
                if self._ending:
                    self._finish()
                    return
            except OSError as error:
                if not self._trouble:
                    self._trouble = _reason(error)
                    self._notices.append(
                        f"recording waits: {self._trouble}. Free space: {_HELD / 60:.0f} minutes are kept in memory"
                    )
                if time.monotonic() >= until:
                    lost = len(self._queue) * self._size / self._rate
                    self._notices.append(f"the last {lost:.1f} s could not be recorded: {self._trouble}")
                    try:
                        self._finish(whole=False)  # takes less space than a frame
                    except OSError:
                        if self._part is not None:
                            self._part.close(finished=False)
                            self._part = None
                    return
            self._bell.wait(_RETRY)

    def _frame(self, index: int, voice: Pcm, heard: Pcm, words: tuple[Word, ...]) -> None:
        part = self._part
        if part is not None and (index != part.next_index or part.full):
            self._finish()
            part = None
        if part is None:
            part = self._part = _Part(self.folder, self._rate, self._size, index, self._about)
        part.write(index, voice, heard, words)
        self._captions(part)
        if part.path not in self.files[-1:]:
            self.files.append(part.path)

    def _captions(self, part: _Part) -> None:
        while self._said:
            part.caption(self._said[0])
            self._said.popleft()

    def _finish(self, *, whole: bool = True) -> None:
        part = self._part
        if part is not None:
            self._captions(part)
            part.finish(whole=whole)
            self._part = None
            self._recover()

    def _recover(self) -> None:
        """Finish recordings of killed programs in the folder; those in progress are locked."""
        for path in sorted(self.folder.glob(".*.wav.lock")):
            ours = _OURS.fullmatch(path.name)
            if ours is None:
                continue
            wav = path.with_name(ours[1])
            try:
                claim = Claim(wav)
            except OSError:
                continue
            recovered = False
            try:
                recovered = claim.sure and _recover(wav)
                finished = claim.sure
            except (OSError, ValueError, RecursionError):  # a full disk, or another program's JSON: left unchanged
                finished = False
            claim.release(keep=not finished)
            if recovered:
                self._notices.append(f"{wav}: its program was killed; the part that was written is listed now")


class _Part:
    """One wav and its JSON. A frame can be written again after an error: its number determines its position."""

    def __init__(self, folder: Path, rate: int, size: int, first: int, about: Transcript | None):
        self._rate, self._size, self._first = rate, size, first
        stem = time.strftime("%Y-%m-%d_%H-%M-%S")
        for count in range(1, 1000):
            self.path = folder / f"{stem}{'' if count == 1 else f'-{count}'}.wav"
            self._words = self.path.with_suffix(".json")
            if self.path.exists() or self._words.exists():
                continue
            try:
                self._claim = Claim(self.path)
            except BlockingIOError:  # another program, at this moment
                continue
            try:
                self._wav = WavFile(self.path, rate, 2, new=True)
                break
            except FileExistsError:
                self._claim.release(keep=True)
            except OSError:
                self._claim.release()
                raise
        else:
            raise FileExistsError(errno.EEXIST, "too many recordings of the same second", str(folder))
        self._speaker = "moshi" if about is None else about.speaker
        known = {"version": VERSION} if about is None else replace(about, file=self.path.name).head()
        head = json.dumps(known, indent=1)[:-2] + f",\n {_HEAD}"
        try:
            replace_text(self._words, head + _TAIL)
            self._json = os.open(self._words, os.O_RDWR)
        except OSError:
            self._wav.close()
            self._discard()
            self._claim.release()
            raise
        self._entries = ""  # words that are not yet in the file
        self._any = False
        self._taken = first - 1  # the last frame whose words were taken over
        self._end = len(head)

    @property
    def samples(self) -> int:
        return self._wav.samples

    @property
    def next_index(self) -> int:
        return self._first + self.samples // self._size

    @property
    def full(self) -> bool:
        return self.samples * 4 + self._size * 4 > _LARGEST_WAV

    def write(self, index: int, voice: Pcm, heard: Pcm, words: tuple[Word, ...]) -> None:
        if index > self._taken:
            self._taken = index
            self._entries += "".join(self._entry(word, self._speaker) for word in words if self._inside(word))
        self._wav.write(voice, heard)
        self._write_entries()

    def caption(self, word: Word) -> None:
        """Add a word of the user."""
        if self._inside(word):
            self._entries += self._entry(word, "user")
            self._write_entries()

    def _write_entries(self) -> None:
        if self._entries:
            with named(self._words):
                write_at(self._json, (self._entries + _TAIL).encode(), self._end)
            self._end += len(self._entries)
            self._entries = ""

    def finish(self, *, whole: bool) -> None:
        """Complete the JSON, list the recording, and release it. After an OSError it can be called again."""
        if self.samples:
            _complete(self._words, self._rate, self.samples, whole=whole)
            _list(self.path, self.samples / self._rate)
        else:
            self._discard()
        self.close(finished=True)

    def close(self, *, finished: bool) -> None:
        """Release it; an unfinished recording is finished by the next one in the folder."""
        self._wav.close()
        os.close(self._json)
        self._claim.release(keep=not finished)

    def _discard(self) -> None:
        for path in (self.path, self._words):
            path.unlink(missing_ok=True)

    def _inside(self, word: Word) -> bool:
        return bool(word.text.strip()) and word.start >= self._first * self._size / self._rate

    def _entry(self, word: Word, speaker: str) -> str:
        shift = self._first * self._size / self._rate
        start, end = round(word.start - shift, 3), round(max(word.end, word.start) - shift, 3)
        entry = aligned({"text": word.text.strip(), "start": start, "end": end, "speaker": speaker})
        text = (",\n " if self._any else " ") + json.dumps(entry)
        self._any = True
        return text


def _complete(path: Path, rate: int, samples: int, *, whole: bool) -> None:
    """Add the keys of a recording's JSON that are known only at its end."""
    found = read_json(path) or _salvaged(path)
    if "duration" in found:
        return
    words = unaligned(found.pop("alignments"))
    own = [word["text"] for word in words if word["speaker"] == "moshi"] or [word["text"] for word in words]
    write_json(
        path,
        {
            **found,
            "complete": whole,
            "sample_rate": rate,
            "duration": round(samples / rate, 3),
            "text": " ".join(own),
            **spoken(words),
        },
    )


def _salvaged(path: Path) -> dict[str, Any]:
    """Repair JSON that was truncated in the middle of a word, by dropping that word."""
    head, _, rest = path.read_text(encoding="utf-8", errors="replace").partition(_HEAD)
    entries = []
    for line in rest.splitlines():
        with suppress(ValueError):
            entries.append(json.loads(line.strip().rstrip(",")))
    with suppress(ValueError):
        return {**json.loads(f"{head}{_HEAD}]}}"), "alignments": entries}
    return {"version": VERSION, "alignments": entries}


def _recover(wav: Path) -> bool:
    """Finish a recording whose program was killed. Returns whether it was missing from the list."""
    words = wav.with_suffix(".json")
    if not (wav.exists() and words.exists()):
        return False
    with open(wav, "rb") as file:
        first = file.read(HEADER)
        there = os.fstat(file.fileno()).st_size - HEADER
    if there <= 0:  # killed before the first frame
        wav.unlink()
        words.unlink()
        return False
    rate, size = *struct.unpack_from("<I", first, 24), *struct.unpack_from("<I", first, 40)
    samples = min(size, there) // 4
    if first != header(rate, 2, size // 4) or not samples:
        return False
    _complete(words, rate, samples, whole=False)
    if _listed(wav):
        return False
    _list(wav, samples / rate)
    return True


def _listed(wav: Path) -> bool:
    try:
        lines = wav.with_name(LIST).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return False
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["path"] == wav.name:
                return True
    return False


def _list(wav: Path, duration: float) -> None:
    """Append a line to the list, or nothing: half a line would also corrupt the next one."""
    path = wav.with_name(LIST)
    with named(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            # Other programs may record here, too. The system releases this lock with the file.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            before = os.fstat(file).st_size
            torn = before > 0 and os.pread(file, 1, before - 1) != b"\n"
            data = ("\n" * torn + json.dumps({"path": wav.name, "duration": duration}) + "\n").encode()
            try:
                while data:
                    data = data[os.write(file, data) :]
            except OSError:
                os.ftruncate(file, before)
                raise
        finally:
            os.close(file)


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
