"""Echo cancellation in simulated rooms: ``python -m benchmarks.echo`` in the repository's root.

Needs the package livekit, and pystoi for the intelligibility. For each room three runs of the program's canceller: only
Moshi speaks, only the user speaks, and both speak at once after eight seconds, without pauses. Each is done twice, with
the speakers' parts exchanged and other walls and jitter, so that nothing is tuned to one case. Prints a table, then one
JSON line. The speech is that of the included questions.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import soundfile
from moshi_mlx_app.audio.echo import WebRtcEcho

from tests.helpers.room import Room, dense, reduction, run

RATE, ALONE, DELAY = 24_000, 8, 222


class Moved(Room):
    """A laptop that is moved after five seconds: another echo path."""

    def echo(self, played: np.ndarray, rate: int, seed: int = 0) -> np.ndarray:
        before = super().echo(played, rate, seed)
        after = Room(delay=self.delay + 0.003).echo(played, rate, seed + 10)
        return np.concatenate([before[: 5 * rate], after[5 * rate :]])


ROOMS = {
    "50 ms, 200 ms reverb": Room(),
    "quiet echo": Room(gain=0.2),
    "loud echo": Room(gain=1.0),
    "120 ms away": Room(delay=0.12),
    "400 ms reverb": Room(reverb=0.4),
    "distorting loudspeaker": Room(distortion=0.5),
    "clocks 100 ppm apart": Room(drift=100e-6),
    "clocks -200 ppm apart": Room(drift=-200e-6),
    "noisy microphone": Room(noise=3e-3),
    "moved in the sixth second": Moved(),
}


def intelligibility(clean: np.ndarray, heard: np.ndarray) -> float | None:
    try:
        from pystoi import stoi
    except ImportError:
        return None
    count = min(len(clean), len(heard))
    return round(float(stoi(clean[:count], heard[:count], RATE)), 3)


class Timed(WebRtcEcho):
    """Measures processor time."""

    def __init__(self) -> None:
        super().__init__(RATE)
        self.seconds = 0.0

    def cancel(self, pcm: np.ndarray, when: float) -> np.ndarray:
        began = time.thread_time()
        out = super().cancel(pcm, when)
        self.seconds += time.thread_time() - began
        return out


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.echo", description="Echo cancellation in rooms.").parse_args(
        argv
    )
    path = Path(__file__).resolve().parents[1] / "moshi_mlx" / "assets" / "questions.wav"
    speech = dense(soundfile.read(path, dtype="float32")[0])
    half = 5 * RATE
    rows = []
    for (name, room), draw in product(ROOMS.items(), (0, 1)):
        voices = np.roll(speech, -half * draw)
        far = np.tile(voices[:half], 3)[: 13 * RATE] * np.float32(0.7)
        near = np.concatenate([np.zeros(ALONE * RATE), np.tile(voices[half:], 3)])[: len(far)].astype(np.float32)
        nothing, start = np.zeros_like(far), ALONE * RATE
        echo = room.echo(far, RATE, draw)
        timed = Timed()
        left = run(timed, far, nothing, room, seed=draw)
        cost = timed.seconds / (len(far) / RATE)
        both = run(WebRtcEcho(RATE), far, near, room, seed=draw)
        alone = run(WebRtcEcho(RATE), nothing, near, room, seed=draw)
        rows.append(
            {
                "room": name,
                "draw": draw,
                "reduction_db": round(reduction(left[RATE:], echo[RATE:]), 1),
                "first_second_db": round(reduction(left[:RATE], echo[:RATE]), 1),
                "voice_to_echo_db": round(reduction(echo[start:], near[start:]), 1),
                "stoi_without": intelligibility(near[start:], (near + echo)[start:]),
                "stoi_both": intelligibility(near[start:], both[start + DELAY :]),
                "stoi_alone": intelligibility(near[start:], alone[start + DELAY :]),
                "cores": round(cost, 3),
            }
        )
        if len(rows) == 1:
            print(f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
            print(
                f"{'room':27} {'echo':>7} {'1st s':>7} {'STOI: as heard':>15} "
                f"{'cancelled':>10} {'user alone':>11} {'cores':>6}"
            )
        row = rows[-1]
        print(
            f"{f'{name}, {draw}':27} {-row['reduction_db']:4.0f} dB {-row['first_second_db']:4.0f} dB "
            f"{row['stoi_without']!s:>15} "
            f"{row['stoi_both']!s:>10} {row['stoi_alone']!s:>11} {row['cores']:6.3f}",
            flush=True,
        )
    print(json.dumps({"benchmark": "echo", "rows": rows}))


if __name__ == "__main__":
    main()
