"""SentencePiece models for tests, trained in a second on our own text, with the ids that Kyutai's models use."""

from __future__ import annotations

import os
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import sentencepiece

CORPUS = Path(__file__).resolve().parent.parent / "data" / "tokenizer_corpus.txt"


def train_tokenizer(path: str | os.PathLike[str], vocab_size: int = 600, *, byte_fallback: bool = True) -> Path:
    """Write a unigram model of ``vocab_size`` pieces to ``path`` and return it.

    Ids 0 to 3 are ``<unk>`` (EPAD in the text stream), ``<s>``, ``</s>`` and ``<pad>``; with ``byte_fallback`` the 256
    byte pieces follow at 4. ``vocab_size`` from 350 to 840 works with the corpus (90 to 580 without the byte pieces).
    The same arguments give the same model.
    """
    path = Path(path)
    path.write_bytes(tokenizer_bytes(vocab_size, byte_fallback))
    return path


@lru_cache
def tokenizer_bytes(vocab_size: int = 600, byte_fallback: bool = True) -> bytes:
    """The model as bytes, trained once a process."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.read_text(encoding="utf-8").splitlines()),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        byte_fallback=byte_fallback,
        # Rare letters stay out of the vocabulary, so that they come as bytes.
        character_coverage=0.995,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
