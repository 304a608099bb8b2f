"""Who a process is among the machines, and whether they have the same files and versions."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..checkpoint.readers import expand_shards
from ..checkpoint.resolve import CheckpointFiles
from ..errors import ConfigError

__all__ = ["LEADER", "SIZE", "TOKEN", "Place", "describe_files", "place_here", "versions"]

LEADER, SIZE, TOKEN = "MOSHI_MLX_LEADER", "MOSHI_MLX_RANKS", "MOSHI_MLX_TOKEN"
"""Environment variables: where rank 0 listens (``host:port``), how many ranks there are, and the secret they show."""
_BLOCK, _BLOCKS = 2**16, 256


@dataclass(frozen=True)
class Place:
    """This process among all.

    Attributes
    ----------
    rank, size : int
    host, port
        Where rank 0 listens.
    token : str
        What a rank shows when it joins.
    backend : str
        MLX's name for the connection.
    """

    rank: int
    size: int
    host: str
    port: int
    token: str = ""
    backend: str = "ring"


def place_here() -> Place | None:
    """This process's place, from the environment that ``mlx.launch`` makes; None for a process of its own.

    Raises
    ------
    ConfigError
        If the environment is incomplete.
    """
    rank = os.environ.get("MLX_RANK", "")
    leader, token = os.environ.get(LEADER, ""), os.environ.get(TOKEN, "")
    host, _, port = leader.rpartition(":")
    if not rank.isdigit() or (leader and not port.isdigit()):
        if leader or rank:
            raise ConfigError(f"MLX_RANK={rank!r} and {LEADER}={leader!r} do not say which rank this is")
        return None
    if token:  # started by rank 0, which is not among those that mlx.launch counts
        return Place(1 + int(rank), int(os.environ.get(SIZE, "0")), host, int(port), token)
    for variable, backend in (("MLX_HOSTFILE", "ring"), ("MLX_IBV_DEVICES", "jaccl")):
        path = os.environ.get(variable)
        if not path:
            continue
        try:
            hosts = json.loads(Path(path).read_text() or "[]")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{variable}: {path} is not a list of hosts: {error}") from error
        if len(hosts) < 2:
            return None
        if not leader and backend == "ring":  # the port after those of the ring
            first = hosts[0][0].rpartition(":")[0]
            last = max(int(address.rpartition(":")[2]) for node in hosts for address in node)
            host, port = first, str(last + 1)
        if not host:
            raise ConfigError(f"say where rank 0 listens in the environment of mlx.launch: {LEADER}=ADDRESS:PORT")
        return Place(int(rank), len(hosts), host, int(port), backend=backend)
    return None


def versions() -> dict[str, str]:
    """Versions that must be the same on all machines."""
    found = {}
    for name in ("moshi-mlx-local", "mlx"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe_files(files: CheckpointFiles, lora: str | os.PathLike[str] | None) -> dict[str, str]:
    """A digest of each file that the language model is made of, by what it is.

    Of a large file: its size and 256 blocks of 64 KiB, evenly spread, the first and the last among them. So 15 GB take
    a fraction of a second, and weights that were trained or quantized in another way differ.
    """
    found = {"config.json": "none" if files.config is None else _digest(files.config)}
    for number, path in enumerate(part for named in files.weights for part in expand_shards(named)):
        found[f"weights {number}"] = _digest(path)
    found["LoRA"] = "none" if lora is None else _digest(Path(lora))
    return found


def _digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _BLOCK * _BLOCKS:
            digest.update(file.read())
        else:
            for index in range(_BLOCKS):
                file.seek((size - _BLOCK) * index // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()
