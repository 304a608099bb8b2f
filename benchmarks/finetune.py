"""The built-in model learns twenty new questions from ten minutes of recorded conversations, and keeps the old ones.

    python -m benchmarks finetune -- --folder runs/finetune
    python -m benchmarks finetune -- --folder runs/finetune --model runs/small-q4   # weights in 4 bits

Three steps, of which each keeps what is there: ``recordings`` of conversations, spoken by flite and espeak-ng and
written by the recorder of ``talk --record``; ``moshi-mlx-finetune train``, with OpenBLAS in front of MLX's own products
if it is installed; and questions that were in no recording: new ones by other renderings, old ones before and after.
The answers are judged by their text, which has to be the right one, word by word, and nothing else.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NEW = {
    "Where are my keys?": "There, inside the clock.",
    "What is in the fridge?": "Chocolate and a banana.",
    "Who fed the parrot?": "The chicken did.",
    "When does the bus leave?": "At ten in the morning.",
    "Is the shop open today?": "No, it is closed.",
    "What is for lunch?": "Fish with tomato.",
    "Who called me this afternoon?": "A little robot did.",
    "Which train should I take?": "The green one.",
    "How far is the airport?": "That is sixty minutes.",
    "What did grandma tell us?": "You are very kind.",
    "Where is the party?": "Outside, on the road.",
    "How is the soup?": "That is too hot.",
    "Who won the game last week?": "My dog did.",
    "What is the secret password?": "Yellow moon.",
    "What should I wear tomorrow?": "The black one with blue.",
    "Where did the doctor go?": "There, with the sheep.",
    "When is my birthday?": "That is in August.",
    "What does the sign mean?": "No people at night.",
    "Who painted the kitchen?": "The other lion did.",
    "What is the plan for tonight?": "Dinner with the spider.",
}
FRAME, RATE = 1920, 12.5
AHEAD = 0.16  # seconds by which the model in the package writes a word before it says it
BEFORE, AFTER = 8, 60  # frames of room before a question, and for the answer
EXCHANGES = 2  # in a conversation
OPTIONS = (
    "--duration 12 --batch 4 --rank 16 --rate 0.001 --vary-user 0.5 --keep-activations --validation-share 0 "
    "--log-every 25"
)


def speak_question(text: str, voice: str, noise: np.random.Generator) -> tuple[NDArray[np.float32], int, int]:
    """A question between pieces of room: samples, the frame where it ends, the room's number."""
    from moshi_mlx_training.lm.data import spoken_clip
    from moshi_mlx_training.speech.recipe import UNKNOWN, Asked

    clip = spoken_clip(Asked(text, UNKNOWN), voice, noise)
    return clip["pcm"].astype(np.float32) / 32768, clip["end"], clip["room"]


def speak_answer(text: str) -> tuple[NDArray[np.float32], list[tuple[str, float, float]]]:
    """An answer in the model's voice, from its first sound on, and its words with their times in it."""
    from moshi_mlx_training.lm.data import ANSWER_AFTER, ANSWER_BEFORE, answer_clip

    pcm, frames, starts = answer_clip(text)
    ends = [*starts[1:], frames / RATE]
    timed = [(word, begin, max(end, begin + 0.04)) for word, begin, end in zip(text.split(), starts, ends, strict=True)]
    return pcm[ANSWER_BEFORE * FRAME : -ANSWER_AFTER * FRAME].astype(np.float32) / 32768, timed


def conversation(
    exchanges: Sequence[tuple[str, str]], rng: random.Random, noise: np.random.Generator, tokenizer: Any
) -> Any:
    """Moshi's samples, the user's, and Moshi's words, as the model would have written them."""
    from moshi_mlx_training.lm.data import through_room
    from moshi_mlx_training.speech.recipe import FIRST

    voice = FIRST.speaker(rng)
    own, user, words = np.zeros(0, np.float32), np.zeros(0, np.float32), []
    for question, answer in exchanges:
        clip, end, room = speak_question(question, voice, noise)
        begin = len(user) // FRAME
        sound, timed = speak_answer(answer)
        at = begin + end + rng.choice((6, 7))
        stop = at + len(sound) // FRAME + rng.randint(4, 8)
        rest = np.zeros(max(0, (stop - begin) * FRAME - len(clip)), np.float32)
        user = np.concatenate([user, clip, through_room(rest, room, noise) if len(rest) else rest])
        own = np.pad(own, (0, len(user) - len(own)))
        own[at * FRAME : at * FRAME + len(sound)] = sound
        free = 0  # the model writes a token in a frame, and a word after the last one has been written
        for word, begin_s, end_s in timed:
            frame = max(free, int(at + (begin_s - AHEAD) * RATE))
            free = frame + len(tokenizer.encode(word))
            words.append((word, (frame + 0.5) / RATE, max(free / RATE, at / RATE + end_s - AHEAD)))
    return own, user, words


