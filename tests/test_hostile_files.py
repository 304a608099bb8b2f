"""Files that are damaged or made to do harm: each ends in a clear error, quickly and without filling the memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moshi_mlx.checkpoint.fit import load_config, load_lm
from moshi_mlx.checkpoint.gguf import read_gguf
from moshi_mlx.checkpoint.pickled import read_torch_tensors
from moshi_mlx.checkpoint.readers import read_json, read_safetensors, write_safetensors
from moshi_mlx.checkpoint.voices import list_voices, load_speaker, load_voice_prompt
from moshi_mlx.errors import CheckpointError, MoshiError

from .fuzz import attack
from .helpers.checkpoints import small_config, write_checkpoint
from .helpers.torch_files import integer, tensor, text, write_archive, write_pt

Entry = dict[str, Any]
EIGHT = b"\0" * 8


def safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body) if length is None else length) + body + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> Entry:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


HEADERS: list[tuple[str, Any, bytes, int | None, str]] = [
    ("length past the end", {}, b"", 10**6, r"header alone should have 1000000: the file is incomplete"),
    ("largest length", {}, b"", 2**64 - 1, r"should have 18446744073709551615"),
    ("not JSON", b"{oops", b"", None, r"not valid JSON"),
    ("not UTF-8", b'{"\xff\xfe": 1}', b"", None, r"not valid JSON"),
    ("a list", [], b"", None, r"should hold a JSON object"),
    ("deep", b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", None, r"nested too deeply"),
    ("endless number", b'{"a": ' + b"9" * 100_000 + b"}", b"", None, r"not valid JSON"),
    ("twice", b'{"a": 1, "a": 2}', b"", None, r"has 'a' twice"),
    ("no entry", {"a": 3}, EIGHT, None, r"'a' should have dtype"),
    ("extra key", {"a": entry() | {"x": 1}}, EIGHT, None, r"should have dtype"),
    ("unknown type", {"a": entry("F4")}, EIGHT, None, r"'a' has the type 'F4'"),
    ("float64", {"a": entry("F64", (1,))}, EIGHT, None, r"convert it to F32"),
    ("type of a list", {"a": entry(["F32"])}, EIGHT, None, r"has the type"),  # type: ignore[arg-type]
    ("negative axis", {"a": entry(shape=(-2,))}, EIGHT, None, r"impossible shape"),
    ("fraction", {"a": entry(shape=(2.0,))}, EIGHT, None, r"impossible shape"),
    ("true as axis", {"a": entry(shape=(True, 2))}, EIGHT, None, r"impossible shape"),
    ("no shape", {"a": entry(shape=None)}, EIGHT, None, r"impossible shape"),
    ("many axes", {"a": entry(shape=(1,) * 99)}, EIGHT, None, r"impossible shape"),
    ("overflow", {"a": entry(shape=(2**32, 2**32, 2), end=8)}, EIGHT, None, r"takes 147573952589676412928 bytes"),
    ("beyond 2^53", {"a": entry(shape=(2**63,), end=8)}, EIGHT, None, r"impossible shape"),
    (
        "wrong size",
        {"a": entry(shape=(3,))},
        EIGHT,
        None,
        r"F32 of shape \[3\] takes 12 bytes, but data_offsets span 8",
    ),
    ("backwards", {"a": entry(begin=8, end=0)}, EIGHT, None, r"impossible data_offsets"),
    ("negative offset", {"a": entry(begin=-8, end=0)}, EIGHT, None, r"impossible data_offsets"),
    ("one offset", {"a": entry() | {"data_offsets": [0]}}, EIGHT, None, r"impossible data_offsets"),
    ("past the end", {"a": entry(shape=(4,), end=16)}, EIGHT, None, r"ends at byte 16 of the data, which has only 8"),
    ("overlap", {"a": entry(), "b": entry(begin=4, end=12)}, EIGHT + EIGHT, None, r"'b' overlaps"),
    ("same place", {"a": entry(), "b": entry()}, EIGHT, None, r"overlaps"),
    ("hole", {"a": entry(), "b": entry(begin=16, end=24)}, EIGHT * 3, None, r"leaves 8 bytes unused"),
    ("left over", {"a": entry()}, EIGHT * 2, None, r"8 bytes after its last tensor"),
    ("metadata list", {"__metadata__": [1]}, b"", None, r"__metadata__ should map"),
    ("metadata numbers", {"__metadata__": {"a": 1}}, b"", None, r"__metadata__ should map"),
]


@pytest.mark.parametrize(("header", "data", "length", "message"), [h[1:] for h in HEADERS], ids=[h[0] for h in HEADERS])
def test_safetensors_headers(tmp_path: Path, header: Any, data: bytes, length: int | None, message: str) -> None:
    """Broken: a damaged or hostile header crashes, hangs, or is believed."""
    path = safetensors(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


def test_long_header(tmp_path: Path) -> None:
    """Broken: a header of gigabytes is read into memory because the file is as long as it says."""
    path = tmp_path / "long.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**33))
        file.truncate(8 + 2**33)
    with pytest.raises(CheckpointError, match="not believable"):
        read_safetensors(path)
    repeated = b'{"a":' + b'{"b":0},"a":' * 50_000 + b"0}"
    with pytest.raises(CheckpointError, match="twice"):
        read_safetensors(safetensors(path, repeated))


@pytest.mark.parametrize("size", [0, 1, 7])
def test_hardly_a_file(tmp_path: Path, size: int) -> None:
    """Broken: an empty download ends in a traceback."""
    for name, read in [("x.safetensors", read_safetensors), ("x.gguf", read_gguf), ("x.pt", read_torch_tensors)]:
        path = tmp_path / name
        path.write_bytes(b"\0" * size)
        with pytest.raises(CheckpointError, match=re_name(path)):
            read(path)
        path.unlink()
        with pytest.raises(CheckpointError, match="no such file"):
            read(path)


def re_name(path: Path) -> str:
    return path.name.replace(".", r"\.")


@pytest.mark.parametrize("padding", range(9))
@pytest.mark.parametrize("metadata", ["absent", None, {}, {"format": "pt"}])
def test_good_files_of_other_writers(tmp_path: Path, padding: int, metadata: Any) -> None:
    """Broken: files that MLX wrote (null metadata, no padding, offsets out of order) are refused or misread."""
    first, second = np.arange(3, dtype=np.float32), np.arange(5, dtype=np.int8)
    header: dict[str, Any] = {"z": entry("F32", (3,), 5, 17), "a": entry("I8", (5,), 0, 5)}
    if metadata != "absent":
        header = {"__metadata__": metadata, **header}
    body = json.dumps(header).encode() + b" " * padding
    tensors, found = read_safetensors(safetensors(tmp_path / "x.safetensors", body, second.tobytes() + first.tobytes()))
    assert tensors["z"].tolist() == first.tolist() and tensors["a"].tolist() == second.tolist()
    assert found == (metadata if isinstance(metadata, dict) else {})


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    """Broken: tensors without elements or without axes are refused."""
    header = {"empty": entry("F32", (0, 5), 0, 0), "scalar": entry("F32", (), 0, 4)}
    tensors, _ = read_safetensors(safetensors(tmp_path / "x.safetensors", header, struct.pack("<f", 2.5)))
    assert tensors["empty"].shape == (0, 5) and tensors["scalar"].item() == 2.5


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken: an interrupted or failed save destroys the file that was there, or leaves half a file behind."""
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": mx.ones((3,))}, {"made": "here"})
    tensors, metadata = read_safetensors(path)
    assert tensors["a"].tolist() == [1, 1, 1] and metadata == {"format": "mlx", "made": "here"}
    with pytest.raises(CheckpointError, match="cannot write"):
        write_safetensors(tmp_path / "missing" / "x.safetensors", {"a": mx.ones((3,))})

    def fail_halfway(name: str, *_: Any) -> None:
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", fail_halfway)
    with pytest.raises(CheckpointError, match="No space left"):
        write_safetensors(path, {"a": mx.zeros((3,))})
    assert read_safetensors(path)[0]["a"].tolist() == [1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("layout", ["mlx", "torch", "candle", "sharded", "gguf"])
def test_truncated_checkpoints(tmp_path: Path, layout: str) -> None:
    """Broken: an interrupted copy of a model loads, and is noise from somewhere on."""
    folder = write_checkpoint(tmp_path, layout=layout, tokenizer=False)
    config = load_config(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    weights = index if index.exists() else next(p for p in folder.iterdir() if p.name.startswith("model"))
    load_lm(config, weights)
    victim = folder / "model-00002-of-00003.safetensors" if index.exists() else weights
    whole = victim.read_bytes()
    for size in (0, 5, 8, 100, len(whole) // 2, len(whole) - 40):
        victim.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=re_name(victim)):
            load_lm(config, weights)


# --------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "should hold a JSON object"),
        (b'{"dim": 1, "dim": 2}', "'dim' twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"dim": NaN}', "dim"),
        (b'{"dim": 1e999}', "dim"),
        (b'{"dim": 999999999999999999999999}', "dim"),
        (b'{"num_layers": -1}', "num_layers"),
        (b'{"delays": "abc"}', "delays"),
        (b'{"conditioners": [1]}', "conditioners"),
        (b'{"fuser": 3}', "fuser"),
        (b'{"moshi_name": 3}', "moshi_name"),
        (b'{"quantization": 4}', "quantization"),
        (b"\xff\xfe{}", "not valid JSON"),
    ],
)
def test_configurations(tmp_path: Path, content: bytes, message: str) -> None:
    """Broken: a damaged config.json ends in a traceback."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(MoshiError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 10**8},
        {"depformer_num_layers": 10**8},
        {"depformer_num_layers": -1},
        {"extra_heads_num_heads": 10**9},
        {"extra_heads_num_heads": 1, "extra_heads_dim": -1},
        {"text_card": 10**9},
        {"text_card": 10**12},
        {"card": 10**18},
        {"dim": 2**40, "num_heads": 2},
        {"hidden_scale": 1e18},
        {"hidden_scale": 1e300},
        {"hidden_scale": 1e-300},
        {"depformer_dim": 0},
        {"depformer_dim": -64},
        {"depformer_num_heads": 0},
        {"depformer_dim_feedforward": -5},
        {"depformer_low_rank_embeddings": 10**13},
        {"depformer_low_rank_embeddings": -3},
        {"context": 10**15},
        {"conditioners": {"a": {"type": "tensor", "tensor": {"dim": 0}}}, "fuser": {"sum": ["a"]}},
        {"conditioners": {"a": {"type": "lut", "lut": {"dim": -1, "n_bins": 3, "possible_values": ["x"]}}}},
    ],
    ids=str,
)
def test_impossible_sizes(tmp_path: Path, change: dict[str, Any]) -> None:
    """Broken: a config.json with absurd numbers fills the memory or ends in a traceback."""
    folder = write_checkpoint(tmp_path, small_config(num_layers=1), tokenizer=False)
    data = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(data))
    start = time.process_time()
    try:
        load_lm(load_config(folder / "config.json"), folder / "model.safetensors")
    except MoshiError:
        pass
    else:
        assert change.keys() <= {"context", "conditioners"}  # weights do not show these
    assert time.process_time() - start < 5


def test_large_configuration(tmp_path: Path) -> None:
    """Broken: a config.json of gigabytes is read."""
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(CheckpointError, match="too much for a configuration"):
        read_json(tmp_path / "config.json")


# --------------------------------------------------------------------------------------------------- GGUF


def gguf(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts))
    return path


def head(version: int = 3, tensors: int = 1, pairs: int = 0) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, pairs)


def string(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def info(name: bytes = b"a.weight", dims: tuple[int, ...] = (32, 2), kind: int = 8, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


GGUFS: list[tuple[str, list[bytes], str]] = [
    ("magic", [b"GGML" + b"\0" * 40], "not a GGUF file"),
    ("version", [head(version=1)], "version 1 is not known"),
    ("count", [head(tensors=2**63)], "not believable"),
    ("pairs", [head(pairs=2**63)], "not believable"),
    ("name length", [head(), string(b"", 2**62)], "not believable"),
    ("ends", [head(), string(b"a")], "ends inside its header"),
    ("axes", [head(), string(b"a") + struct.pack("<I", 2**31)], "axes"),
    ("type", [head(), info(kind=12)], "has the ggml type 12"),
    ("shape", [head(), info(dims=(33, 2))], "impossible shape"),
    ("huge shape", [head(), info(dims=(2**40, 2**40))], "impossible shape"),
    ("past the end", [head(), info(), b"\0" * 64], "but the file has"),
    ("offset", [head(), info(offset=2**62), b"\0" * 512], "but the file has"),
    ("overlap", [head(tensors=2), info(), info(b"b.weight", offset=8), b"\0" * 512], "overlaps"),
    ("twice", [head(tensors=2), info(), info(offset=96), b"\0" * 512], "twice"),
    ("not a weight", [head(), info(b"odd"), b"\0" * 512], "not called a weight"),
    ("value type", [head(pairs=1), string(b"k") + struct.pack("<I", 99)], "unknown type 99"),
    ("array", [head(pairs=1), string(b"k") + struct.pack("<IIQ", 9, 8, 2**62)], "ends inside its header"),
    ("wide array", [head(pairs=1), string(b"k") + struct.pack("<IIQ", 9, 12, 2**62)], "not believably long"),
    (
        "nested array",
        [head(pairs=1), string(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 90],
        "unknown type 9",
    ),
    ("empty strings", [head(pairs=1), string(b"k") + struct.pack("<IIQ", 9, 8, 2**40) + b"\0" * 2**20], "ends inside"),
    ("alignment", [head(pairs=1), string(b"general.alignment") + struct.pack("<II", 4, 0)], "alignment of 0"),
]


@pytest.mark.parametrize(("parts", "message"), [case[1:] for case in GGUFS], ids=[case[0] for case in GGUFS])
def test_gguf_headers(tmp_path: Path, parts: list[bytes], message: str) -> None:
    """Broken: a hostile GGUF header crashes, hangs, or fills the memory."""
    with pytest.raises(CheckpointError, match=message):
        read_gguf(gguf(tmp_path / "bad.gguf", *parts))


# ------------------------------------------------------------------------------------------------- pickles


class Evil:
    """Unpickling this would run a command; the file that it would make shows whether it did."""

    def __init__(self, call: Callable[..., Any], *arguments: Any):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


def evil_programs(witness: Path) -> dict[str, bytes]:
    import os

    good = tensor("0", "FloatStorage", 2, 0, [2], [1])
    bomb = b"]q\x00" + b"".join(b"(h%ch%ct\x71%c" % (i, i, i + 1) for i in range(60))
    return {
        "system": pickle.dumps(Evil(os.system, f"touch {witness}"), 2),
        "system 4": pickle.dumps({"a": Evil(os.system, f"touch {witness}")}, 4),
        "eval": b"\x80\x02}(" + text("a") + b"cbuiltins\neval\n(" + text(f"open({str(witness)!r}, 'w')") + b"tRu.",
        "open": b"\x80\x02cbuiltins\nopen\n(" + text(str(witness)) + text("w") + b"tR.",
        "inst": b"(" + text("touch") + b"ios\nsystem\n.",
        "build": b"\x80\x02}}b.",
        "newobj": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "getattr": b"\x80\x02ctorch\nload\n.",
        "torch other": b"\x80\x02ctorch\nFloatTensor\n.",
        "dotted": b"\x80\x04" + b"\x8c\x05torch\x8c\x10Tensor.__class__\x93.",
        "extension": b"\x80\x02\x82\x01.",
        "numbers": b"\x80\x02}(" + text("a") + integer(1) + b"u.",
        "list": b"\x80\x02].",
        "no dict": b"\x80\x02" + good + b".",
        "empty": b"\x80\x02}.",
        "no end": b"\x80\x02}",
        "nothing": b"",
        "garbage": b"\xff" * 100,
        "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "memo missing": b"\x80\x02h\x07.",
        "stack": b"\x80\x02RRRR.",
        "marks": b"\x80\x02tttt.",
        "bomb": b"\x80\x02" + bomb + b".",
        "bomb as a name": b"\x80\x04" + bomb + b"\x8c\x01x\x93.",
        "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".",
        "long int": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "decimal": b"L" + b"9" * 100_000 + b"L\n.",
        "integer keys": b"\x80\x02}(" + integer(1) + good + b"u.",
        "deep keys": b"\x80\x02}N" + b"\x85" * 500_000 + b"Ns.",
        "deep arguments": b"\x80\x02ccollections\nOrderedDict\n(N" + b"\x85" * 500_000 + b"Nt\x85R.",
        "beyond": b"\x80\x02}(" + text("a") + tensor("0", "FloatStorage", 2, 1, [2], [1]) + b"u.",
        "far stride": b"\x80\x02}(" + text("a") + tensor("0", "FloatStorage", 2, 0, [2], [2**40]) + b"u.",
        "negative stride": b"\x80\x02}(" + text("a") + tensor("0", "FloatStorage", 2, 1, [2], [-1]) + b"u.",
        "negative offset": b"\x80\x02}(" + text("a") + tensor("0", "FloatStorage", 2, -1, [1], [1]) + b"u.",
        "zero stride": b"\x80\x02}(" + text("a") + tensor("0", "FloatStorage", 2, 0, [2**20, 2**20], [0, 0]) + b"u.",
        "huge shape": b"\x80\x02}(" + text("a") + tensor("0", "FloatStorage", 2, 0, [2**47] * 8, [0] * 8) + b"u.",
        "other storage": b"\x80\x02}(" + text("a") + tensor("../../x", "FloatStorage", 2, 0, [2], [1]) + b"u.",
        "lost storage": b"\x80\x02}(" + text("a") + tensor("7", "FloatStorage", 2, 0, [2], [1]) + b"u.",
        "odd items": b"\x80\x02}(" + text("a") + b"u.",
        "complex": b"\x80\x02}(" + text("a") + tensor("0", "ComplexFloatStorage", 1, 0, [1], [1]) + b"u.",
    }


@pytest.mark.parametrize("name", evil_programs(Path("/nowhere")))
def test_pickles(tmp_path: Path, name: str) -> None:
    """Broken: a voice file from the net runs commands on the user's machine, or crashes the program."""
    witness = tmp_path / "witness"
    path = write_archive(tmp_path / "voice.pt", evil_programs(witness)[name], {"data/0": EIGHT})
    with pytest.raises(CheckpointError, match=r"voice\.pt"):
        load_voice_prompt(path)
    assert not witness.exists()


def test_many_tensors_of_one_storage(tmp_path: Path) -> None:
    """Broken: a small file asks for the same bytes again and again until the memory is full."""
    data = bytes(4 * 2**20)
    entries = b"".join(text(str(i)) + tensor("0", "FloatStorage", 2**20, 0, [2**20], [1]) for i in range(500))
    path = write_archive(tmp_path / "voice.pt", b"\x80\x02}(" + entries + b"u.", {"data/0": data})
    with pytest.raises(CheckpointError, match="larger than the file"):
        load_voice_prompt(path)
    many = b"".join(text(str(i)) + tensor("0", "FloatStorage", 2, 0, [2], [1]) for i in range(2000))
    path = write_archive(tmp_path / "voice.pt", b"\x80\x02}(" + many + b"u.", {"data/0": EIGHT})
    with pytest.raises(CheckpointError, match="impossible tensor"):
        load_voice_prompt(path)


def test_archives(tmp_path: Path) -> None:
    """Broken: a ZIP bomb, an archive of a million members or a foreign ZIP is unpacked."""
    good = b"\x80\x02}(" + text("a") + tensor("0", "FloatStorage", 2, 0, [2], [1]) + b"u."
    bomb = write_archive(tmp_path / "bomb.pt", good, {"data/0": bytes(200 * 2**20)}, compress=True)
    assert bomb.stat().st_size < 10**6
    with pytest.raises(CheckpointError, match="compressed, which torch never does"):
        load_voice_prompt(bomb)
    long = write_archive(tmp_path / "long.pt", good + b"0" * 2**21, {"data/0": EIGHT})
    with pytest.raises(CheckpointError, match=r"'data\.pkl' has \d+ bytes"):
        load_voice_prompt(long)
    with zipfile.ZipFile(tmp_path / "many.pt", "w") as archive:
        for index in range(5000):
            archive.writestr(f"archive/{index}", b"")
    with pytest.raises(CheckpointError, match="5000 members"):
        load_voice_prompt(tmp_path / "many.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", b"hello")
    with pytest.raises(CheckpointError, match="0 descriptions"):
        load_voice_prompt(tmp_path / "other.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"embeddings": [1]}))
    with pytest.raises(CheckpointError, match="not a ZIP archive"):
        load_voice_prompt(tmp_path / "old.pt")
    with (tmp_path / "big.pt").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(CheckpointError, match="too much for a voice"):
        load_voice_prompt(tmp_path / "big.pt")


def test_tar_archives(tmp_path: Path) -> None:
    """Broken: an archive of voices unpacks gigabytes, follows links, or hides a voice outside."""
    path = tmp_path / "voices.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, kind, target in [
            ("voices/A.pt", tarfile.SYMTYPE, "/etc/passwd"),
            ("voices/B.pt", tarfile.LNKTYPE, "x"),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    assert list_voices(path) == []
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("voices/A.pt")
        member.size = 65 * 2**20
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(CheckpointError, match="unpacks to too much"):
        list_voices(path)
    whole = path.read_bytes()
    for broken in (b"", whole[:50], b"\x1f\x8b" + b"\xff" * 100, bytes(512)):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"voices\.tgz"):
            load_voice_prompt(path, "A")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"embeddings": mx.zeros((5, 1, 1, 8))}, "should hold embeddings and cache"),
        ({"embeddings": mx.zeros((5, 8)), "cache": mx.zeros((1, 3, 4), mx.int64)}, "embeddings should be floats"),
        ({"embeddings": mx.zeros((5, 1, 1, 8)), "cache": mx.zeros((1, 3, 4))}, "cache should be integers"),
        ({"embeddings": mx.zeros((5, 1, 1, 8)), "cache": mx.zeros((3, 4), mx.int64)}, "cache should be integers"),
    ],
)
def test_misshapen_voices(tmp_path: Path, tensors: dict[str, mx.array], message: str) -> None:
    """Broken: a voice of another form crashes the model much later."""
    with pytest.raises(CheckpointError, match=message):
        load_voice_prompt(write_pt(tmp_path / "voice.pt", tensors))


