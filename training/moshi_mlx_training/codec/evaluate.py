"""What the codec keeps of speech it never saw: sentences, renderings and speakers that are not in training.

    python -m moshi_mlx_training.codec.evaluate runs/codec/codec.pt

For the answering voice (answers; new sentences), known speakers (questions) and held-out speakers (questions):
mel distance, STOI (of sentences with 0.4 s of speech or more), PESQ-WB, phones read off the semantic codebook, and
sentences recognised in the original and in the resynthesized sound. Everything is drawn from a seed that training does
not use; the whole set repeats exactly.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from moshi_mlx_training.checkpoint import load_model
from moshi_mlx_training.codec.data import FRAME_SAMPLES
from moshi_mlx_training.codec.losses import mel_distance
from moshi_mlx_training.codec.mimi_torch import Mimi
from moshi_mlx_training.speech import dialogues, sentences
from moshi_mlx_training.speech.recogniser import Recogniser
from moshi_mlx_training.speech.synthesis import ANSWERING_VOICE, HELD_OUT, SAMPLE_RATE, TRAINING, resample, say

_SEED = 777_000
_LEAD = 6 * FRAME_SAMPLES  # silence before each sentence


@dataclass(frozen=True)
class Item:
    """One sentence to resynthesize; ``judge`` names the grammar that may hear it, if any."""

    group: str
    voice: str
    text: str
    judge: str | None


def items(count: int) -> list[Item]:
    """``count`` items of each of the four groups, always the same ones."""
    rng = random.Random(_SEED)
    answers = list(dialogues.answers())
    rng.shuffle(answers)
    known = [v for v in TRAINING if v != ANSWERING_VOICE]
    out = [Item("answers", ANSWERING_VOICE, text, "answers") for text in answers[:count]]
    for group, voices in (("known speakers", known), ("held-out speakers", list(HELD_OUT))):
        for index in range(count):
            voice = voices[index % len(voices)] if group.startswith("held") else rng.choice(voices)
            out.append(Item(group, voice, rng.choice(dialogues.questions()), "questions"))
    for _ in range(count):
        out.append(Item("answering voice, new sentences", ANSWERING_VOICE, sentences.sentence(rng), None))
    return out


def render(item: Item, index: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """(pcm [frames * 1920], phone labels [frames * 2]): the sentence between two silences."""
    utterance = say(item.text, item.voice, np.random.default_rng([_SEED, index]))
    frames = -(-(_LEAD + len(utterance.pcm)) // FRAME_SAMPLES) + 3
    pcm = np.zeros(frames * FRAME_SAMPLES, np.float32)
    pcm[_LEAD : _LEAD + len(utterance.pcm)] = utterance.pcm
    return pcm, utterance.labels(2 * frames, _LEAD / SAMPLE_RATE)


def measure(original: NDArray[np.float32], copy: NDArray[np.float32]) -> dict[str, float]:
    """Distances between two recordings [samples] at 24 kHz; no ``stoi`` where there is too little speech for one."""
    from pesq import pesq
    from pystoi import stoi

    with torch.no_grad():
        mel = float(mel_distance(torch.from_numpy(copy)[None], torch.from_numpy(original)[None]))
    a, b = resample(original, SAMPLE_RATE, 16000), resample(copy, SAMPLE_RATE, 16000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # under 0.4 s of speech it warns and gives 1e-5, which is no measurement
        intelligible = float(stoi(a, b, 16000))
    figures = {"mel": mel, "pesq": float(pesq(16000, a, b, "wb"))}
    return figures if intelligible <= 1e-5 else figures | {"stoi": intelligible}


@torch.no_grad()
def evaluate(
    model: Mimi, count: int, judged: bool = True, wav_folder: Path | None = None, group: str = ""
) -> dict[str, dict[str, float]]:
    """Mean of every figure for every group whose name begins with ``group``."""
    judges = (
        {"answers": Recogniser(dialogues.answers()), "questions": Recogniser(dialogues.questions())} if judged else {}
    )
    sums: dict[str, dict[str, list[float]]] = {}
    for index, item in enumerate(items(count)):
        if not item.group.startswith(group):
            continue
        pcm, labels = render(item, index)
        codes = model.encode(torch.from_numpy(pcm)[None, None])
        copy = model.decode(codes)[0, 0].numpy()
        phones = model.phones(model.first.decode(codes[0, :1].T), 1)[0].argmax(-1).flatten().numpy()
        spoken = labels > 0
        figures = measure(pcm, copy)
        figures["phones"] = float((phones == labels).mean())
        figures["phones_in_speech"] = float((phones == labels)[spoken].mean())
        if item.judge in judges:
            judge = judges[item.judge]
            figures["recognised_original"] = float(judge.right(pcm, item.text))
            figures["recognised"] = float(judge.right(copy, item.text))
        print(f"{index + 1}/{4 * count}", end="\r", file=sys.stderr, flush=True)
        for name, value in figures.items():
            sums.setdefault(item.group, {}).setdefault(name, []).append(value)
        if wav_folder is not None and index % count < 4:
            import soundfile

            wav_folder.mkdir(parents=True, exist_ok=True)
            soundfile.write(wav_folder / f"{item.group.split(',')[0].replace(' ', '-')}-{index}.wav", copy, SAMPLE_RATE)
    return {group: {n: round(float(np.mean(v)), 4) for n, v in f.items()} for group, f in sums.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moshi_mlx_training.codec.evaluate", description=__doc__.split("\n")[0]
    )
    parser.add_argument("checkpoint", type=Path, help="codec.pt or finetuned.pt")
    parser.add_argument("--count", type=int, default=100, help="sentences of each of the four groups (100)")
    parser.add_argument("--group", default="", help="only groups whose names begin so: answers, known, held-out")
    parser.add_argument("--no-judge", action="store_true", help="leave out the recogniser")
    parser.add_argument("--wav", type=Path, help="write a few resynthesized sentences to this folder")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began = time.monotonic()
    table = evaluate(load_model(options.checkpoint), options.count, not options.no_judge, options.wav, options.group)
    for group, figures in table.items():
        print(f"{group}: " + "  ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)
    print(json.dumps({"figures": table, "count": options.count, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
