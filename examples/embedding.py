"""A conversation in a program that handles its own audio: here a wav file replaces the microphone, and another one
the loudspeaker.

    python examples/embedding.py question.wav answer.wav

The two essential lines are in `audio_callback`: sound goes in, sound comes out, and neither blocks. The rest is what
an audio engine, a window and a main loop do anyway.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time

import numpy as np
import soundfile

import moshi_mlx
from moshi_mlx.audio import TAIL, as_mono
from moshi_mlx.realtime import Conversation

BLOCK = 0.01  # seconds that an audio engine asks for at a time


class AudioEngine:
    """Calls back every 10 ms, in a separate thread, as CoreAudio would."""

    def __init__(self, microphone: np.ndarray, rate: int, conversation: Conversation):
        self.microphone, self.rate, self.conversation = microphone, rate, conversation
        self.loudspeaker = np.zeros_like(microphone)
        self.done = threading.Event()
        threading.Thread(target=self.run, daemon=True).start()

    def audio_callback(self, recorded: np.ndarray, to_play: np.ndarray) -> None:
        """The code for your callback: samples at the model's rate, one channel, float32 from -1 to 1."""
        self.conversation.feed(recorded)
        self.conversation.read_into(to_play)

    def run(self) -> None:
        size = round(BLOCK * self.rate)
        began = time.monotonic()
        for start in range(0, len(self.microphone) - size + 1, size):
            time.sleep(max(0.0, began + start / self.rate - time.monotonic()))
            self.audio_callback(self.microphone[start : start + size], self.loudspeaker[start : start + size])
        self.done.set()


def main() -> int:
    """Play a recording to a model, and save its answer."""
    parser = argparse.ArgumentParser(description="a conversation with wav files in place of microphone and loudspeaker")
    parser.add_argument("question")
    parser.add_argument("answer")
    parser.add_argument("--model", default="small")
    parser.add_argument("--tail", type=float, default=TAIL, help="seconds of silence after the question")
    args = parser.parse_args()

    model = moshi_mlx.load(args.model)
    rate = model.sample_rate
    pcm = as_mono(*soundfile.read(args.question), rate)
    pcm = np.concatenate([pcm, np.zeros(round(args.tail * rate), np.float32)])

    with Conversation(model, seed=0) as conversation:  # leaving it ends the threads, and raises what went wrong
        engine = AudioEngine(pcm, rate, conversation)
        while not engine.done.is_set() and conversation.running:
            conversation.wait(0.1)
            for event in conversation.events():  # the main loop: draw, log, react
                if event.kind == "text":
                    print(event.text, end="", flush=True)
                elif event.kind in ("late", "dropped"):
                    print(f"[{event.kind}]", end="", flush=True, file=sys.stderr)
        print()
    soundfile.write(args.answer, engine.loudspeaker, rate)
    stats = conversation.stats
    print(
        f"{stats.frames} frames, answered after {stats.latency.percentile(50) * 1e3:.0f} ms, {stats.late} late",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
