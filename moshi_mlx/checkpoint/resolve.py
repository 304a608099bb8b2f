"""From a name to files: a folder, a repository on a model hub at a pinned revision, or a built-in model.

::

    plan_download("kyutai/moshiko-mlx-q4").missing              # bytes that would have to be fetched
    files = resolve("kyutai/moshiko-mlx-q4")             # or "org/repo@revision", "path/to/folder", "small"
    config = load_config(files.config, files.weights)
    lm = load_lm(config, files.weights, lora=files.lora)

Only the files that a model needs are fetched. What a configuration from a repository names can lie in that repository,
in another one (``hf://org/repo/path``) or in a built-in model (``builtin://small/mimi.safetensors``), never elsewhere
on this machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ..config import DEFAULT_MIMI, DEFAULT_TOKENIZER, DEFAULT_WEIGHTS
from ..errors import CheckpointError, DownloadError
from .download import HubRepo, Progress
from .readers import INDEX_SUFFIX, expand_shards, inner_path, read_json, shown

__all__ = ["CheckpointFiles", "DownloadPlan", "builtin_models", "plan_download", "resolve"]

BUILTIN = Path(__file__).resolve().parents[1] / "builtin"

_REPO = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_INDEX = ".index.json"
# Names that published folders without a config.json use, best first.
_WEIGHT_NAMES = (
    DEFAULT_WEIGHTS,
    DEFAULT_WEIGHTS + _INDEX,
    "model.q8.safetensors",
    "model.q6.safetensors",
    "model.q4.safetensors",
    "model.q8.gguf",
)
_NOT_LM = re.compile(r"(tokenizer|mimi|lora|adapter|voice)", re.IGNORECASE)
# Parts that a model can do without: where one is named and missing, it would be another model, and nobody would know.
_NEEDED = {"lora", "mimi_config"}
_TOKENIZERS = (DEFAULT_TOKENIZER, "tokenizer_spm_48k_multi6_2.model", "tokenizer.model")


@dataclass(frozen=True)
class CheckpointFiles:
    """Where the parts of a checkpoint are.

    Attributes
    ----------
    source : str
        As it was asked for.
    folder : Path
        Folder of config.json and weights.
    config : Path or None
        config.json.
    weights : tuple of Path
        The language model: one file, or the index of a sharded one.
    mimi, mimi_config, tokenizer, lora : Path or None
        None where the checkpoint has none; ``names`` then says what was looked for.
    extras : mapping of str to Path
        Further files that were asked for.
    names : mapping of str to str
        The name that was looked for, by part.
    revision : str or None
        Commit, for a repository.
    """

    source: str
    folder: Path
    config: Path | None
    weights: tuple[Path, ...]
    mimi: Path | None = None
    mimi_config: Path | None = None
    tokenizer: Path | None = None
    lora: Path | None = None
    extras: Mapping[str, Path] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None


@dataclass(frozen=True)
class DownloadPlan:
    """What a checkpoint needs, and what of it is here.

    Attributes
    ----------
    source : str
    files : mapping of str to (int, int)
        Bytes of each file that :func:`resolve` would return, and how many of them it would have to fetch.
    place : Path
        Where they are, or would be put.
    config : Path or None
        config.json, which has been fetched; None if the checkpoint has none.
    """

    source: str
    files: Mapping[str, tuple[int, int]]
    place: Path
    config: Path | None = None

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())

    @property
    def missing(self) -> int:
        """Bytes that would have to be fetched."""
        return sum(missing for _, missing in self.files.values())

    @property
    def begun(self) -> int:
        """Bytes that are here already."""
        return self.total - self.missing


class _Folder:
    """Files that are here, asked for as those of a :class:`~moshi_mlx.checkpoint.repo.HubRepo`."""

    commit = None

    def __init__(self, path: Path):
        self.path, self.label = path, str(path)

    def has(self, name: str) -> bool:
        return os.path.isfile(inner_path(self.path, name, self.label))

    def names(self) -> list[str]:
        try:
            return sorted(path.name for path in self.path.iterdir() if os.path.isfile(path))
        except OSError as error:
            raise CheckpointError(f"{self.label} cannot be read: {error.strerror}") from error

    def amount(self, name: str) -> tuple[int, int]:
        return inner_path(self.path, name, self.label).stat().st_size, 0

    def fetch(self, names: Sequence[str]) -> dict[str, Path]:
        paths = {name: inner_path(self.path, name, self.label) for name in names}
        missing = [name for name, path in paths.items() if not os.path.isfile(path)]
        if missing:
            raise CheckpointError(f"{self.label} lacks {shown(missing)}")
        return paths


_Place = _Folder | HubRepo


def builtin_models() -> list[str]:
    """Names of the models that come with the package."""
    if not BUILTIN.is_dir():
        return []
    return sorted(path.name for path in BUILTIN.iterdir() if (path / "config.json").is_file())


def resolve(
    source: str | os.PathLike[str],
    *,
    weights: str | None = None,
    extras: Sequence[str] = (),
    cache: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
    progress: Progress | None = None,
) -> CheckpointFiles:
    """Find a checkpoint's files, fetching those that are not here.

    Parameters
    ----------
    source : str or path
        A folder; a file of weights in it; ``organisation/name`` on the hub, with ``@revision`` for a branch, tag or
        commit; or the name of a built-in model.
    weights : str, optional
        Which file of weights to take where there are several.
    extras : sequence of str
        Further files to find, for instance ``voices.tgz``.
    cache, offline, progress
        See :class:`~moshi_mlx.checkpoint.download.HubRepo`.

    Raises
    ------
    CheckpointError
        If there is no such folder or file, a name leads outside, or it is not clear which file is meant.
    DownloadError
        If a file cannot be fetched.
    """
    options = {"cache": cache, "offline": offline, "progress": progress}
    place, weights = _place(source, weights, options)
    return _collect(os.fspath(source), place, weights, extras, options)


def plan_download(
    source: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
    timeout: float | None = None,
) -> DownloadPlan:
    """How much :func:`resolve` would fetch. Only the configuration is fetched for it.

    Parameters
    ----------
    source, cache, offline
        As for :func:`resolve`.
    timeout : float, optional
        Seconds to wait for the hub's answer.

    Raises
    ------
    CheckpointError, DownloadError
        As :func:`resolve`.
    """
    options: dict[str, Any] = {"cache": cache, "offline": offline, "progress": _nothing, "timeout": timeout}
    place, weights = _place(source, None, options)
    wanted, shards, config = _plan(place, weights)
    files: dict[str, tuple[int, int]] = {}
    for name in dict.fromkeys(["config.json", *wanted.values(), *shards]):
        if name.startswith("hf://"):
            repo, inner = _split_hub_name(name)
            files[inner] = HubRepo(repo, **options).amount(inner)
        elif not _is_reference(name) and place.has(name):  # resolve() knows whether it can do without
            files[name] = place.amount(name)
    where = place.cache if isinstance(place, HubRepo) else place.path
    return DownloadPlan(os.fspath(source), files, where, config)


def _nothing(*_: object) -> None:
    """Progress that nobody looks at."""


def _place(source: str | os.PathLike[str], weights: str | None, options: dict[str, Any]) -> tuple[_Place, str | None]:
    """Where a checkpoint is, and which of its weights are meant if the source says so."""
    text = os.fspath(source)
    if isinstance(source, str) and source in builtin_models():
        return _Folder(BUILTIN / text), weights
    path = _path(text)
    if text and os.path.isdir(path):
        return _Folder(path), weights
    if os.path.isfile(path):
        return _Folder(path.parent), path.name
    if isinstance(source, str) and (match := _REPO.fullmatch(source)):
        return HubRepo(match[1], match[2], **options), weights
    names = ", ".join(builtin_models()) or "none"
    raise CheckpointError(
        f"{text[:300]!r} is neither a folder, nor a repository (organisation/name), nor a built-in model ({names})"
    )


def _path(text: str) -> Path:
    """A path as a person types it. What cannot be one stays as it is: no file is called so."""
    try:
        return Path(os.path.expanduser(text))
    except ValueError:  # a zero, or half of a surrogate pair, behind the ~
        return Path(text)


def _plan(place: _Place, weights: str | None) -> tuple[dict[str, str], list[str], Path | None]:
    """Names of a checkpoint's parts (``weights`` among them, unless a built-in model has none yet), names of the shards
    that its index lists, and its configuration."""
    config: Path | None = None
    data: dict[str, Any] = {}
    if place.has("config.json"):
        config = place.fetch(["config.json"])["config.json"]
        data = read_json(config)
    for key in ("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name"):
        if not isinstance(data.get(key), (str, type(None))):
            raise CheckpointError(
                f"{place.label}: config.json: {key} must be a file name, found {str(data[key])[:60]!r}"
            )
    wanted = {part: name for part, name in _part_names(data, place).items() if name is not None}
    name = _choose_weights(place, weights, data)
    # A built-in model that is not trained yet has sizes and a tokenizer, and no weights.
    if _is_builtin(place) and (name is None or not place.has(name)):
        return wanted, [], config
    if name is None:
        raise CheckpointError(
            f"{place.label} holds no weights: looked for {data.get('moshi_name') or DEFAULT_WEIGHTS}, "
            f"found {shown(place.names(), 12) or 'nothing'}"
        )
    wanted["weights"] = name
    return wanted, _shard_names(place, name) if name.endswith(_INDEX) else [], config


def _is_builtin(place: _Place) -> bool:
    return isinstance(place, _Folder) and place.path.parent == BUILTIN


def _collect(
    source: str, place: _Place, weights: str | None, extras: Sequence[str], options: dict[str, Any]
) -> CheckpointFiles:
    wanted, shards, config = _plan(place, weights)
    here = {part: name for part, name in wanted.items() if not _is_reference(name) and place.has(name)}
    missing = [name for name in extras if not place.has(name)]
    if missing:
        raise CheckpointError(f"{place.label} has no {shown(missing)}")
    # One call for all, so that disk space is checked for the whole.
    fetched = place.fetch([*here.values(), *shards, *extras])
    paths = {part: fetched[name] for part, name in here.items()}
    for part in _NEEDED & wanted.keys() - here.keys():
        if not _is_reference(wanted[part]):
            raise CheckpointError(
                f"{place.label}: config.json names {wanted[part][:100]} ({part}_name), which is missing: without it "
                "this would be another model. Put it there, or take its name out of config.json"
            )
    for part, name in wanted.items():
        if _is_reference(name):
            paths[part] = _fetch_reference(name, place, options)
    if "weights" in wanted and "weights" not in paths:
        raise CheckpointError(f"{place.label} lacks {wanted['weights']}")
    folder = config.parent if config is not None else paths["weights"].parent
    return CheckpointFiles(
        source=source,
        folder=folder,
        config=config,
        weights=(paths["weights"],) if "weights" in paths else (),
        mimi=paths.get("mimi"),
        mimi_config=paths.get("mimi_config"),
        tokenizer=paths.get("tokenizer"),
        lora=paths.get("lora"),
        extras={name: fetched[name] for name in extras},
        names=wanted,
        revision=place.commit,
    )


def _part_names(data: Mapping[str, Any], place: _Place) -> dict[str, str | None]:
    """The names of a checkpoint's other parts, from its configuration or by default."""
    helium = data.get("model_type") == "helium"
    usual = "tokenizer.model" if helium else DEFAULT_TOKENIZER
    tokenizer = data.get("tokenizer_name") or next((name for name in _TOKENIZERS if place.has(name)), usual)
    lora = data.get("lora_name") or None
    if lora is None and data.get("lora") and place.has("lora.safetensors"):
        lora = "lora.safetensors"
    return {
        "mimi": data.get("mimi_name") or (None if helium else DEFAULT_MIMI),
        "mimi_config": data.get("mimi_config_name") or None,
        "tokenizer": tokenizer,
        "lora": lora,
    }


