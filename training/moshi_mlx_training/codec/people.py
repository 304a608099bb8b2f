"""What the codec keeps of people: phones read off its semantic codes, and STOI of its copies.

To judge by, never to train.

    apt install pocketsphinx-testdata alsa-utils
    python -m moshi_mlx_training.codec.people moshi_mlx/builtin/small

Debian's packages carry a minute of people under free licences: playing cards, commands, a page of a novel, the names of
loudspeakers. A recogniser that is told the words says when each phone was spoken. Which phone a code stands for is
counted on synthetic speech: the semantic code of a frame is read alone, as the trained head for phones reads it. The
same is measured on synthetic speech by speakers of training and by a synthesizer that training leaves out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_mlx_training.speech import dialogues, sentences
from moshi_mlx_training.speech.recipe import FIRST
from moshi_mlx_training.speech.recogniser import RATE
from moshi_mlx_training.speech.synthesis import (
    LEVEL_DB,
    PHONE_INDEX,
    PHONES,
    SAMPLE_RATE,
    SpeechUnavailable,
    Utterance,
    resample,
    say,
    unheard,
)

SPHINX, ALSA = Path("/usr/share/pocketsphinx/test/data"), Path("/usr/share/sounds/alsa")
FRAME = 1920
LEAD = 6  # frames of silence before each recording
# The recogniser has one phone for both.
_SAME = np.arange(len(PHONES))
_SAME[PHONE_INDEX["ax"]] = PHONE_INDEX["ah"]


@dataclass(frozen=True)
class Recording:
    """Somebody's speech, and what is said."""

    path: Path
    text: str

    def read(self) -> NDArray[np.float32]:
        """pcm [samples], 24 kHz, ``LEVEL_DB`` loud; .raw files hold 16-bit samples at 16 kHz."""
        import soundfile

        if self.path.suffix == ".raw":
            samples, rate = np.fromfile(self.path, "<i2") / 32768, RATE
        else:
            samples, rate = soundfile.read(self.path, dtype="float32")
            samples = samples if samples.ndim == 1 else samples.mean(1)
        pcm = resample(samples, rate)
        return np.clip(pcm * np.float32(10 ** (LEVEL_DB / 20) / max(1e-4, float(np.sqrt(np.mean(pcm**2))))), -1, 1)


def recordings(sphinx: Path = SPHINX, alsa: Path = ALSA) -> list[Recording]:
    """The recordings of people that are on this machine."""
    found = [
        Recording(sphinx / "goforward.raw", "go forward ten meters"),
        Recording(sphinx / "tidigits" / "dhd.2934z.raw", "two nine three four zero"),
    ]
    for folder, listed in (("cards", "cards.transcription"), ("librivox", "transcription")):
        path = sphinx / folder / listed
        for line in path.read_text().splitlines() if path.exists() else ():
            text, _, name = line.rpartition(" (")
            spoken = text.replace("<s>", "").replace("</s>", "").split()
            found.append(Recording(path.parent / f"{name.strip(' )')}.wav", " ".join(spoken)))
    for path in sorted(alsa.glob("*_*.wav")):
        found.append(Recording(path, path.stem.replace("_", " ").lower()))
    return [one for one in found if one.path.exists()]


def aligned(pcm: NDArray[np.float32], text: str) -> Utterance:
    """The phones of pcm [samples] at 24 kHz, whose words are known, by a recogniser.

    Raises
    ------
    ValueError : the recogniser finds no way to say these words in this sound
    """
    from pocketsphinx import Decoder

    decoder = Decoder(loglevel="FATAL", samprate=RATE, lm=None, bestpath=False)
    narrow = resample(pcm, SAMPLE_RATE, RATE)
    # Without noise at -60 dB digital silence misleads it.
    narrow = narrow + 1e-3 * np.random.default_rng(0).standard_normal(len(narrow)).astype(np.float32)
    data = (np.clip(narrow, -1, 1) * 32767).astype(np.int16).tobytes()
    try:
        decoder.set_align_text(" ".join(dialogues.words(text)))
    except RuntimeError:
        raise ValueError(f"the recogniser does not know every word of {text!r}") from None
    for phones in (False, True):  # words first, then phones inside them; asked for words then, it crashes
        if phones:
            decoder.set_alignment()
        decoder.start_utt()
        decoder.process_raw(data, full_utt=True)
        decoder.end_utt()
        if not phones and decoder.hyp() is None:
            raise ValueError(f"the recogniser does not hear {text!r} in it")
    found: list[tuple[str, float]] = []
    for word in decoder.get_alignment():
        for phone in word:
            name = phone.name.lower()
            end = (phone.start + phone.duration) / 100
            found.append((name if name in PHONE_INDEX else "pau", end))
    return Utterance(pcm, tuple(found), ())


