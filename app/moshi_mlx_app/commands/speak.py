"""``moshi-mlx-local speak``: a text in, spoken while it comes, to the loudspeaker or a file."""

from __future__ import annotations

import argparse
import codecs
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.errors import AudioError, ConfigError, MoshiError, TextError
from moshi_mlx_app.options import add_cache_option, add_generation_options, add_model_options, bounded, generation_from
from moshi_mlx_app.recording.audio_files import Recording
from moshi_mlx_app.recording.interrupt import no_interrupt
from moshi_mlx_app.recording.outputs import Output, partial_name, replace_text, reserved
from moshi_mlx_app.recording.wav import LARGEST, AnswerFile
from moshi_mlx_app.screen.terminal import AnswerProgress, warn

if TYPE_CHECKING:
    from moshi_mlx.engine.text import Word
    from moshi_mlx.tasks.dialogue import Moshi
    from moshi_mlx.tasks.speak import Speaker, TextToSpeech, Voice

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

Pcm = NDArray[np.float32]

HELP = "speak a text while it comes, to the loudspeaker or a file"
EXAMPLES = """\
examples:
  moshi-mlx-local speak "Hello there." --model kyutai/tts-1.6b-en_fr
  moshi-mlx-local speak "Hello there." -o hello.wav --model M
  llm "tell me a story" | moshi-mlx-local speak --model M    begins before the text has ended
  moshi-mlx-local speak - -o book.wav --words book.json --model M < book.txt
  moshi-mlx-local speak --script dialogue.jsonl --voice A --second-voice B --model M

<break time="1.5s"/> in the text is a pause. A script has a JSON object a line,
with "turns" of two speakers that alternate and, if you like, their "voices".
Ctrl-C ends it and keeps what was spoken.
"""
_AHEAD = 2.0  # seconds of sound that are computed before they are heard
_BEGIN = 0.24  # seconds of sound before the loudspeaker begins, and after it ran dry
_WAKE = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options and the shared ones."""
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what to say; - or none: standard input, as it comes")
    parser.add_argument("-o", "--output", metavar="OUT.wav", help="write a wav file instead of playing")
    parser.add_argument("--words", metavar="FILE", help="write the words with their times into this JSON file")
    parser.add_argument("--script", metavar="FILE", help="a file of turns (JSON lines) instead of TEXT")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    group = parser.add_argument_group("voice")
    group.add_argument("--voice", metavar="V", help="a name in the repository of voices, or a file")
    group.add_argument("--second-voice", metavar="V", help="of the other speaker of a script")
    group.add_argument(
        "--voices",
        default="kyutai/tts-voices",
        metavar="R",
        help="the repository or folder of voices (default: %(default)s)",
    )
    group.add_argument(
        "--speed", type=bounded(float, -2, 2), default=None, metavar="S", help="from -2, slower, to 2, faster"
    )
    group.add_argument(
        "--cfg",
        type=bounded(float, 1, 10),
        default=2.0,
        metavar="C",
        help="how closely voice and text are followed; 1: off (default: %(default)s)",
    )
    group.add_argument("--codebooks", type=bounded(int, 1, 64), metavar="N", help="fewer are faster and rougher")
    parser.add_argument("--output-device", metavar="D", help="loudspeaker: a number or part of a name; see devices")
    parser.add_argument("--quiet", action="store_true", help="no text; warnings and errors are still shown")
    add_model_options(parser)
    add_generation_options(parser)
    add_cache_option(parser)


def run(args: argparse.Namespace) -> int:
    """Speak. Returns the exit status: 0, or 130 after Ctrl-C."""
    if args.script is not None and args.text is not None:
        args.parser.error("name a TEXT or a --script, not both")
    if args.script is None and args.text is None and sys.stdin is not None and sys.stdin.isatty():
        args.parser.error("what is to be said? Name a TEXT, a --script, or pipe a text in")
    if args.speed is not None and args.padding_bonus is not None:
        args.parser.error("--speed and --padding-bonus are the same setting, with opposite signs: give one of them")
    if args.speed is not None:
        args.padding_bonus = -args.speed
    outputs = []
    for what, option, name in (("the speech", "-o", args.output), ("the words", "--words", args.words)):
        if name is not None:
            outputs.append(Output(what, option, Path(name), partial_name(Path(name))))
    if args.output is not None and Path(args.output).suffix.lower() not in (".wav", ".wave"):
        args.parser.error(f"-o {args.output}: the speech is a wav file; give it a name that ends in .wav")
    others: dict[str, str | int | Path] = {} if args.script is None else {"the script": args.script}
    with reserved(args.parser, outputs, others=others, force=args.force):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    if args.output is None:
        from moshi_mlx_app.audio.portaudio import devices, find_device

        find_device(args.output_device, "output", devices())  # report a missing device before a download
    turns, voices = ([], []) if args.script is None else _read_script(args.script)
    text: _Piped | None = None
    if args.script is None:
        text = None if args.text not in (None, "-") else _Piped(sys.stdin.fileno())
        turns = [args.text] if text is None else []
    model = _model(args)
    if not model.trained:
        warn(f"the model {model.name!r} has random weights: it has not been trained, so its voice is noise", "notice")
    generation = generation_from(args, model.sampling)
    chosen = _voice(args, model, voices)
    manner: dict[str, Any] = {"voice": chosen, "cfg": args.cfg, "codebooks": args.codebooks, "seed": args.seed}
    speech = _Speech(args, model)
    try:
        with (
            model.speaker(**manner, generation=generation, kv_bits=args.kv_bits) as speaker,
            AnswerProgress(0.0, text=not args.quiet, bar=False) as shown,
            speech,
        ):
            failure = _speak(speaker, turns, text, speech, shown)
            speech.end()
    except KeyboardInterrupt:
        with no_interrupt():
            warn(speech.keep(), "stopped")
        return 130
    except (MoshiError, OSError):
        with no_interrupt():
            if speech.seconds:
                warn(speech.keep(), "kept")
            else:
                speech.keep()
        raise
    with no_interrupt():
        if failure is not None:
            warn(speech.keep(), "kept")
            raise failure
        speech.finish()
    return 0


def _speak(
    speaker: Speaker, turns: list[str], text: _Piped | None, speech: _Speech, shown: AnswerProgress
) -> TextError | None:
    """Speak all of it, or what comes before something that cannot be spoken: that is returned."""
    from moshi_mlx.tasks.tts_script import without_markup

    failure: TextError | None = None
    pieces = _given(turns) if text is None else text.pieces()
    ended = False
    while True:
        while not ended:
            try:
                piece = next(pieces, None)
                if piece is None:
                    ended = True
                    speaker.finish()
                elif not piece:  # nothing has come yet
                    break
                elif isinstance(piece, int):
                    speaker.turn(piece)
                else:
                    for line in piece.splitlines(keepends=True):
                        speaker.feed(without_markup(line))
            except TextError as error:
                failure = error
                if not ended and not speaker.over and speaker.said:
                    ended = True
                    speaker.finish()
                else:
                    raise
            if not ended and speaker.waiting > 100:  # the rest waits where it is
                break
        spoken = speaker.step()
        if spoken is None:
            if speaker.over:
                return failure
            speech.check()
            if text is not None:
                text.wait(_WAKE)
            continue
        speech.take(spoken.pcm, spoken.words)
        for word in spoken.words:
            shown.frame(word.start, f" {word.text}")


def _given(turns: list[str]) -> Iterator[str | int | None]:
    """Turns in pieces, with the number of each before it."""
    for number, turn in enumerate(turns):
        if number:
            yield number
        for start in range(0, len(turn), 1000):
            yield turn[start : start + 1000]
    yield None


class _Piped:
    """Text from a descriptor, read in a thread as it comes."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._queue: queue.Queue[str | None] = queue.Queue(64)
        self._next: list[str | None] = []
        threading.Thread(target=self._read, name="moshi reading", daemon=True).start()

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        data = b"-"
        while data:
            try:
                data = os.read(self._descriptor, 4096)
            except OSError:  # it has gone: the text ends there
                data = b""
            self._queue.put(decoder.decode(data, final=not data))
        self._queue.put(None)

    def pieces(self) -> Iterator[str | None]:
        """What has come: text; an empty piece for nothing yet; None at the end."""
        while True:
            if not self._next:
                try:
                    self._next.append(self._queue.get_nowait())
                except queue.Empty:
                    yield ""
                    continue
            piece = self._next.pop()
            if piece is None:
                yield None
                return
            if piece:
                yield piece

    def wait(self, seconds: float) -> None:
        """Until something comes, so long at most."""
        if not self._next:
            try:
                self._next.append(self._queue.get(timeout=seconds))
            except queue.Empty:
                pass


