"""Half an hour of random talk with a model, nobody there: is every answer right to the end, and does memory stay flat?

    python -m moshi_mlx_training.lm.unattended small --minutes 30

One conversation, sound in and sound out, as the program runs it: random questions by random speakers in changing rooms,
with pauses of random length. Prints right answers and memory in each quarter, and a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil

import moshi_mlx
from moshi_mlx.models.sampling import GREEDY
from moshi_mlx_training.lm.data import AFTER, FRAME, RATE, spoken_clip, through_room
from moshi_mlx_training.speech import dialogues
from moshi_mlx_training.speech.recipe import FIRST, Asked

ANSWERED, LONGEST_PAUSE = 60, 40  # frames after a question until the next may come, and how much later it comes
QUARTERS = 4


def questions(seed: int) -> Any:
    """Without end: a taught question, its answer, samples of whole frames until the next one."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    while True:
        exchange = dialogues.pick(rng)
        number = dialogues.exchanges().index(exchange)
        clip = spoken_clip(Asked(dialogues.ask(exchange, rng), number), FIRST.speaker(rng), noise)
        rest = np.zeros((ANSWERED - AFTER + rng.randrange(LONGEST_PAUSE)) * FRAME, np.float32)
        sound = clip["pcm"].astype(np.float32) / 32768
        yield clip["text"], exchange.answer, np.concatenate([sound, through_room(rest, clip["room"], noise)])


def talk(session: moshi_mlx.Session, minutes: float, seed: int, wrong: int = 5) -> dict[str, Any]:
    """Talk for so long; the share of right answers and the memory in MB of each quarter."""
    process, frames = psutil.Process(), round(60 * minutes * RATE)
    right: list[list[bool]] = [[] for _ in range(QUARTERS)]
    memory, at, began = [0.0] * QUARTERS, 0, time.monotonic()
    for question, answer, pcm in questions(seed):
        heard = [session.step(pcm[start : start + FRAME]) for start in range(0, len(pcm), FRAME)]
        reply = "".join(frame.text for frame in heard)
        quarter = min(QUARTERS - 1, QUARTERS * at // frames)
        right[quarter].append(dialogues.words(reply) == dialogues.words(answer))
        if not right[quarter][-1] and sum(not good for part in right for good in part) <= wrong:
            print(f"  {at / RATE / 60:.1f} min: {question!r}: {answer!r}, but said {reply.strip()!r}", flush=True)
        at += len(heard)
        memory[quarter] = process.memory_info().rss / 1e6
        if at >= frames:
            break
    share = [round(sum(part) / len(part), 4) if part else None for part in right]
    count, seconds = [len(part) for part in right], time.monotonic() - began
    speed = round(at / RATE / seconds, 2)
    return {"minutes": at / RATE / 60, "right": share, "count": count, "memory_mb": memory, "times_real_time": speed}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moshi_mlx_training.lm.unattended", description=__doc__.split("\n")[0]
    )
    parser.add_argument("model", nargs="?", default="small", help="a built-in name or a folder (small)")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wrong", type=int, default=5, help="how many wrong answers to print (5)")
    options = parser.parse_args(arguments)
    model = moshi_mlx.load(options.model)
    settings = moshi_mlx.GenerationConfig(text=GREEDY, audio=GREEDY)
    with model.session(generation=settings, seed=options.seed) as session:
        found = talk(session, options.minutes, options.seed, options.wrong)
    for number, (share, count, memory) in enumerate(
        zip(found["right"], found["count"], found["memory_mb"], strict=True)
    ):
        print(f"quarter {number + 1}: {100 * (share or 0):.1f} % of {count} right, {memory:.0f} MB", flush=True)
    print(json.dumps({"model": options.model, **found}), flush=True)


if __name__ == "__main__":
    main()
