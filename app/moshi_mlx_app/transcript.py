"""What was said, in a file that other programs can read.

The file is JSON, UTF-8, one object:

======================  ==========================================================================================
``version``             1: the number of this schema; raised when a key changes its meaning
``program``             name and version of what wrote it
``model``               the model's name, as given or built in
``model_description``   one line about it
``trained``             false if its weights are random: the words and the sound mean nothing then
``complete``            false if it was stopped before the end
``seed``                of the sampling; the same seed, settings and question give the same answer
``sample_rate``         of the answer's file, hertz
``duration``            of the answer's file, seconds
``text``                everything that the model said
``words``               list of ``{"text", "start", "end"}``: seconds from the start of the answer's file
``question``            ``{"file", "sample_rate", "channels", "duration"}`` of the recording, as it was found
``answer``              ``{"file", "channels": ["moshi", "user"]}``
``generation``          settings of the sampling, and ``tail``, the seconds of silence after the question
``seconds_computed``    time that codec and model took
``real_time_factor``    ``seconds_computed`` by seconds of sound: below 1 keeps up with a conversation
``warnings``            list of sentences: what was odd about the recording
======================  ==========================================================================================
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moshi_mlx.text import Word

__all__ = ["VERSION", "Transcript", "write_json"]

VERSION = 1


@dataclass
class Transcript:
    """One question and its answer; the fields are the file's keys (see the module)."""

    program: str
    model: str
    model_description: str
    trained: bool
    seed: int
    sample_rate: int
    question: dict[str, Any]
    answer: dict[str, Any]
    generation: dict[str, Any]
    complete: bool = False
    duration: float = 0.0
    text: str = ""
    words: list[Word] = field(default_factory=list)
    seconds_computed: float = 0.0
    warnings: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """The JSON object; times are rounded to a millisecond."""
        words = [{"text": word.text, "start": round(word.start, 3), "end": round(word.end, 3)} for word in self.words]
        return {
            "version": VERSION,
            **asdict(self),
            "duration": round(self.duration, 3),
            "text": self.text.strip(),
            "words": words,
            "warnings": list(self.warnings),
            "seconds_computed": round(self.seconds_computed, 3),
            "real_time_factor": round(self.seconds_computed / self.duration, 4) if self.duration else None,
        }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
