"""From names to files: folders, built-in models, repositories on a hub, and everything that can go wrong there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.utils._http
import pytest

from moshi_mlx.checkpoint import resolve as hub
from moshi_mlx.checkpoint import transfer
from moshi_mlx.checkpoint.download import HubRepo
from moshi_mlx.checkpoint.resolve import builtin_models, plan_download, resolve
from moshi_mlx.errors import CheckpointError, DownloadError, MoshiError

from .helpers.fake_hub import FakeHub, FakeRepo, running_hub

NAME = "someone/model"
MIMI = "tokenizer-e351c8d8-checkpoint125.safetensors"
TOKENIZER = "tokenizer_spm_32k_3.model"
FILES = {
    "config.json": json.dumps({"model_type": "moshi", "moshi_name": "weights.safetensors"}).encode(),
    "weights.safetensors": b"w" * 5000,
    MIMI: b"m" * 100,
    TOKENIZER: b"t" * 50,
    "README.md": b"not needed",
    "other.safetensors": b"not needed either" * 1000,
}


def fetch(name: str, cache: Path) -> Path:
    """One file of the repository."""
    return HubRepo(NAME, cache=cache).fetch([name])[name]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that HF_ENDPOINT points at; nothing outside this machine can be asked."""
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        # The variable was read when huggingface_hub was imported, perhaps by another test.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        for reset in ("reset_sessions", "close_session"):
            getattr(huggingface_hub.utils._http, reset, lambda: None)()
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def make_folder(path: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# ------------------------------------------------------------------------------------------------ folders


def test_folder_by_configuration(tmp_path: Path) -> None:
    """Broken: a local checkpoint's parts are not found under the names that its config.json gives."""
    names = {
        "moshi_name": "lm@200.safetensors",
        "mimi_name": "codec.safetensors",
        "mimi_config_name": "sub/codec.json",
        "tokenizer_name": "words.model",
        "lora_name": "adapter.safetensors",
    }
    folder = make_folder(tmp_path / "m", {**dict.fromkeys(names.values(), b"x"), "config.json": json.dumps(names)})
    files = resolve(folder)
    assert files.config == folder / "config.json"
    assert files.weights == (folder / "lm@200.safetensors",)
    assert files.mimi == folder / "codec.safetensors"
    assert files.mimi_config == folder / "sub" / "codec.json"
    assert files.tokenizer == folder / "words.model"
    assert files.lora == folder / "adapter.safetensors"
    assert files.folder == folder and files.revision is None


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (["model.safetensors", "model.q4.safetensors"], "model.safetensors"),
        (["model.q4.safetensors"], "model.q4.safetensors"),
        (["model.q8.gguf"], "model.q8.gguf"),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], "model.safetensors.index.json"),
        (
            ["helium-1-preview-2b-q4.safetensors", "tokenizer_spm_48k_multi6_2.model"],
            "helium-1-preview-2b-q4.safetensors",
        ),
        (["strange.safetensors", MIMI, "lora.safetensors"], "strange.safetensors"),
    ],
)
def test_folder_without_configuration(tmp_path: Path, present: list[str], chosen: str) -> None:
    """Broken: folders as Kyutai published them before there was a config.json are refused."""
    contents: dict[str, bytes | str] = dict.fromkeys(present, b"x")
    if "model.safetensors.index.json" in present:
        contents["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": present[1]}})
    files = resolve(make_folder(tmp_path / "m", contents))
    assert files.config is None
    assert files.weights[0].name == chosen
    if MIMI not in present:
        assert files.mimi is None and files.names["mimi"] == MIMI


