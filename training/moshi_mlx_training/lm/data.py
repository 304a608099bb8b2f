"""What the language model hears and says, as codes on disk.

    python -m moshi_mlx_training.lm.data speak  runs/lm/data --questions 32000
    python -m moshi_mlx_training.lm.data encode runs/lm/data --codec runs/codec/codec.pt

``speak`` needs the synthesizers and no codec: it writes spoken questions by many voices (``train-NNNN``), new
renderings by the same voices (``known``) and by voices never used in training (``held``), the answers in the
answering voice, and empty rooms. ``encode`` turns them into codes. Both keep what is there, so they can be stopped
and run again; what is said, by whom and when depends on a set's name alone. Conversations are put together from these
pieces while training (`lm_dialogue`), so a question is heard after many silences, interruptions and other questions.

A clip of a question begins with room and ends with room; the room goes on in ``rooms``, of which every clip names one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moshi_mlx_training.speech import dialogues, morph, wordings
from moshi_mlx_training.speech import recipe as recipes
from moshi_mlx_training.speech.recipe import FIRST, Asked, Recipe
from moshi_mlx_training.speech.synthesis import (
    ANSWERING_VOICE,
    EVERYONE,
    HELD_OUT,
    SAMPLE_RATE,
    SpeechUnavailable,
    say,
)

FRAME = 1920  # samples: one column of codes
RATE = SAMPLE_RATE / FRAME  # frames a second
BEFORE, AFTER = 8, 8  # frames of room around a question
DROPPED = 5  # of them, frames at the start whose codes still feel the beginning of the clip
ROOMS, ROOM_FRAMES, DEAD_ROOMS = 32, 500, 4  # rooms 0 to 3 are digital silence
ANSWER_BEFORE, ANSWER_AFTER = 32, 24  # frames of silence around an answer when it is encoded
SHARD = 500  # questions
TRAINING_POWER = 0.7  # how much likelier large topics are asked in training: sums have most to tell apart
OTHER_WORD = 0

Pcm = NDArray[np.float32]
Encode = Callable[[Sequence[NDArray[np.int16]]], list[NDArray[np.uint16]]]  # codes [frames, books] of every clip


@cache
def heard_words() -> dict[str, int]:
    """Index of every word of the questions; 0 stands for any other. Teaches listening; not part of the model.

    Words of `dialogues` come first, so that data made when there were no others keeps its indices.
    """
    names = sorted({word for question in dialogues.questions() for word in dialogues.words(question)})
    names += [name for name in wordings.all_words() if name not in names]
    return {name: index for index, name in enumerate(names, start=1)}


def taught() -> int:
    """A digest of what is asked and answered: data made for other sentences must not be used."""
    return zlib.crc32(repr(dialogues.exchanges()).encode())


def through_room(pcm: Pcm, room: int, rng: np.random.Generator) -> Pcm:
    """Add the steady noise of a room to pcm [samples]; rooms differ in level and colour, ``DEAD_ROOMS`` add nothing."""
    if room < DEAD_ROOMS:
        return pcm
    character = np.random.default_rng([7, room])
    level, tilt = 10 ** (character.uniform(-80, -45) / 20), character.uniform(-1, 0)
    spectrum = np.fft.rfft(rng.standard_normal(len(pcm)))
    spectrum *= (np.linspace(0, 1, len(spectrum)) + 0.01) ** tilt
    noise = np.fft.irfft(spectrum, len(pcm))
    noise *= level / max(1e-9, float(np.sqrt(np.mean(noise**2))))
    return (pcm + noise).astype(np.float32)


def trimmed(pcm: Pcm, threshold: float = 0.01) -> tuple[int, int]:
    """First and last sample (exclusive) of what can be heard in pcm, with 10 ms before and 30 ms after."""
    loud = np.flatnonzero(np.abs(pcm) > threshold)
    if not len(loud):
        return 0, len(pcm)
    return max(0, int(loud[0]) - 240), min(len(pcm), int(loud[-1]) + 720)


def question_clip(split: str, rng: random.Random, noise: np.random.Generator, recipe: Recipe = FIRST) -> dict[str, Any]:
    """One spoken question or unknown sentence in a room: pcm [frames * 1920] and what is known about it.

    ``split`` is ``train``, or ``known`` or ``held`` for evaluation, by speakers of training or those held out.
    """
    asked = recipe.asked(rng, TRAINING_POWER if split == "train" else 0.5)
    return spoken_clip(asked, rng.choice(HELD_OUT) if split == "held" else recipe.speaker(rng), noise, recipe)


def spoken_clip(asked: Asked, voice: str, noise: np.random.Generator, recipe: Recipe = FIRST) -> dict[str, Any]:
    """The same of what is asked and who asks."""
    utterance = recipe.say(asked.text, voice, noise)
    pause = recipe.pause(asked, noise)
    if pause is not None:
        utterance = morph.paused(utterance, *pause)
    first, last = trimmed(utterance.pcm)
    pcm = utterance.pcm[first:last]
    kind = recipe.channel if recipe.channel != "both" else ("first", "wide")[int(noise.integers(2))]
    through = recipes.channels(kind)
    if kind == "none":
        pass
    elif kind == "wide":
        pcm = through(np.pad(pcm, (0, SAMPLE_RATE // 5)), noise)
    else:
        pcm = pcm * np.float32(10 ** (noise.uniform(-14, 5) / 20))
        if noise.random() < 0.4:
            pcm = through(np.pad(pcm, (0, SAMPLE_RATE // 5)), noise)[: len(pcm) + SAMPLE_RATE // 10]
    shift = int(noise.integers(FRAME))  # speech starts anywhere inside a frame
    spoken = -(-(shift + last - first) // FRAME)
    clip = np.zeros((BEFORE + spoken + AFTER) * FRAME, np.float32)
    at = BEFORE * FRAME + shift
    clip[at : at + len(pcm)] = pcm
    room = 0 if kind == "none" else int(noise.integers(ROOMS))
    clip = np.clip(through_room(clip, room, noise), -1, 1)
    starts = [(word, start * SAMPLE_RATE - first + at) for word, start in utterance.words]
    ends = [start for _, start in starts[1:]] + [at + last - first]
    if pause is not None:
        ends[pause[0] - 1] -= pause[1] * SAMPLE_RATE
    index = heard_words()
    words = [
        (int(end / FRAME), index.get(name.lower(), OTHER_WORD)) for (name, _), end in zip(starts, ends, strict=True)
    ]
    return {
        "pcm": np.round(clip * 32767).astype(np.int16),
        "exchange": asked.exchange,
        "second": asked.second,
        "voice": EVERYONE.index(voice),
        "room": room,
        "end": BEFORE + spoken,
        "words": words,
        "starts": [start / SAMPLE_RATE for _, start in starts],
        "phones": utterance.labels(2 * (len(clip) // FRAME), (at - first) / SAMPLE_RATE),
        "text": asked.text,
    }


def answer_clip(answer: str) -> tuple[NDArray[np.int16], int, list[float]]:
    """An answer between silences, how many frames it sounds, and when its words start (seconds into the sound).

    The synthesizer's pause before the first word is cut off here, in the waveform: as codes it would tell the answer
    before it is said.
    """
    utterance = say(answer, ANSWERING_VOICE)
    first, last = trimmed(utterance.pcm)
    frames = -(-(last - first) // FRAME)
    pcm = np.zeros((ANSWER_BEFORE + frames + ANSWER_AFTER) * FRAME, np.float32)
    pcm[ANSWER_BEFORE * FRAME :][: last - first] = utterance.pcm[first:last]
    starts = [max(0.0, start - first / SAMPLE_RATE) for _, start in utterance.words]
    return np.round(np.clip(pcm, -1, 1) * 32767).astype(np.int16), frames, starts


def _write(path: Path, arrays: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)


def _flat(pieces: Sequence[NDArray[Any]]) -> dict[str, Any]:
    """Pieces of different lengths end to end, and their lengths."""
    return {"data": np.concatenate(pieces), "count": np.array([len(piece) for piece in pieces])}


def split_flat(data: NDArray[Any], count: NDArray[Any]) -> list[NDArray[Any]]:
    return np.split(data, np.cumsum(count)[:-1])


def speak_set(folder: Path, name: str, size: int, recipe: Recipe = FIRST) -> bool:
    """Write ``name``.pcm.npz with ``size`` clips unless it is there; returns whether it was made."""
    path = folder / f"{name}.pcm.npz"
    if path.exists():
        return False
    write_set(path, size, lambda rng, noise: question_clip(name.split("-")[0], rng, noise, recipe))
    return True


def write_set(path: Path, size: int, make: Callable[[random.Random, np.random.Generator], dict[str, Any]]) -> None:
    """Write a set of so many clips that ``make`` makes; they depend on the file's name alone."""
    seed = zlib.crc32(path.name.removesuffix(".pcm.npz").encode())
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    clips: list[dict[str, Any]] = []
    while len(clips) < size:
        try:
            clips.append(make(rng, noise))
        except SpeechUnavailable:
            if not clips:
                raise  # nothing works here, as against one strange word
    words = [np.array(clip["words"], np.int32).reshape(-1, 2) for clip in clips]
    arrays = {
        key: np.array([clip[key] for clip in clips]) for key in ("exchange", "second", "voice", "room", "end", "text")
    }
    pieces = _flat([clip["pcm"] for clip in clips])
    spelled = _flat(words)
    arrays |= {"words": spelled["data"], "word_count": spelled["count"]}
    arrays["starts"] = np.array(
        [start for clip in clips for start in clip["starts"]], np.float32
    )  # seconds, one a word
    arrays["phones"] = np.concatenate([clip["phones"] for clip in clips])  # two a frame
    _write(path, {**arrays, **pieces})


