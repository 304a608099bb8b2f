"""``moshi-mlx-local file``: a recording in, Moshi's spoken answer and its text out."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from moshi_mlx.audio import LONGEST_TAIL, TAIL
from moshi_mlx.errors import MoshiError
from moshi_mlx_app.models.fetch import load_model, refuse_deaf
from moshi_mlx_app.options import (
    add_cache_option,
    add_generation_options,
    add_machine_options,
    add_model_options,
    add_role_options,
    bounded,
    generation_from,
    opening_from,
)
from moshi_mlx_app.recording.audio_files import Recording
from moshi_mlx_app.recording.interrupt import no_interrupt
from moshi_mlx_app.recording.outputs import Output, partial_name, reserved
from moshi_mlx_app.recording.transcript import Transcript, clean, read_json, unaligned, write_json
from moshi_mlx_app.recording.wav import AnswerFile, AnswerStream
from moshi_mlx_app.screen.terminal import AnswerProgress, say, warn
from moshi_mlx_app.tracing import add_trace_option, trace_output, tracing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moshi_mlx.engine.generator import GenerationConfig
    from moshi_mlx.engine.pipeline import Opening
    from moshi_mlx.engine.session import Session
    from moshi_mlx.realtime import Trace
    from moshi_mlx.tasks.dialogue import Moshi, SessionFrame

    Pcm = NDArray[np.float32]

__all__ = [
    "EXAMPLES",
    "HELP",
    "UNTRAINED",
    "Answer",
    "Question",
    "add_arguments",
    "add_output_arguments",
    "answer",
    "check_seed",
    "outputs_of",
    "run",
    "standard_output",
]

HELP = "answer a recording: write Moshi's voice to a wav file and print its words"
EXAMPLES = """\
examples:
  moshi-mlx-local file question.wav -o answer.wav
  moshi-mlx-local file --demo -o answer.wav          answer the included questions
  moshi-mlx-local file question.flac -o answer.wav --trailing-silence 10 --json
  moshi-mlx-local file memo.m4a -o answer.wav --mono  m4a and others need ffmpeg
  moshi-mlx-local file question.wav -o - | ffplay -   listen while it is computed
  moshi-mlx-local file talks/2026-11-22_14-05-33.wav -o again.wav

The wav is stereo at 24 kHz: Moshi on the left, the question on the right. Until
it is complete it is called answer.partial.wav; Ctrl-C keeps it. Words and their
times go to answer.json. If the question is a conversation that this program
recorded or answered, the user's channel is used.
"""
UNTRAINED = (
    "the model {name!r} has random weights: it has not been trained, so its answers are noise. "
    "Name a trained one with --model"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options and the shared ones."""
    parser.add_argument(
        "question",
        nargs="?",
        metavar="QUESTION",
        help="a sound file (wav, flac, mp3, ogg, ...; m4a and others if ffmpeg is installed), or - for standard input",
    )
    parser.add_argument(
        "--demo", action="store_true", help="answer the recorded questions that are included instead of QUESTION"
    )
    parser.add_argument(
        "--trailing-silence",
        type=bounded(float, 0, LONGEST_TAIL),
        default=TAIL,
        metavar="SECONDS",
        help="seconds of silence after the question, so that the answer can end (default: %(default)s)",
    )
    parser.add_argument(  # its name until 0.1
        "--tail", type=bounded(float, 0, LONGEST_TAIL), dest="trailing_silence", help=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
    )  # fmt: skip
    add_output_arguments(parser)
    add_model_options(parser)
    add_role_options(parser)
    add_generation_options(parser)
    add_cache_option(parser)
    add_machine_options(parser)


