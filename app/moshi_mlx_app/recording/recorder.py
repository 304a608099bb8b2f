"""Live conversations on disk, as they happen, in the layout that moshi-finetune trains on.

For each conversation three things in one folder (kyutai-labs/moshi-finetune, README, "Prepare dataset")::

    2026-11-22_14-05-33.wav     stereo, 16 bits: left Moshi, right the user as the model heard it
    2026-11-22_14-05-33.json    {"alignments": [["word", [start, end], "SPEAKER_MAIN"], ...], ...}, seconds in the wav
    recordings.jsonl            {"path": "2026-11-22_14-05-33.wav", "duration": 83.2}, a line for each finished one

Every frame is written as it comes, with the lengths in the wav's header, and every word leaves valid JSON behind: if
the program is killed, what is missing is what was still on its way, a fraction of a second. The next recording in the
folder, of whatever program, adds what the killed one left out: the line in recordings.jsonl and the JSON's last keys
(docs/recordings.md). When the disk is full, frames are kept in memory and written once there is room.
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
_LAST_TRIES = 1.5  # seconds in which the end is written when the disk is full to the last
_HEAD, _TAIL = '"alignments": [\n', "\n]}\n"
_OURS = re.compile(r"\.(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(?:-\d+)?\.wav)\.lock")


class Recorder:
    """Takes a conversation's frames and writes them in a thread of its own.

    Parameters
    ----------
    folder : path
        Made if it is missing, at the first :meth:`start`.
    sample_rate, frame_size : int
    about : Transcript, optional
        What is known of the conversation before it begins, for the JSON.
    """

    def __init__(self, folder: Path, sample_rate: int, frame_size: int, about: Transcript | None = None):
        self.folder, self._about = folder, about
        self._rate, self._size = sample_rate, frame_size
        self._queue: deque[tuple[int, Pcm, Pcm, tuple[Word, ...]]] = deque()
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
        check_folder(self.folder, "--record")
        self.folder.mkdir(parents=True, exist_ok=True)
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
                    try:
                        self._finish(whole=False)  # which takes less room than a frame
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
        if part.path not in self.files[-1:]:
            self.files.append(part.path)

    def _finish(self, *, whole: bool = True) -> None:
        part = self._part
        if part is not None:
            part.finish(whole=whole)
            self._part = None
            self._recover()

    def _recover(self) -> None:
        """Finish what killed programs left in the folder; what is still being recorded is locked."""
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
            except (OSError, ValueError, RecursionError):  # a full disk, somebody else's JSON: it stays as it is
                finished = False
            claim.release(keep=not finished)
            if recovered:
                self._notices.append(f"{wav}: its program was killed; all of it that was written is listed now")


class _Part:
    """One wav and its JSON. Writing the same frame again, after an error, does no harm: places follow from numbers."""

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
            except BlockingIOError:  # another program, in this moment
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
        self._entries = ""  # words that are not in the file yet
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
            self._entries += "".join(self._entry(word) for word in words if self._inside(word))
        self._wav.write(voice, heard)
        if self._entries:
            with named(self._words):
                write_at(self._json, (self._entries + _TAIL).encode(), self._end)
            self._end += len(self._entries)
            self._entries = ""

    def finish(self, *, whole: bool) -> None:
        """Complete the JSON, list the recording, and let go of it. After an OSError it can be called again."""
        if self.samples:
            _complete(self._words, self._rate, self.samples, whole=whole)
            _list(self.path, self.samples / self._rate)
        else:
            self._discard()
        self.close(finished=True)

    def close(self, *, finished: bool) -> None:
        """Let go of it; what is not finished, the next recording in the folder will finish."""
        self._wav.close()
        os.close(self._json)
        self._claim.release(keep=not finished)

    def _discard(self) -> None:
        for path in (self.path, self._words):
            path.unlink(missing_ok=True)

    def _inside(self, word: Word) -> bool:
        return bool(word.text.strip()) and word.start >= self._first * self._size / self._rate

    def _entry(self, word: Word) -> str:
        shift = self._first * self._size / self._rate
        start, end = round(word.start - shift, 3), round(max(word.end, word.start) - shift, 3)
        entry = aligned({"text": word.text.strip(), "start": start, "end": end, "speaker": self._speaker})
        text = (",\n " if self._any else " ") + json.dumps(entry)
        self._any = True
        return text


def _complete(path: Path, rate: int, samples: int, *, whole: bool) -> None:
    """Add what follows from the rest of a recording's JSON: only its end knows it."""
    found = read_json(path) or _salvaged(path)
    if "duration" in found:
        return
    words = unaligned(found.pop("alignments"))
    write_json(
        path,
        {
            **found,
            "complete": whole,
            "sample_rate": rate,
            "duration": round(samples / rate, 3),
            "text": " ".join(word["text"] for word in words),
            **spoken(words),
        },
    )


def _salvaged(path: Path) -> dict[str, Any]:
    """JSON that was cut off in the middle of a word: what stands before it."""
    head, _, rest = path.read_text(encoding="utf-8", errors="replace").partition(_HEAD)
    entries = []
    for line in rest.splitlines():
        with suppress(ValueError):
            entries.append(json.loads(line.strip().rstrip(",")))
    with suppress(ValueError):
        return {**json.loads(f"{head}{_HEAD}]}}"), "alignments": entries}
    return {"version": VERSION, "alignments": entries}


def _recover(wav: Path) -> bool:
    """Finish a recording whose program was killed. Returns whether it was missing in the list."""
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
    """Append a line to the list, or nothing: half a line would spoil the next one, too."""
    path = wav.with_name(LIST)
    with named(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            # Other programs may record here, too. The system lets go of this lock with the file.
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
