"""Voices: speaker embeddings of the text-to-speech model, and prompts of PersonaPlex."""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from .files import read_safetensors
from .pickled import read_torch_tensors

__all__ = ["VoicePrompt", "list_voices", "load_speaker", "load_voice_prompt"]

MAX_MEMBER = 64 * 2**20
MAX_ARCHIVE = 2**30
_FLOATS = (mx.float16, mx.bfloat16, mx.float32)


@dataclass(frozen=True)
class VoicePrompt:
    """What PersonaPlex replays before a conversation to take on a voice.

    Attributes
    ----------
    embeddings : mx.array [frames, dim], float
        Summed input embeddings, one per frame, for :meth:`moshi_mlx.lm.Lm.step_embedded`.
    cache : mx.array [streams, slots], int64
        Tokens of the last frames, text first, to be installed afterwards.
    """

    embeddings: mx.array
    cache: mx.array


def load_speaker(path: str | os.PathLike[str]) -> mx.array:
    """Speaker embedding [frames, dim], float32: ``speaker_wavs`` [1, dim, frames] in a file of kyutai/tts-voices."""
    tensors, _ = read_safetensors(path)
    wavs = tensors.get("speaker_wavs")
    if set(tensors) != {"speaker_wavs"} or wavs is None or wavs.ndim != 3 or wavs.shape[0] != 1 or 0 in wavs.shape:
        raise CheckpointError(f"{path} should hold one tensor, speaker_wavs [1, dim, frames]")
    if wavs.dtype not in _FLOATS:
        raise CheckpointError(f"{path}: speaker_wavs is {wavs.dtype}; floats are needed")
    return wavs[0].T.astype(mx.float32)


def load_voice_prompt(path: str | os.PathLike[str], name: str | None = None) -> VoicePrompt:
    """Read a voice prompt.

    Parameters
    ----------
    path : path
        A ``.pt`` or ``.safetensors`` file with ``embeddings`` [frames, 1, 1, dim] and ``cache`` [1, streams, slots],
        or an archive (``voices.tgz``) of ``.pt`` files.
    name : str, optional
        Which voice of an archive, for instance ``NATF0``.

    Raises
    ------
    CheckpointError
        If the file is damaged, holds something else, or the archive lacks the voice.
    """
    path = Path(path)
    if path.name.endswith((".tgz", ".tar.gz")):
        members = {voice: data for voice, data in _voices(path, name) if data is not None}
        if name not in members:
            raise CheckpointError(f"{path} has no voice {name!r}; it has {', '.join(list_voices(path))}")
        tensors = read_torch_tensors(members[name], f"{path}: voice {name}")
    elif path.suffix == ".safetensors":
        tensors = read_safetensors(path)[0]
    else:
        tensors = read_torch_tensors(path)
    return _checked(tensors, str(path))


def list_voices(path: str | os.PathLike[str]) -> list[str]:
    """Names of the voices in an archive."""
    return sorted(name for name, _ in _voices(Path(path), None))


def _checked(tensors: dict[str, mx.array], where: str) -> VoicePrompt:
    if set(tensors) != {"embeddings", "cache"}:
        raise CheckpointError(f"{where} should hold embeddings and cache, found {sorted(tensors)[:4]}")
    embeddings, cache = tensors["embeddings"], tensors["cache"]
    if embeddings.ndim != 4 or embeddings.shape[1:3] != (1, 1) or embeddings.dtype not in _FLOATS:
        raise CheckpointError(f"{where}: embeddings should be floats [frames, 1, 1, dim], found {embeddings.shape}")
    if cache.ndim != 3 or cache.shape[0] != 1 or cache.dtype not in (mx.int64, mx.int32):
        raise CheckpointError(f"{where}: cache should be integers [1, streams, slots], found {cache.shape}")
    return VoicePrompt(embeddings[:, 0, 0], cache[0])


def _voices(path: Path, wanted: str | None) -> list[tuple[str, bytes | None]]:
    """Voices of an archive; contents only of the wanted one. Nothing is unpacked to disk."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    voices: list[tuple[str, bytes | None]] = []
    passed = 0
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                passed += member.size + 512
                if passed > MAX_ARCHIVE or member.size > MAX_MEMBER:
                    raise CheckpointError(f"{path} unpacks to too much for an archive of voices")
                match = re.fullmatch(r"(?:.*/)?([A-Za-z0-9_-]+)\.pt", member.name)
                if match is None or not member.isreg():
                    continue
                data = archive.extractfile(member) if match[1] == wanted else None
                voices.append((match[1], data.read() if data is not None else None))
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable archive: {error}") from error
    return voices
