"""``moshi-mlx-local transcribe``: recordings or the microphone in, written words out."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from moshi_mlx.errors import ConfigError, MoshiError
from moshi_mlx_app.commands.talk import stop_signals
from moshi_mlx_app.options import add_cache_option, add_model_options, bounded
from moshi_mlx_app.recording.audio_files import Recording
from moshi_mlx_app.recording.interrupt import no_interrupt
from moshi_mlx_app.recording.outputs import Output, partial_name, replace_text, reserved
from moshi_mlx_app.recording.subtitles import FORMATS, written
from moshi_mlx_app.screen.terminal import say, warn

if TYPE_CHECKING:
    from moshi_mlx.engine.text import Word
    from moshi_mlx.tasks.transcribe import Heard, SpeechToText

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

HELP = "write down speech: recordings, or the microphone as somebody speaks"
EXAMPLES = """\
examples:
  moshi-mlx-local transcribe --model kyutai/stt-1b-en_fr-mlx             the microphone, until Ctrl-C
  moshi-mlx-local transcribe talk.wav --model kyutai/stt-1b-en_fr-mlx    prints the text as it comes
  moshi-mlx-local transcribe talk.mp3 -o talk.srt --model M              subtitles; also .vtt, .json, .txt
  moshi-mlx-local transcribe *.wav --format vtt --model M                a file beside each recording

Needs a speech-to-text model; moshi-mlx-local check lists them. Ctrl-C keeps
what was written so far. A recorded conversation (stereo wav with its JSON) is
written down from the user's channel.
"""
_WAKE = 0.05  # seconds between two looks at the microphone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options and the shared ones."""
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="sound files (wav, flac, mp3, ...; m4a and others if ffmpeg is installed), or - for standard input; none: "
        "the microphone",
    )
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="file for the words of one recording; its ending says the format"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="of what is written; with several recordings a file beside each one (default: text on standard output)",
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument(
        "--at-once",
        type=bounded(int, 1, 256),
        default=8,
        metavar="N",
        help="recordings that go through the model together (default: %(default)s)",
    )
    parser.add_argument("--seconds", type=bounded(float, 0, 1e9), metavar="S", help="stop listening after S seconds")
    parser.add_argument("--input-device", metavar="D", help="microphone: a number or part of a name; see devices")
    parser.add_argument(
        "--quiet", action="store_true", help="no progress and no text as it comes; warnings and errors are still shown"
    )
    add_model_options(parser)
    add_cache_option(parser)


def run(args: argparse.Namespace) -> int:
    """Write down what is asked for. Returns the exit status: 0, or 130 after Ctrl-C."""
    if args.output is not None and len(args.files) > 1:
        args.parser.error("-o names the words of one recording; with several use --format, for a file beside each")
    if args.files.count("-") > 1:
        args.parser.error("standard input can be read once")
    if args.output is not None and args.format is None:
        args.format = Path(args.output).suffix.lower().removeprefix(".")
        if args.format not in FORMATS:
            args.parser.error(f"-o {args.output}: the name must end in {', '.join('.' + name for name in FORMATS)}")
    outputs = _outputs(args)
    others: dict[str, str | int | Path] = {f"the recording {name}": name for name in args.files if name != "-"}
    with reserved(args.parser, [output for output in outputs if output is not None], others=others, force=args.force):
        return _files(args, outputs) if args.files else _microphone(args, outputs[0])


def _outputs(args: argparse.Namespace) -> list[Output | None]:
    """The file for each recording, or None for standard output."""
    if args.output is not None:
        path = Path(args.output)
        return [Output("the words", "-o", path, partial_name(path))]
    if args.format is None or not args.files or len(args.files) == 1 or "-" in args.files:
        return [None] * max(len(args.files), 1)
    paths = [Path(name).with_suffix(f".{args.format}") for name in args.files]
    return [Output(f"the words of {path.stem}", "--format", path, partial_name(path)) for path in paths]


def _model(args: argparse.Namespace) -> SpeechToText:
    from moshi_mlx.tasks.transcribe import SpeechToText
    from moshi_mlx_app.models.fetch import load_model

    model = load_model(args, shown=not args.quiet)
    if not isinstance(model, SpeechToText):
        raise ConfigError(
            f"{model.name} is a model for {model.purpose}, and writes nothing down: name a speech-to-text model with "
            f"--model, such as kyutai/stt-1b-en_fr-mlx, or use moshi-mlx-local {model.command}"
        )
    return model


# Recordings


class _File:
    """A recording, and what was written of it."""

    def __init__(self, name: str, output: Output | None):
        self.recording = Recording(name)
        self.output = output
        self.words: list[Word] = []
        self.turns: list[float] = []
        self.seconds = 0.0

    def take(self, heard: Heard) -> None:
        self.words += heard.words
        self.seconds = heard.time
        if heard.turn_ended:
            self.turns.append(heard.time)

    def text(self, args: argparse.Namespace, complete: bool) -> str:
        about = {"file": self.recording.name, "duration": round(self.seconds, 3), "complete": complete}
        return written(args.format or "txt", self.words, self.turns, about)

    def keep(self, args: argparse.Namespace, complete: bool) -> str:
        """Write the file; returns its name, or an empty string if there is none to write."""
        if self.output is None or not (complete or self.words):
            return ""
        path = self.output.path if complete else self.output.partial
        replace_text(path, self.text(args, complete))
        return str(path)


