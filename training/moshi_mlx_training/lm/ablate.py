"""What the text stream is for: the same conversations, taught with the streams shifted or without words.

    python -m moshi_mlx_training.lm.ablate train    moshi_mlx/builtin/small runs/lm/data runs/ablate --steps 100
    python -m moshi_mlx_training.lm.ablate evaluate moshi_mlx/builtin/small runs/lm/data runs/ablate

Four small models, alike but for one thing, trained from the same weights for as many steps (what Défossez et al. 2024
show in sections 3.4.4 and 5.7, on synthetic speech and a few topics):

``moshi``         text two frames ahead of the sound: inner monologue
``no-monologue``  the text stream holds padding only
``text-first``    the own voice comes ``SHIFT`` frames later: given text becomes speech
``sound-first``   the text comes ``SHIFT`` frames later: given speech becomes text

``evaluate`` asks all of them three things, running free: to answer spoken questions, to speak text that is forced on
them, to write what they are made to say. Sentences that are mixed from the parts of answers were never in training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moshi_mlx.engine.generator import GenerationConfig, Generator
from moshi_mlx.engine.text import PAD, TextTokenizer
from moshi_mlx.models.lm import Lm
from moshi_mlx.models.sampling import Sampling
from moshi_mlx_training.lm.batch import make_batch
from moshi_mlx_training.lm.data import UNKNOWN, answer_clip, trimmed
from moshi_mlx_training.lm.dialogue import Answer, Pieces, Window, answer_tokens, compose
from moshi_mlx_training.lm.evaluate import BEFORE, load_weights, question_stream, room_codes, said
from moshi_mlx_training.lm.model import FIGURES
from moshi_mlx_training.lm.train import Trainer, preload_blas, read_model
from moshi_mlx_training.process import Stop, keep_memory
from moshi_mlx_training.speech import dialogues

SHIFT = 16  # frames: 1.3 s, longer than any word
VARIANTS = {"moshi": (0, 0), "no-monologue": (0, 0), "text-first": (0, SHIFT), "sound-first": (SHIFT, 0)}
TOPICS = ("colour", "animal", "legs", "repeat", "manners", "greeting", "goodbye")
AFTER = 75 + SHIFT  # frames that an answer may take
GREEDY = GenerationConfig(text=Sampling(0.0), audio=Sampling(0.0))

Ints = NDArray[np.int32]


def chosen(pieces: Pieces, topics: Sequence[str]) -> Pieces:
    """Leave only the questions of some topics, in place."""
    exchanges = dialogues.exchanges()
    pieces.questions = [
        question
        for question in pieces.questions
        if question.exchange != UNKNOWN and exchanges[question.exchange].topic in topics
    ]
    return pieces


def shifted(window: Window, variant: str) -> Window:
    """The window as a variant is to learn it: text or own codes later, or no text at all."""
    text, own = VARIANTS[variant]
    tokens = window.tokens.copy()
    books = (len(tokens) - 1) // 2
    if variant == "no-monologue":
        tokens[0] = PAD
    if own:
        tokens[1 : 1 + books] = np.concatenate([tokens[1 : 1 + books, :own], tokens[1 : 1 + books, :-own]], axis=1)
    first, deciding, stopped, speaking = window.first, window.deciding, window.stopped, window.speaking
    if text:
        tokens[0] = np.concatenate([np.full(text, PAD, np.int32), tokens[0, :-text]])
        first, deciding, stopped = (
            np.concatenate([np.zeros(text, bool), label[:-text]]) for label in (first, deciding, stopped)
        )
    if own:
        speaking = np.concatenate([np.zeros(own, bool), speaking[:-own]])
    return replace(window, tokens=tokens, first=first, deciding=deciding, stopped=stopped, speaking=speaking)


def train(options: argparse.Namespace) -> None:
    """Train one variant after the other, ``--minutes`` or ``--steps`` long; those that are there are kept."""
    config, tokenizer = read_model(options.model)
    pieces, stop = chosen(Pieces(options.data, tokenizer), options.topics), Stop()
    print(f"{len(pieces.questions)} renderings of {len(options.topics)} topics", flush=True)
    steps = options.steps
    for variant in options.variants:
        path = options.run / f"{variant}.safetensors"
        if path.exists():
            print(f"{variant}: kept", flush=True)
            continue
        trainer, began, figures = Trainer(config, options.seed), time.monotonic(), np.zeros(len(FIGURES))
        if options.start_from is not None:
            trainer.start_from(options.start_from)
        while not stop:
            minutes = (time.monotonic() - began) / 60
            done = trainer.step_count / steps if steps else minutes / options.minutes
            if done >= 1:
                break
            rng = np.random.default_rng([options.seed, trainer.step_count])
            windows = [shifted(compose(pieces, options.frames, rng), variant) for _ in range(options.batch)]
            figures += trainer.step(make_batch(windows, config, rng).arrays(), options.rate * (1 - done))[0]
            if trainer.step_count % 50 == 0:
                line = {"variant": variant, "step": trainer.step_count, "minutes": round(minutes, 2)}
                line |= {name: round(float(v), 4) for name, v in zip(FIGURES, figures / 50, strict=True)}
                print(json.dumps(line), flush=True)
                figures[:] = 0
        if stop:
            return  # a part of a run cannot be compared
        steps = steps or trainer.step_count  # the others get as many as the first managed
        trainer.save(path, codec=pieces.codec, steps=trainer.step_count)


def mixed() -> tuple[str, ...]:
    """Sentences of the answers' words that are no answer: colours, sounds and numbers of legs moved on by one."""
    out = []
    for things, form in (
        (dialogues.COLOURS, "{} is {}."),
        (dialogues.ANIMALS, "A {} says {}."),
        (dialogues.LEGS, "A {} has {} legs."),
    ):
        names, values = list(things), list(things.values())
        for name, value in zip(names, values[1:] + values[:1], strict=True):
            sentence = form.format(name, value)
            out.append(sentence[0].upper() + sentence[1:])
    return tuple(sentence for sentence in out if sentence not in dialogues.answers())


