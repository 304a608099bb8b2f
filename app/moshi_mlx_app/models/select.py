"""Choose the default model: the best that this machine can hold and run in real time.

Memory and speed are measured in about a second and cached in the user's cache folder until the machine or the
versions change. The step time of a model in a real conversation is cached there too, and replaces the estimate. A
model that is already downloaded is preferred to a better one that is not: the line that explains the choice
names the better one.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moshi_mlx.disk import free_bytes, replacing
from moshi_mlx_app.models.catalog import BUILTIN, CATALOG, PublishedModel, kind, room, verdict
from moshi_mlx_app.version import DISTRIBUTION, program

if TYPE_CHECKING:
    from moshi_mlx.checkpoint.resolve import DownloadPlan

__all__ = [
    "Measured",
    "Selection",
    "cache_folder",
    "default_model",
    "measured",
    "read_remembered",
    "remember",
    "remember_step",
    "select",
]

_PATIENCE = 4.0  # seconds to wait for the hub
_SPARE = 2**29  # bytes that a download must leave on the disk
_OTHER = "; --model names another"


@dataclass(frozen=True)
class Selection:
    """The chosen model.

    Attributes
    ----------
    model : str
    line : str
        The choice and its reason, for the user.
    missing : int
        Bytes that are not downloaded yet.
    """

    model: str
    line: str
    missing: int = 0


@dataclass(frozen=True)
class Measured:
    """Measurements of this machine.

    Attributes
    ----------
    room : int
        Bytes of memory that a model may take.
    speeds : mapping of int to float
        See :func:`moshi_mlx_app.models.measure.speeds`.
    steps : mapping of str to float
        Milliseconds of a step (p95) in conversations, by :func:`~moshi_mlx_app.models.catalog.kind`.
    """

    room: int
    speeds: Mapping[int, float]
    steps: Mapping[str, float] = field(default_factory=dict)


def select(
    here: Measured,
    plan_download: Callable[[str, bool], DownloadPlan],
    free: Callable[[Path], int] = free_bytes,
    catalog: tuple[PublishedModel, ...] = CATALOG,
) -> Selection:
    """The best model for a machine.

    Parameters
    ----------
    here : Measured
    plan_download : callable
        Called with a name and whether to stay offline; returns a model's files and which of them are here. May raise
        MoshiError.
    free : callable
        Returns the free bytes on the disk of a folder.
    catalog : tuple of PublishedModel
        Models, best first.
    """
    from moshi_mlx.errors import MoshiError

    talking = [model for model in catalog if model.purpose == "dialogue" and not model.gated]
    verdicts = {model.name: verdict(model, here.room, here.speeds, here.steps) for model in talking}
    able = [model.name for model in talking if verdicts[model.name]["fits"] and verdicts[model.name]["keeps_up"]]
    if not able:
        least = min(talking, key=lambda model: verdicts[model.name]["step_ms"])
        return _builtin(f"no published model runs here; the closest, {least.name}, {verdicts[least.name]['why']}")
    for name in able:
        with contextlib.suppress(MoshiError):
            if plan_download(name, True).missing == 0:
                better = "" if kind(name) == kind(able[0]) else f"; {able[0]} would run too, with --model"
                return Selection(name, f"{name}, the best one here: {verdicts[name]['why']}{better or _OTHER}")
    full = ""
    for name in able:
        try:
            needed = plan_download(name, False)
        except MoshiError as error:
            reason = " ".join(str(error).split()).partition(". ")[0]
            return _builtin(f"{name} would run here, but {reason[:200]}")
        if needed.missing + _SPARE <= free(needed.place):
            line = f"{name}, the best one that this machine can run: {verdicts[name]['why']}{_OTHER}"
            return Selection(name, line, needed.missing)
        full = f"{name} would run here, but {needed.place} has no space for {needed.missing / 1e9:.1f} GB"
    return _builtin(full)


def _builtin(why: str) -> Selection:
    return Selection(BUILTIN, f"{BUILTIN}, the built-in one: {why}{_OTHER}")


def default_model(say: Callable[[str], object] = lambda _: None, here: Measured | None = None) -> Selection:
    """The model that ``talk`` takes on this machine. ``say`` is called with progress messages."""
    say("choosing a model for this machine")
    return select(here or measured(), _survey)


def _survey(name: str, offline: bool) -> DownloadPlan:
    """Like :func:`moshi_mlx.checkpoint.resolve.plan_download`, but returns within seconds whatever the network does."""
    from moshi_mlx.checkpoint.resolve import plan_download
    from moshi_mlx.errors import DownloadError

    if offline:
        return plan_download(name, offline=True)
    found: list[DownloadPlan | BaseException] = []

    def ask() -> None:
        try:
            found.append(plan_download(name, timeout=_PATIENCE))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=ask, name="moshi hub", daemon=True)
    thread.start()
    thread.join(2 * _PATIENCE)
    if not found:
        raise DownloadError(f"cannot fetch {name}: the hub does not answer within {2 * _PATIENCE:g} s")
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


# -------------------------------------------------------------------------------------------------- cached measurements


def cache_folder() -> Path:
    """The program's cache folder."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / DISTRIBUTION
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / DISTRIBUTION


