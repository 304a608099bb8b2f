"""From names to files: folders, built-in models, repositories on a hub, and everything that can go wrong there."""

from __future__ import annotations

import json
import shutil
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.utils._http
import pytest

from moshi_mlx import hub
from moshi_mlx.checkpoint import repo as repo_module
from moshi_mlx.errors import CheckpointError, DownloadError, MoshiError
from moshi_mlx.hub import builtin_models, fetch_file, resolve, survey

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
    "name", ["../secret", "/etc/passwd", "a/../../b", "..\\secret", "C:\\x", "", "hf://only", "ftp://x/y"]
)
@pytest.mark.parametrize("key", ["moshi_name", "mimi_name", "tokenizer_name"])
def test_names_do_not_leave_the_folder(tmp_path: Path, key: str, name: str) -> None:
    """Broken: a downloaded config.json makes the program open any file of the machine."""
    make_folder(tmp_path, {"secret": b"s"})
    folder = make_folder(tmp_path / "m", {"config.json": json.dumps({key: name}), "model.safetensors": b"x"})
    if name == "":  # as good as absent
        assert resolve(folder).weights[0].name == "model.safetensors"
        return
    with pytest.raises(CheckpointError, match=r"outside its folder|should read hf://|not understood"):
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
    server.repos[NAME] = FakeRepo(dict(FILES))
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
    path = fetch_file("hf://someone/codec/sub/mimi@125.safetensors", cache=cache)
    assert path.read_bytes() == b"codec"
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
    monkeypatch.setattr(repo_module, "_TIMEOUT", 0.3)
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
        fetch_file(f"hf://{NAME}/x.wav", cache=cache)


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

    def full(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(DownloadError, match="the disk is full.*HF_HOME"):
        resolve(NAME, cache=cache)


def test_broken_connection_is_resumed(server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken: a dropped connection starts a large download again from zero, or fails it."""
    monkeypatch.setattr(repo_module, "RESUMABLE_BYTES", 1000)
    # huggingface_hub writes pieces of 10 MB: the second one is lost, the first is kept.
    weights = bytes(range(256)) * 100_000
    server.repos[NAME] = FakeRepo(FILES | {"weights.safetensors": weights}, break_after=15_000_000, breaks=1)
    seen: list[tuple[str, int, int]] = []
    files = resolve(NAME, cache=cache, progress=lambda *report: seen.append(report))
    assert files.weights[0].read_bytes() == weights
    ranges = [r for m, p, r in server.requests if m == "GET" and p.endswith("weights.safetensors")]
    assert len(ranges) == 2 and ranges[0] == ""
    assert 5_000_000 < int(ranges[1].removeprefix("bytes=").removesuffix("-")) <= 15_000_000
    assert ("weights.safetensors", len(weights), len(weights)) in seen


def test_interrupted_download_goes_on_in_the_next_run(
    server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken: Ctrl-C during a long download loses what was fetched."""
    monkeypatch.setattr(repo_module, "RESUMABLE_BYTES", 1000)
    # More than one of huggingface_hub's pieces of 10 MB, so that there is something to keep.
    weights = bytes(range(256)) * 100_000
    server.repos[NAME] = FakeRepo(FILES | {"weights.safetensors": weights})

    def interrupt(name: str, done: int, size: int) -> None:
        if name == "weights.safetensors" and done < size:
            raise KeyboardInterrupt

    total = len(FILES["config.json"]) + len(weights) + 150
    before = survey(NAME, cache=cache)
    assert (before.total, before.missing, before.place) == (total, total - len(FILES["config.json"]), cache)
    with pytest.raises(KeyboardInterrupt):
        resolve(NAME, cache=cache, progress=interrupt)
    kept = list(cache.rglob("*.incomplete"))
    assert len(kept) == 1 and 0 < kept[0].stat().st_size < len(weights)
    done = kept[0].stat().st_size
    assert survey(NAME, cache=cache).missing == len(weights) - done + 150 - sum(
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
    assert survey(NAME, cache=cache).missing == 5000 + 77 + 50
    resolve(NAME, cache=cache)
    assert survey(NAME, cache=cache).missing == survey(NAME, cache=cache, offline=True).missing == 0
    assert survey("small").missing == 0 and survey("small").total > 1e6
    folder = make_folder(tmp_path / "model", FILES)
    assert (survey(folder).missing, survey(folder).place) == (0, folder)
    server.repos[NAME].delay = 1.0
    began = time.monotonic()
    with pytest.raises(DownloadError, match="cannot be reached"):
        survey(NAME, cache=tmp_path / "empty", timeout=0.2)
    assert time.monotonic() - began < 0.9


def test_damaged_partial_download_is_noticed(server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken: a resumed download whose first half is wrong becomes a checkpoint full of noise."""
    monkeypatch.setattr(repo_module, "RESUMABLE_BYTES", 1000)
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