def test_ambiguous_weights_need_a_name(tmp_path: Path) -> None:
    """Broken: one of several quantizations is taken at random, or the file that the user named is not."""
    folder = make_folder(tmp_path / "m", {"model.q4.safetensors": b"x", "model.q8.safetensors": b"x"})
    with pytest.raises(CheckpointError, match=r"several.*q4.*q8"):
        resolve(folder)
    assert resolve(folder, weights="model.q4.safetensors").weights[0].name == "model.q4.safetensors"
    assert resolve(folder / "model.q8.safetensors").weights[0].name == "model.q8.safetensors"
    with pytest.raises(CheckpointError, match=r"no model\.q6"):
        resolve(folder, weights="model.q6.safetensors")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../b", "..\\secret", "C:\\x", "", "hf://only", "ftp://x/y", "file://[x"]
)
@pytest.mark.parametrize("key", ["moshi_name", "mimi_name", "tokenizer_name"])
def test_names_do_not_leave_the_folder(tmp_path: Path, key: str, name: str) -> None:
    """Broken: a downloaded config.json makes the program open any file of the machine."""
    make_folder(tmp_path, {"secret": b"s"})
    folder = make_folder(tmp_path / "m", {"config.json": json.dumps({key: name}), "model.safetensors": b"x"})
    if name == "":  # as good as absent
        assert resolve(folder).weights[0].name == "model.safetensors"
        return
    with pytest.raises(CheckpointError, match=r"outside its folder|should read hf://|not understood|no such file"):
        resolve(folder)


def test_file_references(tmp_path: Path) -> None:
    """Broken: the user's own configuration cannot point at a shared codec elsewhere on the disk."""
    shared = make_folder(tmp_path / "shared", {"codec.safetensors": b"x"}) / "codec.safetensors"
    config = {"mimi_name": shared.as_uri(), "tokenizer_name": "file://words.model"}
    contents = {"config.json": json.dumps(config), "model.safetensors": b"x", "words.model": b"x"}
    files = resolve(make_folder(tmp_path / "m", contents))  # type: ignore[arg-type]
    assert files.mimi == shared
    assert files.tokenizer == tmp_path / "m" / "words.model"
    bad = make_folder(
        tmp_path / "n", {"config.json": json.dumps({"mimi_name": "file://../x"}), "model.safetensors": b""}
    )
    with pytest.raises(CheckpointError, match="outside its folder"):
        resolve(bad)


@pytest.mark.parametrize("source", ["no/such/folder/here", "nothing", "./missing", "", "a/b@"])
def test_unknown_source(source: str) -> None:
    """Broken: a typing error in the model's name ends in a traceback instead of a sentence."""
    with pytest.raises(MoshiError, match=r"neither a folder"):
        resolve(source, offline=True)


def test_empty_folder(tmp_path: Path) -> None:
    """Broken: a folder without weights, or whose weights have another name, is not explained."""
    with pytest.raises(CheckpointError, match="holds no weights"):
        resolve(make_folder(tmp_path / "a", {"README.md": b""}))
    with pytest.raises(CheckpointError, match=r"names x\.safetensors, which is missing; there is config.json, y"):
        resolve(make_folder(tmp_path / "b", {"config.json": '{"moshi_name": "x.safetensors"}', "y.safetensors": b""}))


