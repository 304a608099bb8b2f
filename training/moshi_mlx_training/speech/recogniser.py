"""A judge by ear: pocketsphinx with a grammar of whole sentences.

With its open vocabulary it errs on every fifth word of clean synthetic speech and cannot judge; given the sentences
that may have been said it makes almost no mistakes on the originals, so what it misses was lost on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

from moshi_mlx_training.speech.dialogues import words
from moshi_mlx_training.speech.synthesis import ANSWERING_VOICE, LEVEL_DB, SAMPLE_RATE, resample, say

RATE = 16000
# pocketsphinx knows 39 phones; ours that are not among them
_TO_SPHINX = {"ax": "AH", "pau": ""}


def normal(text: str) -> str:
    """The form in which sentences are compared."""
    return " ".join(words(text))


@cache
def pronunciation(word: str) -> str:
    """A word as pocketsphinx spells sounds, from how the answering voice says it."""
    phones = [_TO_SPHINX.get(p, p.upper()) for p, _ in say(word, ANSWERING_VOICE).phones]
    return " ".join(p for p in phones if p)


class Recogniser:
    """Hears which of the given sentences was said.

    Parameters
    ----------
    sentences : iterable of str
    spelled : mapping of str to str
        Sounds of words that pocketsphinx may not know, as it spells them; the answering voice is asked for all others.
    """

    def __init__(self, sentences: Iterable[str], spelled: Mapping[str, str] | None = None) -> None:
        from pocketsphinx import Decoder

        self.sentences = sorted({normal(s) for s in sentences})
        self.decoder = Decoder(loglevel="FATAL", samprate=RATE, cmn="batch")  # no memory of the last speaker
        for word in sorted({w for s in self.sentences for w in s.split()}):
            if self.decoder.lookup_word(word) is None:
                self.decoder.add_word(word, (spelled or {}).get(word) or pronunciation(word), True)
        grammar = "#JSGF V1.0; grammar sentences; public <sentence> = " + " | ".join(self.sentences) + " ;"
        self.decoder.add_jsgf_string("sentences", grammar)
        self.decoder.activate_search("sentences")

    def hear(self, pcm: NDArray[np.floating]) -> str:
        """The sentence in pcm [samples] at 24 kHz, or an empty string."""
        return self.hear_resampled(resample(np.asarray(pcm, np.float32), SAMPLE_RATE, RATE))

    def hear_resampled(self, x: NDArray[np.floating]) -> str:
        """The same of x [samples] at ``RATE``."""
        x = x * (10 ** (LEVEL_DB / 20) / max(1e-4, float(np.sqrt(np.mean(x**2)))))
        x = np.concatenate([np.zeros(RATE // 5), x, np.zeros(RATE // 5)])
        # Digital silence misleads it: without noise at -60 dB it misses a quarter of originals it hears with it.
        x = x + 1e-3 * np.random.default_rng(0).standard_normal(len(x))
        self.decoder.start_utt()
        self.decoder.process_raw((np.clip(x, -1, 1) * 32767).astype(np.int16).tobytes(), False, True)
        self.decoder.end_utt()
        found = self.decoder.hyp()
        return found.hypstr if found else ""

    def right(self, pcm: NDArray[np.floating], text: str) -> bool:
        return self.hear(pcm) == normal(text)