def speak_answers(folder: Path) -> None:
    path = folder / "answers.pcm.npz"
    if path.exists():
        return
    clips = [answer_clip(answer) for answer in dialogues.answers()]
    starts = _flat([np.array(clip[2]) for clip in clips])
    _write(path, {**_flat([clip[0] for clip in clips]), "frames": np.array([clip[1] for clip in clips]),
                  "starts": starts["data"], "start_count": starts["count"], "taught": np.array(taught())})  # fmt: skip


def speak_rooms(folder: Path) -> None:
    path = folder / "rooms.pcm.npz"
    if path.exists():
        return
    silence = np.zeros(ROOM_FRAMES * FRAME, np.float32)
    rooms = [through_room(silence, room, np.random.default_rng([8, room])) for room in range(ROOMS)]
    _write(path, _flat([np.round(np.clip(room, -1, 1) * 32767).astype(np.int16) for room in rooms]))


def set_names(questions: int, evaluated: int) -> Iterator[tuple[str, int]]:
    """Names and sizes of the question sets; those for evaluation come first."""
    yield "known", evaluated
    yield "held", evaluated
    for number in range(-(-questions // SHARD)):
        yield f"train-{number:04d}", SHARD


# ------------------------------------------------------------------------------------------ codes


def load_codec(path: Path) -> tuple[Any, str]:
    """The codec of a checkpoint or published file, and a digest of what makes the codes (the decoder may differ)."""
    import torch

    from moshi_mlx_training.checkpoint import load_model
    from moshi_mlx_training.codec.export import from_published

    model = from_published(path, usage=1.0) if path.suffix == ".safetensors" else load_model(path)
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if re.match(r"encoder|downsample|quantizer", name):
            digest.update(np.ascontiguousarray(value.detach().to(torch.float32).numpy()).tobytes())
    return model, digest.hexdigest()[:16]


def encode_clips(codec: Any, clips: Sequence[NDArray[np.int16]], seconds: float = 64.0) -> list[NDArray[np.uint16]]:
    """Codes [frames, books] of every clip; clips of like length go together. The codec is causal: padding is safe."""
    import torch

    order = sorted(range(len(clips)), key=lambda i: len(clips[i]))
    out: list[NDArray[np.uint16]] = [np.empty((0, 0), np.uint16)] * len(clips)
    while order:
        longest = len(clips[order[-1]])
        group = [order.pop() for _ in range(min(len(order), max(1, int(seconds * SAMPLE_RATE / longest))))]
        batch = np.zeros((len(group), 1, longest), np.float32)
        for row, index in enumerate(group):
            batch[row, 0, : len(clips[index])] = clips[index] / np.float32(32768)
        with torch.inference_mode():
            codes = codec.encode(torch.from_numpy(batch)).transpose(1, 2).numpy()
        for row, index in enumerate(group):
            out[index] = codes[row, : len(clips[index]) // FRAME].astype(np.uint16)
    return out


def library_codec(folder: Path) -> tuple[Encode, str]:
    """The library's own codec of a model's folder, which needs no PyTorch: (encode clips, digest).

    Its codes differ from PyTorch's where numbers are rounded (0.3 to 0.4 %), so its digest is another one.
    """
    from moshi_mlx.checkpoint.readers import read_safetensors
    from moshi_mlx.codec.base import make_codec
    from moshi_mlx.config import ModelConfig
    from moshi_mlx.models.mimi import MimiConfig

    config = MimiConfig.from_dict(json.loads((folder / "mimi_config.json").read_text(encoding="utf-8")))
    arrays, _ = read_safetensors(folder / "mimi.safetensors")
    digest = hashlib.sha256(b"library")
    for name in sorted(name for name in arrays if re.match(r"encoder|downsample|quantizer", name)):
        digest.update(np.ascontiguousarray(np.array(arrays[name].astype(mx.float32))).tobytes())
    books = ModelConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))).lm.own_q
    codec = make_codec(folder / "mimi.safetensors", config, books)  # numpy on a CPU: several times faster there

    def encode(clips: Sequence[NDArray[np.int16]]) -> list[NDArray[np.uint16]]:
        return [codec.encode(clip / np.float32(32768)).T.astype(np.uint16) for clip in clips]

    return encode, digest.hexdigest()[:16]


