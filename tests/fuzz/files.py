"""Files of weights, voices and words: damaged at random, and made to do harm."""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from moshi_mlx.checkpoint.fit import load_config, load_lm
from moshi_mlx.checkpoint.pickled import read_torch_tensors
from moshi_mlx.checkpoint.readers import read_safetensors, read_tensors
from moshi_mlx.checkpoint.voices import list_voices, load_speaker, load_voice_prompt
from moshi_mlx.engine.text import TextTokenizer
from tests.helpers.checkpoints import small_config, write_checkpoint, write_gguf
from tests.helpers.tokenizer import tokenizer_bytes
from tests.helpers.torch_files import integer, tensor, text, write_archive, write_pt

from . import Attack, Attempt, fuzzer

_NUMBERS = [0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few random changes: bytes, 4- and 8-byte numbers, cuts, repeats; mostly near the start, where headers are."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        near = min(len(result), 2000 if rng.random() < 0.8 else len(result))
        at = rng.randrange(max(1, near))
        kind = rng.randrange(7)
        if kind == 0:
            result[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            result[at : at + 8] = struct.pack("<Q", rng.choice(_NUMBERS))
        elif kind == 2:
            del result[at : at + rng.randint(1, 50)]
        elif kind == 3:
            result[at:at] = result[at : at + rng.randint(1, 50)]
        elif kind == 4:
            result[at : at + 1] = rng.choice([b"9", b"-", b'"', b"{", b"[", b"\0", b"(", b"R", b"."])
        elif kind == 5:
            result[at : at + 4] = struct.pack("<I", rng.choice(_NUMBERS) & 0xFFFFFFFF)
        else:
            del result[at if rng.random() < 0.5 else rng.randrange(len(result) + 1) :]
    return bytes(result)


def mutated(path: Path, read: Callable[[Path], object]) -> Attack:
    """Mutations of the file that is at ``path`` now, which has to be readable."""
    good = path.read_bytes()
    read(path)
    return lambda rng: written(path, mutate(good, rng), read)


def written(path: Path, data: bytes, read: Callable[[Path], object]) -> Attempt:
    """The attempt to read ``data`` from a file; what is refused has to be named."""

    def call() -> None:
        path.write_bytes(data)
        try:
            read(path)
        except Exception as error:
            if path.name not in str(error):
                raise AssertionError(f"the error does not name {path.name}: {error}") from error
            raise

    return data, call


def _evaluated(path: Path) -> None:
    mx.eval(list(read_tensors(path).values()))


@fuzzer()
def safetensors(folder: Path) -> Attack:
    path = folder / "x.safetensors"
    mx.save_safetensors(str(path), {f"layer.{i}.weight": mx.ones((3, i)) for i in range(1, 9)}, {"format": "mlx"})
    damaged = mutated(path, _evaluated)

    def make(rng: random.Random) -> Attempt:
        if rng.random() < 0.5:
            return damaged(rng)
        # A header whose every value is drawn, before as many bytes as its tensors might take.
        header, end = {}, 0
        for index in range(rng.choice([0, 1, 2, 3, 50])):
            shape = [rng.choice([0, 1, 2, 3, 4, rng.choice(_NUMBERS)]) for _ in range(rng.choice([0, 1, 2, 2, 3, 9]))]
            size = 4
            for axis in shape:
                size *= axis
            begin, end = end, end + size
            entry = {
                "dtype": rng.choice(["F32", "F32", "I32", "BF16", "F64"]),
                "shape": shape,
                "data_offsets": [begin, end],
            }
            if rng.random() < 0.1:
                entry[rng.choice(list(entry))] = rng.choice([None, -1, [], [0], "x", 1.5, True, [2**64, 0]])
            header[rng.choice(["a", "b.weight", "", "\u202e", "x" * 5000, f"layer.{index}"])] = entry
        body = json.dumps(header).encode()
        data = struct.pack("<Q", len(body) + rng.choice([0, 0, 0, 1, 2**40])) + body + bytes(min(end, 5000))
        return written(path, data, _evaluated if rng.random() < 0.8 else lambda path: read_safetensors(path))

    return make


@fuzzer()
def gguf(folder: Path) -> Attack:
    path = folder / "x.gguf"
    write_gguf(path, {f"layer.{i}.weight": mx.ones((2, 32)) for i in range(4)} | {"norm": mx.ones((8,))})
    return mutated(path, _evaluated)


@fuzzer()
def torch(folder: Path) -> Attack:
    """Voices as torch saves them."""
    tensors = {"embeddings": mx.ones((3, 1, 1, 8), mx.bfloat16), "cache": mx.ones((1, 5, 4), mx.int64)}
    path = write_pt(folder / "x.pt", tensors)
    good = path.read_bytes()
    load_voice_prompt(path)

    def make(rng: random.Random) -> Attempt:
        data = bytearray(mutate(good, rng))
        if rng.random() < 0.3 and (at := data.find(rng.choice([b"PK\1\2", b"PK\3\4", b"PK\5\6"]))) >= 0:
            data[min(at + rng.randrange(4, 46), len(data) - 1)] = rng.randrange(256)  # a member's flags, sizes, offsets
        return written(path, bytes(data), load_voice_prompt)

    return make


@fuzzer()
def pickles(folder: Path) -> Attack:
    """Damage inside a pickle, under an archive's intact checksums."""
    good = b"\x80\x02}q\x00(" + text("a") + tensor("0", "FloatStorage", 2, 0, [2], [1]) + text("b")
    good += tensor("1", "LongStorage", 4, 0, [2, 2], [2, 1]) + b"u."
    path = folder / "x.pt"

    def make(rng: random.Random) -> Attempt:
        program = mutate(good, rng)
        for _ in range(rng.choice([0, 0, 1, 3])):
            at = rng.randrange(len(program) + 1)
            pieces = [
                integer(rng.choice(_NUMBERS) - 2**63),
                b"(",
                b"t",
                b"R",
                b"}",
                b"u",
                b"q\x00",
                b"h\x00",
                b"\x85",
                b"Q",
            ]
            program = program[:at] + rng.choice(pieces) + program[at:]
        write_archive(path, program, {"data/0": bytes(8), "data/1": bytes(32)}, compress=rng.random() < 0.02)
        return written(path, path.read_bytes(), read_torch_tensors)

    return make


@fuzzer(megabytes=64.0)
def archives(folder: Path) -> Attack:
    """Archives of voices: members of every kind and size, under names of every length, and damage to the whole."""
    voice = write_pt(
        folder / "A.pt", {"embeddings": mx.ones((3, 1, 1, 8), mx.bfloat16), "cache": mx.ones((1, 5, 4), mx.int64)}
    ).read_bytes()
    path = folder / "voices.tgz"
    kinds = [*b"01234567", *b"LKxgSV", 0, 255]

    def read(path: Path) -> None:
        list_voices(path)
        load_voice_prompt(path, "A")

    def make(rng: random.Random) -> Attempt:
        archive = io.BytesIO()
        with gzip.GzipFile(fileobj=archive, mode="wb", compresslevel=1) as stream:
            if rng.random() < 0.5:
                good = tarfile.TarInfo("voices/A.pt")
                good.size = len(voice)
                stream.write(good.tobuf() + voice + bytes(-len(voice) % 512))
            for _ in range(rng.choice([0, 1, 2, 5, 30])):
                member = tarfile.TarInfo(rng.choice(["voices/A.pt", "A.pt", "B.pt", "../A.pt", "é" * 40, "x" * 99, ""]))
                member.type = bytes([rng.choice(kinds)]) if rng.random() < 0.6 else tarfile.REGTYPE
                data = rng.choice([voice, b"", bytes(700), b"30 path=voices/A.pt\n", b"9999 path=", bytes(10**5)])
                times = 1
                if rng.random() < 0.05:  # as large as it says, which compresses well
                    data = bytes([rng.randrange(256)]) * 2**20
                    times = rng.choice([1, 30, 63])
                member.size = len(data) * times
                if rng.random() < 0.15:
                    member.size = rng.choice([2**20, 2**26, 2**30, 2**33, 2**60])
                whole = member.tobuf(tarfile.GNU_FORMAT) + data
                whole = mutate(whole, rng) if rng.random() < 0.05 else whole
                for _ in range(5000 if rng.random() < 0.02 and len(data) < 1000 else 1):
                    stream.write(whole)
                    for _ in range(times - 1):
                        stream.write(data)
                    stream.write(bytes(-len(data) % 512))
            stream.write(bytes(rng.choice([0, 512, 1024, 10240])))
        data = archive.getvalue()
        return written(path, mutate(data, rng) if rng.random() < 0.2 else data, read)

    return make


@fuzzer()
def speakers(folder: Path) -> Attack:
    """Voices of the text-to-speech model."""
    path = folder / "x.safetensors"
    mx.save_safetensors(str(path), {"speaker_wavs": mx.ones((1, 4, 5))})
    return mutated(path, load_speaker)


@fuzzer(seconds=10.0)
def checkpoints(folder: Path) -> Attack:
    """Whole checkpoints, in every layout, one of whose files is damaged."""
    layouts = ["mlx", "torch", "candle", "sharded", "gguf"]
    places = {}
    for layout in layouts:
        config = small_config(num_layers=1, depformer_num_layers=1)
        places[layout] = write_checkpoint(folder / layout, config, layout, tokenizer=False)

    def make(rng: random.Random) -> Attempt:
        place = places[rng.choice(layouts)]
        files = sorted(path for path in place.iterdir() if path.name.startswith(("config", "model")))
        index = place / "model.safetensors.index.json"
        weights = index if index.exists() else next(path for path in files if path.name.startswith("model"))
        victim = rng.choice(files)
        data = mutate(victim.read_bytes(), rng)

        def call() -> None:
            broken = folder / "broken"
            shutil.rmtree(broken, ignore_errors=True)
            broken.mkdir()
            for path in files:
                if path != victim:
                    (broken / path.name).symlink_to(path)
            (broken / victim.name).write_bytes(data)
            load_lm(load_config(broken / "config.json"), broken / weights.name)

        return data, call

    return make


@fuzzer()
def tokenizers(folder: Path) -> Attack:
    good = tokenizer_bytes()
    path = folder / "x.model"

    def read(path: Path) -> None:
        tokenizer = TextTokenizer(path)
        tokenizer.decode(tokenizer.encode("What is it? é 𝄞"))

    path.write_bytes(good)
    return mutated(path, read)
