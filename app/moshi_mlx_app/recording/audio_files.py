"""Reading sound files block by block.

:class:`Recording` reads every format of libsndfile (wav, flac, ogg, mp3, aiff, caf...), twice: first completely,
so that damage, NaN and the true length are known before the model is loaded, then in frames, mono and
resampled. Other formats (m4a, webm, ...) are decoded by ffmpeg into a temporary file, if it is installed.
No more than a fraction of a second of sound is in memory, however long the file is. This module depends on no model
and no terminal.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.audio import MAX_RATE, MIN_RATE
from moshi_mlx.errors import AudioError
from moshi_mlx_app.recording.outputs import named

__all__ = ["Recording"]

Pcm = NDArray[np.float32]

_BLOCK_VALUES = 1 << 16  # samples times channels in one read
_STREAMED = 0x7FFF0000  # programs that write a wav into a pipe put this or more into the length field
_FFMPEG = ("-nostdin", "-v", "error", "-protocol_whitelist", "file", "-i", "file:/dev/stdin", "-map", "0:a:0")
# An au file can be written into a pipe: its header needs no length.
_INTO_AU = ("-c:a", "pcm_s16be", "-f", "au", "pipe:1")


class Recording:
    """A recorded question.

    Parameters
    ----------
    source : str or path
        A sound file, a pipe, or ``"-"`` for standard input. Pipes are copied to a temporary file first.
    side : int, optional
        Which of two channels to use; by default the mean of all channels.

    Attributes
    ----------
    name : str
        Its name in messages.
    sample_rate, channels : int
        As in the file.
    samples : int
        Samples per channel that can be read, which may be fewer than the header says.
    peak : float
        Loudest absolute sample after mixing to mono; above 1 the recording is played softer by that factor.
    warnings : tuple of str
        Problems that do not prevent its use.

    Raises
    ------
    AudioError
        If it is not a sound file, is empty, damaged from the start, has an unsupported rate, or holds NaN or infinity.
    OSError
        If it cannot be opened or read.
    """

    def __init__(self, source: str | os.PathLike[str], side: int | None = None):
        path = os.fspath(source)
        self._side, self._damage = side, ""
        self.name = "standard input" if path == "-" else path
        self._path = path
        self._spool: IO[bytes] | None = None
        self.warnings: tuple[str, ...] = ()
        mode = None if path == "-" else os.stat(path).st_mode
        if mode is not None and stat.S_ISDIR(mode):
            raise AudioError(f"{self.name} is a folder; name the sound file in it")
        if mode is None or stat.S_ISFIFO(mode):
            self._spool = self._copy()
        elif not stat.S_ISREG(mode):
            raise AudioError(f"{self.name} is a device or a socket, not a sound file")
        try:
            self._decode()
            self._survey()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the copy of a pipe."""
        if self._spool is not None:
            self._spool.close()

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.samples / self.sample_rate

    def length(self, rate: int) -> int:
        """Samples after resampling to ``rate``: at least one."""
        return max(1, round(self.samples * rate / self.sample_rate))

    def frames(self, rate: int, size: int, *, lead: int = 0, tail: int = 0) -> Iterator[Pcm]:
        """The recording as the model hears it.

        Parameters
        ----------
        rate : int
            Hertz; resampled with soxr's best quality.
        size : int
            Samples in a frame.
        lead, tail : int
            Samples of silence before and after it. The last frame is padded with silence.

        Yields
        ------
        array [size], float32, mono, within -1 and 1 but for the resampler's overshoot
        """
        pending, held = [np.zeros(lead, np.float32)], lead
        for piece in self._pieces(rate, tail):
            pending.append(piece)
            held += len(piece)
            if held >= size:
                joined = np.concatenate(pending)
                whole = held - held % size
                for start in range(0, whole, size):
                    yield joined[start : start + size]
                pending, held = [joined[whole:]], held - whole
        if held:
            yield np.concatenate([*pending, np.zeros(size - held, np.float32)])

    def _pieces(self, rate: int, tail: int) -> Iterator[Pcm]:
        """Mono blocks at ``rate``, exactly :meth:`length` samples in all, then ``tail`` samples of silence."""
        missing = self.length(rate)
        for piece in self._resampled(rate):
            yield piece[:missing]
            missing -= min(missing, len(piece))
        # The resampler may round a sample away, and the file may have become shorter since the first pass.
        missing += tail
        while missing > 0:
            count = min(missing, rate)
            yield np.zeros(count, np.float32)
            missing -= count

    def _resampled(self, rate: int) -> Iterator[Pcm]:
        blocks = self._mono()
        if rate == self.sample_rate:
            yield from blocks
            return
        import soxr

        stream = soxr.ResampleStream(self.sample_rate, rate, 1, dtype="float32", quality="VHQ")
        for block in blocks:
            yield stream.resample_chunk(block)
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)

    def _mono(self) -> Iterator[Pcm]:
        """Blocks [n], float32, of the part that was readable in the first pass."""
        gain = np.float32(1 / max(1.0, self.peak))
        left = self.samples
        with self._open() as file:
            while left > 0:
                # The same blocks as in the first pass, so that a decoder's failure stays after the last of them.
                block = file.read(self._block, dtype="float32", always_2d=True)[:left]
                if not len(block):
                    return
                left -= len(block)
                yield self._mixed(block) * gain

    def _mixed(self, block: NDArray[np.float32]) -> Pcm:
        mixed: Pcm = block.mean(axis=1) if self._side is None or self.channels != 2 else block[:, self._side]
        return mixed

    def _survey(self) -> None:
        """The first pass: length, peak, and whether it is usable."""
        import soundfile

        with self._open() as file:
            self.sample_rate, self.channels = int(file.samplerate), int(file.channels)
            promised, header = int(file.frames), str(file.extra_info)
            self._block = max(1, _BLOCK_VALUES // self.channels)
            if not MIN_RATE <= self.sample_rate <= MAX_RATE:
                raise AudioError(
                    f"{self.name} has a sample rate of {self.sample_rate} Hz; "
                    f"between {MIN_RATE} and {MAX_RATE} Hz is supported: resample it first"
                )
            samples, peak, damage = 0, 0.0, ""
            while True:
                try:
                    block = file.read(self._block, dtype="float32", always_2d=True)
                except soundfile.SoundFileError as error:
                    damage = _reason(error)
                    break
                if not len(block):
                    break
                mono = self._mixed(block)
                bad = np.flatnonzero(~np.isfinite(mono))
                if bad.size:
                    raise AudioError(
                        f"{self.name} has samples that are not finite numbers, the first at "
                        f"{(samples + int(bad[0])) / self.sample_rate:.3f} s: the program that wrote it is at fault; "
                        "export it again, or cut that part out"
                    )
                peak = max(peak, float(np.abs(mono).max()))
                samples += len(block)
        self.samples, self.peak = samples, peak
        if not samples:
            why = f"its sound cannot be decoded ({damage})" if damage else "it holds no sound: not one sample"
            raise AudioError(f"{self.name} is unusable: {why}")
        self.warnings = tuple(self._complaints(promised, header, damage))

    def _complaints(self, promised: int, header: str, damage: str) -> Iterator[str]:
        said = f"{self.name}: only the first {self.duration:.2f} s are used"
        sizes = re.search(r"^ ?(?:data|SSND) : (\d+) \(should be (\d+)\)", header, re.MULTILINE)
        if damage:
            yield f"{said}; what follows cannot be decoded ({damage})"
        elif self.samples + self.sample_rate < promised < 1 << 62:
            yield f"{said}; the header says {promised / self.sample_rate:.2f} s, but the file ends there"
        elif sizes and int(sizes[2]) < int(sizes[1]) < _STREAMED:
            share = int(sizes[2]) / int(sizes[1])
            yield f"{said}; the header says {self.duration / max(share, 1e-9):.2f} s, but the file ends there"
        if self._damage:
            yield f"{self.name}: some of it could not be decoded ({self._damage})"
        if self.peak > 1:
            yield (
                f"{self.name}: its loudest sample is {self.peak:.3g} times full scale; "
                f"all of it is attenuated by {20 * np.log10(self.peak):.1f} dB"
            )
        elif not self.peak:
            yield f"{self.name}: all of it is digital silence; was the microphone muted or not allowed?"

    def _open(self) -> Any:
        """A new reader at the start. Opened by descriptor: the content determines the format, not the name."""
        import soundfile

        try:
            return soundfile.SoundFile(self._descriptor())  # closes the descriptor, also on failure
        except soundfile.SoundFileError as error:
            raise _Unknown(f"{self.name} cannot be read ({_reason(error)})") from error

    def _descriptor(self) -> int:
        if self._spool is None:
            return os.open(self._path, os.O_RDONLY)
        descriptor = os.dup(self._spool.fileno())
        os.lseek(descriptor, 0, os.SEEK_SET)
        return descriptor

    def _decode(self) -> None:
        """Decode with ffmpeg if libsndfile does not know the format."""
        try:
            self._open().close()
            return
        except _Unknown as error:
            if self._size() == 0:
                raise AudioError(f"{self.name} is empty (0 bytes)") from None
            why = _reason(error.__cause__ or error)
        path = f"./{self._path}" if self._path.startswith("-") else self._path
        show = "ffmpeg -i -" if self._spool is not None else f"ffmpeg -i {shlex.quote(path)}"
        program = shutil.which("ffmpeg")
        if program is None:
            raise AudioError(
                f"{self.name} is not a sound file that can be read without ffmpeg ({why}); install ffmpeg and try "
                f"again, or convert it elsewhere with: {show} {'-f wav -' if self._spool else 'question.wav'}"
            )
        source = self._descriptor()
        decoded = tempfile.TemporaryFile(prefix="moshi-question-")
        try:
            with tempfile.TemporaryFile() as said:
                # A descriptor is seekable, as m4a requires, and keeps the name off the command line.
                done = subprocess.run([program, *_FFMPEG, *_INTO_AU], stdin=source, stdout=decoded, stderr=said)
                said.seek(0)
                line = said.read(4096).decode("utf-8", "replace").strip().partition("\n")[0]
            why = re.sub(r"^\[[^]]*\] ?|^file:/dev/stdin: |\.$", "", line)
            if done.returncode:
                raise AudioError(
                    f"{self.name} is not a sound file that ffmpeg can decode ({why or 'it does not say why'}); "
                    f"see what it is with: {show}"
                )
        except BaseException:
            decoded.close()
            raise
        finally:
            os.close(source)
        self.close()
        self._spool, self._damage = decoded, why

    def _size(self) -> int:
        return os.fstat(self._spool.fileno()).st_size if self._spool is not None else os.stat(self._path).st_size

    def _copy(self) -> IO[bytes]:
        """A pipe's contents in a temporary file: readers of sound files seek."""
        if self._path == "-" and sys.stdin is None:
            raise AudioError("standard input is closed; pipe a sound file into it, or name one")
        if self._path == "-" and sys.stdin.isatty():
            raise AudioError("standard input is a terminal; pipe a sound file into it, or name one")
        spool = tempfile.TemporaryFile(prefix="moshi-question-")
        try:
            with named(Path(tempfile.gettempdir())):
                if self._path == "-":
                    shutil.copyfileobj(sys.stdin.buffer, spool)
                else:
                    with open(self._path, "rb") as pipe:
                        shutil.copyfileobj(pipe, spool)
                spool.flush()
        except BaseException:
            spool.close()
            raise
        return spool


class _Unknown(AudioError):
    """libsndfile does not know this format."""


def _reason(error: BaseException) -> str:
    """libsndfile's message without the descriptor's number and the full stop."""
    text = getattr(error, "error_string", None) or str(error)
    return re.sub(r"^(Error opening [^:]*: |Error : )", "", text).strip().rstrip(".")