class _Speech:
    """Where the sound goes, and the words with it."""

    def __init__(self, args: argparse.Namespace, model: TextToSpeech):
        self._args, self._rate = args, model.sample_rate
        self._file: AnswerFile | None = None
        self._loud: _Loudspeaker | None = None
        self._words: list[Word] = []
        self._samples = 0

    def __enter__(self) -> _Speech:
        if self._args.output is None:
            self._loud = _Loudspeaker(self._rate, self._args.output_device)
        else:
            self._file = AnswerFile(Path(self._args.output), self._rate, 0, 1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._loud is not None:
            self._loud.close()

    @property
    def seconds(self) -> float:
        """Seconds of speech so far."""
        return self._samples / self._rate

    def take(self, pcm: Pcm | None, words: tuple[Word, ...]) -> None:
        self._words += words
        if pcm is None:
            return
        if self._file is not None:
            if 2 * (self._samples + len(pcm)) > LARGEST:
                raise AudioError("the speech is longer than a wav file can be: split the text")
            self._file.write(pcm, pcm)
        elif self._loud is not None:
            self._loud.write(pcm)
        self._samples += len(pcm)

    def check(self) -> None:
        if self._loud is not None:
            self._loud.check()

    def end(self) -> None:
        """Wait until all has been heard."""
        if self._loud is not None:
            self._loud.end()

    def finish(self) -> None:
        """Move the files to their names."""
        if self._file is not None:
            where = self._file.finish()
            if not self._args.quiet:
                warn(f"{where}: {self.seconds:.1f} s", "")
        if self._args.words is not None:
            replace_text(Path(self._args.words), self._json(complete=True))

    def keep(self) -> str:
        """Leave what was spoken in valid files; a sentence that says where."""
        kept = None if self._file is None else self._file.keep()
        said = f"{self.seconds:.1f} s were spoken" if kept is None else f"the first {self.seconds:.1f} s are in {kept}"
        if self._args.words is None or not self._samples:
            return said if self._samples else "nothing was spoken"
        path = partial_name(Path(self._args.words))
        replace_text(path, self._json(complete=False))
        return f"{said}, the words in {path}"

    def _json(self, complete: bool) -> str:
        heard = [word for word in self._words if complete or word.end <= self.seconds]
        words = [{"text": word.text, "start": round(word.start, 3), "end": round(word.end, 3)} for word in heard]
        about = {"file": self._args.output, "duration": round(self.seconds, 3), "complete": complete}
        return json.dumps({**about, "words": words}, ensure_ascii=False) + "\n"


class _Loudspeaker:
    """Plays what is written, from a ring of a few seconds."""

    def __init__(self, rate: int, device: str | None):
        from moshi_mlx.realtime.ring import Ring
        from moshi_mlx_app.audio.device import SoundCard

        self._ring = Ring(round(_AHEAD * rate))
        self._begin, self._playing, self._ended = round(_BEGIN * rate), False, False
        self._edge = round(0.005 * rate)
        self._card = SoundCard(None, self._fill, rate, output_device=device)
        self._card.start()

    def _fill(self, out: Pcm) -> None:
        """In the loudspeaker's callback."""
        if not self._playing:
            self._playing = self._ring.available >= (1 if self._ended else self._begin)
        got = self._ring.read_into(out) if self._playing else 0
        if got < len(out):  # nothing more has been computed yet: no click
            fade = min(got, self._edge)
            out[got - fade : got] *= np.linspace(1, 0, fade, dtype=np.float32)
            out[got:] = 0
            self._playing = False

    def write(self, pcm: Pcm) -> None:
        """Add sound; waits while there is enough."""
        while len(pcm):
            pcm = pcm[self._ring.write(pcm) :]
            if len(pcm):
                self.check()
                time.sleep(_WAKE)

    def check(self) -> None:
        """Say what happens to the device; raise what went wrong in its threads."""
        for notice in self._card.notices():
            warn(notice, "notice")
        self._card.check()

    def end(self) -> None:
        """Wait until all has been heard."""
        self._ended = True
        while self._ring.available:
            self.check()
            time.sleep(_WAKE)
        time.sleep(self._card.latency_out + _WAKE)

    def close(self) -> None:
        self._card.stop()


def _read_script(name: str) -> tuple[list[str], list[str]]:
    """Turns and voices of a file of JSON lines; several lines are one conversation."""
    turns: list[str] = []
    voices: list[str] = []
    for number, line in enumerate(Path(name).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            found, named = item["turns"], item.get("voices") or []
            if not all(isinstance(one, str) for one in [*found, *named]) or isinstance(found, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TextError(
                f'{name}, line {number}: a line of a script reads {{"turns": ["Hello.", "Hi!"], "voices": [...]}}'
            ) from error
        turns += found
        voices = voices or named
    if not turns:
        raise TextError(f"{name} has no turns: there is nothing to say")
    return turns, voices


def _voice(args: argparse.Namespace, model: TextToSpeech, voices: list[str]) -> Voice:
    names = [name for name in (args.voice, args.second_voice) if name is not None] or voices
    if model.has_speakers or not names:
        return model.voice(*names, source=args.voices)
    if len(names) > 1:
        raise ConfigError(f"{model.name} has one voice at a time, that of a recording: name one sound file")
    recording = Recording(names[0])
    try:
        sound = list(recording.frames(model.sample_rate, model.frame_size))
    finally:
        recording.close()
    return model.voice_of(np.concatenate(sound), model.sample_rate)


def _model(args: argparse.Namespace) -> TextToSpeech:
    from moshi_mlx.tasks.speak import TextToSpeech
    from moshi_mlx_app.models.fetch import load_model, wrong_model

    def accept(name: str, task: type[Moshi] | Moshi) -> None:
        if task.purpose != TextToSpeech.purpose:
            raise ConfigError(f"{wrong_model(name, task)}; speak needs one such as kyutai/tts-1.6b-en_fr")

    model = load_model(args, shown=not args.quiet, accept=accept)
    assert isinstance(model, TextToSpeech)
    return model
