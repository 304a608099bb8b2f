"""What goes into training data: whose voices, which words, what lies between them and the codec.

The default recipe is the one that the model in the package was made with. Every share can be raised alone, so that an
ablation changes one thing. A folder of data is of one recipe, which it holds in ``recipe.json``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moshi_mlx_training.speech import channel, dialogues, morph, sentences, vocabulary, wordings
from moshi_mlx_training.speech.synthesis import (
    ALL_ACCENTS,
    ANSWERING_VOICE,
    ESPEAK_ACCENTS,
    SYNTHESIZERS,
    TRAINING,
    Utterance,
    say,
    speakers,
)

UNKNOWN = -1  # "exchange" of a sentence that no answer belongs to
NO_SECOND = -2  # "second" exchange of a clip with one question or none
FLITE_SHARE = 0.35  # of the users of the first recipe; espeak-ng's voices are many but alike
SHARES = {"flite": 0.3, "festival": 0.25, "espeak": 0.45}  # of the users of all voices, of those that are there
PAUSE = (0.4, 2.0)  # seconds inside a question
UNKNOWN_PAUSE = (0.2, 0.6)  # inside a sentence that may be over: shorter than what the model waits for

Pcm = NDArray[np.float32]


@dataclass(frozen=True)
class Asked:
    """What a clip says: its text, which exchange that is, and the second one where it asks two things."""

    text: str
    exchange: int
    second: int = NO_SECOND


@dataclass(frozen=True)
class Recipe:
    """What goes into a folder of training data.

    Attributes
    ----------
    wordings : ``first`` those of `dialogues`, ``many`` those of `wordings`; ``words`` is no questions but sentences of
        `vocabulary`, for speech to text and text to speech
    voices : ``first`` the speakers that the model in the package was taught with, ``all`` every one there is,
        ``answering`` the model's own voice
    leave_out : synthesizer of which ``all`` takes no voice
    channel : ``first`` a small room and a tilted microphone, ``wide`` all of `channel`, ``both`` one or the other,
        ``none`` sound as it is
    morphed : share of utterances that the vocoder makes somebody else's
    paused : share of clips with a long pause inside
    pairs : share of clips with two questions
    unknown : share of clips that are none of the questions
    """

    wordings: str = "first"
    voices: str = "first"
    leave_out: str = "festival"
    channel: str = "first"
    morphed: float = 0.0
    paused: float = 0.0
    pairs: float = 0.0
    unknown: float = 0.08

    def asked(self, rng: random.Random, power: float) -> Asked:
        """What the next clip says; large topics are likely by ``power`` of their size."""
        if self.wordings == "words":
            return Asked(vocabulary.sentence(rng), UNKNOWN)
        if rng.random() < self.unknown:
            if self.wordings == "many":
                return Asked(wordings.unknown(rng), UNKNOWN)
            return Asked(sentences.sentence(rng), UNKNOWN)
        if self.pairs and rng.random() < self.pairs:
            return Asked(*wordings.ask_two(rng))
        chosen = dialogues.pick(rng, power)
        ask = wordings.ask if self.wordings == "many" else dialogues.ask
        return Asked(ask(chosen, rng), dialogues.exchanges().index(chosen))

    def speaker(self, rng: random.Random) -> str:
        """A voice for a user."""
        if self.voices == "answering":
            return ANSWERING_VOICE
        if self.voices == "first":
            flite = rng.random() < FLITE_SHARE
            return rng.choice([v for v in TRAINING if v != ANSWERING_VOICE and v.startswith("flite/") == flite])
        there = [name for name in SYNTHESIZERS if name != self.leave_out]
        (name,) = rng.choices(there, [SHARES[name] for name in there])
        return rng.choice([v for v in speakers(self.leave_out) if v != ANSWERING_VOICE and v.startswith(f"{name}/")])

    def say(self, text: str, voice: str, rng: np.random.Generator) -> Utterance:
        """A user's sentence."""
        utterance = say(text, voice, rng, ESPEAK_ACCENTS if self.voices == "first" else ALL_ACCENTS)
        if self.morphed and rng.random() < self.morphed:
            return morph.morphed(utterance, morph.draw(rng, len(utterance.words)), rng)
        return utterance

    def pause(self, asked: Asked, rng: np.random.Generator) -> tuple[int, float] | None:
        """Before which word a speaker stops, and for how many seconds; None mostly."""
        if not self.paused or rng.random() >= self.paused:
            return None
        places = wordings.pauses(asked.text)
        if not places:
            return None
        seconds = rng.uniform(*(UNKNOWN_PAUSE if asked.exchange == UNKNOWN else PAUSE))
        return int(rng.choice(places)), float(seconds)


FIRST = Recipe()
_CHOICES = {"wordings": ("first", "many", "words"), "voices": ("first", "all", "answering"),
            "channel": ("first", "wide", "both", "none"), "leave_out": ("festival", "espeak")}  # fmt: skip
_HELP = {
    "wordings": "how questions are worded: as in dialogues.py, or in all ways of wordings.py; words: other sentences",
    "voices": "users' voices: those of the model in the package, all, or the answering voice",
    "leave_out": "synthesizer of which no voice is taken, to judge by",
    "channel": "between mouth and codec: small rooms and tilted microphones, telephones too, both in turn, or nothing",
    "morphed": "share of utterances that a vocoder makes somebody else's (needs pyworld)",
    "paused": "share of clips with a long pause inside",
    "pairs": "share of clips with two questions",
    "unknown": "share of clips that are none of the questions",
}


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """The options of a recipe, or those of these ``names``; their defaults are those of ``FIRST``."""
    for field in fields(Recipe):
        if names and field.name not in names:
            continue
        option, default = "--" + field.name.replace("_", "-"), getattr(FIRST, field.name)
        if field.name in _CHOICES:
            parser.add_argument(
                option, choices=_CHOICES[field.name], default=default, help=f"{_HELP[field.name]} ({default})"
            )
        else:
            parser.add_argument(
                option, type=share, default=default, metavar="SHARE", help=f"{_HELP[field.name]} ({default:g})"
            )


def share(text: str) -> float:
    """A share between 0 and 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return value


def from_options(options: argparse.Namespace) -> Recipe:
    """The recipe that was asked for."""
    return Recipe(**{f.name: getattr(options, f.name) for f in fields(Recipe) if hasattr(options, f.name)})


def hold(folder: Path, recipe: Recipe) -> None:
    """Write the recipe of a folder, or check that it is the one that its data was made with.

    Raises
    ------
    ValueError : the folder's data is of another recipe
    """
    path = folder / "recipe.json"
    if path.exists():
        stored = Recipe(**json.loads(path.read_text(encoding="utf-8")))
    elif any(folder.glob("*.pcm*")):
        stored = FIRST  # made before recipes were written
    else:
        stored = recipe
    if stored != recipe:
        different = ", ".join(
            f"--{name.replace('_', '-')} {value}"
            for name, value in asdict(stored).items()
            if asdict(recipe)[name] != value
        )
        raise ValueError(f"{folder} holds data of another recipe ({different}): name an empty folder, or those options")
    path.write_text(json.dumps(asdict(recipe), indent=1) + "\n", encoding="utf-8")


def channels(name: str) -> Callable[[Pcm, np.random.Generator], Pcm]:
    """What ``--channel`` puts between a mouth and the codec."""
    if name == "wide":
        return channel.through
    from moshi_mlx_training.codec.data import through_microphone

    return through_microphone
