"""Recordings cut into pieces of equal length and encoded: the tokens of a training step.

As moshi-finetune does, a recording is cut every so many seconds, and every piece is encoded on its own. Pieces are kept
in a file, because encoding them takes longer than several passes of training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moshi_mlx.checkpoint.readers import read_safetensors, write_safetensors
from moshi_mlx.codec.base import Codec
from moshi_mlx.config import LmConfig
from moshi_mlx.engine.text import TextTokenizer
from moshi_mlx.errors import CheckpointError, ConfigError

from .recordings import Recording, read_piece
from .rows import FRAME_RATE, cut_words, frames_in, masked_tail, text_row

__all__ = ["Cut", "Piece", "cut_recording", "encode_pieces", "load_pieces", "made_of", "split_pieces"]

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Cut:
    """Where a piece is.

    Attributes
    ----------
    recording : Recording
    start, seconds : float
        The last piece of a recording may be shorter than the others.
    """

    recording: Recording
    start: float
    seconds: float

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.recording.path.name} from {self.start:g} s"


@dataclass(frozen=True)
class Piece:
    """A piece as it is learnt.

    Attributes
    ----------
    tokens : array [streams, frames], int32
        Text, own codes, user codes; -1 where the recording has ended.
    name : str
    conditions : mapping or None
    """

    tokens: Ints
    name: str
    conditions: Mapping[str, Any] | None = None

    @property
    def frames(self) -> int:
        """Frames that are recorded."""
        return int((self.tokens[1] >= 0).sum())


def cut_recording(recording: Recording, seconds: float) -> list[Cut]:
    """The consecutive pieces of a recording; an end shorter than a frame is left out."""
    cuts = []
    count = 0
    while (left := recording.seconds - count * seconds) >= 1 / FRAME_RATE:
        cuts.append(Cut(recording, count * seconds, min(seconds, left)))
        count += 1
    return cuts


def piece_tokens(cut: Cut, frames: int, config: LmConfig, codec: Codec, tokenizer: TextTokenizer, ahead: float) -> Ints:
    """Tokens of one piece."""
    own, user = read_piece(cut.recording, cut.start, cut.seconds, codec.sample_rate)
    codes = [codec.encode(own)[: config.own_q], codec.encode(user)[: config.user_q]]
    length = min(frames, *(part.shape[1] for part in codes))
    words = cut_words(cut.recording.words or (), cut.start, cut.seconds, ahead)
    pads = {"pad": config.existing_text_padding_id, "end_pad": config.existing_text_end_padding_id}
    row = text_row(words, length, tokenizer.encode, **pads)
    return masked_tail(np.concatenate([row[None], *(part[:, :length] for part in codes)]), frames)


def encode_pieces(
    recordings: Sequence[Recording],
    seconds: float,
    config: LmConfig,
    codec: Codec,
    tokenizer: TextTokenizer,
    *,
    ahead: float = 0.0,
    advance: Callable[[float], None] = lambda seconds: None,
) -> list[Piece]:
    """All pieces of recordings.

    Parameters
    ----------
    seconds : float
        Length of a piece.
    ahead : float
        Seconds by which the text comes before the sound.
    advance : callable
        Called with the seconds of each piece that is done.

    Raises
    ------
    AudioError
        If a recording cannot be read.
    ConfigError
        If a recording has no words.
    """
    silent = [recording for recording in recordings if recording.words is None]
    if silent:
        raise ConfigError(
            f"{len(silent)} of {len(recordings)} recordings have no timed words, the first is {silent[0].path}: "
            "add them with 'moshi-mlx-finetune prepare DATA --recogniser MODEL'"
        )
    frames, pieces = frames_in(seconds), []
    for recording in recordings:
        for cut in cut_recording(recording, seconds):
            tokens = piece_tokens(cut, frames, config, codec, tokenizer, ahead)
            pieces.append(Piece(tokens, cut.name, recording.conditions))
            advance(cut.seconds)
    return pieces


def load_pieces(path: Path, key: Mapping[str, Any], make: Callable[[], list[Piece]]) -> list[Piece]:
    """Pieces from a file that was made from the same things, or made now and kept there.

    Parameters
    ----------
    path : path
    key : mapping
        What the pieces depend on.
    make : callable
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    if path.exists():
        try:
            arrays, metadata = read_safetensors(path)
            if metadata.get("key") == digest:
                about = json.loads(metadata["about"])
                tokens = np.array(arrays["tokens"].astype(mx.int32))
                return [Piece(part, *entry) for part, entry in zip(tokens, about, strict=True)]
        except (CheckpointError, ValueError, KeyError):
            pass  # of a run that was killed, or of another version
    pieces = make()
    if pieces:
        about = [[piece.name, piece.conditions] for piece in pieces]
        stacked = mx.array(np.stack([piece.tokens for piece in pieces]).astype(np.int32))
        write_safetensors(path, {"tokens": stacked}, {"key": digest, "about": json.dumps(about)})
    return pieces


def made_of(recordings: Sequence[Recording], **settings: Any) -> dict[str, Any]:
    """A key for :func:`load_pieces`: files by name, size and time of change, their words, and settings."""
    files = []
    for recording in recordings:
        about = recording.path.stat()
        words = [[word.text, word.start, word.end] for word in recording.words or ()]
        said = hashlib.sha256(json.dumps([words, recording.conditions]).encode()).hexdigest()
        files.append([str(recording.path.resolve()), about.st_size, about.st_mtime_ns, said])
    return {"files": files, **settings}


def split_pieces(pieces: Sequence[Piece], share: float, seed: int) -> tuple[list[Piece], list[Piece]]:
    """Pieces to learn from and to judge by: a share of them, at least one, drawn once by the seed."""
    if share <= 0 or len(pieces) < 2:
        return list(pieces), []
    count = min(len(pieces) - 1, max(1, round(share * len(pieces))))
    chosen = set(np.random.default_rng(seed).permutation(len(pieces))[:count].tolist())
    learnt = [piece for index, piece in enumerate(pieces) if index not in chosen]
    return learnt, [pieces[index] for index in sorted(chosen)]
