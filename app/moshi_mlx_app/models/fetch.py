"""From ``--model`` to a loaded model: choose a default if none is given, download it with progress, load it."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from moshi_mlx_app.models.fastest import fastest_backend, fastest_codec
from moshi_mlx_app.screen.terminal import Loading, is_terminal, warn

if TYPE_CHECKING:
    from moshi_mlx.checkpoint.resolve import DownloadPlan
    from moshi_mlx.sharding import Leader
    from moshi_mlx.tasks.dialogue import Moshi

__all__ = ["fetch", "load_model", "refuse_deaf", "task_of", "wrong_model"]

_EVERY = 10.0  # seconds between lines if no bar can be drawn


def load_model(
    args: argparse.Namespace, *, shown: bool = True, accept: Callable[[str, type[Moshi] | Moshi], object] | None = None
) -> Moshi:
    """The model that ``args`` (``model``, ``codec``, ``backend``) ask for.

    Parameters
    ----------
    args : Namespace
        With ``hosts`` or ``ranks`` the model is divided among machines (:mod:`moshi_mlx.sharding`).
        With ``model`` None the model is chosen, and ``args.model`` set to it. Where ``codec`` or ``backend`` are
        ``auto``, the fastest on this machine computes (:mod:`moshi_mlx_app.models.fastest`), or what the environment
        says (:data:`moshi_mlx.cpu.backend.VARIABLE`).
    shown : bool
        Draw bars. The choice and the download are announced in any case.
    accept : callable, optional
        As for :func:`fetch`.

    Raises
    ------
    MoshiError
        As :func:`moshi_mlx.load`.
    """
    import moshi_mlx
    from moshi_mlx.cpu.backend import VARIABLE

    if args.model is None:
        from moshi_mlx_app.models.select import default_model

        with Loading(shown=shown) as loading:
            choice = default_model(loading)
        warn(choice.line, "model")
        args.model = choice.model
    fetch(args.model, shown=shown, accept=accept)
    with Loading(shown=shown) as loading:
        decided = bool(os.environ.get(VARIABLE))
        codec: Any = args.codec
        if codec == "auto" and not decided:
            codec = next(iter(fastest_codec(args.model, loading)), "auto")
        sharding = _other_machines(args, loading)
        model = moshi_mlx.load(
            args.model,
            codec=codec,
            lora=getattr(args, "lora", None),
            backend=args.backend,
            on_progress=loading,
            sharding=sharding,
        )
        if accept is not None:  # without a config.json only the weights say what it is
            accept(args.model, model)
        if sharding is None and args.backend == "auto" and getattr(args, "kv_bits", None) is None and not decided:
            model.lm.backend = next(iter(fastest_backend(model, loading)), "auto")
    return model


def _other_machines(args: argparse.Namespace, loading: Loading) -> Leader | None:
    """The other machines that ``args`` (``hosts``, ``ranks``, ``python``) ask for, if the command has these options."""
    if not hasattr(args, "hosts"):
        return None
    from moshi_mlx.sharding import launch

    hosts = [] if args.hosts is None else [name.strip() for name in args.hosts.split(",")]
    if args.hosts is not None and not all(hosts):
        args.parser.error(f"{args.hosts!r} names a host that has no name")
    return launch(hosts, args.ranks, python=args.python, on_progress=loading)


_IS_FOR = {
    "dialogue": "is for dialogue",
    "speech-to-text": "is for speech-to-text: it writes down what it hears and does not answer",
    "text-to-speech": "turns text into speech: it does not hear",
    "translation": "is for translation: it says in another language what it hears",
    "text": "is a text model: it does not hear",
}


def wrong_model(source: str, task: type[Moshi] | Moshi) -> str:
    """What a model is for, and the command for it."""
    name = os.path.basename(os.path.normpath(source)) if os.path.isdir(os.path.expanduser(source)) else source
    command = f"moshi-mlx-local {task.command} --model {source}"
    return f"{name} {_IS_FOR[task.purpose]}; the command for it is {command}"


def refuse_deaf(source: str, task: type[Moshi] | Moshi) -> None:
    """For commands that let a model hear: raise ConfigError if it does not."""
    from moshi_mlx.errors import ConfigError

    if task.purpose in ("text", "text-to-speech"):
        raise ConfigError(f"{wrong_model(source, task)}; moshi-mlx-local check lists models for dialogue")


def task_of(plan: DownloadPlan) -> type[Moshi] | None:
    """The class of a model, if its config.json says it."""
    from moshi_mlx.checkpoint.fit import load_config
    from moshi_mlx.tasks import TASKS

    return None if plan.config is None else TASKS[load_config(plan.config).model_type]


def fetch(
    source: str, *, shown: bool = True, accept: Callable[[str, type[Moshi] | Moshi], object] | None = None
) -> None:
    """Download a model's files, announcing their size; nothing to do for folders and built-in models.

    Parameters
    ----------
    source : str
    shown : bool
        Draw bars.
    accept : callable, optional
        Called with the name and the class of the model before anything but its config.json is fetched, if that says
        it, and with the model once it is loaded. May raise MoshiError.

    Raises
    ------
    MoshiError
        If it cannot be found or not be downloaded completely. The next attempt resumes.
    """
    from moshi_mlx.checkpoint.resolve import plan_download, resolve

    with Loading(shown=shown) as loading:
        if "/" in source and not os.path.exists(os.path.expanduser(source)):
            loading(f"asking {os.environ.get('HF_ENDPOINT') or 'the hub'} for {source}; it has 15 s to answer")
        needed = plan_download(source)
    task = None if accept is None else task_of(needed)
    if accept is not None and task is not None:
        accept(source, task)
    if not needed.missing:
        return
    # The configuration itself is always here: the plan_download fetched it.
    begun = f", {needed.begun / 1e9:.2f} GB of it already here" if needed.begun > 0.01 * needed.total else ""
    warn(
        f"{source}: {needed.total / 1e9:.2f} GB, fetched once{begun}; into {needed.place}. "
        "Ctrl-C stops it, and the next run resumes it",
        "download",
    )
    with _Download(needed, shown=shown) as download:
        resolve(source, progress=download)


class _Download:
    """One bar for all files; without a terminal, a line every few seconds."""

    def __init__(self, needed: DownloadPlan, *, shown: bool):
        self._here = {name: size - missing for name, (size, missing) in needed.files.items()}
        self._total = needed.total
        self._shown = shown
        self._said = time.monotonic()
        self._bar: Progress | None = None
        if shown and is_terminal(sys.stderr):
            self._bar = Progress(
                BarColumn(bar_width=20),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True, highlight=False),
                transient=True,
            )
            self._task = self._bar.add_task("", total=self._total, completed=sum(self._here.values()))

    def __enter__(self) -> _Download:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, name: str, here: int, size: int) -> None:
        self._here[name] = here
        done = sum(self._here.values())
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif self._shown and time.monotonic() - self._said >= _EVERY:
            self._said = time.monotonic()
            with contextlib.suppress(OSError):  # the reader of standard error has gone
                warn(f"{done / 1e9:.2f} of {self._total / 1e9:.2f} GB", "download")
