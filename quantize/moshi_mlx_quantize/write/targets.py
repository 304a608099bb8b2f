"""What the command writes, checked before any work: nothing is replaced but what programs like this one wrote.

``--force`` replaces a checkpoint or a report, which are recognised by what they hold. A folder with anything else in it
is left alone, whatever the flags say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from moshi_mlx.checkpoint.readers import expand_shards, read_json, read_shapes, shown
from moshi_mlx.checkpoint.resolve import CheckpointFiles
from moshi_mlx.config import DEFAULT_MIMI
from moshi_mlx.errors import CheckpointError, ConfigError, MoshiError

from ..measure.report import REPORT_FILES, is_report

__all__ = ["as_path", "check_apart", "check_report", "check_target", "files_of"]

_WEIGHTS = re.compile(r"model(\.q\d)?(-\d{5}-of-\d{5})?\.(safetensors|gguf)")
# What Kyutai's programs, mlx-lm and this one put beside weights, and what git and macOS add.
_BESIDE = re.compile(
    r"config\.json|mimi_config\.json|README\.md|LICENSE(\.\w+)?|\.gitattributes|\.DS_Store"
    r"|model\.safetensors\.index\.json|generation_config\.json|chat_template\.(jinja|json)"
    r"|tokenizer\.(model|json)|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt"
    r"|tokenizer_spm_\w+\.model|(tokenizer|mimi)-[\w.@-]+\.safetensors"
)
_NAMED = ("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name")


def as_path(text: str) -> Path:
    """An absolute path without ``~``, ``..`` and links in its folders; a link at its very end stays one.

    Raises
    ------
    CheckpointError
        If it cannot be one.
    """
    try:
        path = Path(text).expanduser()
        return path if path.is_symlink() else path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # too long; no such user, links in a circle; a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{text[:100]!r} cannot be a path: {reason}") from error


# --------------------------------------------------------------------------------------------------------------- DEST


def check_target(target: Path, force: bool) -> None:
    """Refuse to write over anything but a checkpoint.

    Parameters
    ----------
    target : path
        From :func:`as_path`.
    force : bool
        Whether a checkpoint may be replaced.

    Raises
    ------
    CheckpointError
        Says what is there.
    """
    try:
        str(target).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{target} is not valid UTF-8, which MLX cannot open: choose another name") from error
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{target} exists and is no folder: choose another name")
    if not target.exists():
        return
    if os.path.ismount(target):
        raise CheckpointError(f"{target} is where a disk is mounted, which cannot be replaced: name a folder in it")
    for what, place in (("the current folder", "."), ("your home folder", "~")):
        if _holds(target, Path(os.path.expanduser(place))):
            raise CheckpointError(f"{target} is or holds {what}, which cannot be replaced: choose another name")
    if not force:
        raise CheckpointError(f"{target} exists: choose another name, or replace it with --force")
    if foreign := _foreign(target):
        raise CheckpointError(f"{target} will not be replaced: {foreign}. Choose another name, or move the folder")


def _foreign(folder: Path) -> str | None:
    """Why a folder is more or less than a checkpoint; None for a checkpoint, and where nothing is in it."""
    plain = {entry.name: entry.is_file(follow_symlinks=False) for entry in os.scandir(folder)}
    if not plain:
        return None
    try:
        config = read_json(folder / "config.json") if plain.get("config.json") else {}
        named = {value for key in _NAMED if isinstance(value := config.get(key), str)}
        known = {name for name in plain if name in named or _WEIGHTS.fullmatch(name) or _BESIDE.fullmatch(name)}
        if other := [name for name, file in plain.items() if not file or name not in known]:
            return f"it holds what is not part of a checkpoint ({shown(other)})"
        weights = [name for name in plain if _WEIGHTS.fullmatch(name) or name == config.get("moshi_name")]
        if not read_shapes(folder / name for name in weights):
            return "it holds no weights"
    except MoshiError as error:
        return f"it is not a readable checkpoint ({error})"
    # Kyutai's first repositories have no config.json.
    if {"model_type", "moshi_name"} & config.keys() or {"dim", "text_card"} <= config.keys() or DEFAULT_MIMI in plain:
        return None
    return "nothing in it says which model it is"


def check_apart(target: Path, read: Iterable[Path]) -> None:
    """Refuse a target that holds what is read.

    Raises
    ------
    ConfigError
        Names the target.
    """
    if target.is_dir() and any(_holds(target, path) for path in read):
        raise ConfigError(f"{target} holds the source itself, or another file that is read: write to another folder")


def files_of(files: CheckpointFiles) -> list[Path]:
    """Every file of a source, and its folder."""
    parts = [files.config, files.mimi, files.mimi_config, files.tokenizer, files.lora]
    shards = [shard for path in files.weights for shard in (path, *expand_shards(path))]
    return [files.folder, *shards, *(path for path in parts if path is not None)]


def _holds(folder: Path, path: Path) -> bool:
    """Whether a path that exists is this folder or lies in it, by whatever name."""
    path = path.resolve()
    return any(place.exists() and folder.samefile(place) for place in (path, *path.parents))


# ------------------------------------------------------------------------------------------------------------- report


def check_report(folder: Path, force: bool, written: Iterable[Path]) -> None:
    """Refuse a report that cannot be written, or would be written over something else.

    Parameters
    ----------
    folder : path
    force : bool
        Whether an earlier report may be replaced.
    written : iterable of Path
        Folders that the command writes as well.

    Raises
    ------
    CheckpointError
        Says what is in the way.
    """
    folder = folder.resolve()
    place = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not place.is_dir():
        raise CheckpointError(f"{place} is no folder: --report names the folder for {' and '.join(REPORT_FILES)}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise CheckpointError(f"{place} may not be written to: choose another folder for --report")
    paths = [folder / name for name in REPORT_FILES]
    for other in written:
        if other in (folder, *folder.parents) or any(path in (other, *other.parents) for path in paths):
            raise CheckpointError(f"--report {folder} and DEST {other} are in each other's way: name two folders")
    for path in paths:
        if os.path.lexists(path) and not is_report(path):
            raise CheckpointError(f"{path} exists and is no report of this program: choose another folder for --report")
        if path.exists() and not force:
            raise CheckpointError(f"{path} exists: choose another folder for --report, or replace it with --force")
