"""The small model's text tokenizer: a SentencePiece model of the words it can say, other text in bytes.

    python -m moshi_mlx_training.lm.tokenizer moshi_mlx/builtin/small/tokenizer.model
    python -m moshi_mlx_training.lm.tokenizer training/models/small-stt/tokenizer.model --words

Ids are those of Kyutai's models: 0 ``<unk>`` (EPAD in the text stream), 1 and 2 the ends, 3 padding, then 256 bytes.
Nearly every word of the answers is one piece, so a word takes one frame. The same answers give the same file.

With ``--words`` it is that of speech to text and text to speech: parts of the words of `speech.vocabulary`, letters,
and the marks of a sentence; capitals are read as small letters. What it does not know is ``<unk>``, and is left out.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase

from moshi_mlx_training.speech import vocabulary
from moshi_mlx_training.speech.dialogues import answers

PIECES, SPEECH_PIECES = 624, 1024
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


def _speech_lines() -> Iterator[str]:
    """Words as often as they are drawn, nearly, with the marks that may stand behind them."""
    words = vocabulary.words()
    for rank, word in enumerate(words):
        for count in range(round(3000 * (rank + 20) ** -0.7)):
            yield word + ("", "", "", "", ".", ",", "?")[count % 7]


def speech_tokenizer_bytes(pieces: int = SPEECH_PIECES) -> bytes:
    """Train the model of ``--words``; takes some seconds."""
    import tempfile

    import sentencepiece

    model = BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        rules.writelines(f"{ord(letter):X}\t{ord(letter.lower()):X}\n" for letter in ascii_uppercase)
        rules.flush()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_speech_lines(),
            model_writer=model,
            model_type="bpe",
            vocab_size=pieces,
            character_coverage=1.0,
            required_chars=ascii_lowercase + "'.,?!",
            normalization_rule_tsv=rules.name,
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
    parser.add_argument("--words", action="store_true", help="that of speech to text and text to speech")
    options = parser.parse_args(arguments)
    contents = speech_tokenizer_bytes() if options.words else tokenizer_bytes()
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_bytes(contents)
    print(f"{options.file}: {SPEECH_PIECES if options.words else PIECES} pieces, {len(contents)} bytes")


if __name__ == "__main__":
    main()