def _choose_weights(place: _Place, weights: str | None, data: Mapping[str, Any]) -> str | None:
    """Which file holds the language model."""
    if weights is not None:
        if not place.has(weights):
            raise CheckpointError(f"{place.label} has no {weights}; it has {shown(place.names(), 12)}")
        return weights
    named: str | None = data.get("moshi_name")
    if named:
        if _is_reference(named) or place.has(named):
            return named
        if place.has(named + _INDEX):
            return named + _INDEX
        if named != DEFAULT_WEIGHTS:
            raise CheckpointError(
                f"{place.label}: config.json names {named}, which is missing; there is {shown(place.names(), 12)}"
            )
    found = [name for name in _WEIGHT_NAMES if place.has(name)]
    if found and found[0].startswith(DEFAULT_WEIGHTS):
        return found[0]
    if not found:
        endings = (".safetensors", ".gguf", INDEX_SUFFIX)
        plain = [name for name in place.names() if "/" not in name and not _NOT_LM.search(name)]
        found = [name for name in plain if name.endswith(endings)]
        found = [name for name in found if not re.search(r"-\d{5}-of-\d{5}\.safetensors$", name)]
    if len(found) > 1:
        raise CheckpointError(f"{place.label} has several files of weights: {shown(found, 12)}. Name the one to take")
    return found[0] if found else None