def spoken(sentence: str, codec: Any, tokenizer: TextTokenizer) -> Answer:
    """A sentence in the answering voice, as `lm_data` makes answers."""
    from moshi_mlx_training.lm.data import ANSWER_BEFORE

    pcm, frames, starts = answer_clip(sentence)
    codes = codec.encode(pcm.astype(np.float32) / np.float32(32768)).T[ANSWER_BEFORE:]
    tokens = answer_tokens(sentence, starts, tokenizer)
    return Answer(codes.astype(np.uint16), frames, tokens, np.zeros(len(tokens), bool))


def forced(
    lm: Lm, user: NDArray[Any], text: Ints | None = None, own: Ints | None = None, config: GenerationConfig = GREEDY
) -> tuple[Ints, Ints]:
    """Run free but for what is forced.

    Parameters
    ----------
    user : array [batch, frames, books]
    text : array [batch, frames], or None to let the model write
    own : array [batch, frames, books], or None to let it speak

    Returns
    -------
    text [batch, frames], own codes [batch, frames, books] : both by their own frame
    """
    batch, frames, books = user.shape

    def given(index: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if index < frames and text is not None:
            out["text"] = text[:, index]
        if index < frames and own is not None:
            out["own_codes"] = own[:, index]
        return out

    generator = Generator(lm, config, seeds=range(batch), **given(0))
    wrote, voice = np.full((batch, frames), PAD, np.int32), np.zeros((batch, frames, books), np.int32)
    wrote[:, 0] = generator.first.text
    for frame in range(frames):
        step = generator.step(user[:, frame].astype(np.int32), **given(frame + 1))
        if frame + 1 < frames:
            wrote[:, frame + 1] = step.text
        if step.codes is not None and 0 <= step.frame < frames:
            voice[:, step.frame] = step.codes
    return wrote, voice


def timeline(sentences: Sequence[Answer], variant: str, quiet: NDArray[Any]) -> tuple[Ints, Ints]:
    """Text [batch, frames] and own codes [batch, frames, books] of sentences, as a variant was taught them."""
    text_shift, own_shift = VARIANTS[variant]
    begin = 30
    frames = begin + max(len(s.codes) for s in sentences) + SHIFT + 10
    text = np.full((len(sentences), frames), PAD, np.int32)
    own = np.stack([np.resize(quiet[40:], (frames, quiet.shape[1])) for _ in sentences]).astype(np.int32)
    own[:, :40] = quiet[:40]
    for row, sentence in enumerate(sentences):
        at = begin + own_shift
        own[row, at : at + len(sentence.codes)] = sentence.codes
        if variant != "no-monologue":
            text[row, begin + text_shift + sentence.tokens[:, 0]] = sentence.tokens[:, 1]
    return text, own


def evaluate(options: argparse.Namespace) -> None:
    """A table of what each variant can do, then one line of JSON."""
    from moshi_mlx.codec.base import make_codec
    from moshi_mlx.models.mimi import MimiConfig
    from moshi_mlx_training.speech.recogniser import Recogniser

    config, tokenizer = read_model(options.model)
    sizes = MimiConfig.from_dict(json.loads((options.model / "mimi_config.json").read_text()))
    codec = make_codec(options.model / "mimi.safetensors", sizes, config.own_q)
    pieces = chosen(Pieces(options.data, tokenizer, "known"), options.topics)
    texts = dialogues.answers()
    mine = sorted({question.answer for question in chosen(Pieces(options.data, tokenizer), options.topics).questions})
    judge = Recogniser([*(texts[i] for i in mine), *mixed()])
    # Hearing costs more than all else: a part of the sentences, evenly taken.
    mine = mine[:: max(1, len(mine) // options.count)][: options.count]
    new = mixed()[:: max(1, len(mixed()) // options.count)][: options.count]
    sentences = {
        "taught": ([texts[i] for i in mine], [pieces.answers[i] for i in mine]),
        "new": (list(new), [spoken(sentence, codec, tokenizer) for sentence in new]),
    }

    def ear(codes: Ints, wanted: str) -> bool:
        pcm = codec.decode(codes.T)
        first, last = trimmed(pcm, 0.02)
        return last > first and judge.right(pcm[first:last], wanted)

    def share(hits: Sequence[bool]) -> float:
        return round(float(np.mean(hits)), 3)

    table: dict[str, dict[str, Any]] = {}
    for variant in options.variants:
        lm = load_weights(options.run / f"{variant}.safetensors", config)
        questions = pieces.questions[: options.count]
        frames = max(BEFORE + len(question.codes) for question in questions) + AFTER
        user = np.stack([question_stream(pieces, question, frames) for question in questions])
        wrote, voice = forced(lm, user)
        row: dict[str, Any] = {
            "answered_text": share([
                dialogues.words(said(tokens, tokenizer)) == dialogues.words(texts[question.answer])
                for tokens, question in zip(wrote, questions, strict=True)
            ]),
            "answered_ear": share([
                ear(codes[BEFORE + question.end :], texts[question.answer])
                for codes, question in zip(voice, questions, strict=True)
            ]),
        }  # fmt: skip
        for name, (wanted, answers) in sentences.items():
            text, own = timeline(answers, variant, pieces.rooms[0])
            room = np.stack([room_codes(pieces, 0, text.shape[1])] * len(answers))
            _, voice = forced(lm, room, text=text)
            row[f"spoke_{name}"] = share(
                [ear(codes[20:], sentence) for codes, sentence in zip(voice, wanted, strict=True)]
            )
            wrote, _ = forced(lm, room, own=own)
            row[f"wrote_{name}"] = share([
                dialogues.words(said(tokens, tokenizer)) == dialogues.words(sentence)
                for tokens, sentence in zip(wrote, wanted, strict=True)
            ])  # fmt: skip
        table[variant] = row
        print(f"{variant:14}" + "  ".join(f"{name} {value:.0%}" for name, value in row.items()), flush=True)
    counts = {"questions": min(options.count, len(pieces.questions)), "taught": len(mine), "new": len(new)}
    print(json.dumps({"benchmark": "ablations", "counts": counts, **table}), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moshi_mlx_training.lm.ablate", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in (("train", "train the variants"), ("evaluate", "compare them, running free")):
        command = commands.add_parser(name, help=purpose)
        command.add_argument("model", type=Path, help="folder with config.json, the tokenizer and the codec")
        command.add_argument("data", type=Path, help="folder that 'lm_data encode' wrote")
        command.add_argument("run", type=Path, help="folder of the variants' weights")
        command.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
        command.add_argument("--topics", nargs="+", default=TOPICS, help=f"what is asked ({' '.join(TOPICS)})")
        if name == "train":
            command.add_argument(
                "--start-from", type=Path, metavar="FILE", help="published weights to begin with (else from nothing)"
            )
            command.add_argument("--minutes", type=float, default=5, help="for the first variant (5)")
            command.add_argument("--steps", type=int, help="steps of every variant (what the first one managed)")
            command.add_argument("--batch", type=int, default=8, help="conversations in a step (8)")
            command.add_argument("--frames", type=int, default=192, help="length of a conversation (192)")
            command.add_argument("--rate", type=float, default=1e-3, help="learning rate, falling to zero (0.001)")
            command.add_argument("--seed", type=int, default=0)
        else:
            command.add_argument("--count", type=int, default=60, help="questions, and sentences of each kind (60)")
    options = parser.parse_args(arguments)
    preload_blas()
    keep_memory()
    mx.set_cache_limit(4 << 30)
    if options.command == "train":
        options.run.mkdir(parents=True, exist_ok=True)
        train(options)
    else:
        evaluate(options)


if __name__ == "__main__":
    main()
