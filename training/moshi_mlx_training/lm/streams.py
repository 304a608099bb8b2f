"""Speech with its text behind it or ahead of it: what speech to text and text to speech are taught with.

Clips of `lm_data` (``--wordings words``) lie one after the other in a window; the text stream is shifted against them
(Zeghidour et al. 2025, "Streaming Sequence-to-Sequence Learning with Delayed Streams Modeling")::

    stt    sound  room the  the  dog  dog  room ...         a word's first piece, ``delay`` frames behind its sound,
           text   PAD  PAD  PAD  PAD  EPAD the  EPAD dog    EPAD before it where there is room

    tts    text   PAD  EPAD the  EPAD dog  PAD ...          EPAD where a word may begin, its pieces follow; which they
           sound  -    -    -    -    room the  the  dog    are is not learnt; the sound comes ``delay`` frames later

The same tables are read when the models run: the words' times by `moshi_mlx.tasks.transcribe`, the pieces by the state
machine of `moshi_mlx.tasks.tts_machine`, which puts an EPAD before every word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moshi_mlx.config import ZERO_TOKEN, LmConfig
from moshi_mlx.engine.text import EPAD, PAD, TextTokenizer
from moshi_mlx_training.lm.batch import delayed, drop_acoustic, spoil
from moshi_mlx_training.lm.data import BEFORE, DROPPED, RATE, split_flat
from moshi_mlx_training.lm.dialogue import NONE, PHONES_AFTER, WARPED, fill_room
from moshi_mlx_training.speech.synthesis import spans

Task = Literal["stt", "tts"]
Ints = NDArray[np.int32]

PAD_WEIGHT = 0.5  # of padding, beside 1 for the other tokens
DEPTH_SHARE = 0.3  # of all frames, whose codes are learnt in one step
TEXT_SPOILED = 0.03  # of what speech to text has written, which is padding instead
GAP, LONG_GAP, LONG = (0, 16), (16, 80), 0.15  # frames of room between clips that are heard, and how often it is long
REST = (1, 5)  # frames of silence between sentences that are spoken


@dataclass(frozen=True)
class Clip:
    """A sentence: codes [frames, books], sounding from ``onset`` to ``end``.

    ``starts`` [words] are in frames, ``groups`` the pieces of each word, ``phones`` [frames, 2] what is being said.
    """

    codes: NDArray[np.uint16]
    starts: NDArray[np.float64]
    groups: tuple[tuple[int, ...], ...]
    phones: NDArray[np.uint8]
    room: int
    onset: int
    end: int
    voice: int
    text: str


def pieces_of(text: str, task: Task, tokenizer: TextTokenizer) -> tuple[tuple[int, ...], ...]:
    """The pieces of each word: bare for speech to text, with its punctuation for text to speech."""
    words = [text[a:b].lower() for a, b in spans(text)] if task == "stt" else text.split()
    return tuple(tuple(tokenizer.encode(word)) for word in words)


def place(groups: Sequence[Sequence[int]], starts: Sequence[float], task: Task, delay: int = 0) -> Ints:
    """Where a text's tokens go: [n, 2] of (frame, id).

    For ``stt`` a word's first piece is in the frame nearest to its start and ``delay`` later; for ``tts`` its EPAD is
    in the frame of its start. A word whose place is taken by the one before follows it.
    """
    out: list[tuple[int, int]] = []
    free = 0
    for group, start in zip(groups, starts, strict=True):
        if task == "tts":
            begin = max(int(start), free) + 1
            out.append((begin - 1, EPAD))
        else:
            begin = max(round(start) + delay, free)
            if begin > free:
                out.append((begin - 1, EPAD))
        out += [(begin + i, token) for i, token in enumerate(group)]
        free = begin + len(group)
    return np.array(out, np.int32).reshape(-1, 2)


class Clips:
    """All sentences of a folder, with their text in a model's pieces.

    Parameters
    ----------
    folder : Path
        Where ``lm_data encode`` wrote sets of ``--wordings words``.
    tokenizer : TextTokenizer
    task : {"stt", "tts"}
    sets : str
        Their names, as a glob.
    """

    def __init__(self, folder: Path, tokenizer: TextTokenizer, task: Task, sets: str = "train-*") -> None:
        self.folder, self.tokenizer, self.task, self.sets = folder, tokenizer, task, sets
        self.codec = ""
        self.rooms: list[NDArray[np.uint16]] = []
        self.clips: list[Clip] = []
        self._read: set[str] = set()
        self.refresh()
        if not self.clips or not self.rooms:
            raise FileNotFoundError(
                f"no sentences {sets}.npz and rooms.npz in {folder}: run 'python -m moshi_mlx_training.lm.data' with "
                "--wordings words"
            )

    def refresh(self) -> int:
        """Read sets that have come since; returns how many sentences there are."""
        if not self.rooms and (self.folder / "rooms.npz").exists():
            with np.load(self.folder / "rooms.npz") as file:
                self.rooms, self.codec = split_flat(file["data"], file["count"]), str(file["codec"])
        for path in sorted(self.folder.glob(f"{self.sets}.npz")):
            if path.name.endswith(".pcm.npz") or path.name in self._read:
                continue
            with np.load(path) as file:
                loaded = {name: file[name] for name in file.files}
            if str(loaded["codec"]) != self.codec:
                continue
            self._read.add(path.name)
            for codes, starts, phones, room, end, voice, text in zip(
                split_flat(loaded["data"], loaded["count"]),
                split_flat(loaded["starts"], loaded["word_count"]),
                split_flat(loaded["phones"], loaded["count"]),
                loaded["room"],
                loaded["end"],
                loaded["voice"],
                loaded["text"],
                strict=True,
            ):
                groups = pieces_of(str(text), self.task, self.tokenizer)
                if len(groups) == len(starts):
                    self.clips.append(
                        Clip(
                            codes,
                            starts * RATE,
                            groups,
                            phones,
                            int(room),
                            BEFORE - DROPPED,
                            int(end),
                            int(voice),
                            str(text),
                        )
                    )
        return len(self.clips)

    def draw(self, rng: np.random.Generator) -> Clip:
        return self.clips[int(rng.integers(len(self.clips)))]


def stretched(clip: Clip, rng: np.random.Generator) -> Clip:
    """The sentence a little faster here and slower there: some frames are left out, some come twice."""
    times = rng.choice(3, len(clip.codes), p=(WARPED / 2, 1 - WARPED, WARPED / 2))
    times[: clip.onset + 1] = times[clip.end - 1 :] = 1
    until = np.concatenate([[0], np.cumsum(times)])
    return replace(
        clip,
        codes=np.repeat(clip.codes, times, axis=0),
        phones=np.repeat(clip.phones, times, axis=0),
        starts=np.interp(clip.starts, np.arange(len(until)), until),
        end=int(until[clip.end]),
    )


def heard(clips: Clips, frames: int, rng: np.random.Generator, delay: int) -> tuple[Ints, Ints]:
    """Speech to text: tokens [1 + books, frames] of sentences in rooms, and phones [frames, 2] to be known, or -1."""
    books = clips.rooms[0].shape[1]
    longest = frames + 1000
    tokens, phones = np.full((1 + books, longest), PAD, np.int32), np.full((longest, 2), NONE, np.int32)
    filled = free = 0
    while filled < frames:
        clip = clips.draw(rng)
        if rng.random() < 0.5:
            clip = stretched(clip, rng)
        at = filled + int(rng.integers(*(LONG_GAP if rng.random() < LONG else GAP)))
        fill_room(tokens[1:], filled, at, clips.rooms[clip.room], rng)
        filled = at + len(clip.codes)
        if filled > longest - 100:
            break
        tokens[1:, at:filled] = clip.codes.T
        phones[at + PHONES_AFTER : filled + PHONES_AFTER] = clip.phones
        placed = place(clip.groups, list(clip.starts + at), "stt", delay)
        placed = placed[placed[:, 0] >= free]  # a clip without room after the last one
        tokens[0, placed[:, 0]] = placed[:, 1]
        free = int(placed[-1, 0]) + 1 if len(placed) else free
    return tokens[:, :frames], phones[:frames]


def spoken(clips: Clips, frames: int, rng: np.random.Generator, delay: int) -> Ints:
    """Text to speech: tokens [1 + books, frames] of sentences that follow each other; before the voice codes are -1."""
    books, longest = clips.rooms[0].shape[1], frames + 1000
    tokens = np.full((1 + books, longest), PAD, np.int32)
    tokens[1:, :delay] = ZERO_TOKEN
    filled = 0
    while filled < frames:
        clip = clips.draw(rng)
        begin = 0 if filled == 0 else max(0, clip.onset - 1)
        end = min(len(clip.codes), clip.end + int(rng.integers(*REST)))
        placed = place(clip.groups, list(clip.starts - begin + filled), "tts")
        tokens[0, placed[:, 0]] = placed[:, 1]
        tokens[1:, delay + filled : delay + filled + end - begin] = clip.codes[begin:end].T
        filled = max(filled + end - begin, int(placed[-1, 0]) + 1)
    return tokens[:, :frames]


@dataclass(frozen=True)
class SpeechBatch:
    """Arrays of one step; n frames are batch * time in row-major order.

    Attributes
    ----------
    inputs : array [batch, streams, time], int32
        What each stream holds at each position: delayed, and spoiled here and there; -1 is nothing at all.
    text, text_weight : arrays [n]
        The token to predict and how much it counts.
    phones : array [n, 2]; phone_weight : array [n]
        What is being said; all weights are 0 in text to speech.
    depth_rows : array [rows], int32
        Positions whose codes are learnt, ``depth_tokens`` [rows, 1 + dep_q] their text token and codes; none in speech
        to text.
    """

    inputs: mx.array
    text: mx.array
    text_weight: mx.array
    phones: mx.array
    phone_weight: mx.array
    depth_rows: mx.array
    depth_tokens: mx.array

    def arrays(self) -> tuple[mx.array, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def speech_batch(
    clips: Clips,
    config: LmConfig,
    delay: int,
    size: int,
    frames: int,
    seed: int,
    step: int,
    worker: int = 0,
    dropped: float = 0.0,
) -> SpeechBatch:
    """The batch of one worker at one step: depends on its arguments and the clips alone."""
    rng = np.random.default_rng([seed, step, worker])
    listens = clips.task == "stt"
    windows, labels = [], []
    for _ in range(size):
        if listens:
            tokens, phones = heard(clips, frames, rng, delay)
        else:
            tokens, phones = spoken(clips, frames, rng, delay), np.full((frames, 2), NONE, np.int32)
        windows.append(tokens)
        labels.append(phones)
    shifted = np.stack([delayed(tokens, config) for tokens in windows])
    inputs, targets = shifted[:, :, :-1].copy(), shifted[:, : 1 + config.dep_q, 1:]
    for row in inputs:
        spoil(row, config, rng, TEXT_SPOILED if listens else 0.0)
        if dropped and rng.random() < dropped:
            drop_acoustic(row, config, rng)
    n = size * frames
    text, phones = targets[:, 0].reshape(n), np.concatenate(labels)
    weight = np.where(text == PAD, PAD_WEIGHT, 1.0)
    if not listens:
        weight[(text != PAD) & (text != EPAD)] = 0  # the text is given
    known = np.zeros(0, np.intp)
    if config.dep_q:
        known = np.flatnonzero(((targets[:, 1:] >= 0) & (targets[:, 1:] < config.card)).all(1).reshape(n))
        known = np.sort(rng.choice(known, int(n * DEPTH_SHARE), replace=False))
    codes = targets.transpose(0, 2, 1).reshape(n, -1)
    return SpeechBatch(
        mx.array(inputs),
        mx.array(text),
        mx.array(weight.astype(np.float32)),
        mx.array(np.maximum(phones, 0)),
        mx.array((phones[:, 0] != NONE).astype(np.float32)),
        mx.array(known.astype(np.int32)),
        mx.array(codes[known]),
    )
