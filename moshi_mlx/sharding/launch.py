"""Start the other ranks with ``mlx.launch``, or find that something has started this one as a rank.

The process of the user is rank 0 and stays in its terminal; ``mlx.launch`` starts ranks 1 and higher, over ssh on other
machines. What ``mlx.launch`` passes on are pipes, in which a panel and keys do not work.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import ConfigError, RankError
from .identity import LEADER, SIZE, TOKEN, Place, place_here
from .leader import LATE, SILENCE, Leader

__all__ = ["launch"]

_LOOPBACK = "127.0.0.1"
_MOST = 64
_PIPES = 2**18
# MLX waits for the GPU by polling, which halves the time of a small message (MLX's documentation of distributed).
_ENVIRONMENT = {"MLX_METAL_FAST_SYNCH": "1"}


def launch(
    hosts: Sequence[str] = (),
    ranks: int = 1,
    *,
    python: str | None = None,
    command: Sequence[str] | None = None,
    on_progress: Callable[[str], None] | None = None,
    silence: float = SILENCE,
    late: float = LATE,
) -> Leader | None:
    """Begin a group whose rank 0 is this process.

    Parameters
    ----------
    hosts : sequence of str
        Names or addresses; the first one is this machine.
    ranks : int
        Processes on each host.
    python : str, optional
        The interpreter on the other hosts; by default the path of this one.
    command : sequence of str, optional
        What the other ranks run; by default ``python -m moshi_mlx.sharding``.
    silence, late : float
        As for :class:`Leader`.

    Returns
    -------
    Leader or None
        None if there is only this process. If ``mlx.launch`` has started it as rank 0 of several, nothing is started.

    Raises
    ------
    ConfigError
        If the hosts cannot be used.
    RankError
        If ``mlx.launch`` cannot be started.
    """
    here = place_here()
    if here is not None and here.size > 1:
        if here.rank:
            raise ConfigError(f"this is rank {here.rank}: it serves rank 0 (python -m moshi_mlx.sharding)")
        return Leader(here, on_progress=on_progress, silence=silence, late=late)
    names = list(hosts) or [_LOOPBACK]
    size = len(names) * ranks
    if size == 1:
        return None
    if size > _MOST:
        raise ConfigError(f"{size} ranks are more than {_MOST}")
    addresses = [_address(name) for name in names] if hosts else [_LOOPBACK]
    try:
        listener = socket.create_server((addresses[0], 0))
    except OSError as error:
        raise ConfigError(
            f"{names[0]} ({addresses[0]}) is not an address of this machine: name this machine first, by the address "
            "at which the others reach it"
        ) from error
    place = Place(0, size, addresses[0], listener.getsockname()[1], secrets.token_hex(16))
    others = [(names[0], addresses[0])] * (ranks - 1)
    others += [pair for pair in zip(names[1:], addresses[1:], strict=True) for _ in range(ranks)]
    try:
        process = _start(place, others, python or sys.executable, command)
    except BaseException:
        listener.close()
        raise
    return Leader(place, process, listener=listener, on_progress=on_progress, silence=silence, late=late)


def _start(
    place: Place, others: Sequence[tuple[str, str]], python: str, command: Sequence[str] | None
) -> subprocess.Popen[bytes]:
    beside = Path(sys.executable).with_name("mlx.launch")
    program = str(beside) if beside.exists() else shutil.which("mlx.launch")
    if program is None:
        raise RankError("mlx.launch, which is part of MLX, is not beside this Python: it starts the other machines")
    listed: Any = [{"ssh": _LOOPBACK if address == place.host else name, "ips": [address]} for name, address in others]
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(listed, file)
    environment = {
        **_ENVIRONMENT, LEADER: f"{place.host}:{place.port}", SIZE: str(place.size), TOKEN: place.token,
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }  # fmt: skip
    told = [part for name, value in environment.items() for part in ("--env", f"{name}={value}")]
    run = list(command or [python, "-m", "moshi_mlx.sharding"])
    line = [program, "--backend", "ring", "--hostfile", file.name, *told, "--", *run]
    try:
        process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        with suppress(OSError):
            os.unlink(file.name)
        raise RankError(f"{program} cannot be started: {error}") from error
    if all(address == place.host for _, address in others):
        threading.Thread(target=_fill_input, args=(process,), daemon=True).start()
    return process


def _fill_input(process: subprocess.Popen[bytes]) -> None:
    """Keep mlx.launch from turning in circles: it polls whether it could write to a rank's standard input.

    That takes a core, until the pipes are full. Nobody reads them. Not over ssh, which would send it on.
    """
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.write(b"\n" * _PIPES)
        process.stdin.flush()


def _address(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError as error:
        raise ConfigError(f"the host {name} is not known here: {error}") from error