def _shard_names(place: _Place, index: str) -> list[str]:
    path = place.fetch([index])[index]
    folder = index.rpartition("/")[0]
    return [f"{folder}/{shard.name}" if folder else shard.name for shard in expand_shards(path)]


def _is_reference(name: str) -> bool:
    return "://" in name


def _split_hub_name(reference: str) -> tuple[str, str]:
    parts = reference.removeprefix("hf://").split("/", 2)
    if len(parts) != 3 or not _REPO.fullmatch("/".join(parts[:2])):
        raise CheckpointError(f"{reference!r} should read hf://organisation/name/path")
    inner_path(Path(), parts[2], reference)
    return "/".join(parts[:2]), parts[2]


def _fetch_reference(name: str, place: _Place, options: dict[str, Any]) -> Path:
    """A file that a configuration names by ``hf://``, ``file://`` or ``builtin://model/file``."""
    if name.startswith("hf://"):
        repo, inner = _split_hub_name(name)
        return HubRepo(repo, **options).fetch([inner])[inner]
    if name.startswith("builtin://"):
        return _builtin_file(name)
    if not name.startswith("file://"):
        raise CheckpointError(f"{place.label}: {name[:100]!r} is not understood; hf://organisation/name/path is")
    if not isinstance(place, _Folder):
        raise DownloadError(f"{place.label} names {name[:100]!r}: a repository may not point at files of this machine")
    path = Path(unquote(name.removeprefix("file://")))
    path = path if path.is_absolute() else inner_path(place.path, path.as_posix(), place.label)
    if not os.path.isfile(path):
        raise CheckpointError(f"{place.label} names {name[:100]!r}, but there is no such file")
    return path


def _builtin_file(name: str) -> Path:
    """A file of a built-in model, which several of them may share."""
    model, _, inner = name.removeprefix("builtin://").partition("/")
    if model not in builtin_models():
        raise CheckpointError(f"{name[:100]!r}: there is no built-in model {model[:60]!r}")
    folder = _Folder(BUILTIN / model)
    return folder.fetch([inner])[inner]
