"""What a run may replace, and what it leaves behind where the folder cannot be moved into place."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from moshi_mlx_quantize.cli import main
from moshi_mlx_quantize.write import staging
from moshi_mlx_quantize.write.staging import Staging

from moshi_mlx.checkpoint.readers import write_safetensors
from moshi_mlx.errors import CheckpointError

from ..helpers.checkpoints import small_config, write_checkpoint
from .helpers import error_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "dense", small_config(num_layers=1))


def held(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def checkpoint(folder: Path) -> None:
    write_checkpoint(folder, small_config(num_layers=1))


def with_file(name: str, text: str = "mine") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        checkpoint(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return make


def settings_only(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "moshi"}')
    (folder / "README.md").write_text("how my program is configured")


def tensors_only(folder: Path) -> None:
    """Somebody's tensors: nothing says that they are a model."""
    folder.mkdir()
    shutil.copy(ROOT / "moshi_mlx" / "builtin" / "small" / "model.safetensors", folder)


def other_config(folder: Path) -> None:
    tensors_only(folder)
    (folder / "config.json").write_text('{"theme": "dark"}')


def broken_config(folder: Path) -> None:
    tensors_only(folder)
    (folder / "config.json").write_text("{")


def cut_weights(folder: Path) -> None:
    checkpoint(folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def linked_file(folder: Path) -> None:
    checkpoint(folder)
    os.rename(folder / "model.safetensors", folder.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (with_file("thesis.odt"), "thesis.odt"),
        (with_file("lora.safetensors"), "lora.safetensors"),
        (with_file("photos/a.jpg"), "photos"),
        (with_file(".git/HEAD"), ".git"),
        (with_file("model.safetensors.bak"), "model.safetensors.bak"),
        (linked_file, "model.safetensors"),
        (settings_only, "holds no weights"),
        (tensors_only, "says which model"),
        (other_config, "says which model"),
        (broken_config, "not valid JSON"),
        (cut_weights, "incomplete or damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_force_spares_what_is_no_checkpoint(
    make: Callable[[Path], None], named: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails, --force deletes a folder with the user's own files in it."""
    make(tmp_path / "precious")
    before = held(tmp_path)
    message = error_of(capsys, source, tmp_path / "precious", "--recipe", "q4", "--force")
    assert "will not be replaced" in message and named in message
    assert held(tmp_path) == before


def ours(folder: Path) -> None:
    assert main([str(ROOT / "tests" / "quantize" / "data"), str(folder), "--quiet"]) == 0


def empty(folder: Path) -> None:
    folder.mkdir()


def of_mlx_lm(folder: Path) -> None:
    write_checkpoint(folder, layout="helium")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("---\nlibrary_name: mlx\n---\n")


def of_kyutai_without_config(folder: Path) -> None:
    checkpoint(folder)
    (folder / "config.json").unlink()
    os.rename(folder / "model.safetensors", folder / "model.q4.safetensors")
    write_safetensors(folder / "tokenizer-e351c8d8-checkpoint125.safetensors", {})
    (folder / "tokenizer_spm_32k_3.model").write_text("")
    (folder / ".gitattributes").write_text("")


def with_names_of_its_own(folder: Path) -> None:
    """As Hibiki's repositories, whose files config.json names."""
    checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"moshi_name": "hibiki-220b12c0@200.safetensors", "mimi_name": "codec.safetensors"}
    (folder / "config.json").write_text(json.dumps(config | names))
    os.rename(folder / "model.safetensors", folder / names["moshi_name"])
    write_safetensors(folder / names["mimi_name"], {})
    (folder / ".DS_Store").write_text("")


@pytest.mark.parametrize(
    "make",
    [ours, empty, of_mlx_lm, of_kyutai_without_config, with_names_of_its_own],
    ids=lambda make: make.__name__,
)
def test_force_replaces_a_checkpoint(make: Callable[[Path], None], source: Path, tmp_path: Path) -> None:
    """If this fails, --force no longer does what it is for."""
    make(tmp_path / "out")
    assert main([str(source), str(tmp_path / "out"), "--recipe", "q8", "--force", "--quiet"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"model.q8.safetensors", "config.json", "README.md"}
    assert not (tmp_path / "out" / "model.q4.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_by_another_name(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, DEST with `..` or links in it fails half-way, or lands somewhere else."""
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    out = tmp_path / "real" / "out"
    for dest in ("real/deep/../out", "link/../out", "real/out/../deep/../out/.", "nowhere/../real/out"):
        monkeypatch.chdir(tmp_path)
        assert main([str(source), dest, "--force", "--quiet"]) == 0
        assert out.is_dir() and sorted(path.name for path in out.parent.iterdir()) == ["deep", "out"], dest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    before = held(out)
    monkeypatch.chdir(out)
    for dest in (".", "../out", "..", "../../..", "/"):
        for force in ([], ["--force"]):
            message = error_of(capsys, source, dest, *force)
            assert re.search("current folder|disk is mounted|holds the source", message), dest
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(out))
    assert "home folder" in error_of(capsys, source, "~", "--force")
    assert "home folder" in error_of(capsys, source, "real/out", "--force")
    for link, target in (("dangling", "nothing"), ("circle", "circle"), ("to", "real/out")):
        (tmp_path / link).symlink_to(target)
        assert "exists and is no folder" in error_of(capsys, source, link, "--force")
    assert re.search("cannot be a path|levels of symbolic links", error_of(capsys, source, "circle/out"))
    assert "cannot be a path" in error_of(capsys, source, "~nobody-of-this-name/out")
    assert "too long" in error_of(capsys, source, "x" * 300)
    assert held(out) == before and not list(tmp_path.rglob("*.partial"))


def test_source_and_target(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a run deletes what it reads, or refuses a new folder beside a file of weights."""
    before = held(source)
    message = "holds the source itself"
    assert message in error_of(capsys, source, source, "--force")
    assert message in error_of(capsys, source / "model.safetensors", source, "--force")
    assert message in error_of(capsys, source, source / ".." / source.name, "--force")
    (tmp_path / "view").mkdir()  # a source whose weights are links into the target
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "view" / name).symlink_to(source / name)
    assert message in error_of(capsys, tmp_path / "view", source, "--force")
    (tmp_path / "link").symlink_to(source)
    assert message in error_of(capsys, tmp_path / "link", source, "--force")
    assert held(source) == before
    copy = shutil.copytree(source, tmp_path / "copy")
    assert main([str(copy / "model.safetensors"), str(copy / "q8"), "--quiet", "--recipe", "q8"]) == 0
    assert (copy / "q8" / "model.q8.safetensors").is_file() and held(copy).items() >= before.items()


@pytest.mark.parametrize("failing", [1, 2])
def test_a_move_that_fails(
    failing: int, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, an error while the result is moved into place costs the old folder, or the work."""
    out = tmp_path / "out"
    ours(out)
    before, real, calls = held(out), os.rename, []

    def rename(old: Path, new: Path) -> None:
        calls.append(old)
        if len(calls) == failing:
            raise PermissionError(13, "Permission denied")
        real(old, new)

    monkeypatch.setattr(staging.os, "rename", rename)
    message = error_of(capsys, source, out, "--force", "--recipe", "q8")
    assert held(out) == before
    kept = tmp_path / "out.partial" / "result"
    assert f"The result is whole, and kept in {kept}" in message and (kept / "model.q8.safetensors").is_file()
    monkeypatch.undo()
    assert "was not created by this program" in error_of(capsys, source, out, "--force")
    assert (kept / "model.q8.safetensors").is_file()


def test_a_file_that_comes_while_it_works(tmp_path: Path) -> None:
    """If this fails, what somebody puts into the old folder during an hour's work is deleted at its end."""
    out = tmp_path / "out"
    ours(out)
    with pytest.raises(CheckpointError, match="notes.txt.*The result is whole"), Staging(out, force=True) as staged:
        (staged.folder / "new").write_text("result")
        (out / "notes.txt").write_text("mine")
        staged.commit()
    assert (out / "notes.txt").read_text() == "mine" and (staged.folder / "new").read_text() == "result"


@pytest.mark.parametrize("renames", [1, 2])
def test_killed_while_replacing(renames: int, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a kill between the two renames loses the old folder, or stops every later run."""
    out = tmp_path / "out"
    ours(out)
    before = held(out)
    staged = Staging(out, force=True)
    staged.__enter__()
    (staged.folder / "new").write_text("result")
    os.rename(out, staged.room / "replaced")
    if renames == 2:
        os.rename(staged.folder, out)
    os.close(staged._lock or -1)  # as the system does for a process that is killed
    if renames == 1:
        assert "exists: choose another name" in error_of(capsys, source, out)
        assert held(out) == before
    else:
        (out / "new").unlink()
    assert main([str(source), str(out), "--recipe", "q8", "--force", "--quiet"]) == 0
    assert (out / "model.q8.safetensors").is_file() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_folders_are_left(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, a run that comes to nothing leaves folders that it made for its result."""
    assert "is neither a folder" in error_of(capsys, tmp_path / "nowhere", tmp_path / "a" / "b" / "out")
    assert not (tmp_path / "a").exists()
    assert main([str(source), str(tmp_path / "a" / "b" / "out"), "--quiet"]) == 0
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]