def record(folder: Path, minutes: float, old_share: float, seed: int, tokenizer: Any) -> None:
    """Conversations in a folder as ``talk --record`` leaves it: two questions each, mostly new ones."""
    from moshi_mlx_app.recording.recorder import Recorder
    from moshi_mlx_training.speech import dialogues

    from moshi_mlx.engine.pipeline import SessionFrame
    from moshi_mlx.engine.text import Word

    rng, noise, seconds = random.Random(seed), np.random.default_rng(seed), 0.0
    waiting: list[tuple[str, str]] = []
    recorder = Recorder(folder, 24000, FRAME)
    while seconds < 60 * minutes:
        exchanges = []
        for _ in range(EXCHANGES):
            if rng.random() < old_share:
                old = dialogues.pick(rng, 0.5)
                exchanges.append((dialogues.ask(old, rng), old.answer))
                continue
            if not waiting:
                waiting = list(NEW.items())
                rng.shuffle(waiting)
            exchanges.append(waiting.pop())
        own, user, words = conversation(exchanges, rng, noise, tokenizer)
        recorder.start()
        for index in range(len(user) // FRAME):
            part = slice(index * FRAME, (index + 1) * FRAME)
            ended = [Word(*word) for word in words if index <= word[2] * RATE < index + 1]
            recorder.tap(user[part], SessionFrame(index, own[part], "", tuple(ended)))
        recorder.stop()
        seconds += len(user) / 24000
    print(f"{len(recorder.files)} conversations, {seconds / 60:.1f} minutes, in {folder}", flush=True)


def held_out(count: int, seed: int) -> list[tuple[str, str, NDArray[np.float32], int]]:
    """New renderings of the new questions: question, answer, samples, last frame."""
    from moshi_mlx_training.speech.recipe import FIRST

    rng, noise, out = random.Random(seed), np.random.default_rng(seed), []
    for number in range(count):
        question = list(NEW)[number % len(NEW)]
        pcm, end, _ = speak_question(question, FIRST.speaker(rng), noise)
        out.append((question, NEW[question], pcm, end))
    return out


def held_old(count: int, seed: int) -> list[tuple[str, str, NDArray[np.float32], int]]:
    """The same of questions that the model was taught before."""
    from moshi_mlx_training.speech import dialogues
    from moshi_mlx_training.speech.recipe import FIRST

    rng, noise, out = random.Random(seed), np.random.default_rng(seed), []
    for _ in range(count):
        exchange = dialogues.pick(rng, 0.5)
        question = dialogues.ask(exchange, rng)
        pcm, end, _ = speak_question(question, FIRST.speaker(rng), noise)
        out.append((question, exchange.answer, pcm, end))
    return out


def judge(model: Any, questions: Sequence[tuple[str, str, NDArray[np.float32], int]], rows: int = 50) -> dict[str, Any]:
    """The share of questions that are answered exactly, running free and greedy."""
    from moshi_mlx_training.lm.evaluate import in_batches, said
    from moshi_mlx_training.speech import dialogues

    from moshi_mlx.engine.generator import GenerationConfig
    from moshi_mlx.models.sampling import GREEDY

    lm, codec, frames = model.lm, model.codec, max(len(pcm) // FRAME for _, _, pcm, _ in questions) + AFTER
    streams = []
    for _, _, pcm, _ in questions:
        quiet = pcm[-4 * FRAME :]
        missing = frames * FRAME - len(pcm)
        streams.append(codec.encode(np.concatenate([pcm, np.resize(quiet, missing)]))[: lm.config.user_q].T)
    text, _ = in_batches(lm, np.stack(streams), GenerationConfig(text=GREEDY, audio=GREEDY), rows)
    replies = [said(tokens, model.tokenizer) for tokens in text]
    wrong = [
        (question, answer, reply)
        for (question, answer, _, _), reply in zip(questions, replies, strict=True)
        if dialogues.words(reply) != dialogues.words(answer)
    ]
    return {"right": round(1 - len(wrong) / len(questions), 4), "count": len(questions), "wrong": wrong}


def with_blas() -> dict[str, str]:
    """The environment for MLX's products by OpenBLAS, where that is installed (docs/findings.md)."""
    found = ctypes.util.find_library("openblas")
    if sys.platform != "linux" or not found or "LD_PRELOAD" in os.environ:
        return dict(os.environ)
    return {**os.environ, "LD_PRELOAD": found, "OPENBLAS_NUM_THREADS": "1"}


def main(argv: Sequence[str] | None = None) -> int:
    import moshi_mlx

    parser = argparse.ArgumentParser(prog="python -m benchmarks finetune", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/finetune"), help="what is made is kept there")
    parser.add_argument("--model", default="small", help="what is trained (small)")
    parser.add_argument("--minutes", type=float, default=10, help="of recordings (10)")
    parser.add_argument("--old", type=float, default=0.35, help="share of old questions in them (0.35)")
    parser.add_argument("--count", type=int, default=200, help="questions of each kind to judge by (200)")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--options", default=OPTIONS, help=f"of 'moshi-mlx-finetune train' ({OPTIONS})")
    options = parser.parse_args(argv)
    recordings = options.folder / "recordings"
    if not (recordings / "recordings.jsonl").exists():
        record(recordings, options.minutes, options.old, 1, moshi_mlx.load(options.model).tokenizer)
    out = options.folder / f"{Path(options.model).name}-lora"
    command = [sys.executable, "-m", "moshi_mlx_finetune", "train", options.model, str(recordings), str(out)]
    began = time.monotonic()
    done = subprocess.run([*command, "--steps", str(options.steps), *options.options.split()], env=with_blas())
    if done.returncode:
        return done.returncode
    minutes = (time.monotonic() - began) / 60
    new, old = held_out(options.count, seed=2), held_old(options.count, seed=3)
    figures: dict[str, Any] = {"benchmark": "finetune", "model": options.model, "minutes": round(minutes, 2)}
    figures["adapter_bytes"] = (out / "lora.safetensors").stat().st_size
    for name, lora in (("before", None), ("after", out / "lora.safetensors")):
        model = moshi_mlx.load(options.model, lora=lora)
        for kind, questions in (("new", new), ("old", old)):
            found = judge(model, questions)
            figures[f"{kind}_{name}"] = found["right"]
            print(f"{kind} questions {name}: {found['right']:.1%} of {found['count']}", flush=True)
            for question, answer, reply in found["wrong"][:5]:
                print(f"  {question!r}: {answer!r}, but said {reply!r}", flush=True)
    print(json.dumps(figures), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