def measured(*, again: bool = False) -> Measured:
    """Measurements of this machine, taken now if ``again`` or if there are none."""
    from moshi_mlx_app.models import measure

    machine = measure.machine()
    kept = _read(machine)
    if kept is None or again:
        steps = {} if kept is None else kept["steps"]
        kept = {"machine": _identity(machine), "speeds": measure.speeds(), "steps": steps}
        _write(kept)
    return Measured(room(machine), {int(bits): value for bits, value in kept["speeds"].items()}, kept["steps"])


def remember_step(model: str, milliseconds: float) -> None:
    """Cache the step time (p95) of a published model in a conversation, for the next choice."""
    from moshi_mlx_app.models import measure

    if not any(published.name == model for published in CATALOG):
        return
    machine = measure.machine()
    kept = _read(machine)
    if kept is not None:
        kept["steps"][kind(model)] = round(milliseconds, 1)
        _write(kept)


def _identity(machine: Mapping[str, Any]) -> dict[str, Any]:
    """What a cached measurement depends on."""
    names = ("machine", "processor", "device", "cores", "memory")
    packages = {name: machine["packages"][name] for name in ("mlx", "numpy", "rustymimi")}
    return {"program": program(), **packages, **{name: machine[name] for name in names}}


def read_remembered(name: str) -> dict[str, Any]:
    """What :func:`remember` kept; empty if there is nothing, or it is of another machine or version, or damaged."""
    from moshi_mlx_app.models import measure

    try:
        kept = json.loads((cache_folder() / name).read_text(encoding="utf-8"))
        return dict(kept["found"]) if kept["machine"] == _identity(measure.machine()) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def remember(name: str, found: Mapping[str, Any]) -> None:
    """Keep what was measured on this machine, with these versions, in a file of the cache folder."""
    from moshi_mlx_app.models import measure

    _write({"machine": _identity(measure.machine()), "found": found}, name)


def _read(machine: Mapping[str, Any]) -> dict[str, Any] | None:
    """The cache; None if it is missing, damaged, or of another machine or version."""
    try:
        kept = json.loads((cache_folder() / "machine.json").read_text(encoding="utf-8"))
        kept["speeds"] = {int(bits): float(value) for bits, value in kept["speeds"].items()}
        kept["steps"] = {str(name): float(value) for name, value in kept["steps"].items()}
        right = kept["machine"] == _identity(machine) and min(kept["speeds"][bits] for bits in (4, 8, 16)) > 0
        return kept if right else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(kept: Mapping[str, Any], name: str = "machine.json") -> None:
    folder = cache_folder()
    with contextlib.suppress(OSError):  # then it is measured again the next time
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / name) as partial:
            partial.write_text(json.dumps(kept), encoding="utf-8")
