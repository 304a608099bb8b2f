"""``moshi-mlx-finetune prepare``: timed words for recordings that have none, and a look at what would be learnt."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moshi_mlx.disk import replacing
from moshi_mlx.errors import AudioError, ConfigError
from moshi_mlx.tasks.transcribe import SpeechToText

from .data.pieces import cut_recording
from .data.recordings import MAIN, Recording, find_recordings, open_recording, read_piece, words_file
from .data.rows import FRAME_RATE, TimedWord, cut_words, frames_in, text_row
from .show import Bar, say

if TYPE_CHECKING:
    from moshi_mlx.engine.text import TextTokenizer

__all__ = ["prepare"]

_QUIET = 10 ** (-60 / 20)  # of full scale: a channel without any sound


def prepare(args: argparse.Namespace) -> int:
    """Add words, then show the recordings; returns the exit status."""
    recordings = find_recordings(Path(args.data).expanduser())
    if args.recogniser is not None:
        recordings = _recognise(args, recordings)
    _show(args, recordings)
    return 0


def _recognise(args: argparse.Namespace, recordings: list[Recording]) -> list[Recording]:
    """Write down what the left channels say, of all recordings or of those without words."""
    import moshi_mlx

    todo = [recording for recording in recordings if args.again or recording.words is None]
    with Bar(shown=not args.quiet) as bar:
        if not todo:
            return recordings
        bar.stage(f"loading {args.recogniser}")
        model = moshi_mlx.load(args.recogniser, on_progress=bar.line)
        if not isinstance(model, SpeechToText):
            raise ConfigError(
                f"{args.recogniser} is for {model.purpose}: --recogniser needs a speech-to-text model, such as "
                "kyutai/stt-1b-en_fr-mlx"
            )
        bar.stage("writing down", sum(recording.seconds for recording in todo))
        for recording in todo:
            words = heard(model, recording)
            write_words(recording.path, words)
            bar.advance(recording.seconds)
            bar.line(f"{words_file(recording.path)}: {len(words)} words")
    return [open_recording(recording.path) for recording in recordings]


def heard(model: SpeechToText, recording: Recording) -> list[TimedWord]:
    """Words of a recording's left channel by a speech-to-text model."""
    pcm, _ = read_piece(recording, 0.0, recording.seconds, model.sample_rate)
    if np.abs(pcm).max() < _QUIET:
        return []
    words = model.transcribe(pcm, model.sample_rate).words
    return [TimedWord(word.text.strip(), word.start, word.end) for word in words]


def write_words(path: Path, words: list[TimedWord]) -> None:
    """Put words into a recording's JSON; its other keys and the other speaker's words stay."""
    target, data = words_file(path), dict[str, Any]()
    if target.exists():
        try:
            data = json.loads(target.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{target} is not JSON that can be read: {error}. Move it away") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{target} is no object with words: move it away")
    others = [entry for entry in data.get("alignments") or [] if entry[2] != MAIN]
    mine = [[word.text, [round(word.start, 3), round(word.end, 3)], MAIN] for word in words]
    data["alignments"] = sorted([*mine, *others], key=lambda entry: entry[1][0])
    with replacing(target) as partial:
        partial.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _show(args: argparse.Namespace, recordings: list[Recording]) -> None:
    """A line for each recording, the text of the first pieces as it would be learnt, and the sums."""
    tokenizer = _tokenizer(args.model)
    pieces = [cut for recording in recordings for cut in cut_recording(recording, args.duration)]
    for recording in recordings:
        said = "no words yet" if recording.words is None else f"{len(recording.words)} words"
        line = f"{recording.path.name}: {recording.seconds:.1f} s, {recording.rate} Hz, {said}"
        if recording.words:
            line += ": " + " ".join(word.text.strip() for word in recording.words[:8])
            line += " ..." * (len(recording.words) > 8)
        say(line)
    shown = [cut for cut in pieces if cut.recording.words][: args.show]
    for cut in shown:
        words = cut_words(cut.recording.words or (), cut.start, cut.seconds, args.text_ahead)
        say(f"\n{cut.name}, {cut.seconds:.1f} s, as it is learnt (seconds, token):")
        say("  " + written(words, frames_in(cut.seconds), tokenizer))
    minutes = sum(recording.seconds for recording in recordings) / 60
    missing = sum(recording.words is None for recording in recordings)
    short = sum(cut.seconds < args.duration for cut in pieces)
    say(
        f"\n{len(recordings)} recordings, {minutes:.1f} minutes, {len(pieces)} pieces of {args.duration:g} s"
        f" ({short} of them shorter: what is missing there is not learnt)"
    )
    if missing:
        say(f"{missing} recordings have no timed words: add them with --recogniser MODEL")
    elif not any(recording.words for recording in recordings):
        raise AudioError("no recording has a word of Moshi: is its voice on the left channel?")


def written(words: list[TimedWord], frames: int, tokenizer: TextTokenizer) -> str:
    """The tokens of a text row that are no padding, each with its time."""
    row = text_row(words, frames, tokenizer.encode)
    shown = [f"{frame / FRAME_RATE:.2f} {tokenizer.piece(int(token))}" for frame, token in enumerate(row) if token > 3]
    return "  ".join(shown) or "(nothing is said)"


def _tokenizer(source: str) -> TextTokenizer:
    from moshi_mlx.checkpoint.resolve import resolve
    from moshi_mlx.engine.text import TextTokenizer

    files = resolve(source)
    if files.tokenizer is None:
        raise ConfigError(f"{source} has no tokenizer: name the model to train with --model")
    return TextTokenizer(files.tokenizer)
