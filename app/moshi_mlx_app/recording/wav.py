"""16-bit wav files that are valid on disk after every frame, and the same format for a pipe."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.errors import AudioError
from moshi_mlx_app.recording.outputs import named, partial_name

__all__ = ["HEADER", "LARGEST", "AnswerFile", "AnswerStream", "WavFile", "header", "write_at"]

Pcm = NDArray[np.float32]

HEADER = 44
"""Bytes before the sound."""
LARGEST = (1 << 32) - 4096
"""Bytes of sound that fit, as a wav's sizes are 32 bits wide."""


def header(rate: int, channels: int, samples: int | None) -> bytes:
    """The header of a wav with this many samples in each channel; None for a pipe, if nobody knows yet how many."""
    width = 2 * channels
    size = 0xFFFFFFFF if samples is None else samples * width
    whole = size if samples is None else HEADER - 8 + size
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", whole, b"WAVE", b"fmt ", 16, 1, channels, rate, rate * width, width, 16, b"data", size),
    )


def write_at(file: int, data: bytes, place: int) -> None:
    """Write all of ``data`` at ``place``; the system may write less at a time when the disk fills up."""
    while data:
        count = os.pwrite(file, data, place)
        data, place = data[count:], place + count


def _values(sides: tuple[Pcm, ...]) -> bytes:
    both = np.stack(sides, axis=1)
    values: NDArray[np.int16] = np.clip(np.rint(both * np.float32(32768)), -32768, 32767).astype("<i2")
    return values.tobytes()


class WavFile:
    """A growing wav file. A write that failed, for example on a full disk, can be repeated.

    Parameters
    ----------
    path : path
    rate, channels : int
    new : bool
        Refuse to replace an existing file.

    Attributes
    ----------
    samples : int
        In each channel, so far.

    Raises
    ------
    OSError
        With the name of the file, here and from :meth:`write`.
    """

    def __init__(self, path: Path, rate: int, channels: int, *, new: bool = False):
        self.path = path
        self.samples = 0
        self._rate, self._channels = rate, channels
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_EXCL if new else os.O_TRUNC), 0o666)

    def write(self, *sides: Pcm) -> None:
        """Append an array [samples], float32, for each channel; what is beyond -1 and 1 is clipped."""
        data, width = _values(sides), 2 * self._channels
        with named(self.path):
            if not self.samples:
                write_at(self._file, header(self._rate, self._channels, 0), 0)
            write_at(self._file, data, HEADER + width * self.samples)
            # The lengths are written after the sound, so the header never counts missing samples.
            samples = self.samples + len(data) // width
            write_at(self._file, header(self._rate, self._channels, samples), 0)
        self.samples = samples

    def close(self) -> None:
        """Close it; errors are ignored, since everything has been written."""
        file, self._file = self._file, -1
        if file >= 0:
            with contextlib.suppress(OSError):
                if self.samples:  # drop half a frame on a full disk: its space is used for the words
                    os.ftruncate(file, HEADER + 2 * self._channels * self.samples)
            with contextlib.suppress(OSError):
                os.close(file)


def _fit(rate: int, samples: int, channels: int) -> None:
    if samples * 2 * channels > LARGEST:
        raise AudioError(
            f"the answer would last {samples / rate / 3600:.1f} hours; a wav file ends at "
            f"{LARGEST / 2 / channels / rate / 3600:.1f}: split the question"
        )


class AnswerFile:
    """The wav of an answer: left Moshi, right the user, or Moshi alone.

    It grows under :func:`partial_name`. :meth:`finish` moves it to its name, :meth:`keep` leaves it where it is.

    Parameters
    ----------
    target : path
    sample_rate : int
    samples : int
        Its length: refused if no wav can hold it.
    channels : int

    Raises
    ------
    AudioError
        If it is too long for a wav.
    OSError
        If the folder is missing or not writable.
    """

    def __init__(self, target: Path, sample_rate: int, samples: int, channels: int = 2):
        _fit(sample_rate, samples, channels)
        self.target, self.partial = target, partial_name(target)
        self._channels = channels
        self._wav = WavFile(self.partial, sample_rate, channels)

    @property
    def samples(self) -> int:
        """In each channel, so far."""
        return self._wav.samples

    def write(self, moshi: Pcm, user: Pcm) -> None:
        """Append both channels, [samples] float32 each and equally long."""
        self._wav.write(*(moshi, user)[: self._channels])

    def finish(self) -> Path:
        """Close it and move it into place."""
        self._wav.close()
        os.replace(self.partial, self.target)
        self.partial = self.target
        return self.target

    def keep(self) -> Path | None:
        """Close it as it is. Returns its path, or None if it was empty and has been removed."""
        self._wav.close()
        if self.samples:
            return self.partial
        self.partial.unlink(missing_ok=True)
        return None


class AnswerStream:
    """An answer written to a pipe, frame by frame. Parameters as for :class:`AnswerFile`.

    The header has the length, if ``samples`` is ``exact`` and not an upper bound.
    """

    def __init__(self, stream: BinaryIO, sample_rate: int, samples: int, channels: int = 2, *, exact: bool = True):
        _fit(sample_rate, samples, channels)
        self.target = Path("standard output")
        self.samples = 0
        self._stream, self._channels = stream, channels
        self._header = header(sample_rate, channels, samples if exact else None)

    def write(self, moshi: Pcm, user: Pcm) -> None:
        """As :meth:`AnswerFile.write`."""
        with named(self.target):
            data = memoryview(self._header + _values((moshi, user)[: self._channels]))
            while data:
                data = data[self._stream.write(data) or 0 :]
                self._stream.flush()
        self._header = b""
        self.samples += len(moshi)

    def finish(self) -> Path:
        """Nothing to do."""
        return self.target

    def keep(self) -> Path | None:
        """Nothing to do: what was written has left the pipe."""
        return self.target if self.samples else None