def test_builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken: built-in models are not found by their bare names."""
    make_folder(tmp_path / "tiny", {"config.json": "{}", "model.safetensors": b"x"})
    monkeypatch.setattr(hub, "BUILTIN", tmp_path)
    assert builtin_models() == ["tiny"]
    assert resolve("tiny").folder == tmp_path / "tiny"
    assert resolve("tiny").weights == (tmp_path / "tiny" / "model.safetensors",)
    (tmp_path / "tiny" / "model.safetensors").unlink()
    assert resolve("tiny").weights == ()  # not trained yet
    monkeypatch.setattr(hub, "BUILTIN", tmp_path / "none")
    assert builtin_models() == []


# -------------------------------------------------------------------------------------------- repositories


def test_fetches_only_what_is_needed(server: FakeHub, cache: Path) -> None:
    """Broken: loading a model downloads whole repositories, or asks again for what is in the cache."""
    server.repos[NAME] = FakeRepo(FILES | {"empty": b""})
    assert fetch("empty", cache).read_bytes() == b""
    server.requests.clear()
    files = resolve(NAME, cache=cache)
    assert files.weights[0].read_bytes() == FILES["weights.safetensors"]
    assert files.mimi is not None and files.mimi.read_bytes() == FILES[MIMI]
    assert files.tokenizer is not None and files.tokenizer.read_bytes() == FILES[TOKENIZER]
    assert files.revision == "a" * 40
    assert sorted(server.fetched()) == sorted(["config.json", "weights.safetensors", MIMI, TOKENIZER])
    server.requests.clear()
    assert resolve(NAME, cache=cache) == files
    assert server.fetched() == []


def test_sharded_and_extras(server: FakeHub, cache: Path) -> None:
    """Broken: the shards that an index names, or further files asked for, are not fetched."""
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    shards = dict.fromkeys(index["weight_map"].values(), b"s")
    server.repos[NAME] = FakeRepo(
        {"model.safetensors.index.json": json.dumps(index).encode(), **shards, "voices.tgz": b"v", "unused.bin": b"u"}
    )
    files = resolve(NAME, cache=cache, extras=["voices.tgz"])
    assert files.weights[0].name == "model.safetensors.index.json"
    assert all((files.folder / shard).is_file() for shard in shards)
    assert files.extras["voices.tgz"].read_bytes() == b"v"
    assert "unused.bin" not in server.fetched()
    with pytest.raises(CheckpointError, match=r"has no nothing\.here"):
        resolve(NAME, cache=cache, extras=["nothing.here"])


def test_pinned_revision(server: FakeHub, cache: Path) -> None:
    """Broken: a pinned model silently changes, or its files come from different commits."""
    server.repos[NAME] = FakeRepo(dict(FILES), sha="b" * 40, tags=("v1",))
    for revision in ("v1", "b" * 40, "main"):
        assert resolve(f"{NAME}@{revision}", cache=cache).revision == "b" * 40
    assert all("b" * 40 in path for _, path, _ in server.requests if "/resolve/" in path)
    with pytest.raises(DownloadError, match=r"no revision 'v2'"):
        resolve(f"{NAME}@v2", cache=cache)


def test_other_repository_by_reference(server: FakeHub, cache: Path) -> None:
    """Broken: a configuration that shares another repository's codec cannot be loaded."""
    config = {"mimi_name": "hf://someone/codec/sub/mimi@125.safetensors"}
    server.repos[NAME] = FakeRepo({"config.json": json.dumps(config).encode(), "model.safetensors": b"w"})
    server.repos["someone/codec"] = FakeRepo({"sub/mimi@125.safetensors": b"codec", "big": b"b"}, sha="c" * 40)
    files = resolve(NAME, cache=cache)
    assert files.mimi is not None and files.mimi.read_bytes() == b"codec"
    codec = HubRepo("someone/codec", cache=cache).fetch(["sub/mimi@125.safetensors"])
    assert codec["sub/mimi@125.safetensors"].read_bytes() == b"codec"
    assert "big" not in server.fetched()


@pytest.mark.parametrize("name", ["file:///etc/passwd", "file://config.json"])
def test_repositories_may_not_name_local_files(server: FakeHub, cache: Path, name: str) -> None:
    """Broken: a repository makes the program read files of the user's machine."""
    config = json.dumps({"mimi_name": name}).encode()
    server.repos[NAME] = FakeRepo({"config.json": config, "model.safetensors": b"w"})
    with pytest.raises(DownloadError, match="may not point at files of this machine"):
        resolve(NAME, cache=cache)


def test_offline_uses_the_cache(server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken: a model that is already here cannot be used on a train."""
    server.repos[NAME] = FakeRepo(dict(FILES))
    files = resolve(NAME, cache=cache)
    server.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve(NAME, cache=cache) == files
    assert resolve(f"{NAME}@{'a' * 40}", cache=cache).weights == files.weights
    assert server.requests == []
    with pytest.raises(DownloadError, match=r"not in the cache.*HF_HUB_OFFLINE.*built-in model small"):
        resolve("someone/else", cache=cache)


def test_unreachable_hub_falls_back_to_the_cache(server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken: without a network a cached model is refused, or an uncached one ends in a traceback or a long wait."""
    server.repos[NAME] = FakeRepo(dict(FILES))
    files = resolve(NAME, cache=cache)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert resolve(NAME, cache=cache) == files
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"cannot be reached.*built-in model small.*local folder.*HF_ENDPOINT"):
        resolve("someone/else", cache=cache)
    assert time.monotonic() - start < 10