def _files(args: argparse.Namespace, outputs: Sequence[Output | None]) -> int:
    files: list[_File] = []
    with contextlib.ExitStack() as stack:
        for name, output in zip(args.files, outputs, strict=True):
            files.append(_File(name, output))
            stack.callback(files[-1].recording.close)
            for warning in files[-1].recording.warnings:
                warn(f"{files[-1].recording.name}: {warning}" if len(args.files) > 1 else warning)
        model = _model(args)
        complete: set[int] = set()
        live = len(files) == 1 and outputs[0] is None and args.format is None and not args.quiet
        began = time.monotonic()
        try:
            with _progress(args, files, shown=not live) as shown:
                _written(args, model, files, complete, live, shown)
        except (KeyboardInterrupt, MoshiError, OSError) as error:
            with no_interrupt():
                for number, file in enumerate(files):
                    if number not in complete and (kept := file.keep(args, complete=False)):
                        warn(f"the first {file.seconds:.1f} s of {file.recording.name} are in {kept}", "kept")
            if isinstance(error, KeyboardInterrupt):
                return 130
            raise
        if not args.quiet:
            seconds, took = sum(file.seconds for file in files), time.monotonic() - began
            factor = took / max(seconds, 1e-9)
            warn(f"{seconds:.1f} s of sound in {took:.1f} s: real-time factor {factor:.2f} (1: as fast as speech)", "")
    return 0


def _written(
    args: argparse.Namespace, model: SpeechToText, files: Sequence[_File], complete: set[int], live: bool, shown: Any
) -> None:
    """Play all recordings to the model, and write each one's words when it is over."""
    line = _Line(sys.stdout) if live else None

    def take(number: int, heard: Heard) -> None:
        files[number].take(heard)
        shown(sum(file.seconds for file in files))
        if line is not None:
            line.take(heard)

    rate, size = model.sample_rate, model.frame_size
    for start in range(0, len(files), args.at_once):
        group = range(start, min(start + args.at_once, len(files)))
        sounds = [files[number].recording.frames(rate, size) for number in group]
        model.transcribe_all(
            sounds,
            at_once=args.at_once,
            kv_bits=args.kv_bits,
            on_heard=lambda index, heard, start=start: take(start + index, heard),  # type: ignore[misc]
        )
        for number in group:
            with no_interrupt():
                complete.add(number)
                if files[number].output is not None:
                    name = files[number].keep(args, complete=True)
                    if not args.quiet:
                        warn(name, "written")
                elif line is None:
                    if len(files) > 1:
                        say(f"{files[number].recording.name}:")
                    say(files[number].text(args, complete=True).rstrip("\n"))
    if line is not None:
        line.end()


@contextlib.contextmanager
def _progress(args: argparse.Namespace, files: Sequence[_File], shown: bool) -> Iterator[Any]:
    """A bar over all recordings: gives a function that takes the seconds done."""
    from moshi_mlx_app.screen.terminal import AnswerProgress

    total = sum(file.recording.duration for file in files)
    with AnswerProgress(total, text=False, bar=shown and not args.quiet) as bar:
        yield lambda seconds: bar.frame(min(seconds, total), "")


class _Line:
    """Words on a terminal, or in a pipe, as they come; a turn's end ends the line."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._open = False

    def take(self, heard: Heard) -> None:
        from moshi_mlx.printable import printable

        for word in heard.words:
            print(f"{' ' if self._open else ''}{printable(word.text.strip())}", end="", file=self._stream, flush=True)
            self._open = True
        if heard.turn_ended:
            self.end()

    def end(self) -> None:
        if self._open:
            print(file=self._stream, flush=True)
        self._open = False


# The microphone


def _microphone(args: argparse.Namespace, output: Output | None) -> int:
    import numpy as np

    from moshi_mlx.realtime.ring import Ring, Signal
    from moshi_mlx_app.audio.device import SoundCard
    from moshi_mlx_app.audio.portaudio import devices, find_device

    find_device(args.input_device, "input", devices())  # report a missing device before a download
    model = _model(args)
    ring, bell = Ring(10 * model.sample_rate), Signal()
    lost = 0

    def hear(pcm: Any) -> None:
        nonlocal lost
        lost += len(pcm) - ring.write(pcm)
        bell.ring()

    words: list[Word] = []
    turns: list[float] = []
    line = None if args.quiet else _Line(sys.stdout)

    def take(heard: Heard) -> None:
        words.extend(heard.words)
        if heard.turn_ended:
            turns.append(heard.time)
        if line is not None:
            line.take(heard)

    def keep() -> None:
        if output is not None and words:
            about = {"file": "", "duration": round(listener.time, 3), "complete": True}
            replace_text(output.path, written(args.format, words, turns, about))
            warn(str(output.path), "written")

    card = SoundCard(hear, lambda out: out.fill(0), model.sample_rate, input_device=args.input_device)
    with stop_signals() as stopped, model.listen(kv_bits=args.kv_bits) as listener:
        try:
            with card:
                warn("listening; Ctrl-C ends it", "")
                while not stopped and (args.seconds is None or listener.time < args.seconds):
                    bell.wait(_WAKE)
                    for notice in card.notices():
                        warn(notice, "notice")
                    card.check()
                    if ring.available >= model.frame_size:
                        pcm = np.empty(ring.available, np.float32)
                        for heard in listener.feed(pcm[: ring.read_into(pcm)]):
                            take(heard)
            for heard in listener.finish():
                take(heard)
        finally:
            with no_interrupt():
                if line is not None:
                    line.end()
                keep()
    if lost:
        warn(f"{lost / model.sample_rate:.1f} s of sound were lost: this machine is too slow for {model.name}")
    return 130 if stopped and stopped[0] == signal.SIGINT else 0