def padded(utterance: Utterance) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """pcm [frames * 1920] after a silence, and the phones of its spans of 40 ms [frames, 2]."""
    frames = LEAD + -(-len(utterance.pcm) // FRAME) + 1
    pcm = np.zeros(frames * FRAME, np.float32)
    pcm[LEAD * FRAME :][: len(utterance.pcm)] = utterance.pcm
    return pcm, utterance.labels(2 * frames, LEAD * FRAME / SAMPLE_RATE).reshape(-1, 2)


def counted(codes: NDArray[np.integer[Any]], labels: NDArray[np.uint8], card: int) -> NDArray[np.intp]:
    """Which phone each semantic code stands for in the first and second half of its frame: [card, 2]."""
    counts = np.zeros((card, 2, len(PHONES)), int)
    for half in (0, 1):
        np.add.at(counts[:, half], (codes.astype(np.intp), _SAME[labels[:, half]]), 1)
    return counts.argmax(-1)


def agreement(
    codes: NDArray[np.integer[Any]], labels: NDArray[np.uint8], phones: NDArray[np.intp]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether the phone read off is the right one, and whether something is spoken: [frames, 2] each."""
    return phones[codes] == _SAME[labels], labels > 0


def similar(original: NDArray[np.float32], copy: NDArray[np.float32]) -> float | None:
    """STOI of the copy; None where pystoi is missing or there is too little speech."""
    try:
        from pystoi import stoi
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = float(stoi(resample(original, SAMPLE_RATE, RATE), resample(copy, SAMPLE_RATE, RATE), RATE))
    return None if value <= 1e-5 else value


def synthetic(count: int, voices: Sequence[str] | None, seed: int) -> list[Utterance]:
    """Questions and other sentences by speakers of training, or by these voices."""
    rng, out = random.Random(seed), list[Utterance]()
    while len(out) < count:
        text = dialogues.ask(dialogues.pick(rng), rng) if rng.random() < 0.5 else sentences.sentence(rng)
        voice = FIRST.speaker(rng) if voices is None else rng.choice(voices)
        try:
            out.append(say(text, voice, np.random.default_rng([seed, len(out)])))
        except SpeechUnavailable:
            if not out:
                raise
    return out


def measure(codec: Any, utterances: Sequence[Utterance], phones: NDArray[np.intp]) -> dict[str, float]:
    """Figures over all of them."""
    right, spoken, alike = [], [], []
    for utterance in utterances:
        pcm, labels = padded(utterance)
        codes = codec.encode(pcm)
        one, other = agreement(codes[0], labels, phones)
        right.append(one)
        spoken.append(other)
        value = similar(pcm[LEAD * FRAME :], codec.decode(codes)[LEAD * FRAME : len(pcm)])
        alike += [] if value is None else [value]
    rights, speech = np.concatenate(right), np.concatenate(spoken)
    figures = {"phones": float(rights.mean()), "phones_in_speech": float(rights[speech].mean())}
    figures |= {"seconds_of_speech": float(speech.sum() / 25), "count": len(utterances)}
    return figures | ({"stoi": float(np.mean(alike))} if alike else {})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moshi_mlx_training.codec.people", description=__doc__.split("\n")[0]
    )
    parser.add_argument("model", type=Path, help="folder with config.json and the codec")
    parser.add_argument("--counted", type=int, default=1500, help="synthetic sentences to learn codes from (1500)")
    parser.add_argument("--count", type=int, default=60, help="synthetic sentences of each kind to compare with (60)")
    parser.add_argument("--sphinx", type=Path, default=SPHINX, help=f"pocketsphinx-testdata ({SPHINX})")
    parser.add_argument("--alsa", type=Path, default=ALSA, help=f"alsa-utils' sounds ({ALSA})")
    options = parser.parse_args(arguments)
    people = recordings(options.sphinx, options.alsa)
    if not people:
        parser.error("no recordings of people here: apt install pocketsphinx-testdata alsa-utils")
    from moshi_mlx.codec.base import make_codec
    from moshi_mlx.config import ModelConfig
    from moshi_mlx.models.mimi import MimiConfig

    sizes = MimiConfig.from_dict(json.loads((options.model / "mimi_config.json").read_text(encoding="utf-8")))
    books = ModelConfig.from_dict(json.loads((options.model / "config.json").read_text(encoding="utf-8"))).lm.own_q
    codec = make_codec(options.model / "mimi.safetensors", sizes, books, "mlx")
    codes, labels = [], []
    for utterance in synthetic(options.counted, None, 1):
        pcm, one = padded(utterance)
        codes.append(codec.encode(pcm)[0])
        labels.append(one)
    phones = counted(np.concatenate(codes), np.concatenate(labels), codec.card)
    heard = []
    for recording in people:
        try:
            heard.append(aligned(recording.read(), recording.text))
        except ValueError as error:
            print(f"{recording.path.name}: {error}", file=sys.stderr)
    groups = {"people": heard, "known": synthetic(options.count, None, 2)}
    try:
        groups["unheard"] = synthetic(options.count, unheard(), 3)
    except SpeechUnavailable as error:
        print(error, file=sys.stderr)
    table = {name: measure(codec, utterances, phones) for name, utterances in groups.items()}
    for name, figures in table.items():
        print(f"{name}: " + "  ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)
    print(json.dumps({"model": str(options.model), "counted": options.counted, "figures": table}))


if __name__ == "__main__":
    main()