def test_silent_hub_times_out(server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken: a hub that accepts the connection and never answers hangs the program."""
    monkeypatch.setattr(transfer, "TIMEOUT", 0.3)
    server.repos[NAME] = FakeRepo(dict(FILES), delay=1.5)
    start = time.monotonic()
    with pytest.raises(DownloadError, match="cannot be reached"):
        resolve(NAME, cache=cache)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "gated"}, r"gated: accept its licence at http.*someone/model.*hf auth login.*HF_TOKEN"),
        ({"gate": "private"}, r"shows no repository someone/model.*log in"),
        ({"status": 500}, r"cannot be reached"),
        ({"status": 403}, r"refuses someone/model"),
    ],
)
def test_access_refused(server: FakeHub, cache: Path, options: dict[str, Any], message: str) -> None:
    """Broken: the user does not learn that a licence, a login or patience is needed, and where."""
    server.repos[NAME] = FakeRepo(dict(FILES), **options)
    with pytest.raises(DownloadError, match=message):
        resolve(NAME, cache=cache)


def test_missing_repository_and_file(server: FakeHub, cache: Path) -> None:
    """Broken: a wrong name on the hub is not named."""
    with pytest.raises(DownloadError, match=r"no repository nobody/nothing"):
        resolve("nobody/nothing", cache=cache)
    server.repos[NAME] = FakeRepo({"config.json": b'{"moshi_name": "lost.safetensors"}', "README.md": b""})
    with pytest.raises(CheckpointError, match=r"names lost\.safetensors"):
        resolve(NAME, cache=cache)
    with pytest.raises(DownloadError, match=r"no such file: x\.wav"):
        fetch("x.wav", cache)


def test_disk_space_is_checked_first(server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken: a 15 GB download fills the disk and fails at its end."""
    server.repos[NAME] = FakeRepo(dict(FILES))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**5))
    with pytest.raises(DownloadError, match=r"GB more.*GB free.*HF_HOME"):
        resolve(NAME, cache=cache)
    assert "weights.safetensors" not in server.fetched()


