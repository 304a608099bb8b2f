"""Timed words as a file: plain text, JSON, SubRip (srt) or WebVTT (vtt)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moshi_mlx.printable import printable
from moshi_mlx_app.recording.transcript import spoken

if TYPE_CHECKING:
    from moshi_mlx.engine.text import Word

__all__ = ["FORMATS", "cues", "lines", "written"]

FORMATS = ("txt", "json", "srt", "vtt")
_LETTERS, _SECONDS, _GAP = 84, 6.0, 1.0  # of a cue, two lines of 42; a longer gap begins another
_ENDS = (".", "?", "!", "…")


def written(
    form: str, words: Sequence[Word], turns: Sequence[float] = (), about: Mapping[str, Any] | None = None
) -> str:
    """The contents of a file.

    Parameters
    ----------
    form : {"txt", "json", "srt", "vtt"}
        ``json`` has ``words`` and ``alignments`` as recordings do (docs/recordings.md).
    words : sequence of Word
    turns : sequence of float
        Where turns end, in seconds: text begins a line there, subtitles a cue.
    about : mapping, optional
        Further keys of the JSON.
    """
    if form == "json":
        mine = [
            {"text": word.text.strip(), "start": round(word.start, 3), "end": round(word.end, 3), "speaker": "user"}
            for word in words
        ]
        text = " ".join(str(word["text"]) for word in mine)
        return json.dumps({**(about or {}), "text": text, **spoken(mine), "turns": [round(t, 3) for t in turns]}) + "\n"
    if form == "txt":
        return "".join(f"{_text(line)}\n" for line in lines(words, turns))
    head = "WEBVTT\n\n" if form == "vtt" else ""
    return head + "".join(
        f"{number}\n{_clock(cue[0].start, form)} --> {_clock(cue[-1].end, form)}\n{_text(cue)}\n\n"
        for number, cue in enumerate(cues(words, turns), start=1)
    )


def cues(words: Sequence[Word], turns: Sequence[float] = ()) -> Iterator[list[Word]]:
    """Words in groups for one subtitle each: until a turn or sentence ends, a gap, or it is long enough to read."""
    cue: list[Word] = []
    for line in lines(words, turns):
        for word in line:
            if cue and (
                word.start - cue[-1].end > _GAP
                or word.end - cue[0].start > _SECONDS
                or len(_text([*cue, word])) > _LETTERS
                or cue[-1].text.strip().endswith(_ENDS)
            ):
                yield cue
                cue = []
            cue.append(word)
        if cue:
            yield cue
            cue = []


def lines(words: Sequence[Word], turns: Sequence[float]) -> Iterator[list[Word]]:
    """Words by turns."""
    line: list[Word] = []
    ends = iter([*sorted(turns), float("inf")])
    end = next(ends)
    for word in words:
        while word.start >= end:
            end = next(ends)
            if line:
                yield line
                line = []
        line.append(word)
    if line:
        yield line


def _text(words: Sequence[Word]) -> str:
    return printable(" ".join(word.text.strip() for word in words))


def _clock(seconds: float, form: str) -> str:
    whole = round(seconds * 1000)
    hours, minutes, rest = whole // 3_600_000, whole // 60_000 % 60, whole % 60_000
    point = "." if form == "vtt" else ","
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{point}{rest % 1000:03}"
