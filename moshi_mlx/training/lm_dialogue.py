"""Conversations put together from encoded pieces, as the streams that the model reads.

A window is one conversation from its first frame: silences, questions in one room or another, answers, interruptions.
Nothing here is random but the generator passed in, and nothing knows sound or a model: codes in, codes out.

Around one question, with the text two frames ahead of the sound::

    user   room ... q q q q q q q q room room room room room room room room room
    own    ............................ quiet . . . . . A A A A A A A A A quiet
    text   PAD ................... PAD EPAD The PAD PAD cap.. PAD EPAD of PAD ...
                             end ^        ^ 3 frames before the sound, which comes 5 to 7 after the question

When the user interrupts, the own voice is quiet from the fourth frame after the user's first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.text import EPAD, PAD, TextTokenizer
from moshi_mlx.training import dialogues
from moshi_mlx.training.lm_data import BEFORE, DROPPED, RATE, ROOMS, UNKNOWN, split_flat, taught

LEAD = 2  # frames by which a word's first token comes before its sound
GAP = (5, 8)  # frames from the end of a question to the first sound of its answer: 5, 6 or 7
PAUSE = (3, 20)  # frames from the end of an answer to the next question's clip
STOP = 4  # frames after the user's first sound from which an interrupted answer is quiet
INTERRUPTED, SILENT = 1 / 8, 0.07  # shares of turns
STEADY = 40  # frames after which the codes of a room no longer feel its beginning
NONE = -1  # label: nothing to learn here

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Question:
    """A clip: codes [frames, books], in which speech ends before ``end``; ``words`` [n, 2] are (end frame, index)."""

    codes: NDArray[np.uint16]
    exchange: int
    voice: int
    room: int
    end: int
    words: NDArray[np.int32]
    text: str

    @property
    def onset(self) -> int:
        """Frame of the clip in which the voice begins."""
        return BEFORE - DROPPED

    @property
    def answer(self) -> int:
        """Index of the right answer in ``dialogues.answers()``."""
        return answer_index(self.exchange)


@dataclass(frozen=True)
class Answer:
    """Codes of the sound and of the silence after it, and ``tokens`` [n, 2]: (frame from the sound's first, id)."""

    codes: NDArray[np.uint16]
    frames: int
    tokens: Ints


@cache
def answer_index(exchange: int) -> int:
    text = dialogues.NOT_UNDERSTOOD if exchange == UNKNOWN else dialogues.exchanges()[exchange].answer
    return dialogues.answers().index(text)


def answer_tokens(answer: str, starts: Sequence[float], tokenizer: TextTokenizer) -> Ints:
    """Where each text token of an answer goes: [n, 2] of (frame relative to the sound's first, id).

    A word's first piece stands ``LEAD`` frames before the word sounds, its other pieces follow, and EPAD announces it
    where there is room. ``starts`` are seconds into the sound, one a word.
    """
    groups: list[list[int]] = []
    for token in tokenizer.encode(answer):
        if tokenizer.piece(token).startswith("▁") or not groups:
            groups.append([])
        groups[-1].append(token)
    if len(groups) != len(starts):
        raise ValueError(f"{answer!r} has {len(groups)} words in the tokenizer and {len(starts)} in the voice")
    out, free = [], -LEAD - 1
    for group, start in zip(groups, starts, strict=True):
        frame = max(int(start * RATE) - LEAD, free)
        if frame == -LEAD - 1:
            frame += 1
        if frame > free:
            out.append((frame - 1, EPAD))
        out += [(frame + i, token) for i, token in enumerate(group)]
        free = frame + len(group)
    return np.array(out, np.int32)


class Pieces:
    """Everything that conversations are made of, from one folder and one codec.

    Parameters
    ----------
    folder : Path
        Where ``lm_data encode`` wrote.
    tokenizer : TextTokenizer
    sets : str
        Names of question sets, as a glob: ``train-*``, ``known``, ``held``.
    """

    def __init__(self, folder: Path, tokenizer: TextTokenizer, sets: str = "train-*") -> None:
        self.folder, self.sets = folder, sets
        loaded = self._load("answers.npz")
        self.codec = str(loaded["codec"])
        if int(loaded["taught"]) != taught():
            raise ValueError(f"{folder} was made for other questions and answers: make it again in an empty folder")
        texts = dialogues.answers()
        self.answers = [
            Answer(codes, int(frames), answer_tokens(text, starts.tolist(), tokenizer))
            for text, codes, frames, starts in zip(
                texts,
                split_flat(loaded["data"], loaded["count"]),
                loaded["frames"],
                split_flat(loaded["starts"], loaded["start_count"]),
                strict=True,
            )
        ]
        # Codes of the silence before an answer have done their work.
        self.answers = [Answer(a.codes[len(a.codes) - a.frames - _tail(a) :], a.frames, a.tokens) for a in self.answers]
        rooms = self._load("rooms.npz")
        self.rooms = split_flat(rooms["data"], rooms["count"])
        assert len(self.rooms) == ROOMS
        self.questions: list[Question] = []
        self._read: set[str] = set()
        self.refresh()
        if not self.questions:
            raise FileNotFoundError(f"no questions {sets}.npz in {folder}: run 'python -m moshi_mlx.training.lm_data'")

    def refresh(self) -> int:
        """Read question sets that have come since; returns how many questions there are. Order depends on names."""
        for path in sorted(self.folder.glob(f"{self.sets}.npz")):
            if path.name.endswith(".pcm.npz") or path.name in self._read:
                continue
            loaded = self._load(path.name)
            if str(loaded["codec"]) != self.codec:
                continue  # left over from another codec; `encode` will replace it
            self._read.add(path.name)
            self.questions += [
                Question(codes, int(exchange), int(voice), int(room), int(end), words, str(text))
                for codes, exchange, voice, room, end, words, text in zip(
                    split_flat(loaded["data"], loaded["count"]),
                    loaded["exchange"],
                    loaded["voice"],
                    loaded["room"],
                    loaded["end"],
                    split_flat(loaded["words"], loaded["word_count"]),
                    loaded["text"],
                    strict=True,
                )
            ]
        return len(self.questions)

    def _load(self, name: str) -> dict[str, Any]:
        try:
            with np.load(self.folder / name) as file:
                return {key: file[key] for key in file.files}
        except FileNotFoundError:
            raise FileNotFoundError(
                f"no {name} in {self.folder}: run 'python -m moshi_mlx.training.lm_data encode {self.folder}'"
            ) from None


def _tail(answer: Answer) -> int:
    from moshi_mlx.training.lm_data import ANSWER_AFTER

    return min(ANSWER_AFTER, len(answer.codes) - answer.frames)


@dataclass
class Window:
    """One conversation.

    Attributes
    ----------
    tokens : array [1 + 16, frames], int32
        Text, own codes, user codes; not delayed.
    answer : array [frames], int32
        Index of the answer that the question just ended asks for, until its first word is out; else -1.
    heard : array [frames], int32
        Index of the word that the user has just said (`lm_data.heard_words`), else -1.
    first : array [frames], bool
        Where the first word of an answer is written.
    speaking : array [frames], bool
        Where the own voice sounds or has just ended.
    interruptions : list of (int, int)
        The user's first frame, and the own voice's first quiet one.
    """

    tokens: Ints
    answer: Ints
    heard: Ints
    first: NDArray[np.bool_]
    speaking: NDArray[np.bool_]
    interruptions: list[tuple[int, int]]


def compose(pieces: Pieces, frames: int, rng: np.random.Generator) -> Window:
    """A conversation of so many frames."""
    books = pieces.rooms[0].shape[1]
    room_frames = len(pieces.rooms[0])
    longest = frames + 2 * room_frames  # questions and answers may run over the end; it is cut off below
    tokens = np.empty((1 + 2 * books, longest), np.int32)
    own, user, text = tokens[1 : 1 + books], tokens[1 + books :], tokens[0]
    text[:] = PAD
    quiet = pieces.rooms[0]
    own[:, :STEADY] = quiet[:STEADY].T
    own[:, STEADY:] = np.resize(quiet[STEADY:], (longest - STEADY, books)).T
    answer, heard = np.full(longest, NONE, np.int32), np.full(longest, NONE, np.int32)
    first, speaking = np.zeros(longest, bool), np.zeros(longest, bool)
    interruptions = []
    at, filled, interrupts = int(rng.integers(1, PAUSE[1])), 0, False
    room, said = pieces.rooms[0], pieces.answers[0]
    while True:
        question = pieces.questions[int(rng.integers(len(pieces.questions)))]
        if not interrupts and rng.random() < SILENT:
            at += int(rng.integers(30, 100))
        if filled == 0:
            room = pieces.rooms[question.room]
        if filled < at:
            _fill_room(user, filled, min(at, longest), room, rng)
        if at >= frames:
            break
        if interrupts:
            onset = at + question.onset
            _silence_from(own, text, speaking, onset + STOP, said, quiet)
            interruptions.append((onset, onset + STOP))
        user[:, at : at + len(question.codes)] = question.codes.T
        filled = at + len(question.codes)
        for frame, word in question.words:
            heard[at + frame + 1] = word
        room = pieces.rooms[question.room]
        end = at + question.end
        said = pieces.answers[question.answer]
        sound = end + int(rng.integers(*GAP))
        own[:, sound : sound + len(said.codes)] = said.codes.T
        speaking[sound : sound + said.frames + 2] = True
        text[sound + said.tokens[:, 0]] = said.tokens[:, 1]
        begin = sound - LEAD
        first[begin] = True
        answer[end : begin + 1] = question.answer
        interrupts = said.frames >= 8 and rng.random() < INTERRUPTED
        if interrupts:
            at = sound + int(rng.integers(4, said.frames - 2)) - question.onset
        else:
            at = sound + said.frames + int(rng.integers(*PAUSE))
    cut = slice(frames)
    kept = [pair for pair in interruptions if pair[1] < frames]
    return Window(tokens[:, cut], answer[cut], heard[cut], first[cut], speaking[cut], kept)


def _fill_room(user: Ints, start: int, stop: int, room: NDArray[np.uint16], rng: np.random.Generator) -> None:
    """The room's own codes from ``start`` to ``stop``: from its beginning at frame 0, else from anywhere steady."""
    while start < stop:
        begin = 0 if start == 0 else int(rng.integers(STEADY, len(room) - 20))
        count = min(stop - start, len(room) - begin)
        user[:, start : start + count] = room[begin : begin + count].T
        start += count


def _silence_from(
    own: Ints, text: Ints, speaking: NDArray[np.bool_], stop: int, said: Answer, quiet: NDArray[np.uint16]
) -> None:
    """End the answer at frame ``stop``: how it fades is taken from its own end. Words not begun are not written."""
    fade = said.codes[said.frames :]
    own[:, stop : stop + len(fade)] = fade.T
    rest = stop + len(fade)
    own[:, rest : rest + len(said.codes)] = np.resize(quiet[STEADY:], (len(said.codes), len(quiet[0]))).T
    text[stop - 1 : stop + len(said.codes)] = PAD
    speaking[stop + 2 : stop + len(said.codes)] = False