def test_full_disk_while_writing(server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken: a disk that fills up meanwhile ends in a traceback."""
    server.repos[NAME] = FakeRepo(dict(FILES))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transfer._Hashed, "update", full)
    with pytest.raises(DownloadError, match="the disk is full.*HF_HOME"):
        resolve(NAME, cache=cache)


def test_broken_connection_is_resumed(server: FakeHub, cache: Path) -> None:
    """Broken: a dropped connection starts a large download again from zero, or fails it."""
    weights = bytes(range(256)) * 100_000
    server.repos[NAME] = FakeRepo(FILES | {"weights.safetensors": weights}, break_after=15_000_000, breaks=1)
    seen: list[tuple[str, int, int]] = []
    files = resolve(NAME, cache=cache, progress=lambda *report: seen.append(report))
    assert files.weights[0].read_bytes() == weights
    ranges = [r for m, p, r in server.requests if m == "GET" and p.endswith("weights.safetensors")]
    assert len(ranges) == 2 and ranges[0] == ""
    assert 5_000_000 < int(ranges[1].removeprefix("bytes=").removesuffix("-")) <= 15_000_000
    assert ("weights.safetensors", len(weights), len(weights)) in seen


def test_interrupted_download_goes_on_in_the_next_run(server: FakeHub, cache: Path) -> None:
    """Broken: Ctrl-C during a long download loses what was fetched."""
    weights = bytes(range(256)) * 100_000
    server.repos[NAME] = FakeRepo(FILES | {"weights.safetensors": weights})

    def interrupt(name: str, done: int, size: int) -> None:
        if name == "weights.safetensors" and done < size:
            raise KeyboardInterrupt

    total = len(FILES["config.json"]) + len(weights) + 150
    before = plan_download(NAME, cache=cache)
    assert (before.total, before.missing, before.place) == (total, total - len(FILES["config.json"]), cache)
    with pytest.raises(KeyboardInterrupt):
        resolve(NAME, cache=cache, progress=interrupt)
    kept = list(cache.rglob("*.incomplete"))
    assert len(kept) == 1 and 0 < kept[0].stat().st_size < len(weights)
    done = kept[0].stat().st_size
    assert plan_download(NAME, cache=cache).missing == len(weights) - done + 150 - sum(
        path.stat().st_size for path in cache.rglob("snapshots/*/*") if path.name in (MIMI, TOKENIZER)
    )
    server.requests.clear()
    files = resolve(NAME, cache=cache, progress=lambda *_: None)
    assert files.weights[0].read_bytes() == weights
    assert [r for m, p, r in server.requests if m == "GET" and p.endswith("weights.safetensors")] == [f"bytes={done}-"]
    assert not list(cache.rglob("*.incomplete"))


def test_survey_of_what_is_here(server: FakeHub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken: a model that is here is announced as a download, or a short patience is not kept."""
    server.repos[NAME] = FakeRepo(
        FILES | {"config.json": json.dumps({"moshi_name": "weights.safetensors", "mimi_name": "hf://a/b/m"}).encode()}
    )
    server.repos["a/b"] = FakeRepo({"m": b"m" * 77})
    assert plan_download(NAME, cache=cache).missing == 5000 + 77 + 50
    resolve(NAME, cache=cache)
    assert plan_download(NAME, cache=cache).missing == plan_download(NAME, cache=cache, offline=True).missing == 0
    assert plan_download("small").missing == 0 and plan_download("small").total > 1e6
    folder = make_folder(tmp_path / "model", FILES)
    assert (plan_download(folder).missing, plan_download(folder).place) == (0, folder)
    server.repos[NAME].delay = 1.0
    began = time.monotonic()
    with pytest.raises(DownloadError, match="cannot be reached"):
        plan_download(NAME, cache=tmp_path / "empty", timeout=0.2)
    assert time.monotonic() - began < 0.9


def test_damaged_partial_download_is_noticed(server: FakeHub, cache: Path) -> None:
    """Broken: a resumed download whose first half is wrong becomes a checkpoint full of noise."""
    server.repos[NAME] = FakeRepo(dict(FILES))
    resolve(NAME, cache=cache, progress=lambda *_: None)
    weights = next(cache.rglob("weights.safetensors"))
    blob = weights.resolve()
    weights.unlink()
    blob.rename(blob.with_name(blob.name + ".incomplete"))
    blob.with_name(blob.name + ".incomplete").write_bytes(b"?" * 2000)
    with pytest.raises(DownloadError, match="damaged and was thrown away"):
        resolve(NAME, cache=cache, progress=lambda *_: None)
    assert resolve(NAME, cache=cache).weights[0].read_bytes() == FILES["weights.safetensors"]


# ------------------------------------------------------------------------------------- what is not to be trusted


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "etag",
    ["../../../../evil/x.pth", "..", "a/b", "/evil", "main", "A" * 64, "a" * 63, "0" * 39 + "g", "W/../x", None],
)
def test_an_etag_is_a_hash_or_refused(server: FakeHub, tmp_path: Path, etag: str | None) -> None:
    """If this fails, a repository, or a mirror, writes any file of this machine, with any contents."""
    cache = tmp_path / "a" / "b" / "c" / "cache"
    server.repos[NAME] = FakeRepo({"config.json": b"{}", "model.safetensors": b"w" * 9000}, headers={"ETag": etag})
    with pytest.raises(DownloadError, match="ETag .* which is not the hash"):
        resolve(NAME, cache=cache)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("sha", ["../../../../small", "/etc", "main", "", None, 3, "a" * 39, "A" * 40, ["a" * 40]])
def test_a_commit_is_a_hash_or_refused(server: FakeHub, cache: Path, sha: Any) -> None:
    """If this fails, a repository makes the program load a folder of this machine as if it were the repository."""
    (cache / "models--someone--model" / "snapshots").mkdir(parents=True)
    make_folder(cache.parent / "small", {"config.json": "{}", "model.safetensors": b"here"})
    server.repos[NAME] = FakeRepo(dict(FILES), info={"sha": sha})
    with pytest.raises(DownloadError, match="which commit"):
        resolve(NAME, cache=cache)