def add_output_arguments(parser: argparse.ArgumentParser, *, name: str = "ANSWER", mono: str = "Moshi's voice") -> None:
    """The files that are written, and what is printed."""
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar=f"{name}.wav",
        help="the wav file to write; - for standard output, text then goes to standard error",
    )
    parser.add_argument("--mono", action="store_true", help=f"write {mono} only, without the question")
    parser.add_argument(
        "--transcript", metavar="PATH", help=f"the JSON file for the words (default: {name}.json; with -o - none)"
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument(
        "--json", action="store_true", help="print the transcript's JSON at the end instead of the text as it comes"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no text and no progress; warnings and errors are still shown"
    )
    add_trace_option(parser)


def run(args: argparse.Namespace) -> int:
    """Answer one recording. Returns the exit status: 0, or 130 after Ctrl-C."""
    if (args.question is None) != args.demo:
        args.parser.error("name a QUESTION, or - for standard input, or ask for --demo (and not for both)")
    if args.demo:
        asset = resources.files("moshi_mlx") / "assets" / "questions.wav"
        with resources.as_file(asset) as path:
            return answer(args, str(path))
    return answer(args, args.question)


def answer(
    args: argparse.Namespace,
    question: str | None,
    make: type[Answer] | None = None,
    ask: Callable[[], Question] | None = None,
) -> int:
    """Answer a recording, and keep what was computed whatever happens. Returns the exit status.

    Parameters
    ----------
    args : Namespace
    question : str or None
        A sound file, or ``-`` for standard input; None with ``ask``.
    make : type, optional
        What answers: an :class:`Answer`.
    ask : callable, optional
        Makes a question that is no file.
    """
    outputs = outputs_of(args)
    others: dict[str, str | int | Path] = {}
    known = None
    if question is not None:
        others["the question"] = 0 if question == "-" else question
        known = None if question == "-" else _conversation(question)
    if known is not None and question is not None:
        others["the question's words"] = Path(question).with_suffix(".json")
    if args.output == "-":
        others["standard output"] = 1
    with (
        reserved(args.parser, outputs, others=others, force=args.force),
        standard_output(args) as stream,
        tracing(args.trace) as trace,
        ask() if ask is not None else Question(str(question), known) as asked,
    ):
        for warning in asked.recording.warnings:
            warn(warning)
        made = (make or Answer)(args, asked, stream, trace)
        try:
            made.compute()
            with no_interrupt():
                made.finish()
        except KeyboardInterrupt:
            with no_interrupt():
                warn(made.keep(), "stopped")
            return 130
        except (MoshiError, OSError) as error:
            with no_interrupt():
                kept = made.keep()
                if isinstance(error, BrokenPipeError):
                    warn(f"{kept}; its reader has gone", "stopped")
                elif made.seconds:
                    warn(kept, "kept")
            raise
    return 0


class Question:
    """The question: a recording and what is known about it; of a recorded conversation, the user's channel."""

    def __init__(self, question: str, known: dict[str, Any] | None):
        self.words: list[dict[str, Any]] = []
        self.recording = Recording(question, side=None if known is None else 1)
        self.from_conversation = known is not None and self.recording.channels == 2
        if known is not None and self.from_conversation:
            self.words = [word for word in unaligned(known["alignments"]) if word["speaker"] == "user"]
            warn(f"{self.recording.name} is a recorded conversation: the user's channel is the question", "notice")

    def __enter__(self) -> Question:
        return self

    def __exit__(self, *_: object) -> None:
        self.recording.close()

    def about(self) -> dict[str, Any]:
        """The transcript's ``question``."""
        recording = self.recording
        return {
            "file": clean(recording.name),
            "sample_rate": recording.sample_rate,
            "channels": recording.channels,
            "duration": round(recording.duration, 3),
            **({"channel": "user"} if self.from_conversation else {}),
        }


def _conversation(question: str) -> dict[str, Any] | None:
    """The JSON file of a recorded conversation, or None."""
    path = Path(question)
    known = read_json(path.with_suffix(".json")) if path.name else None
    if known is None or known.get("channels", ["moshi", "user"]) != ["moshi", "user"]:
        return None
    answer = known.get("answer")
    belongs = answer.get("file") if isinstance(answer, dict) else None
    return known if not belongs or Path(str(belongs)).name == clean(path.name) else None


class Answer:
    """One answer and its files."""

    exact: ClassVar[bool] = True
    """Whether :meth:`length` is the length, and not an upper bound."""
    left: ClassVar[str] = "Moshi"
    """Whose voice is in the left channel."""
    bar: ClassVar[bool] = True
    """Whether progress can be shown."""

    def __init__(self, args: argparse.Namespace, question: Question, stream: BinaryIO | None, trace: Trace | None):
        self.args, self.question, self.stream, self.trace = args, question, stream, trace
        self.transcript = _transcript(args)
        self.seconds = 0.0
        self.noticed = list(question.recording.warnings)
        self._file: AnswerFile | AnswerStream | None = None
        self._about: Transcript | None = None

    def compute(self) -> None:
        """Load the model and play the recording to it, frame by frame."""
        args = self.args
        model = load_model(args, shown=not args.quiet, accept=self.accept)
        if not model.trained:
            warn(UNTRAINED.format(name=model.name), "notice")
        rate = model.sample_rate
        generation = self.generation(model)
        check_seed(args.seed, model, generation)
        samples = self.length(model)
        conversation = self.session(model, generation)
        channels = ("moshi",) if args.mono else ("moshi", "user")
        if self.transcript is not None:
            partial_name(self.transcript).unlink(missing_ok=True)  # of an earlier run that was stopped
        if self.stream is None:
            self._file = AnswerFile(Path(args.output), rate, samples, len(channels))
        else:
            self._file = AnswerStream(self.stream, rate, samples, len(channels), exact=self.exact)
        self._about = about = Transcript.of(
            model,
            args.seed,
            generation,
            kv_bits=args.kv_bits,
            settings=self.settings(),
            channels=channels,
            question=self.question.about(),
            heard=self.question.words,
            seconds_computed=0.0,
            warnings=self.noticed,
        )
        text = not (args.quiet or args.json)
        with (
            conversation as session,
            AnswerProgress(samples / rate, text=text, bar=self.bar and not args.quiet) as face,
        ):
            write = self._file.write if self.trace is None else self.trace.wrap("write", self._file.write)
            began = time.perf_counter()
            for user, voice, frame in self.played(model, session):
                count = min(len(user), samples - self._file.samples) if self.exact else len(user)
                if count:
                    write(voice[:count], user[:count])
                self.seconds = self._file.samples / rate
                about.duration, about.seconds_computed = self.seconds, time.perf_counter() - began
                about.text += frame.text
                about.words += frame.words
                face.frame(self.seconds, frame.text)

    def accept(self, name: str, task: type[Moshi] | Moshi) -> None:
        """Refuse a model that cannot do this, by a ConfigError, before it is downloaded if that can be known."""
        refuse_deaf(name, task)

    def generation(self, model: Moshi) -> GenerationConfig:
        """Sampling settings."""
        from moshi_mlx.tasks.dialogue import generation_defaults

        return generation_from(self.args, generation_defaults(model.config))

    def session(self, model: Moshi, generation: GenerationConfig) -> AbstractContextManager[Any]:
        """What :meth:`played` plays to."""
        session = self._session(model, generation, opening_from(self.args, model))
        if self.trace is not None:
            session.on_stage = self.trace.span
            session.step = self.trace.wrap("frame", session.step)  # type: ignore[method-assign]
        return session

    def notice(self, text: str) -> None:
        """Say it, and write it into the transcript."""
        warn(text, "notice")
        self.noticed.append(text)

    def settings(self) -> dict[str, Any]:
        """What else the transcript says of the settings."""
        return {"tail": self.args.trailing_silence}

    def length(self, model: Moshi) -> int:
        """Samples of the answer."""
        return self.question.recording.length(model.sample_rate) + model.trailing_silence(self.args.trailing_silence)

    def played(self, model: Moshi, session: Any) -> Iterator[tuple[Pcm, Pcm, SessionFrame]]:
        """What was heard, what was said with it, and the frame."""
        from moshi_mlx.engine.session import play

        tail = model.trailing_silence(self.args.trailing_silence)
        frames = self.question.recording.frames(model.sample_rate, model.frame_size, tail=tail)
        for user, frame in play(session, frames):
            yield user, frame.pcm, frame

    def _session(self, model: Moshi, generation: GenerationConfig, opening: Opening | None) -> Session:
        """The conversation, after its prompts."""
        from moshi_mlx.engine.pipeline import Settings
        from moshi_mlx.engine.session import Session
        from moshi_mlx_app.screen.terminal import Loading

        args = self.args
        if opening is None:
            return model.session(seed=args.seed, generation=generation, kv_bits=args.kv_bits)
        settings = Settings(args.seed, generation, opening=opening)
        with Loading(shown=not args.quiet) as loading:
            told = lambda done, total: loading(f"telling the model its role: {done} of {total}")  # noqa: E731
            return Session(model.engine, settings, kv_bits=args.kv_bits, on_opening=told)

    def finish(self) -> None:
        """Move the files to their names and say where they are."""
        assert self._file is not None and self._about is not None
        about, words = self._about, self.transcript
        about.complete = True
        about.file = clean(self._file.target)
        if words is not None:
            write_json(partial_name(words), about.as_dict())
            words.unlink(missing_ok=True)  # killed between two renames, it would describe another answer
        self._file.finish()
        if words is not None:
            os.replace(partial_name(words), words)
        if self.args.json:
            say(json.dumps(about.as_dict()))
        elif not self.args.quiet:
            computed = about.seconds_computed or 0.0
            sides = f"{self.left} alone" if self.args.mono else f"left {self.left}, right the question"
            where = "" if words is None else f"; words in {words}"
            warn(f"{self._file.target}: {about.duration:.1f} s, {sides}{where}", "")
            factor = computed / max(about.duration, 1e-9)
            warn(f"computed in {computed:.1f} s: real-time factor {factor:.2f} (1: as fast as speech)", "")

    def keep(self) -> str:
        """Leave what was computed in valid files; returns a sentence that says where."""
        kept = None if self._file is None else self._file.keep()
        if kept is None or self._about is None:
            return "nothing was written"
        went = "are in" if self.stream is None else "went to"
        said = f"the first {self.seconds:.1f} s of the answer {went} {kept}"
        if self.transcript is None:
            return said
        words = partial_name(self.transcript)
        self._about.file = clean(kept)
        try:
            write_json(words, self._about.as_dict())
        except OSError as error:
            return f"{said}, but the words could not be written: {words}: {error.strerror or error}"
        return f"{said}, the words in {words}"


def check_seed(seed: int, model: Moshi, generation: GenerationConfig) -> None:
    """Warn if a seed was given and sampling is greedy."""
    drawn = generation.text.temperature or (generation.audio.temperature and model.purpose != "speech-to-text")
    if seed and not drawn:
        warn(
            f"{seed} has no effect: with these settings {model.name} always takes the most likely token. "
            "Use temperatures above 0, such as --text-temperature 0.7 --audio-temperature 0.8",
            "seed",
        )


def _transcript(args: argparse.Namespace) -> Path | None:
    if args.transcript:
        return Path(args.transcript)
    return None if args.output == "-" else Path(args.output).with_suffix(".json")


def outputs_of(args: argparse.Namespace) -> list[Output]:
    """The files that will be written."""
    outputs = []
    if args.output != "-":
        output = Path(args.output)
        if output.suffix.lower() not in (".wav", ".wave"):
            args.parser.error(f"-o {args.output}: the answer is a wav file; give it a name that ends in .wav")
        outputs.append(Output("the answer", "-o", output, partial_name(output)))
    transcript = _transcript(args)
    if transcript is not None:
        outputs.append(Output("the transcript", "--transcript", transcript, partial_name(transcript)))
    if args.trace is not None:
        outputs.append(trace_output(args.trace))
    return outputs


@contextlib.contextmanager
def standard_output(args: argparse.Namespace) -> Iterator[BinaryIO | None]:
    """With ``-o -`` standard output, reserved for the sound: everything printed goes to standard error."""
    if args.output != "-":
        yield None
        return
    if sys.stdout.isatty():
        args.parser.error(
            "-o -: standard output is a terminal; pipe the sound into a player (| ffplay -), or name a file"
        )
    sys.stdout.flush()
    sound = sys.stdout.buffer
    with contextlib.redirect_stdout(sys.stderr):
        yield getattr(sound, "raw", sound)  # unbuffered: nothing is left to be written after an error