def encode_set(folder: Path, name: str, encode: Encode, digest: str) -> bool:
    """Write ``name``.npz, codes for ``name``.pcm.npz, unless it is there from the same codec."""
    path = folder / f"{name}.npz"
    if path.exists():
        with np.load(path) as stored:
            if str(stored["codec"]) == digest:
                return False
    with np.load(folder / f"{name}.pcm.npz") as source:
        arrays = {key: source[key] for key in source.files}
    codes = encode(split_flat(arrays.pop("data"), arrays.pop("count")))
    if "end" in arrays:  # a question: forget the frames that feel the clip's beginning
        phones = split_flat(arrays["phones"].reshape(-1, 2), np.array([len(piece) for piece in codes]))
        arrays["phones"] = np.concatenate([piece[DROPPED:] for piece in phones])
        codes = [piece[DROPPED:] for piece in codes]
        arrays["end"] -= DROPPED
        arrays["words"][:, 0] -= DROPPED
        if "starts" in arrays:
            arrays["starts"] -= DROPPED / RATE
    _write(path, {**arrays, **_flat(codes), "codec": np.array(digest)})
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moshi_mlx_training.lm.data", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    speak = commands.add_parser("speak", help="synthesize waveforms")
    encode = commands.add_parser("encode", help="turn waveforms into codes")
    for command in (speak, encode):
        command.add_argument("folder", type=Path, help="where the sets are; those already there are kept")
        command.add_argument(
            "--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="only every Nth set"
        )
    speak.add_argument("--questions", type=int, default=32000, help="spoken questions to train on (32000)")
    speak.add_argument("--evaluated", type=int, default=200, help="questions of each kind to evaluate on (200)")
    recipes.add_options(speak)
    encode.add_argument(
        "--codec",
        type=Path,
        required=True,
        help="codec.pt, a published mimi.safetensors, or a model's folder: then without PyTorch",
    )
    encode.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if options.command == "speak":
        recipe = recipes.from_options(options)
        try:
            recipes.hold(options.folder, recipe)
        except ValueError as error:
            parser.error(str(error))
        if options.share[0] == 0:
            if recipe.wordings != "words":
                speak_answers(options.folder)
            speak_rooms(options.folder)
        for number, (name, size) in enumerate(set_names(options.questions, options.evaluated)):
            if number % options.share[1] != options.share[0]:
                continue
            made = speak_set(options.folder, name, size, recipe)
            print(f"{name}: {size} questions{'' if made else ' (kept)'}, {time.monotonic() - began:.0f} s", flush=True)
        return
    if options.codec.is_dir():
        encode_all, digest = library_codec(options.codec)
    else:
        import torch

        from moshi_mlx_training.process import keep_memory

        keep_memory()  # encoding is twice as fast with it
        torch.set_num_threads(options.threads)
        codec, digest = load_codec(options.codec)
        encode_all = partial(encode_clips, codec)
    names = sorted(path.name.removesuffix(".pcm.npz") for path in options.folder.glob("*.pcm.npz"))
    names.sort(key=lambda name: name.startswith("train"))  # what every other step needs comes first
    for number, name in enumerate(names):
        if number % options.share[1] != options.share[0]:
            continue
        made = encode_set(options.folder, name, encode_all, digest)
        print(f"{name}: codec {digest}{'' if made else ' (kept)'}, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