@pytest.mark.parametrize(
    "siblings",
    [
        [{"rfilename": "config.json", "size": "60"}],
        [{"rfilename": "config.json", "size": -1}],
        [{"rfilename": "config.json", "size": True}],
        [{"rfilename": "config.json", "size": 1e300}],
        [{"rfilename": 3, "size": 3}],
        [{"size": 3}],
        ["config.json"],
        "config.json",
        {"config.json": 3},
    ],
)
def test_a_list_of_files_that_cannot_be_read(server: FakeHub, cache: Path, siblings: Any) -> None:
    """If this fails, a hub that says nonsense ends in a traceback."""
    server.repos[NAME] = FakeRepo(dict(FILES), info={"siblings": siblings})
    with pytest.raises(DownloadError, match=r"list of files for someone/model that cannot be read"):
        resolve(NAME, cache=cache)


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "a/../../b", "x" * 300, "a\\b", "\ud800"])
def test_names_in_a_repository_stay_inside(server: FakeHub, cache: Path, name: str) -> None:
    """If this fails, a name in a list of files or in a configuration leads out of the cache, or to a traceback."""
    config = json.dumps({"moshi_name": name}).encode()
    listed = [{"rfilename": "config.json", "size": len(config)}, {"rfilename": name, "size": 5}]
    server.repos[NAME] = FakeRepo({"config.json": config, name: b"evil!"}, info={"siblings": listed})
    with pytest.raises(MoshiError):
        resolve(NAME, cache=cache)
    assert not {"evil", "b"} & {path.name for path in cache.parent.rglob("*")}


@pytest.mark.parametrize("size", [100, 5000])
def test_every_file_is_hashed(server: FakeHub, cache: Path, size: int) -> None:
    """If this fails, wrong bytes of the right size are taken for the model."""
    server.repos[NAME] = FakeRepo(FILES | {"weights.safetensors": b"w" * size}, body=lambda data: [b"?" * len(data)])
    with pytest.raises(DownloadError, match="arrived damaged and was thrown away"):
        resolve(NAME, cache=cache)
    assert not list(cache.rglob("blobs/*"))


def test_small_files_have_the_hash_that_git_gives_them(server: FakeHub, cache: Path) -> None:
    """If this fails, every configuration of the real hub is called damaged, or none is ever checked."""
    data = b'{"moshi_name": "w.safetensors"}'
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    repo = server.repos[NAME] = FakeRepo({"config.json": data}, headers={"ETag": f'"{git}"'})
    assert fetch("config.json", cache).read_bytes() == data
    assert (cache / "models--someone--model" / "blobs" / git).read_bytes() == data
    repo.sha, repo.files["config.json"] = "b" * 40, data.replace(b"w", b"v")
    (cache / "models--someone--model" / "blobs" / git).unlink()
    with pytest.raises(DownloadError, match="arrived damaged"):
        fetch("config.json", cache)


def test_the_hash_in_the_list_of_files_counts(server: FakeHub, cache: Path) -> None:
    """If this fails, a mirror that makes ETags of its own is believed about contents that the hub has described."""
    repo = server.repos[NAME] = FakeRepo(dict(FILES), body=lambda data: [b"?" * len(data)])
    repo.headers["ETag"] = f'"{hashlib.sha256(b"?" * 5000).hexdigest()}"'
    with pytest.raises(DownloadError, match="arrived damaged"):
        fetch("weights.safetensors", cache)
    repo.body = None
    assert fetch("weights.safetensors", cache).read_bytes() == FILES["weights.safetensors"]
    assert [path.name for path in cache.rglob("blobs/*")] == [hashlib.sha256(FILES["weights.safetensors"]).hexdigest()]


