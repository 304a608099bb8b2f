"""Transcripts: the JSON that ``file``, ``talk --record`` and the page write; docs/recordings.md describes the keys.

Together with the stereo wav it is what moshi-finetune trains on (the key ``alignments``), and ``file`` reads it when
such a recording is the question.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moshi_mlx.engine.text import Word
from moshi_mlx_app.recording.outputs import replace_text
from moshi_mlx_app.version import program

if TYPE_CHECKING:
    from moshi_mlx.engine.generator import GenerationConfig
    from moshi_mlx.tasks.dialogue import Moshi

__all__ = ["LABELS", "VERSION", "Transcript", "aligned", "clean", "read_json", "spoken", "unaligned", "write_json"]

VERSION = 1
LABELS = {"moshi": "SPEAKER_MAIN", "user": "SPEAKER_OTHER"}
"""A speaker's name in moshi-finetune's alignments, which trains on the words of the first one."""
_LARGEST = 1 << 26  # bytes of a JSON file that is read: hours of words


@dataclass
class Transcript:
    """The transcript of a conversation; :meth:`as_dict` has the file's keys.

    Attributes
    ----------
    speaker : {"moshi", "user"}
        Whose words the model writes: speech-to-text models write the user's.
    words : list of Word
        What the model wrote.
    heard : sequence of dict
        Words of the user that were known before, as the key ``words`` has them.
    seconds_computed : float or None
        None for a live conversation.
    """

    program: str
    model: str
    model_description: str
    trained: bool
    seed: int
    sample_rate: int
    generation: dict[str, Any]
    speaker: str = "moshi"
    channels: Sequence[str] = ("moshi", "user")
    file: str = ""
    question: dict[str, Any] | None = None
    complete: bool = False
    duration: float = 0.0
    text: str = ""
    words: list[Word] = field(default_factory=list)
    heard: Sequence[dict[str, Any]] = ()
    seconds_computed: float | None = None
    warnings: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        model: Moshi,
        seed: int,
        generation: GenerationConfig,
        *,
        kv_bits: int | None = None,
        settings: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Transcript:
        """Start a transcript for a model and its settings; ``settings`` are added, ``fields`` are this class's."""
        return cls(
            program=program(),
            model=clean(model.name),
            model_description=clean(model.description),
            trained=model.trained,
            seed=seed,
            sample_rate=model.sample_rate,
            generation={**asdict(generation), "kv_bits": kv_bits, **(settings or {})},
            speaker="user" if model.purpose == "speech-to-text" else "moshi",
            **fields,
        )

    def head(self) -> dict[str, Any]:
        """The keys that are known at the start."""
        computed = self.seconds_computed
        return {
            "version": VERSION,
            "program": self.program,
            "model": self.model,
            "model_description": self.model_description,
            "trained": self.trained,
            "complete": self.complete,
            "seed": self.seed,
            "sample_rate": self.sample_rate,
            "channels": list(self.channels),
            "question": self.question,
            "answer": {"file": self.file, "channels": list(self.channels)},
            "generation": self.generation,
            "seconds_computed": None if computed is None else round(computed, 3),
            "real_time_factor": None if computed is None or not self.duration else round(computed / self.duration, 4),
            "warnings": list(self.warnings),
        }

    def as_dict(self) -> dict[str, Any]:
        """The JSON object; times are rounded to a millisecond."""
        own = [
            {
                "text": word.text.strip(),
                "start": round(word.start, 3),
                "end": round(word.end, 3),
                "speaker": self.speaker,
            }
            for word in self.words
        ]
        return {
            **self.head(),
            "duration": round(self.duration, 3),
            "text": self.text.strip(),
            **spoken([*own, *self.heard]),
        }


def spoken(words: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The keys ``words`` and ``alignments``, by the words' starts."""
    ordered = sorted(words, key=lambda word: float(word["start"]))
    return {"words": ordered, "alignments": [aligned(word) for word in ordered]}


def aligned(word: dict[str, Any]) -> list[Any]:
    """A word in moshi-finetune's format."""
    return [word["text"], [word["start"], word["end"]], LABELS[word["speaker"]]]


def unaligned(entries: Iterable[Any]) -> list[dict[str, Any]]:
    """The reverse of :func:`aligned` for a list; invalid entries are skipped."""
    words = []
    for entry in entries:
        try:
            text, (start, end), label = entry
            times = round(float(start), 3), round(float(end), 3)
            if not 0 <= times[0] <= times[1] < math.inf:
                continue
        except (TypeError, ValueError, OverflowError):
            continue
        speaker = "moshi" if label == LABELS["moshi"] else "user"
        words.append({"text": clean(str(text)).strip(), "start": times[0], "end": times[1], "speaker": speaker})
    return words


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically (see :func:`replace_text`)."""
    replace_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON file in this format; None if there is none."""
    try:
        if path.stat().st_size > _LARGEST:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and isinstance(found["alignments"], list) else None
    except (OSError, ValueError, KeyError, RecursionError):
        return None


def clean(text: str | os.PathLike[str]) -> str:
    """A name as valid Unicode, which file names on Linux need not be."""
    return os.fspath(text).encode("utf-8", "replace").decode()
