"""``moshi-mlx-local file``: a recording in, Moshi's spoken answer and its text out."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moshi_mlx.audio import LONGEST_TAIL, TAIL
from moshi_mlx.errors import MoshiError
from moshi_mlx_app.audio_files import AnswerFile, Recording, partial_name
from moshi_mlx_app.interrupt import no_interrupt
from moshi_mlx_app.options import (
    add_cache_option,
    add_generation_options,
    add_model_options,
    bounded,
    generation_from,
)
from moshi_mlx_app.terminal import AnswerProgress, say, warn
from moshi_mlx_app.tracing import add_trace_option, tracing
from moshi_mlx_app.transcript import Transcript, write_json
from moshi_mlx_app.version import program

if TYPE_CHECKING:
    from moshi_mlx.model import Moshi
    from moshi_mlx.realtime import Trace

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

HELP = "answer a recording: write Moshi's voice to a wav file and print its words"
EXAMPLES = """\
examples:
  moshi-mlx-local file question.wav -o answer.wav
  moshi-mlx-local file --demo -o answer.wav          the questions that come along
  moshi-mlx-local file question.flac -o answer.wav --seed 7 --tail 10 --json
  ffmpeg -i memo.m4a -f wav - | moshi-mlx-local file - -o answer.wav

The wav is stereo at 24 kHz: Moshi on the left, the question on the right. While
it grows it is called answer.partial.wav; Ctrl-C keeps it. Words and their times
go to answer.json.
"""
UNTRAINED = (
    "the model {name!r} has random weights: it has not been trained, so what it says is noise and nonsense. "
    "Name a trained one with --model"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's own options and the shared ones."""
    parser.add_argument(
        "question",
        nargs="?",
        metavar="QUESTION",
        help="a sound file (wav, flac, mp3, ogg, ...), or - for standard input",
    )
    parser.add_argument("-o", "--output", required=True, metavar="ANSWER.wav", help="where the answer goes")
    parser.add_argument(
        "--demo", action="store_true", help="answer the questions recorded for this program instead of QUESTION"
    )
    parser.add_argument("--transcript", metavar="PATH", help="where the words go, as JSON (default: ANSWER.json)")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--tail",
        type=bounded(float, 0, LONGEST_TAIL),
        default=TAIL,
        metavar="SECONDS",
        help="silence after the question, in which the answer can end (default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the transcript's JSON at the end instead of the text as it comes"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no text and no progress; warnings and errors still appear"
    )
    add_trace_option(parser)
    add_model_options(parser)
    add_generation_options(parser)
    add_cache_option(parser)


def run(args: argparse.Namespace) -> int:
    """Answer one recording. Returns the exit status: 0, or 130 after Ctrl-C."""
    if (args.question is None) != args.demo:
        args.parser.error("name a QUESTION, or - for standard input, or ask for --demo (and not for both)")
    if args.demo:
        asset = resources.files("moshi_mlx_app") / "assets" / "questions.wav"
        with resources.as_file(asset) as path:
            return _answer(args, str(path))
    return _answer(args, args.question)


def _answer(args: argparse.Namespace, question: str) -> int:
    output, transcript = _targets(args, question)
    with tracing(args.trace) as trace, Recording(question) as recording:
        for warning in recording.warnings:
            warn(warning)
        answer = _Answer(args, recording, output, transcript, trace)
        try:
            answer.compute()
        except KeyboardInterrupt:
            with no_interrupt():
                warn(answer.keep(), "stopped")
            return 130
        except (MoshiError, OSError):
            with no_interrupt():
                kept = answer.keep()
                if answer.seconds:
                    warn(kept, "kept")
            raise
        with no_interrupt():
            answer.finish()
    return 0


