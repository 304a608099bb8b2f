"""Recordings with timed words: folders of ``talk --record``, moshi-finetune's lists, or any stereo files.

The left channel is Moshi, the right one the user. The words are in a file of the same name with the ending .json, under
``alignments``: ``["word", [start, end], "SPEAKER_MAIN"]``, of which only the main speaker's are learnt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.audio import MAX_RATE, MIN_RATE, as_mono
from moshi_mlx.errors import AudioError, ConfigError

from .rows import TimedWord

__all__ = ["MAIN", "OTHER", "Recording", "find_recordings", "open_recording", "read_piece", "words_file"]

MAIN, OTHER = "SPEAKER_MAIN", "SPEAKER_OTHER"
LIST_ENDING = ".jsonl"
SOUND_ENDINGS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".caf", ".w64")
_LARGEST = 1 << 26  # bytes of JSON that are read: hours of words
_SHORTEST = 0.08  # seconds


@dataclass(frozen=True)
class Recording:
    """A stereo file and its words.

    Attributes
    ----------
    path : Path
    seconds : float
    rate : int
        Hertz.
    words : tuple of TimedWord or None
        The main speaker's, by start; None if nobody has written them down.
    conditions : mapping or None
        ``text_conditions`` of its JSON.
    """

    path: Path
    seconds: float
    rate: int
    words: tuple[TimedWord, ...] | None
    conditions: Mapping[str, Any] | None = None


def words_file(path: Path) -> Path:
    """Where a recording's words are."""
    return path.with_suffix(".json")


def find_recordings(source: Path) -> list[Recording]:
    """All recordings of a folder, of a list, or one file.

    Parameters
    ----------
    source : path
        A folder with lists in it, at any depth, or else with sound files; a list (``.jsonl``, a line
        ``{"path": "a.wav", ...}`` for each recording, relative to it); or a sound file.

    Raises
    ------
    ConfigError, AudioError
        If there is nothing, or a file cannot be used; the message names it.
    """
    if not source.exists():
        raise ConfigError(f"{source}: there is no such file or folder of recordings")
    if source.is_dir():
        lists = sorted(source.rglob(f"*{LIST_ENDING}"))
        paths = [path for name in lists for path in _listed(name)]
        if not lists:
            files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SOUND_ENDINGS)
            paths = [path for path in files if not path.name.startswith(".") and not path.stem.endswith(".partial")]
        if not paths:
            raise ConfigError(f"{source} holds no recordings: neither a list (*{LIST_ENDING}) nor sound files")
    else:
        paths = _listed(source) if source.suffix.lower() == LIST_ENDING else [source]
        if not paths:
            raise ConfigError(f"{source} names no recordings")
    return [open_recording(path) for path in dict.fromkeys(paths)]


def _listed(path: Path) -> list[Path]:
    paths = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            name = json.loads(line)["path"]
            paths.append(path.parent / Path(name))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f'{path}, line {number}: expected {{"path": "a.wav", "duration": 24.5}}') from error
    return paths


def open_recording(path: Path) -> Recording:
    """A recording's length and words.

    Raises
    ------
    AudioError, ConfigError
        If it is missing, not stereo, or its words are damaged.
    """
    import soundfile

    if not path.is_file():
        raise AudioError(f"{path}: no such recording")
    try:
        info = soundfile.info(str(path))
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(f"{path} is not a sound file that can be read: {error}") from error
    if info.channels != 2:
        raise AudioError(
            f"{path} has {info.channels} channel{'s' * (info.channels != 1)}: two are needed, the voice to learn on "
            "the left and the other speaker on the right"
        )
    if not MIN_RATE <= info.samplerate <= MAX_RATE:
        raise AudioError(f"{path} has a sample rate of {info.samplerate} Hz: {MIN_RATE} to {MAX_RATE} is supported")
    seconds = info.frames / info.samplerate
    if seconds < _SHORTEST:
        raise AudioError(f"{path} holds {seconds:.3f} s of sound: too short to learn from")
    words, conditions = _read_words(words_file(path))
    return Recording(path, seconds, info.samplerate, words, conditions)


def _read_words(path: Path) -> tuple[tuple[TimedWord, ...] | None, Mapping[str, Any] | None]:
    if not path.exists():
        return None, None
    try:
        if path.stat().st_size > _LARGEST:
            raise ConfigError(f"{path} is larger than {_LARGEST >> 20} MB: that is no list of words")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("alignments"), list):
        return None, None
    words = tuple(sorted(_main_words(data["alignments"], path), key=lambda word: word.start))
    conditions = data.get("text_conditions")
    return words, conditions if isinstance(conditions, dict) else None


def _main_words(entries: Iterable[Any], path: Path) -> Iterable[TimedWord]:
    for number, entry in enumerate(entries, start=1):
        try:
            text, (start, end), speaker = entry
            start, end = float(start), float(end)
            if not (isinstance(text, str) and math.isfinite(start) and math.isfinite(end)):
                raise ValueError
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f'{path}: entry {number} of alignments is {str(entry)[:60]}, not ["word", [start, end], "{MAIN}"]'
            ) from error
        if speaker == MAIN:
            yield TimedWord(text, start, end)


def read_piece(
    recording: Recording, start: float, seconds: float, rate: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Both channels of a part of a recording, resampled to ``rate``.

    Raises
    ------
    AudioError
        If the file cannot be read there, or holds values that are no numbers.
    """
    import soundfile

    try:
        with soundfile.SoundFile(str(recording.path)) as file:
            file.seek(min(round(start * recording.rate), len(file)))
            pcm = file.read(round(seconds * recording.rate), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(f"{recording.path} cannot be read from {start:.1f} s on: {error}") from error
    try:
        return as_mono(pcm[:, 0], recording.rate, rate), as_mono(pcm[:, 1], recording.rate, rate)
    except AudioError as error:
        raise AudioError(f"{recording.path}, from {start:.1f} s on: {error}") from error
