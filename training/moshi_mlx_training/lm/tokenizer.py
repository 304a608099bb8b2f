"""The small model's text tokenizer: a SentencePiece model of the words it can say, other text in bytes.

    python -m moshi_mlx_training.lm.tokenizer moshi_mlx/builtin/small/tokenizer.model

Ids are those of Kyutai's models: 0 ``<unk>`` (EPAD in the text stream), 1 and 2 the ends, 3 padding, then 256 bytes.
Nearly every word of the answers is one piece, so a word takes one frame. The same answers give the same file.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

from moshi_mlx_training.speech.dialogues import answers

PIECES = 624
_WORD_WEIGHT = 200  # how often each word is shown alone: enough for words to win over their syllables


def _lines() -> Iterator[str]:
    yield from answers()
    words = sorted({word for answer in answers() for word in re.findall(r"[A-Za-z']+", answer)})
    for word in words:
        for _ in range(_WORD_WEIGHT):
            yield word


def tokenizer_bytes(pieces: int = PIECES) -> bytes:
    """Train the model; takes a second."""
    import sentencepiece

    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(),
        model_writer=model,
        model_type="unigram",
        vocab_size=pieces,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",  # the Unicode tables would be 240 kB of a 10 kB file
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moshi_mlx_training.lm.tokenizer", description=__doc__.split("\n")[0]
    )
    parser.add_argument("file", type=Path, help="where the tokenizer goes")
    options = parser.parse_args(arguments)
    contents = tokenizer_bytes()
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_bytes(contents)
    print(f"{options.file}: {PIECES} pieces, {len(contents)} bytes")


if __name__ == "__main__":
    main()