@pytest.mark.parametrize("status", [200, 500])
def test_a_body_without_an_end(server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """If this fails, a small file fills the disk, or an error's explanation the memory."""
    monkeypatch.setattr(transfer, "_TRIES", 1)
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 200e6:
            sent += 100_000
            yield bytes(100_000)

    def lie(handler: Any) -> bool:
        if handler.command == "GET" and "/resolve/" in handler.path:
            handler.pour(endless(), status)
            return True
        return False

    server.repos[NAME] = FakeRepo(dict(FILES), lie=lie)
    with pytest.raises(DownloadError, match="arrived damaged" if status == 200 else "cannot be reached"):
        fetch("config.json", cache)
    assert sent < 40e6 and not list(cache.rglob("blobs/*"))


def test_a_list_without_an_end(server: FakeHub, cache: Path) -> None:
    """If this fails, a hub fills the memory before the first file is asked for."""

    def endless(handler: Any) -> bool:
        handler.pour(bytes(10**5) for _ in range(300))
        return True

    server.repos[NAME] = FakeRepo(dict(FILES), lie=endless)
    with pytest.raises(DownloadError, match="without end"):
        resolve(NAME, cache=cache)


@pytest.mark.parametrize("what", ["body", "header of a file", "list", "header of the list"])
def test_what_comes_a_byte_at_a_time(server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """If this fails, a hub keeps the program waiting for ever, without ever being late for a socket."""
    for name, value in (("_WINDOW", 0.5), ("TIMEOUT", 0.4), ("_PAUSE", 0.0)):
        monkeypatch.setattr(transfer, name, value)
    ended = threading.Event()

    def drops() -> Iterator[bytes]:
        while not ended.wait(0.05):
            yield b"w"

    def lie(handler: Any) -> bool:
        if ("/resolve/" in handler.path) != (what in ("body", "header of a file")) or "config" in handler.path:
            return False
        if what in ("body", "list"):
            if handler.command == "HEAD":
                return False
            handler.pour(drops())
            return True
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        with contextlib.suppress(OSError):
            for drop in drops():
                handler.wfile.write(drop)
        return True

    server.repos[NAME] = FakeRepo(dict(FILES), lie=lie)
    began = time.monotonic()
    try:
        with pytest.raises(DownloadError, match=r"bytes a second come|cannot be reached \(TimeoutError"):
            resolve(NAME, cache=cache)
    finally:
        ended.set()
    assert time.monotonic() - began < 5


class Answer:
    """Headers that came with requests, answered by a script instead of a server."""

    def __init__(self, answers: dict[tuple[str, str], tuple[int, dict[str, str], bytes]]):
        network = sys.modules[type(huggingface_hub.get_session()).__module__.partition(".")[0]]
        self.tokens: dict[str, str | None] = {}

        def answer(request: Any) -> Any:
            self.tokens[f"{request.method} {request.url}"] = request.headers.get("authorization")
            status, headers, body = answers[request.method, str(request.url).partition("?")[0]]
            return network.Response(status, headers=headers, content=iter([body]))

        self.client = network.Client(transport=network.MockTransport(answer))


@pytest.mark.parametrize(
    "elsewhere", ["http://hub.example/cdn", "https://hub.example:8443/cdn", "https://cdn.example/x", "//cdn.example/x"]
)
@pytest.mark.parametrize("late", [False, True])
def test_the_token_goes_to_the_hub_only(
    cache: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: str, late: bool
) -> None:
    """If this fails, a redirect carries the user's token to another host, to another port, or in clear."""
    data = b"{}"
    etag = f'"{hashlib.sha256(data).hexdigest()}"'
    told = {"ETag": etag, "X-Repo-Commit": "a" * 40}
    here = f"https://hub.example/{NAME}/resolve/{'a' * 40}/config.json"
    absolute = elsewhere if elsewhere.startswith("http") else f"https:{elsewhere}"
    listing = {"sha": "a" * 40, "siblings": [{"rfilename": "config.json", "size": 2}]}
    answers = {
        ("GET", f"https://hub.example/api/models/{NAME}"): (200, {}, json.dumps(listing).encode()),
        ("HEAD", here): (200 if late else 302, told | ({} if late else {"Location": elsewhere}), b""),
        ("GET", here): (302, {"Location": elsewhere}, b""),
        ("GET", absolute): (200, told, data),
    }
    answer = Answer(answers)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: answer.client)
    monkeypatch.setattr("huggingface_hub.utils._http.get_session", lambda: answer.client)
    assert fetch("config.json", cache).read_bytes() == data
    assert answer.tokens[f"HEAD {here}"] == "Bearer hf_secret"
    assert answer.tokens[f"GET {absolute}"] is None


def test_a_hub_that_is_silent_is_asked_once(server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, each step of loading a downloaded model waits again for a hub that does not answer."""
    server.repos[NAME] = FakeRepo(dict(FILES))
    files = resolve(NAME, cache=cache)
    monkeypatch.setattr(transfer, "TIMEOUT", 0.3)
    server.repos[NAME].delay = 1.0
    server.requests.clear()
    assert plan_download(NAME, cache=cache).missing == 0 and resolve(NAME, cache=cache) == files
    assert len(server.requests) == 1


def test_two_downloads_of_one_file(server: FakeHub, cache: Path) -> None:
    """If this fails, two runs at once fetch everything twice, spoil each other's file, or wait without a word."""
    server.repos[NAME] = FakeRepo(FILES | {"weights.safetensors": bytes(30_000)}, body=slowly)
    told: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        runs = [
            pool.submit(resolve, NAME, cache=cache, progress=lambda name, here, size: told.append(here))
            for _ in range(4)
        ]
        found = {run.result().weights[0].read_bytes() for run in runs}
    assert found == {bytes(30_000)} and server.fetched().count("weights.safetensors") == 1 and 0 < len(told)
    assert not list(cache.rglob("*.incomplete"))


def slowly(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 10_000):
        yield data[start : start + 10_000]
        time.sleep(0.5 if len(data) > 10_000 else 0)


# ---------------------------------------------------------------------------------------------- what is missing


@pytest.mark.parametrize("key", ["lora_name", "mimi_config_name"])
def test_a_part_that_is_named_and_missing(tmp_path: Path, key: str) -> None:
    """If this fails, a checkpoint silently loads as another model: without its LoRA, or with another codec's sizes."""
    folder = make_folder(tmp_path / "m", {"config.json": json.dumps({key: "part"}), "model.safetensors": b"x"})
    with pytest.raises(CheckpointError, match=f"config.json names part .{key}., which is missing.*take its name out"):
        resolve(folder)
    make_folder(folder, {"part": b"x"})
    assert resolve(folder).lora == (folder / "part" if key == "lora_name" else None)


@pytest.mark.parametrize(
    "name",
    [
        "x" * 300,
        "~nobody-of-that-name/x",
        "~nobody",
        "~a\0b",
        "~\ud800",
        "a/" * 2000 + "b",
        "a\0b",
        "a/b" * 50,
        "a/b--c",
    ],
)
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    """If this fails, a slip on the command line, or a strange configuration, ends in the system's error."""
    with pytest.raises(MoshiError):
        resolve(name, offline=True)
    with pytest.raises(MoshiError):
        HubRepo(name, offline=True)
    contents = {"config.json": json.dumps({"moshi_name": name, "mimi_name": name}), "model.safetensors": b"x"}
    with pytest.raises(MoshiError):
        resolve(make_folder(tmp_path / "m", contents))  # type: ignore[arg-type]
    with pytest.raises(MoshiError):
        resolve("a/b@" + name, offline=True)


@pytest.mark.parametrize("token", ["hf_\x1b[31m", "hf é", "hf_a\nX-Evil: 1", "\x7f"])
def test_a_token_that_is_none(server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    """If this fails, a slip in HF_TOKEN is a traceback, is printed for all to see, or writes headers of its own."""
    monkeypatch.setenv("HF_TOKEN", token)
    server.repos[NAME] = FakeRepo(dict(FILES))
    with pytest.raises(DownloadError, match="characters that no token has") as caught:
        resolve(NAME, cache=cache)
    assert token not in str(caught.value) and not server.requests


def test_the_hub_is_asked_for_the_model_only(server: FakeHub, cache: Path) -> None:
    """If this fails, huggingface_hub tells, or asks, the hub things that have nothing to do with the model."""
    server.repos[NAME] = FakeRepo(dict(FILES))
    resolve(NAME, cache=cache)
    assert all("/api/models/" in path or "/resolve/" in path for _, path, _ in server.requests)
