"""A folder as ``lm_data encode`` writes it, from random codes: no synthesizer, no codec."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from moshi_mlx_training.lm import data
from moshi_mlx_training.speech import dialogues

BOOKS, CARD = 8, 512
QUIET = 7  # the code of silence in every book


def write_data(folder: Path, sets: tuple[str, ...] = ("train-0000",), size: int = 40, exchanges: int = 1000) -> Path:
    """Write answers, rooms and question sets; every question of one exchange has the same codes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)

    def codes(frames: int) -> np.ndarray:
        return rng.integers(8, CARD, (frames, BOOKS)).astype(np.uint16)

    texts = dialogues.answers()
    frames = np.array([4 * len(text.split()) for text in texts])
    quiet = np.full((data.ANSWER_BEFORE, BOOKS), QUIET, np.uint16)
    starts = [np.arange(len(text.split())) * 0.32 for text in texts]
    sounds = [np.concatenate([quiet, codes(n), quiet[: data.ANSWER_AFTER]]) for n in frames]
    np.savez(
        folder / "answers.npz",
        data=np.concatenate(sounds),
        count=[len(sound) for sound in sounds],
        frames=frames,
        starts=np.concatenate(starts),
        start_count=[len(s) for s in starts],
        codec="random",
        taught=data.taught(),
    )
    rooms = np.full((data.ROOMS * data.ROOM_FRAMES, BOOKS), QUIET, np.uint16)
    np.savez(folder / "rooms.npz", data=rooms, count=[data.ROOM_FRAMES] * data.ROOMS, codec="random")
    spoken = [codes(12) for _ in range(exchanges + 1)]
    for name in sets:
        chosen = rng.integers(-1, min(exchanges, len(dialogues.exchanges())), size)
        around = data.BEFORE - data.DROPPED
        clips = [np.concatenate([quiet[:around], spoken[index], quiet[: data.AFTER]]) for index in chosen]
        np.savez(
            folder / f"{name}.npz",
            data=np.concatenate(clips),
            count=[len(clip) for clip in clips],
            exchange=chosen,
            voice=np.zeros(size, int),
            room=rng.integers(0, data.ROOMS, size),
            end=[around + 12] * size,
            words=np.array([[around + 5, 1], [around + 12, 2]] * size),
            word_count=[2] * size,
            phones=np.concatenate([np.array([[0, 0]] * around + [[3, 4]] * 12 + [[0, 0]] * data.AFTER)] * size),
            text=["a question"] * size,
            codec="random",
        )
    return folder
