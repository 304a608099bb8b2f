"""Sentences of some thousands of words, by grammar and at random: they teach sounds rather than sentences.

    python -m moshi_mlx_training.speech.vocabulary /usr/share/wordnet

writes ``words.txt`` again: the commonest words of WordNet's example sentences, each with what it can be in a sentence
(n noun, N plural, v verb, z its third person, d its past, g its -ing, a adjective, r adverb). WordNet is free for any
use (Debian's package wordnet-base). The words of the questions and answers and of `sentences` are added when read.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, islice
from pathlib import Path

from moshi_mlx_training.speech import dialogues, sentences, wordings

COMMON = 3000  # words from WordNet
_FILE = Path(__file__).with_name("words.txt")
_LEVEL = 60  # how far down the list words are still about as likely as the first
_DETERMINERS = "the the the a this that my your his her our their some every no each another".split()
_PREPOSITIONS = (
    "in on at by for with about against between into through during before after above below to from up down over "
    "under near behind without across along inside outside beside"
).split()
_PRONOUNS = "i you he she it we they".split()
_JOINING = "and but or because when if while so although until where that".split()
_AUXILIARIES = "can will would could should must may might did does do cannot".split()
# What the classes of words are put into; a word in braces is drawn from its class.
_PATTERNS = (
    "{det} {n} {d} {det} {a} {n}.",
    "{pro} {aux} {v} {det} {n} {prep} {det} {n}.",
    "{det} {a} {n} {z} {prep} {det} {n}.",
    "{aux} {pro} {v} {det} {n}?",
    "{pro} {d} {r}, {join} {pro} {d} {det} {N}.",
    "{N} {aux} {v} {a} {N} {prep} {N}.",
    "{det} {n} of {N} was {a} and {a}.",
    "{n}, {n}, {n} and {n}.",
    "why {aux} {det} {n} {v}?",
    "{join} {pro} {v} {det} {n}, {pro} {aux} {v} it {r}.",
    "they were {g} {prep} {det} {n}.",
    "{r}, {pro} {d} to {v} {det} {a} {n}.",
    "there is {det} {a} {n} {prep} the {n}.",
    "{v} the {n} {prep} your {n}.",
    "{g} {N} is {a}.",
    "what {d} {det} {n} {prep} {N}?",
)
_HARSH = re.compile(r"(sex|rape|fuck|shit|nigg|whore|slut|bitch|bastard|penis|vagina|pussy|cunt|dick$|tits|fag)")


@cache
def tagged() -> dict[str, str]:
    """What each word of ``words.txt`` can be, the commonest first."""
    lines = [line for line in _FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {word: tags for word, _, tags in (line.partition(" ") for line in lines)}


@cache
def words() -> tuple[str, ...]:
    """Every word that is said: those of ``words.txt``, then those of questions, answers and `sentences`."""
    out = dict.fromkeys(tagged())
    for text in (*dialogues.answers(), *dialogues.questions(), " ".join(wordings.all_words()), *sentences.words()):
        out.update(dict.fromkeys(word.lower() for word in re.findall(r"[A-Za-z]+(?:'[A-Za-z]+)*", text)))
    return tuple(out)


@cache
def _classes() -> dict[str, list[str]]:
    out: dict[str, list[str]] = {
        "det": _DETERMINERS,
        "prep": _PREPOSITIONS,
        "pro": _PRONOUNS,
        "join": _JOINING,
        "aux": _AUXILIARIES,
    }
    for word, tags in tagged().items():
        for tag in tags:
            out.setdefault(tag, []).append(word)
    return out


@cache
def _weights() -> list[float]:
    return list(accumulate((rank + _LEVEL) ** -0.5 for rank in range(len(words()))))


def _sequence(rng: random.Random) -> str:
    """Three to twelve words without sense."""
    chosen = rng.choices(words(), cum_weights=_weights(), k=rng.randint(3, 12))
    parts = [word + ("," if rng.random() < 0.1 else "") for word in chosen[:-1]]
    return " ".join([*parts, chosen[-1]]) + rng.choice("...?")


def _patterned(rng: random.Random) -> str:
    classes = _classes()
    text = re.sub(r"\{(\w+)\}", lambda match: rng.choice(classes[match[1]]), rng.choice(_PATTERNS))
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def sentence(rng: random.Random) -> str:
    """One sentence: at random, by grammar, or one that the built-in model would hear or say; never an invented word."""
    kind = rng.random()
    if kind < 0.4:
        text = _sequence(rng)
    elif kind < 0.75:
        text = _patterned(rng)
    elif kind < 0.87:
        text = sentences.sentence(rng, invented=False)
    elif kind < 0.95:
        return dialogues.ask(dialogues.pick(rng), rng)
    else:
        return rng.choice(dialogues.answers())
    text = re.sub(r"\bi\b", "I", text)
    return text[0].upper() + text[1:]


def _common(wordnet: Path, count: int) -> dict[str, str]:
    """The commonest words of WordNet's examples and what they can be."""
    seen: Counter[str] = Counter()
    base: dict[str, set[str]] = {"n": set(), "v": set(), "a": set(), "r": set()}
    for part in ("noun", "verb", "adj", "adv"):
        for line in (wordnet / f"data.{part}").read_text("latin-1").splitlines():
            if not line.startswith("  "):
                for example in re.findall(r'"([^"]+)"', line.partition("|")[2]):
                    seen.update(re.findall(r"[a-z]+(?:'[a-z]+)?", example.lower()))
    for line in (wordnet / "cntlist.rev").read_text("latin-1").splitlines():  # senses in use: no rare readings
        key, _, uses = line.split()
        lemma, _, sense = key.partition("%")
        if int(uses) >= 2:
            base["_nvara"[int(sense[0])]].add(lemma)
    irregular = {"v": dict[str, str](), "n": dict[str, str]()}
    for part, tag in (("verb", "v"), ("noun", "n")):
        for line in (wordnet / f"{part}.exc").read_text("latin-1").splitlines():
            form, *lemmas = line.split()
            irregular[tag][form] = lemmas[0]

    def stems(word: str, ending: str) -> set[str]:
        if not word.endswith(ending):
            return set()
        stem = word.removesuffix(ending)
        found = {stem, stem + "e"} if ending != "s" else {stem, word.removesuffix("es")}
        if stem.endswith(("i", "ie")):
            found.add(stem.removesuffix("e").removesuffix("i") + "y")
        return found | ({stem[:-1]} if len(stem) > 2 and stem[-1] == stem[-2] else set())

    def tags(word: str) -> str:
        out = {tag for tag, lemmas in base.items() if word in lemmas}
        if stems(word, "s") & base["n"] or irregular["n"].get(word) in base["n"]:
            out.add("N")
        for ending, tag in (("s", "z"), ("ed", "d"), ("ing", "g")):
            if stems(word, ending) & base["v"]:
                out.add(tag)
        if irregular["v"].get(word) in base["v"]:
            out.add("g" if word.endswith("ing") else "d")
        return "".join(sorted(out))

    usable = (word for word, _ in seen.most_common() if len(word) > 1 or word in "ai")
    found = ((word, tags(word)) for word in usable if not _HARSH.search(word))
    return dict(islice(((word, kinds) for word, kinds in found if kinds or seen[word] > 60), count))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moshi_mlx_training.speech.vocabulary")
    parser.add_argument("wordnet", type=Path, help="folder with WordNet's data files")
    options = parser.parse_args(arguments)
    lines = [f"{word} {tags}".rstrip() for word, tags in _common(options.wordnet, COMMON).items()]
    head = "# From the examples of WordNet 3.0, Copyright 2006 by Princeton University. See vocabulary.py."
    _FILE.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    print(f"{_FILE}: {len(lines)} words")


if __name__ == "__main__":
    main()