def test_misshapen_speakers(tmp_path: Path) -> None:
    """Broken: any safetensors file passes for a speaker."""
    path = tmp_path / "x.safetensors"
    for tensors in ({"speaker": mx.zeros((1, 4, 5))}, {"speaker_wavs": mx.zeros((4, 5))}):
        mx.save_safetensors(str(path), tensors)
        with pytest.raises(CheckpointError, match="speaker_wavs"):
            load_speaker(path)
    mx.save_safetensors(str(path), {"speaker_wavs": mx.zeros((1, 4, 5), mx.int32)})
    with pytest.raises(CheckpointError, match="floats are needed"):
        load_speaker(path)


# ------------------------------------------------------------------------------------------- time and memory

_ALONE = """
import json, sys, time
import moshi_mlx.checkpoint.fit
from moshi_mlx.errors import MoshiError
from tests.helpers.load_memory import peak_bytes
module, name = sys.argv[1].split(":")
read = getattr(__import__(module, fromlist=[name]), name)
before, began, said = peak_bytes(), time.process_time(), ""
try:
    read(sys.argv[2])
except MoshiError as error:
    said = str(error)
print(json.dumps([(peak_bytes() - before) / 1e6, time.process_time() - began, said]))
"""


def alone(read: str, path: Path) -> tuple[float, float, str]:
    """By how many megabytes a process grows that reads a file and does nothing else, its seconds, and the error."""
    command = [sys.executable, "-c", _ALONE, read, str(path)]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    grown, seconds, said = json.loads(run.stdout.splitlines()[-1])
    return grown, seconds, said