class _Answer:
    """One answer on its way into its files."""

    def __init__(
        self, args: argparse.Namespace, recording: Recording, output: Path, transcript: Path, trace: Trace | None
    ):
        self.args, self.recording, self.output, self.transcript = args, recording, output, transcript
        self.trace = trace
        self.seconds = 0.0
        self._file: AnswerFile | None = None
        self._about: Transcript | None = None

    def compute(self) -> None:
        """Load the model and play the recording to it, frame by frame."""
        from moshi_mlx.model import generation_defaults
        from moshi_mlx_app.fetching import load_model

        args = self.args
        model = load_model(args, shown=not args.quiet)
        if not model.trained:
            warn(UNTRAINED.format(name=model.name), "notice")
        rate, size = model.sample_rate, model.frame_size
        lead, tail = model.silence(args.tail)
        generation = generation_from(args, generation_defaults(model.config))
        samples = self.recording.length(rate) + tail
        self._file = AnswerFile(self.output, rate, samples)
        partial_name(self.transcript).unlink(missing_ok=True)  # of an earlier run that was stopped
        self._about = about = self._begin(model, generation)
        skip = lead  # what speech-to-text models are played first is no part of the answer
        text = not (args.quiet or args.json)
        with (
            model.session(seed=args.seed, generation=generation, kv_bits=args.kv_bits) as session,
            AnswerProgress(samples / rate, text=text, bar=not args.quiet) as face,
        ):
            step, write = session.step, self._file.write
            if self.trace is not None:
                session.on_stage = self.trace.span
                step, write = self.trace.wrap("frame", step), self.trace.wrap("write", write)
            began = time.perf_counter()
            for user in self.recording.frames(rate, size, lead=lead, tail=tail):
                frame = step(user)
                start = min(skip, size)
                stop = min(size, start + samples - self._file.samples)
                skip -= start
                write(frame.pcm[start:stop], user[start:stop])
                self.seconds = self._file.samples / rate
                about.duration, about.seconds_computed = self.seconds, time.perf_counter() - began
                about.text += frame.text
                about.words += frame.words
                face.frame(self.seconds, frame.text)
            last = session.finish()
            about.text += last.text
            about.words += last.words
            face.frame(self.seconds, last.text)

    def finish(self) -> None:
        """Move the files to their names and say where they are."""
        assert self._file is not None and self._about is not None
        about = self._about
        about.complete = True
        about.answer["file"] = _name(self._file.finish())
        write_json(self.transcript, about.as_dict())
        if self.args.json:
            say(json.dumps(about.as_dict()))
        elif not self.args.quiet:
            factor = about.seconds_computed / about.duration
            warn(
                f"{self.output}: {about.duration:.1f} s, left Moshi, right the question; words in {self.transcript}", ""
            )
            warn(
                f"computed in {about.seconds_computed:.1f} s: real-time factor {factor:.2f} (1: as fast as speech)", ""
            )

    def keep(self) -> str:
        """Leave what there is in valid files; returns a sentence that says where."""
        kept = None if self._file is None else self._file.keep()
        if kept is None or self._about is None:
            return "nothing was written"
        words = partial_name(self.transcript)
        self._about.answer["file"] = _name(kept)
        said = f"the first {self.seconds:.1f} s of the answer are in {kept}"
        try:
            write_json(words, self._about.as_dict())
        except OSError as error:
            return f"{said}, but the words could not be written: {error}"
        return f"{said}, the words in {words}"

    def _begin(self, model: Moshi, generation: Any) -> Transcript:
        recording = self.recording
        return Transcript(
            program=program(),
            model=model.name,
            model_description=model.description,
            trained=model.trained,
            seed=self.args.seed,
            sample_rate=model.sample_rate,
            question={
                "file": _name(recording.name),
                "sample_rate": recording.sample_rate,
                "channels": recording.channels,
                "duration": round(recording.duration, 3),
            },
            answer={"file": _name(self.output), "channels": ["moshi", "user"]},
            generation={**asdict(generation), "tail": self.args.tail},
            warnings=recording.warnings,
        )


def _targets(args: argparse.Namespace, question: str) -> tuple[Path, Path]:
    """The answer's and the transcript's paths, checked before any work."""
    output = Path(args.output)
    if output.suffix.lower() not in (".wav", ".wave"):
        args.parser.error(f"-o {args.output}: the answer is a wav file; give it a name that ends in .wav")
    transcript = Path(args.transcript) if args.transcript else output.with_suffix(".json")
    files = {"the answer": output, "the transcript": transcript}
    if transcript.resolve() in (output.resolve(), partial_name(output).resolve()):
        args.parser.error(f"--transcript {transcript}: that is where the answer goes")
    for what, path in files.items():
        folder = path.parent
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder for {what}; make it with 'mkdir -p {folder}'")
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name a file for {what}")
        for name in (path, partial_name(path)):
            if question != "-" and name.exists() and os.path.exists(question) and os.path.samefile(name, question):
                raise FileExistsError(f"{name}: {what} would be written over the question; choose another name")
        if path.exists() and not args.force:
            raise FileExistsError(f"{path} exists; replace it with --force, or choose another name for {what}")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder}: {what} cannot be written there; choose a folder that you may write to")
    return output, transcript


def _name(path: str | Path) -> str:
    """A path as valid Unicode: file names on Linux need not be."""
    return os.fsencode(path).decode("utf-8", "replace")
