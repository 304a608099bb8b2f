"""Synthesize the recording of spoken questions that the program ships: ``questions.wav`` and ``questions.json``.

Eight questions that the small model is taught, in eight voices of flite and espeak-ng, none of them the model's own.
After each one comes silence, long enough for the answer. The texts come from ``moshi_mlx_training.speech.dialogues``,
which is also where the expected answers in ``questions.json`` are looked up. Needs the commands ``flite`` and
``espeak-ng``.

    python scripts/make_questions.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "moshi_mlx" / "assets"
SAMPLE_RATE = 24000
LEVEL_DB = -23.0  # root mean square of each question, dB below full scale: the level of the training speech
LEAD_SECONDS = 1.0

# (voice, question, seconds of silence after it). A voice is the synthesizer and its name for the voice. flite/rms,
# espeak/...+m2 and espeak/...+f5 are never heard in training. The longest answer here takes 3.3 s to say.
QUESTIONS = (
    ("espeak/en-us+f2", "Hello.", 4.2),
    ("flite/awb", "What is your name?", 3.2),
    ("espeak/en-us+m2", "What is the capital of France?", 3.4),
    ("espeak/en+Annie", "What is three plus four?", 3.2),
    ("flite/rms", "What color is the sky?", 3.2),
    ("espeak/en-us+m3", "What comes after Monday?", 3.4),
    ("espeak/en-us+f5", "What does a cat say?", 3.2),
    ("flite/kal16", "Goodbye.", 4.0),
)


def speak(voice: str, text: str) -> NDArray[np.float32]:
    """One question, [samples] at 24 kHz, without silence around it, at ``LEVEL_DB``."""
    engine, _, name = voice.partition("/")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "said.wav"))
        command = {
            "flite": ["flite", "-voice", name, "-t", text, "-o", path],
            "espeak": ["espeak-ng", "-v", name, "-s", "155", "-w", path, text],
        }[engine]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except FileNotFoundError:
            sys.exit(f"{command[0]} is not installed: 'apt install flite espeak-ng' or 'brew install flite espeak-ng'")
        said, rate = soundfile.read(path, dtype="float32")
    said = soxr.resample(said, rate, SAMPLE_RATE, quality="VHQ")
    loud = np.flatnonzero(np.abs(said) > 0.01 * np.abs(said).max())
    if not len(loud):
        sys.exit(f"{voice} spoke nothing for {text!r}")
    said = said[loud[0] : loud[-1] + 1]
    said = said * 10 ** (LEVEL_DB / 20) / np.sqrt(np.mean(np.square(said)))
    return np.asarray(np.clip(said, -0.99, 0.99), np.float32)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder for the two files")
    folder: Path = parser.parse_args(argv).output
    sys.path.insert(0, str(ROOT))
    from moshi_mlx_training.speech.dialogues import exchanges

    answers = {question: exchange.answer for exchange in exchanges() for question in exchange.questions}
    pieces, entries = [np.zeros(round(LEAD_SECONDS * SAMPLE_RATE), np.float32)], []
    for voice, text, pause in QUESTIONS:
        said = speak(voice, text)
        start = sum(map(len, pieces)) / SAMPLE_RATE
        pieces += [said, np.zeros(round(pause * SAMPLE_RATE), np.float32)]
        entry = {"text": text, "start": round(start, 3), "end": round(start + len(said) / SAMPLE_RATE, 3)}
        entries.append({**entry, "voice": voice, "expected": answers[text]})
    pcm = np.concatenate(pieces)
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / "questions.wav", pcm, SAMPLE_RATE, subtype="PCM_16")
    about = {
        "version": 1,
        "file": "questions.wav",
        "sample_rate": SAMPLE_RATE,
        "duration": round(len(pcm) / SAMPLE_RATE, 3),
        "questions": entries,
    }
    (folder / "questions.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"{folder / 'questions.wav'}: {len(entries)} questions, {about['duration']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
