"""How well a model hears what it was never taught: other words, another synthesizer, pauses, and what it cannot know.

    python -m moshi_mlx_training.lm.judge moshi_mlx/builtin/small runs/judge --count 200

Speaks the questions, encodes them with the model's own codec (no PyTorch) and lets the model answer, running free. What
was spoken and encoded is kept in the folder, for the next model. Every group is said by speakers of training and by a
synthesizer that training leaves out:

``taught``    questions as they are in dialogues.py
``more``      in all ways that may be taught (``--wordings many``): short forms, politeness, fillers, false starts
``held out``  in patterns that are never taught (`wordings.HELD_OUT`)
``pairs``     two questions at once: both are to be answered
``none``      sentences that are none of the questions, of kinds that are never taught
``paused``    questions with 0.4 to 2 s of silence inside
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moshi_mlx.engine.generator import GenerationConfig
from moshi_mlx.models.sampling import GREEDY
from moshi_mlx_training.lm import evaluate
from moshi_mlx_training.lm.data import encode_set, library_codec, speak_answers, speak_rooms, spoken_clip, write_set
from moshi_mlx_training.lm.dialogue import Pieces, Question
from moshi_mlx_training.lm.train import preload_blas, read_model
from moshi_mlx_training.speech import dialogues, wordings
from moshi_mlx_training.speech.recipe import UNKNOWN, Asked, Recipe
from moshi_mlx_training.speech.synthesis import SpeechUnavailable, unheard

SPEAKERS = ("known", "unheard")


def _question(ask: Callable[[dialogues.Exchange, random.Random], str]) -> Callable[[random.Random], Asked]:
    def asked(rng: random.Random) -> Asked:
        chosen = dialogues.pick(rng)
        return Asked(ask(chosen, rng), dialogues.exchanges().index(chosen))

    return asked


def _pausable(rng: random.Random) -> Asked:
    while True:
        asked = _question(dialogues.ask)(rng)
        if wordings.pauses(asked.text):
            return asked


GROUPS: dict[str, Callable[[random.Random], Asked]] = {
    "taught": _question(dialogues.ask),
    "more": _question(wordings.ask),
    "held out": _question(lambda exchange, rng: wordings.ask(exchange, rng, held=True)),
    "pairs": lambda rng: Asked(*wordings.ask_two(rng)),
    "none": lambda rng: Asked(wordings.unknown(rng, held=True), UNKNOWN),
    "paused": _pausable,
}


def set_name(group: str, speaker: str, left_out: str) -> str:
    """The name of a set in the folder."""
    return f"{group.replace(' ', '_')}-{speaker}" + (f"_{left_out}" if speaker == "unheard" else "")


def speak(folder: Path, group: str, speaker: str, count: int, left_out: str = "festival") -> None:
    """Write the set of one group by one kind of speakers, unless it is there and large enough."""
    path = folder / f"{set_name(group, speaker, left_out)}.pcm.npz"
    if path.exists():
        with np.load(path) as stored:
            if len(stored["end"]) >= count:
                return
    recipe = Recipe(paused=float(group == "paused"))

    def make(rng: random.Random, noise: np.random.Generator) -> dict[str, Any]:
        asked = GROUPS[group](rng)
        voice = recipe.speaker(rng) if speaker == "known" else rng.choice(unheard(left_out))
        return spoken_clip(asked, voice, noise, recipe)

    write_set(path, count, make)
    path.with_name(path.name.replace(".pcm", "")).unlink(missing_ok=True)  # codes of a smaller set


def by_pattern(questions: Sequence[Question], wrong: Sequence[tuple[str, str, str]]) -> dict[str, list[int]]:
    """Of every held-out pattern, how many wordings were answered rightly, and how many there were."""
    missed, out = [text for text, _, _ in wrong], dict[str, list[int]]()
    for question in questions:
        counts = out.setdefault(wordings.pattern(question.text) or "", [0, 0])
        counts[1] += 1
        if question.text in missed:
            missed.remove(question.text)
        else:
            counts[0] += 1
    return dict(sorted(out.items()))


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures as people read them; a range is of 95 %, for chance alone."""
    lines = [f"{'':22}{'right':>16}{'too early':>12}{'silent':>9}{'count':>8}"]
    for name, found in figures.items():
        if "right" in found:
            chance = 196 * (found["right"] * (1 - found["right"]) / found["count"]) ** 0.5
            lines.append(
                f"{name:22}{100 * found['right']:8.1f} ± {chance:.1f} %{100 * found['too_early']:10.1f} %"
                f"{100 * (1 - found['spoke']):7.1f} %{found['count']:8}"
            )
        else:
            share = found["silent" if "silent" in found else "stopped"]
            lines.append(f"{name:22}{100 * share:14.1f} %{'':21}{found['trials']:8}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moshi_mlx_training.lm.judge", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder with config.json, tokenizer and codec")
    parser.add_argument("data", type=Path, help="folder for what is spoken and encoded; what is there is kept")
    parser.add_argument("--weights", type=Path, help="language model to judge (the folder's own)")
    parser.add_argument("--count", type=int, default=200, help="clips of each group and kind of speakers (200)")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="which of them (all)")
    parser.add_argument("--leave-out", choices=("festival", "espeak"), default="festival", help="synthesizer unheard")
    parser.add_argument("--batch", type=int, default=100, help="conversations at once (100)")
    parser.add_argument("--wrong", type=int, default=0, help="how many wrong answers of each to print (0)")
    parser.add_argument("--no-rest", action="store_true", help="leave out silence and interruptions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the line of figures to this file, too")
    options = parser.parse_args(arguments)
    preload_blas()
    options.data.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    names = {f"{group}, {speaker}": (group, speaker) for group in options.groups for speaker in SPEAKERS}
    try:
        speak_answers(options.data)
        for group, speaker in names.values():
            speak(options.data, group, speaker, options.count, options.leave_out)
    except SpeechUnavailable as error:
        parser.error(str(error))
    speak_rooms(options.data)
    spoken = time.monotonic()
    encode, digest = library_codec(options.model)
    sets = {name: set_name(*pair, options.leave_out) for name, pair in names.items()}
    for stored in ("answers", "rooms", *sets.values()):
        encode_set(options.data, stored, encode, digest)
    encoded = time.monotonic()
    config, tokenizer = read_model(options.model)
    lm = evaluate.load_weights(options.weights or options.model / "model.safetensors", config)
    settings = GenerationConfig(text=GREEDY, audio=GREEDY)
    figures: dict[str, dict[str, Any]] = {}
    for name, stored in sets.items():
        pieces = Pieces(options.data, tokenizer, stored)
        report = evaluate.answers(lm, tokenizer, pieces, settings, options.count, None, options.batch)
        figures[name] = {**report.figures, "count": min(options.count, len(pieces.questions))}
        if names[name][0] == "held out":
            figures[name]["by_pattern"] = by_pattern(pieces.questions[: options.count], report.wrong)
        for question, wanted, reply in report.wrong[: options.wrong]:
            print(f"  {name}: {question!r}: {wanted!r}, but said {reply!r}", flush=True)
        print(f"{name}: {100 * report.figures['right']:.1f} %, {time.monotonic() - began:.0f} s", flush=True)
    if not options.no_rest:
        pieces = Pieces(options.data, tokenizer, next(iter(sets.values())))
        figures["silence"] = evaluate.silence(lm, tokenizer, pieces, settings, options.batch)
        figures["interruption"] = evaluate.interruptions(lm, tokenizer, pieces, settings, options.count, options.batch)
    print(table(figures))
    seconds = {"speaking": spoken - began, "encoding": encoded - spoken, "answering": time.monotonic() - encoded}
    line = {
        "weights": str(options.weights or options.model),
        "codec": digest,
        "leave_out": options.leave_out,
        "seconds": {name: round(value) for name, value in seconds.items()},
        "figures": figures,
    }
    print(json.dumps(line), flush=True)
    if options.json is not None:
        with open(options.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
