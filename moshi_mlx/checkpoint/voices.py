"""Voices: speaker embeddings of the text-to-speech model, and prompts of PersonaPlex."""

from __future__ import annotations

import difflib
import gzip
import os
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from .download import HubRepo
from .opening import open_file
from .pickled import read_torch_tensors
from .quantization import FLOATS
from .readers import read_safetensors

__all__ = ["VOICES", "VoicePrompt", "find_speaker", "list_voices", "load_speaker", "load_voice_prompt"]

VOICES = "kyutai/tts-voices"
"""The repository of voices for text-to-speech."""

MAX_MEMBER = 16 * 2**20
MAX_ARCHIVE = 2**28
"""Bytes that an archive may unpack to; the published one holds 18 voices in 6 MB."""
MAX_MEMBERS = 10_000
MAX_EXTENSION = 2**16
"""Bytes of what extends a member's header: its long name, its PAX attributes."""
_BLOCK = tarfile.BLOCKSIZE
_EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)


@dataclass(frozen=True)
class VoicePrompt:
    """What PersonaPlex replays before a conversation to take on a voice.

    Attributes
    ----------
    embeddings : mx.array [frames, dim], float
        Summed input embeddings, one per frame, for :meth:`moshi_mlx.models.lm.Lm.step_embedded`.
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
    if wavs.dtype not in FLOATS:
        raise CheckpointError(f"{path}: speaker_wavs is {wavs.dtype}; floats are needed")
    return wavs[0].T.astype(mx.float32)


def find_speaker(name: str, ending: str, source: str = VOICES) -> Path:
    """The file of a voice for text-to-speech.

    Parameters
    ----------
    name : str
        A path here, or a name in ``source`` such as ``expresso/ex03-ex01_happy_001_channel1_334s.wav``.
    ending : str
        What the model's identity adds to the name: ``.1e68beda@240.safetensors``.
    source : str
        A repository on the hub, or a folder.

    Raises
    ------
    CheckpointError
        If there is no such voice, or it was made for another model.
    DownloadError
        If it cannot be fetched.
    """
    for path in (Path(name).expanduser(), Path(name + ending).expanduser()):
        if path.suffix == ".safetensors" and path.is_file():
            made_for = re.search(r"\.[0-9a-f]{8}@\d+\.safetensors$", path.name)
            if made_for and not path.name.endswith(ending):
                raise CheckpointError(f"{path} is a voice for another model: this one needs a file *{ending}")
            return path
    wanted = name if name.endswith(ending) else name + ending
    folder = Path(source).expanduser()
    if folder.is_dir():
        path = folder / wanted
        names = [] if path.is_file() else [str(found.relative_to(folder)) for found in folder.rglob("*" + ending)]
        if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            return path
    else:
        repo = HubRepo(source)
        if not name.startswith("/") and ".." not in name.split("/") and repo.has(wanted):
            return repo.fetch([wanted])[wanted]
        names = [found for found in repo.names() if found.endswith(ending)]
    known = [found.removesuffix(ending) for found in names]
    near = difflib.get_close_matches(name, known, 3, 0.4) or sorted(known)[:3]
    raise CheckpointError(
        f"there is no voice {name[:100]!r} in {source}; "
        + (f"there is, for instance, {', '.join(near)}" if near else f"it has none that ends in {ending}")
    )


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
    if embeddings.ndim != 4 or embeddings.shape[1:3] != (1, 1) or embeddings.dtype not in FLOATS:
        raise CheckpointError(f"{where}: embeddings should be floats [frames, 1, 1, dim], found {embeddings.shape}")
    if cache.ndim != 3 or cache.shape[0] != 1 or cache.dtype not in (mx.int64, mx.int32):
        raise CheckpointError(f"{where}: cache should be integers [1, streams, slots], found {cache.shape}")
    return VoicePrompt(embeddings[:, 0, 0], cache[0])


def _voices(path: Path, wanted: str | None) -> list[tuple[str, bytes | None]]:
    """Voices of an archive; contents only of the wanted one. Nothing is unpacked to disk.

    ``tarfile`` itself would read whatever a header calls a long name, nest as deeply as headers follow each other, and
    keep an object of each member: it parses single headers here, and everything between them is counted.
    """
    voices: list[tuple[str, bytes | None]] = []
    try:
        with open_file(path) as (file, _), gzip.GzipFile(fileobj=file) as stream:
            name, passed, count = "", 0, 0
            while (header := stream.read(_BLOCK)) != bytes(_BLOCK):
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
                extends = member.type in _EXTENSIONS
                has_data = member.isreg() or extends or member.type not in tarfile.SUPPORTED_TYPES
                padded = -(-member.size // _BLOCK) * _BLOCK if has_data else 0
                passed, count = passed + _BLOCK + padded, count + 1
                if member.size < 0 or count > MAX_MEMBERS or (extends and padded > MAX_EXTENSION):
                    raise CheckpointError(f"{path} holds more than an archive of voices does: refused")
                if passed > MAX_ARCHIVE or padded > MAX_MEMBER:
                    raise CheckpointError(f"{path} unpacks to too much for an archive of voices")
                match = re.fullmatch(r"(?:.*/)?([A-Za-z0-9_-]+)\.pt", name or member.name, re.DOTALL)
                voice = match[1] if match and member.isreg() else None
                keep = extends or (voice is not None and voice == wanted)
                data = _take(stream, padded, member.size if keep else 0)
                name = (_long_name(member.type, data) or name) if extends else ""
                if voice is not None:
                    voices.append((voice, data if keep else None))
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable archive: {error}") from error
    return voices


def _take(stream: gzip.GzipFile, count: int, keep: int) -> bytes:
    """The first ``keep`` of the next ``count`` bytes."""
    data = stream.read(keep)
    passed = len(data)
    while passed < count:
        block = stream.read(min(count - passed, 2**16))
        if not block:
            raise EOFError("it ends in the middle of a file")
        passed += len(block)
    return data


def _long_name(kind: bytes, data: bytes) -> str:
    """The name that an extension gives the member behind it; empty if it is about something else."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    match = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", data) if kind == tarfile.XHDTYPE else None
    return match[1].decode("utf-8", "surrogateescape") if match else ""
