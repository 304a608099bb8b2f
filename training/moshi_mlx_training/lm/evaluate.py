"""How the language model answers when it runs free: exact answers, silence, interruption, and what an ear hears.

    python -m moshi_mlx_training.lm.evaluate moshi_mlx/builtin/small runs/lm/data --weights runs/lm/train/lm.safetensors

Nothing is teacher-forced: the user's codes go in frame by frame through the program's own generator, and what comes
out is read. ``known`` are new renderings by speakers of the training set, ``held`` speakers that were never in it.
With ``--ear`` the answers' sound is decoded and a recogniser says which answer it hears (it needs pocketsphinx).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moshi_mlx.checkpoint.quantization import unpack_modules
from moshi_mlx.checkpoint.readers import read_safetensors
from moshi_mlx.config import LmConfig
from moshi_mlx.engine.generator import GenerationConfig, Generator
from moshi_mlx.engine.text import TextTokenizer
from moshi_mlx.models.lm import Lm
from moshi_mlx.models.sampling import Sampling
from moshi_mlx_training.lm.dialogue import STEADY, STOP, Pieces, Question
from moshi_mlx_training.lm.train import preload_blas, read_model
from moshi_mlx_training.speech import dialogues
from moshi_mlx_training.speech.recipe import UNKNOWN

BEFORE, AFTER = 8, 75  # frames of room before a question and after its clip
SILENT_FRAMES = 375
INTERRUPT_AT = 12  # frames from the end of the first question to the interrupting voice

Ints = NDArray[np.int32]


def load_weights(path: Path, config: LmConfig) -> Lm:
    """A model from a training checkpoint, or from an exported file."""
    arrays, metadata = read_safetensors(path)
    if "extra" not in metadata:
        from moshi_mlx.checkpoint.fit import load_lm

        lm = load_lm(config, path)
        unpack_modules(lm)
        return lm
    lm = Lm(config)
    lm.load_weights([(n.removeprefix("model.lm."), v) for n, v in arrays.items() if n.startswith("model.lm.")])
    mx.eval(lm.parameters())
    return lm


def run(lm: Lm, user: NDArray[Any], settings: GenerationConfig) -> tuple[Ints, Ints]:
    """Feed user codes [batch, frames, books]; returns text [batch, frames] and own codes [batch, frames, books]."""
    generator = Generator(lm, settings, seeds=range(len(user)))
    text, codes = [], []
    for frame in range(user.shape[1]):
        step = generator.step(user[:, frame].astype(np.int32))
        text.append(step.text if step.aligned_text is None else step.aligned_text)
        codes.append(np.zeros(0, np.int32) if step.codes is None else step.codes)
    return np.stack(text, 1), np.stack(codes, 1)


def room_codes(pieces: Pieces, room: int, frames: int, start: int = 0) -> NDArray[np.uint16]:
    """An empty room from frame ``start`` of its recording, its steady part again and again."""
    codes = pieces.rooms[room]
    steady = codes[STEADY:]
    times = -(-(start + frames) // len(steady)) + 1
    return np.concatenate([codes[:STEADY], *[steady] * times])[start : start + frames]


def question_stream(pieces: Pieces, question: Question, frames: int) -> NDArray[np.uint16]:
    """User codes [frames, books]: room, the question, room."""
    head = room_codes(pieces, question.room, BEFORE)
    stream = np.concatenate([head, question.codes])
    return np.concatenate([stream, room_codes(pieces, question.room, frames - len(stream), STEADY)])


def said(tokens: Ints, tokenizer: TextTokenizer) -> str:
    return tokenizer.decode(int(token) for token in tokens)


def sounds(tokens: Ints, tokenizer: TextTokenizer) -> NDArray[np.bool_]:
    """Where a text stream has words."""
    return np.array([not tokenizer.is_silent(int(token)) for token in tokens])


@dataclass
class Report:
    """Figures by name, and answers that were wrong."""

    figures: dict[str, Any]
    wrong: list[tuple[str, str, str]]


def in_batches(lm: Lm, user: NDArray[Any], settings: GenerationConfig, size: int) -> tuple[Ints, Ints]:
    parts = [run(lm, user[at : at + size], settings) for at in range(0, len(user), size)]
    return np.concatenate([text for text, _ in parts]), np.concatenate([codes for _, codes in parts])


def answers(
    lm: Lm,
    tokenizer: TextTokenizer,
    pieces: Pieces,
    settings: GenerationConfig,
    count: int,
    codec: Any,
    size: int,
    listened: int | None = None,
) -> Report:
    """Free-running answers to the first ``count`` questions, right if the words are exactly the right answer's.

    With a codec, the sound of the first ``listened`` of them is judged too.
    """
    questions = pieces.questions[:count]
    frames = max(BEFORE + len(question.codes) for question in questions) + AFTER
    user = np.stack([question_stream(pieces, question, frames) for question in questions])
    text, codes = in_batches(lm, user, settings, size)
    topics: dict[str, list[bool]] = {}
    right, started, wrong = [], [], []
    for question, tokens in zip(questions, text, strict=True):
        reply, wanted = said(tokens, tokenizer), question.wanted
        right.append(dialogues.words(reply) == dialogues.words(wanted))
        words = np.flatnonzero(sounds(tokens, tokenizer))
        if len(words):
            started.append(int(words[0]) - BEFORE - question.end)
        topic = "unknown" if question.exchange == UNKNOWN else dialogues.exchanges()[question.exchange].topic
        topics.setdefault(topic, []).append(right[-1])
        if not right[-1]:
            wrong.append((question.text, wanted, reply))
    figures: dict[str, Any] = {
        "right": float(np.mean(right)),
        "spoke": len(started) / len(questions),
        "first_word_after_question_frames": [float(x) for x in np.percentile(started or [0], (5, 50, 95))],
        "too_early": float(np.mean([s < 0 for s in started])) if started else 0.0,
        "by_topic": {topic: [int(sum(hits)), len(hits)] for topic, hits in sorted(topics.items())},
    }
    if codec is not None:
        figures |= heard_by_ear(codec, questions[:listened], codes, text, tokenizer)
        figures["text_right_of_those"] = float(np.mean(right[:listened]))
    return Report(figures, wrong)


def heard_by_ear(
    codec: Any, questions: Sequence[Question], codes: Ints, text: Ints, tokenizer: TextTokenizer
) -> dict[str, Any]:
    """Which answer a recogniser hears in the decoded sound: the right one, the written one."""
    from moshi_mlx_training.speech.recogniser import Recogniser

    judge = Recogniser(dialogues.answers())
    right, written = [], []
    for question, own, tokens in zip(questions, codes[: len(questions)], text[: len(questions)], strict=True):
        words = np.flatnonzero(sounds(tokens, tokenizer))
        begin = max(0, BEFORE + question.end - 6)
        end = min(len(own), int(words[-1]) + 18) if len(words) else begin + 6
        heard = judge.hear(codec.decode(own[begin:end].T))
        right.append(heard == " ".join(dialogues.words(question.wanted)))
        written.append(heard == " ".join(dialogues.words(said(tokens, tokenizer))))
    return {"ear_right": float(np.mean(right)), "ear_as_written": float(np.mean(written))}


def silence(lm: Lm, tokenizer: TextTokenizer, pieces: Pieces, settings: GenerationConfig, size: int) -> dict[str, Any]:
    """Share of 30-second trials, one in each room, in which nothing is said."""
    user = np.stack([room_codes(pieces, room, SILENT_FRAMES) for room in range(len(pieces.rooms))])
    text, _ = in_batches(lm, user, settings, size)
    return {"silent": float(np.mean([not sounds(tokens, tokenizer).any() for tokens in text])), "trials": len(text)}


def interruptions(
    lm: Lm, tokenizer: TextTokenizer, pieces: Pieces, settings: GenerationConfig, count: int, size: int
) -> dict[str, Any]:
    """The user speaks into long answers: how often no word is begun later than four frames after that."""
    long = [q for q in pieces.questions if pieces.answers[q.answer].frames > INTERRUPT_AT + 8]
    first, second = long[:count], pieces.questions[-count:]
    streams, onsets = [], []
    for one, two in zip(first, second, strict=False):
        head = np.concatenate([room_codes(pieces, one.room, BEFORE), one.codes])
        onset = BEFORE + one.end + INTERRUPT_AT
        gap = onset - two.onset - len(head)
        head = head[: onset - two.onset] if gap < 0 else np.concatenate(
            [head, room_codes(pieces, one.room, gap, STEADY)]
        )  # fmt: skip
        streams.append(np.concatenate([head, two.codes[: two.end]]))
        onsets.append(onset)
    if not streams:
        return {"stopped": 0.0, "trials": 0}
    frames = max(len(stream) for stream in streams)
    user = np.stack([np.concatenate([s, room_codes(pieces, 0, frames - len(s), STEADY)]) for s in streams])
    text, _ = in_batches(lm, user, settings, size)
    speaking = stopped = 0
    for tokens, onset, stream in zip(text, onsets, streams, strict=True):
        words = sounds(tokens, tokenizer)
        if not words[onset - 6 : onset + 1].any():
            continue
        speaking += 1
        stopped += not words[onset + STOP : len(stream)].any()
    return {"stopped": stopped / max(1, speaking), "trials": speaking}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moshi_mlx_training.lm.evaluate", description=__doc__.split("\n")[0]
    )
    parser.add_argument("model", type=Path, help="folder with config.json and the tokenizer")
    parser.add_argument("data", type=Path, help="folder that 'lm_data encode' wrote")
    parser.add_argument("--weights", type=Path, nargs="+", help="checkpoints to compare (the folder's own weights)")
    parser.add_argument("--count", type=int, default=200, help="questions of each kind (200)")
    parser.add_argument("--temperature", type=float, nargs=2, default=(0.0, 0.0), metavar=("TEXT", "AUDIO"))
    parser.add_argument("--batch", type=int, default=100, help="conversations at once (100)")
    parser.add_argument("--text-only", action="store_true", help="answers alone: no silence, no interruptions")
    parser.add_argument("--ear", type=Path, metavar="FOLDER", help="folder with the codec that makes the sound")
    parser.add_argument("--ear-count", type=int, default=60, help="answers of each kind to judge by ear (60)")
    parser.add_argument("--wrong", type=int, default=10, help="how many wrong answers to print (10)")
    options = parser.parse_args(arguments)
    preload_blas()
    config, tokenizer = read_model(options.model)
    text, audio = (Sampling(t, top_k=k if t else 0) for t, k in zip(options.temperature, (25, 250), strict=True))
    settings = GenerationConfig(text=text, audio=audio)
    codec = None
    if options.ear:
        from moshi_mlx.codec.base import make_codec
        from moshi_mlx.models.mimi import MimiConfig

        sizes = MimiConfig.from_dict(json.loads((options.ear / "mimi_config.json").read_text()))
        codec = make_codec(options.ear / "mimi.safetensors", sizes, config.own_q)
    sets = {name: Pieces(options.data, tokenizer, name) for name in ("known", "held")}
    for path in options.weights or [options.model / "model.safetensors"]:
        began, lm = time.monotonic(), load_weights(path, config)
        table: dict[str, Any] = {}
        for name, pieces in sets.items():
            report = answers(lm, tokenizer, pieces, settings, options.count, codec, options.batch, options.ear_count)
            table[name] = report.figures
            for question, wanted, reply in report.wrong[: options.wrong]:
                print(f"  {name}: {question!r}: {wanted!r}, but said {reply!r}", flush=True)
        if not options.text_only:
            table["silence"] = silence(lm, tokenizer, sets["known"], settings, options.batch)
            table["interruption"] = interruptions(lm, tokenizer, sets["known"], settings, options.count, options.batch)
        print(json.dumps({"weights": str(path), "seconds": round(time.monotonic() - began), **table}), flush=True)


if __name__ == "__main__":
    main()