def many_tensors(count: int) -> bytes:
    """A header with so many tensors without elements."""
    one = b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    body = b"{" + b",".join(one % index for index in range(count)) + b"}"
    return struct.pack("<Q", len(body)) + body


def tar_of(name: str, kind: bytes, size: int, data: bytes, times: int = 1) -> bytes:
    """A compressed archive of one member, so many times; its bytes are ``data`` repeated."""
    buffer = io.BytesIO()
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    part = (data * (min(size, 2**20) // max(1, len(data)) + 1))[: min(size, 2**20)]
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as stream:
        if size <= 2**16:
            stream.write((member.tobuf(tarfile.GNU_FORMAT) + part + bytes(-size % 512)) * times)
        else:
            for _ in range(times):
                stream.write(member.tobuf(tarfile.GNU_FORMAT))
                for start in range(0, size, 2**20):
                    stream.write(part[: size - start])
                stream.write(bytes(-size % 512))
        stream.write(bytes(1024))
    return buffer.getvalue()


JSON = "moshi_mlx.checkpoint.readers:read_json"
HEADER = "moshi_mlx.checkpoint.readers:read_safetensors"
VOICES = "moshi_mlx.checkpoint.voices:list_voices"
# What reads it, a name, how it is made, and what is said of it; "": nothing is wrong with it.
GREEDY: dict[str, tuple[str, str, Callable[[], bytes], str]] = {
    "500,000 tensors": (HEADER, "x", lambda: many_tensors(500_000), "header of 29388891 bytes is not believable"),
    "60,000 tensors": (HEADER, "x", lambda: many_tensors(60_000), "60000 tensors are not believable"),
    "15 MB of JSON": (JSON, "x.json", lambda: b'{"a":[' + b"{}," * 5_000_000 + b"0]}", "too much for a config"),
    "2 MB of JSON": (JSON, "x.json", lambda: b'{"a":[' + b"[]," * 690_000 + b"0]}", ""),
    "a long name": (VOICES, "v.tgz", lambda: tar_of("x", tarfile.GNUTYPE_LONGNAME, 2**28, b"x"), "more than"),
    "attributes": (VOICES, "v.tgz", lambda: tar_of("x", tarfile.XHDTYPE, 2**28, b"9 path=x\n"), "more than"),
    "chained headers": (VOICES, "v.tgz", lambda: tar_of("x", tarfile.XHDTYPE, 9, b"9 path=x\n", 3000), ""),
    "global headers": (VOICES, "v.tgz", lambda: tar_of("x", tarfile.XGLTYPE, 50_000, b"9 a=x\n", 3000), ""),
    "empty files": (VOICES, "v.tgz", lambda: tar_of("x", tarfile.REGTYPE, 0, b"", 300_000), "more than"),
    "zeros": (VOICES, "v.tgz", lambda: tar_of("x", tarfile.REGTYPE, 2**24, b"\0", 20), "unpacks to too much"),
}


@pytest.mark.parametrize("case", GREEDY)
def test_small_files_take_little(tmp_path: Path, case: str) -> None:
    """If this fails, a file of a few megabytes takes a gigabyte of memory, or a minute, before it is refused."""
    read, name, make, message = GREEDY[case]
    path = tmp_path / name
    path.write_bytes(make())
    grown, seconds, said = alone(read, path)
    print(f"{path.stat().st_size / 1e6:.1f} MB: {grown:.0f} MB, {seconds:.2f} s: {said}")
    assert grown < 100 and seconds < 5
    assert (name in said and message in said) if message else not said


# ------------------------------------------------------------------------------------------------- small faults


def test_encrypted_and_cut_voices(tmp_path: Path) -> None:
    """If this fails, a voice with a bit set in its archive, or one that is cut, ends in an error of Python's."""
    tensors = {"embeddings": mx.ones((3, 1, 1, 8), mx.bfloat16), "cache": mx.ones((1, 5, 4), mx.int64)}
    path = write_pt(tmp_path / "x.pt", tensors)
    good = bytearray(path.read_bytes())
    encrypted = bytearray(good)
    encrypted[good.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(encrypted)
    with pytest.raises(CheckpointError, match=r"x\.pt: its part .data.pkl. is encrypted"):
        load_voice_prompt(path)
    other = bytearray(good)
    other[good.index(b"PK\1\2") + 10] = 99  # a way of compressing that nobody has
    path.write_bytes(other)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        load_voice_prompt(path)
    directory = good.index(b"PK\1\2")
    for size in range(30, directory, 97):
        path.write_bytes(good[:size] + good[directory:])
        with pytest.raises(CheckpointError, match=r"x\.pt"):
            load_voice_prompt(path)


def test_gguf_axes_that_mlx_cannot_have(tmp_path: Path) -> None:
    """If this fails, a GGUF file with an axis of zero beside one of 2^62 ends in an OverflowError."""
    for kind in (0, 8):
        with pytest.raises(CheckpointError, match="impossible shape"):
            read_gguf(gguf(tmp_path / "x.gguf", head(), info(dims=(0, 2**62), kind=kind)))
        with pytest.raises(CheckpointError, match="impossible shape"):
            read_gguf(gguf(tmp_path / "x.gguf", head(), info(dims=(2**32, 0), kind=kind)))


def test_what_is_not_a_file(tmp_path: Path) -> None:
    """If this fails, a pipe in place of a file waits for ever, or too long a name ends in the system's error."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        for read in (read_json, read_safetensors, read_gguf, read_torch_tensors, list_voices, load_speaker):
            with pytest.raises(CheckpointError, match=r"no such file|cannot be read"):
                read(path)


def test_messages_stay_short() -> None:
    """If this fails, an error quotes a megabyte of a hostile file, and its way out scrolls off the screen."""
    said = str(CheckpointError(f"config.json: {'x' * 10**6} is wrong: fetch it again"))
    assert len(said) < 1500 and said.startswith("config.json: xxx") and said.endswith("xxx is wrong: fetch it again")
    assert str(CheckpointError("short")) == "short" and str(CheckpointError()) == ""


# ---------------------------------------------------------------------------------------------------- fuzz


@pytest.mark.parametrize(
    ("name", "inputs", "refused"),
    [
        ("safetensors", 300, 200),
        ("gguf", 300, 100),
        ("torch", 300, 150),
        ("pickles", 300, 200),
        ("archives", 40, 10),
        ("speakers", 200, 100),
        ("checkpoints", 60, 30),
        ("tokenizers", 100, 50),
        ("texts", 300, 200),
        ("configs", 600, 300),
        ("codec-configs", 300, 200),
    ],
)
def test_fuzzed_files(name: str, inputs: int, refused: int) -> None:
    """If this fails, some damage to some kind of file is not noticed in time, or ends in a traceback or a crash."""
    outcome = attack(name, 1, inputs=inputs)
    assert not outcome.findings and outcome.inputs == inputs
    assert refused < outcome.refused < inputs  # both ways were taken
