"""Conversations put together from encoded pieces, as the streams that the model reads.

A window is one conversation from its first frame: silences, questions in one room or another, answers, interruptions.
Nothing here is random but the generator passed in, and nothing knows sound or a model: codes in, codes out.

Around one question, with the text two frames ahead of the sound::

    user   room ... q q q q q q q q room room room room room room room room room
    own    ............................ quiet . . . . . A A A A A A A A A quiet
    text   PAD ................... PAD EPAD The PAD PAD cap.. PAD EPAD of PAD ...
                             end ^        ^ 3 frames before the sound, which comes 6 or 7 after the question

When the user interrupts, the own voice is quiet from the third or fourth frame after the user's first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.engine.text import EPAD, PAD, TextTokenizer
from moshi_mlx_training.lm.data import ANSWER_BEFORE, BEFORE, DROPPED, RATE, ROOMS, split_flat, taught
from moshi_mlx_training.speech import dialogues
from moshi_mlx_training.speech.recipe import NO_SECOND, UNKNOWN

LEAD = 2  # frames by which a word's first token comes before its sound
# Frames from the end of a question to the first sound of its answer: 6 or 7. The text begins three frames before that,
# and a pause inside a sentence lasts up to four: sooner, the model would have to guess whether more is to come.
GAP = (6, 8)
PAUSE = (3, 20)  # frames from the end of an answer to the next question's clip
STOP = 4  # frames after the user's first sound from which an interrupted answer is quiet at the latest
INTERRUPTED, SILENT = 1 / 4, 0.07  # shares of turns
BETWEEN = 4  # frames from the first to the second answer of two that were asked for at once
PHONES_AFTER = 2  # frames until the phones of a frame are to be known: the acoustic codes come one frame late
WARPED = 0.08  # share of a question's frames left out or doubled, in half of the questions
STEADY = 40  # frames after which the codes of a room no longer feel its beginning
NONE = -1  # label: nothing to learn here

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Manner:
    """How conversations are put together; the defaults are those of the model in the package.

    Attributes
    ----------
    unknown_gap : (int, int)
        Frames from the end of a sentence that is none of the questions to the answer's sound, the second excluded:
        who may not have ended is waited for longer.
    mixed : float
        Share of questions whose acoustic codes are another speaker's.
    """

    unknown_gap: tuple[int, int] = GAP
    mixed: float = 0.0


AS_BEFORE = Manner()


@dataclass(frozen=True)
class Question:
    """A clip: codes [frames, books], in which speech ends before ``end``.

    ``words`` [n, 2] are (end frame, index), ``phones`` [frames, 2] what is being said (`speech.PHONES`).
    """

    codes: NDArray[np.uint16]
    exchange: int
    voice: int
    room: int
    end: int
    words: NDArray[np.int32]
    phones: NDArray[np.uint8]
    text: str
    second: int = NO_SECOND

    @property
    def onset(self) -> int:
        """Frame of the clip in which the voice begins."""
        return BEFORE - DROPPED

    @property
    def answer(self) -> int:
        """Index of the right answer in ``dialogues.answers()``."""
        return answer_index(self.exchange)

    @property
    def wanted(self) -> str:
        """The right answer, or both."""
        indices = [self.answer] if self.second == NO_SECOND else [self.answer, answer_index(self.second)]
        return " ".join(dialogues.answers()[index] for index in indices)


@dataclass(frozen=True)
class Answer:
    """Codes of the sound and of the silence after it.

    ``tokens`` [n, 2] are (frame from the sound's first, id); ``deciding`` [n] marks those that do not follow from
    the two words before.
    """

    codes: NDArray[np.uint16]
    frames: int
    tokens: Ints
    deciding: NDArray[np.bool_]


@cache
def answer_index(exchange: int) -> int:
    text = dialogues.NOT_UNDERSTOOD if exchange == UNKNOWN else dialogues.exchanges()[exchange].answer
    return dialogues.answers().index(text)


def joined(one: Answer, other: Answer) -> Answer:
    """Two answers, one after the other."""
    begin = one.frames + BETWEEN
    return Answer(
        np.concatenate([one.codes[:begin], other.codes]),
        begin + other.frames,
        np.concatenate([one.tokens, other.tokens + np.array([begin, 0], np.int32)]),
        np.concatenate([one.deciding, other.deciding]),
    )


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


def deciding_tokens(answers: Sequence[Ints]) -> list[NDArray[np.bool_]]:
    """Of each answer's tokens [n, 2] the words' that do not follow from the two words before: [n] each.

    In "The capital of France is Paris." these are "The", "capital" and "France", which must have been heard; in "Two
    plus three is five." all but "is".
    """
    after: dict[tuple[int, ...], set[int]] = {}
    spelled = [tokens[tokens[:, 1] != EPAD, 1].tolist() for tokens in answers]
    for words in spelled:
        for i, word in enumerate(words):
            after.setdefault(tuple(words[max(0, i - 2) : i]), set()).add(word)
    out = []
    for tokens, words in zip(answers, spelled, strict=True):
        out.append(np.zeros(len(tokens), bool))
        out[-1][tokens[:, 1] != EPAD] = [len(after[tuple(words[max(0, i - 2) : i])]) > 1 for i in range(len(words))]
    return out


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
        tokens = [
            answer_tokens(text, starts.tolist(), tokenizer)
            for text, starts in zip(texts, split_flat(loaded["starts"], loaded["start_count"]), strict=True)
        ]
        self.answers = [
            # Codes of the silence before an answer have done their work.
            Answer(codes[ANSWER_BEFORE:], int(frames), placed, decides)
            for codes, frames, placed, decides in zip(
                split_flat(loaded["data"], loaded["count"]),
                loaded["frames"],
                tokens,
                deciding_tokens(tokens),
                strict=True,
            )
        ]
        rooms = self._load("rooms.npz")
        self.rooms = split_flat(rooms["data"], rooms["count"])
        assert len(self.rooms) == ROOMS
        self.questions: list[Question] = []
        self._read: set[str] = set()
        self.refresh()
        if not self.questions:
            raise FileNotFoundError(f"no questions {sets}.npz in {folder}: run 'python -m moshi_mlx_training.lm.data'")

    def refresh(self) -> int:
        """Read question sets that have come since; returns how many questions there are. Order depends on names."""
        for path in sorted(self.folder.glob(f"{self.sets}.npz")):
            if path.name.endswith(".pcm.npz") or path.name in self._read:
                continue
            loaded = self._load(path.name)
            if str(loaded["codec"]) != self.codec:
                continue  # left over from another codec; `encode` will replace it
            self._read.add(path.name)
            seconds = loaded.get("second", np.full(len(loaded["end"]), NO_SECOND))
            self.questions += [
                Question(codes, int(exchange), int(voice), int(room), int(end), words, phones, str(text), int(second))
                for codes, exchange, voice, room, end, words, phones, text, second in zip(
                    split_flat(loaded["data"], loaded["count"]),
                    loaded["exchange"],
                    loaded["voice"],
                    loaded["room"],
                    loaded["end"],
                    split_flat(loaded["words"], loaded["word_count"]),
                    split_flat(loaded["phones"], loaded["count"]),
                    loaded["text"],
                    seconds,
                    strict=True,
                )
            ]
        return len(self.questions)

    def said(self, question: Question) -> Answer:
        """What is to be answered to a question, or to both of two."""
        answer = self.answers[question.answer]
        if question.second == NO_SECOND:
            return answer
        return joined(answer, self.answers[answer_index(question.second)])

    def _load(self, name: str) -> dict[str, Any]:
        try:
            with np.load(self.folder / name) as file:
                return {key: file[key] for key in file.files}
        except FileNotFoundError:
            raise FileNotFoundError(
                f"no {name} in {self.folder}: run 'python -m moshi_mlx_training.lm.data encode {self.folder}'"
            ) from None


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
    phones : array [frames, 2], int32
        What the user was saying ``PHONES_AFTER`` frames ago, -1 outside of questions.
    first : array [frames], bool
        Where the first word of an answer is written.
    deciding : array [frames], bool
        Where a text token stands that does not follow from the two before.
    stopped : array [frames], bool
        Where an interrupted answer would have gone on, and does not.
    speaking : array [frames], bool
        Where the own voice sounds or has just ended.
    interruptions : list of (int, int)
        The user's first frame, and the own voice's first quiet one.
    """

    tokens: Ints
    answer: Ints
    heard: Ints
    phones: Ints
    first: NDArray[np.bool_]
    deciding: NDArray[np.bool_]
    stopped: NDArray[np.bool_]
    speaking: NDArray[np.bool_]
    interruptions: list[tuple[int, int]]


def stretched(question: Question, rng: np.random.Generator) -> Question:
    """The question a little faster here and slower there: some frames are left out, some come twice."""
    times = rng.choice(3, len(question.codes), p=(WARPED / 2, 1 - WARPED, WARPED / 2))
    times[: question.onset + 1] = times[question.end - 1 :] = 1
    until = np.cumsum(times)  # frames up to and including each
    words = np.stack([until[question.words[:, 0] - 1], question.words[:, 1]], axis=1)
    return replace(
        question,
        codes=np.repeat(question.codes, times, axis=0),
        end=int(until[question.end - 1]),
        words=words,
        phones=np.repeat(question.phones, times, axis=0),
    )


def mixed(question: Question, other: Question) -> Question:
    """The question with the acoustic codes of another one, faster or slower as needed: only what is said stays."""
    codes = question.codes.copy()
    spoken, theirs = slice(question.onset, question.end), other.codes[other.onset : other.end]
    codes[spoken, 1:] = theirs[np.linspace(0, len(theirs) - 1, question.end - question.onset).round().astype(int), 1:]
    return replace(question, codes=codes)


def compose(pieces: Pieces, frames: int, rng: np.random.Generator, manner: Manner = AS_BEFORE) -> Window:
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
    phones = np.full((longest, 2), NONE, np.int32)
    first, deciding, stopped, speaking = (np.zeros(longest, bool) for _ in range(4))
    interruptions = []
    at, filled, sound, interrupts = int(rng.integers(1, PAUSE[1])), 0, 0, False
    room, said = pieces.rooms[0], pieces.answers[0]
    while True:
        question = pieces.questions[int(rng.integers(len(pieces.questions)))]
        if manner.mixed and rng.random() < manner.mixed:
            question = mixed(question, pieces.questions[int(rng.integers(len(pieces.questions)))])
        if rng.random() < 0.5:
            question = stretched(question, rng)
        if not interrupts and rng.random() < SILENT:
            at += int(rng.integers(30, 100))
        if filled == 0:
            room = pieces.rooms[question.room]
        if filled < at:
            fill_room(user, filled, min(at, longest), room, rng)
        if at >= frames:
            break
        if interrupts:
            onset = at + question.onset
            stop = onset + int(rng.integers(STOP - 1, STOP + 1))
            _silence_from(own, text, speaking, stop, said, quiet)
            deciding[stop - 1 :] = False
            stopped[stop - 1 : sound + said.frames] = True
            interruptions.append((onset, stop))
        user[:, at : at + len(question.codes)] = question.codes.T
        filled = at + len(question.codes)
        for frame, word in question.words:
            heard[at + frame + 1] = word
        spoken = slice(at + PHONES_AFTER, at + PHONES_AFTER + len(question.phones))
        phones[spoken] = question.phones
        room = pieces.rooms[question.room]
        end = at + question.end
        said = pieces.said(question)
        sound = end + int(rng.integers(*(manner.unknown_gap if question.exchange == UNKNOWN else GAP)))
        own[:, sound : sound + len(said.codes)] = said.codes.T
        speaking[sound : sound + said.frames + 2] = True
        text[sound + said.tokens[:, 0]] = said.tokens[:, 1]
        deciding[sound + said.tokens[said.deciding, 0]] = True
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
    return Window(
        tokens[:, cut],
        answer[cut],
        heard[cut],
        phones[cut],
        first[cut],
        deciding[cut],
        stopped[cut],
        speaking[cut],
        kept,
    )


def fill_room(user: Ints, start: int, stop: int, room: NDArray[np.uint16], rng: np.random.Generator) -> None:
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
