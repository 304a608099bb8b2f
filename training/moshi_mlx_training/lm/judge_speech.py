"""How well a model writes down what it hears, or says what it is given: by the synthesizers' own words and times.

    M=training/models
    python -m moshi_mlx_training.lm.judge_speech $M/small-stt runs/judge --weights runs/stt/train/lm.safetensors
    python -m moshi_mlx_training.lm.judge_speech $M/small-tts runs/judge --weights runs/tts/train/lm.safetensors

The model runs as in the program, on sentences of `speech.vocabulary` that training did not have. What was spoken is
kept in the folder. Speech to text: errors by 100 words, and how far the start of each word that was written rightly is
from the synthesizer's; ``known`` are speakers of training, ``held`` speakers that were left out, ``unheard`` a
synthesizer that was. Text to speech: pocketsphinx, with the words of all the sentences in any order as its grammar,
hears the voice, and the originals beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.checkpoint.resolve import resolve
from moshi_mlx.codec.base import make_codec
from moshi_mlx.config import ModelConfig
from moshi_mlx.engine.text import TextTokenizer
from moshi_mlx.models.mimi import MimiConfig
from moshi_mlx.tasks import TASKS
from moshi_mlx.tasks.speak import TextToSpeech
from moshi_mlx.tasks.transcribe import SpeechToText
from moshi_mlx_training.lm.data import FRAME, split_flat, spoken_clip, write_set
from moshi_mlx_training.lm.evaluate import load_weights
from moshi_mlx_training.lm.train import preload_blas
from moshi_mlx_training.speech.dialogues import words
from moshi_mlx_training.speech.recipe import Recipe
from moshi_mlx_training.speech.synthesis import HELD_OUT, SAMPLE_RATE, SpeechUnavailable, spans, unheard

Pcm = NDArray[np.float32]
GROUPS = ("known", "held", "unheard")
HEARD = Recipe(wordings="words", voices="all")
SAID = Recipe(wordings="words", voices="answering", channel="none")


def matched(wanted: Sequence[str], found: Sequence[str]) -> tuple[int, list[tuple[int, int]]]:
    """The fewest words to change, leave out or put in, and the pairs (wanted, found) of those that are right."""
    cost = np.zeros((len(wanted) + 1, len(found) + 1), np.int32)
    cost[:, 0], cost[0] = np.arange(len(wanted) + 1), np.arange(len(found) + 1)
    for i, one in enumerate(wanted, start=1):
        for j, other in enumerate(found, start=1):
            cost[i, j] = min(cost[i - 1, j - 1] + (one != other), cost[i - 1, j] + 1, cost[i, j - 1] + 1)
    i, j, pairs = len(wanted), len(found), list[tuple[int, int]]()
    while i and j:
        same = wanted[i - 1] == found[j - 1]
        if cost[i, j] == cost[i - 1, j - 1] + (not same):
            i, j = i - 1, j - 1
            if same:
                pairs.append((i, j))
        elif cost[i, j] == cost[i - 1, j] + 1:
            i -= 1
        else:
            j -= 1
    return int(cost[-1, -1]), pairs[::-1]


def load(folder: Path, weights: Path) -> SpeechToText | TextToSpeech:
    """The model of a folder with weights of a checkpoint of the trainer, or of an exported file."""
    config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    small = resolve("small")  # whose codec they share
    assert small.mimi is not None and small.mimi_config is not None and config.tokenizer_name is not None
    sizes = MimiConfig.from_dict(json.loads(small.mimi_config.read_text(encoding="utf-8")))
    codec = make_codec(small.mimi, sizes, max(config.lm.own_q, config.lm.user_q))
    model = TASKS[config.model_type](
        config, load_weights(weights, config.lm), codec, TextTokenizer(folder / config.tokenizer_name), name=folder.name
    )
    if not isinstance(model, SpeechToText | TextToSpeech):
        raise SystemExit(f"{folder} is a model for {model.purpose}: judge it with lm.judge")
    return model


def sentences(folder: Path, group: str, count: int) -> list[tuple[str, Pcm, NDArray[np.float32]]]:
    """Text, pcm [samples] and the start of each word in seconds of the sentences of a group, spoken if need be."""
    path = folder / f"speech_{group}.pcm.npz"

    def make(rng: random.Random, noise: np.random.Generator) -> dict[str, Any]:
        recipe = SAID if group == "said" else HEARD
        voices = {"held": HELD_OUT, "unheard": unheard()}.get(group)
        return spoken_clip(recipe.asked(rng, 1.0), rng.choice(voices) if voices else recipe.speaker(rng), noise, recipe)

    if not path.exists() or len(np.load(path)["end"]) < count:
        folder.mkdir(parents=True, exist_ok=True)
        write_set(path, count, make)
    with np.load(path) as stored:
        clips = split_flat(stored["data"], stored["count"])
        starts = split_flat(stored["starts"], stored["word_count"])
        texts = [str(text) for text in stored["text"]]
    sound = [clip.astype(np.float32) / np.float32(32768) for clip in clips]
    return list(zip(texts, sound, starts, strict=True))[:count]


def judge_heard(model: SpeechToText, given: Sequence[tuple[str, Pcm, NDArray[np.float32]]]) -> dict[str, Any]:
    """Word errors and errors of word starts, in milliseconds."""
    began = time.perf_counter()
    results = model.transcribe_all(pcm.reshape(-1, FRAME) for _, pcm, _ in given)
    errors, count, late = 0, 0, list[float]()
    for (text, _, starts), result in zip(given, results, strict=True):
        wanted = [text[a:b].lower() for a, b in spans(text)]
        found = [(word.text.strip().strip(".,?!").lower(), word.start) for word in result.words]
        wrong, pairs = matched(wanted, [name for name, _ in found])
        errors, count = errors + wrong, count + len(wanted)
        late += [1e3 * (found[j][1] - float(starts[i])) for i, j in pairs]
    off = np.abs(late) if late else np.array([np.nan])
    return {
        "words": count,
        "word_error_rate": round(errors / count, 4),
        "start_ms": {"p50": round(float(np.median(off))), "p95": round(float(np.quantile(off, 0.95)))},
        "start_bias_ms": round(float(np.median(late))) if late else None,
        "times_real_time": round(sum(len(p) for _, p, _ in given) / SAMPLE_RATE / (time.perf_counter() - began), 1),
    }


class WordEar:
    """pocketsphinx with a grammar of these words, any number of them in any order."""

    def __init__(self, texts: Sequence[str]) -> None:
        from moshi_mlx_training.speech.recogniser import Recogniser

        names = sorted({word for text in texts for word in words(text)})
        self.ear = Recogniser(names)
        self.ear.decoder.add_jsgf_string(
            "words", f"#JSGF V1.0; grammar words; public <any> = ( {' | '.join(names)} )+ ;"
        )
        self.ear.decoder.activate_search("words")

    def right(self, text: str, pcm: Pcm) -> int:
        """How many of the words of a text are heard in pcm [samples] at 24 kHz, in their order."""
        return len(matched(words(text), self.ear.hear(pcm).split())[1])


def judge_said(model: TextToSpeech, given: Sequence[tuple[str, Pcm, NDArray[np.float32]]]) -> dict[str, Any]:
    """Shares of the words that are heard in the model's voice and in the originals."""
    ear = WordEar([text for text, _, _ in given])
    count = said = original = 0
    frames, taken = 0, 0.0
    for text, pcm, _ in given:
        speech = model.speak(text)
        frames += len(speech.pcm) // FRAME
        taken += speech.seconds_computed
        count += len(words(text))
        said += ear.right(text, speech.pcm)
        original += ear.right(text, pcm)
    return {
        "words": count,
        "heard": round(said / count, 4),
        "heard_of_originals": round(original / count, 4),
        "ms_a_frame": round(1e3 * taken / max(1, frames), 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moshi_mlx_training.lm.judge_speech", description=__doc__.split("\n")[0]
    )
    parser.add_argument("model", type=Path, help="folder with config.json and the tokenizer")
    parser.add_argument("folder", type=Path, help="where the spoken sentences are kept")
    parser.add_argument("--weights", type=Path, help="a checkpoint, or a published file (the model's)")
    parser.add_argument("--count", type=int, default=200, help="sentences of each group (200)")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="of speech to text")
    options = parser.parse_args(arguments)
    preload_blas()
    model = load(options.model, options.weights or options.model / "model.safetensors")
    figures: dict[str, Any] = {}
    if isinstance(model, TextToSpeech):
        figures["said"] = found = judge_said(model, sentences(options.folder, "said", options.count))
        print(
            f"heard {found['heard']:.1%} of {found['words']} words, of the originals' {found['heard_of_originals']:.1%}"
        )
    else:
        for group in options.groups:
            try:
                given = sentences(options.folder, group, options.count)
            except SpeechUnavailable as error:
                print(f"{group}: left out ({error})")
                continue
            figures[group] = found = judge_heard(model, given)
            print(
                f"{group:8} WER {found['word_error_rate']:6.1%} of {found['words']} words, starts off by "
                f"{found['start_ms']['p50']} ms (median), {found['start_ms']['p95']} ms (p95)",
                flush=True,
            )
    print(json.dumps({"benchmark": "judge_speech", "model": model.name, "count": options.count, **figures}))


if __name__ == "__main__":
    main()
