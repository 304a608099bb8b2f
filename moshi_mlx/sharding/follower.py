"""A rank other than 0: it waits for orders, and does with its part of the model what rank 0 does with its own.

It has no sound, no tokenizer and no depth transformer, and samples nothing: every step comes with the tokens that the
temporal transformer reads, which rank 0 has chosen.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.fit import load_config, load_lm
from ..checkpoint.resolve import resolve
from ..cpu.lm import Backend
from ..engine.choose import config_from
from ..engine.rows import Rows
from ..errors import MoshiError, RankError
from ..layers.conditioning import TensorCondition
from ..models.lm import Lm
from ..state import State, state_arrays
from .channel import Channel, Message, connect
from .identity import Place, describe_files, versions
from .split import split_lm

__all__ = ["Follower", "follow"]

BEAT = 0.2
"""Seconds between two signs of life."""
SILENCE = 5.0
"""Seconds without a sign of life from rank 0 after which another rank ends."""
_JOIN_WITHIN = 60.0


def follow(place: Place) -> int:
    """Serve rank 0 until it has no more to do. Returns the exit status: 0, or 1 if rank 0 has gone."""
    try:
        follower = Follower(place)
    except MoshiError as error:
        print(f"rank {place.rank}: {error}", file=sys.stderr, flush=True)
        return 1
    return follower.run()


class Follower:
    """One rank's loop. Belongs to the main thread of its process.

    Parameters
    ----------
    place : Place
        This rank's number, and where rank 0 is.
    """

    def __init__(self, place: Place):
        self.place = place
        self._orders: queue.Queue[Message] = queue.Queue()
        self.begun = self.done = 0  # orders
        self._over = False
        self._rows: dict[int, Rows] = {}
        self._lm: Lm
        self.channel = Channel(connect(place.host, place.port, _JOIN_WITHIN), self._receive)
        threading.Thread(target=self._beat, name="moshi beat", daemon=True).start()

    def run(self) -> int:
        """Join, load, and obey. An error is sent to rank 0, which ends everything."""
        try:
            with socket.socket() as probe:  # a port for MLX's ring, which opens it later
                probe.bind(("", 0))
                port = probe.getsockname()[1]
            self.channel.send(
                "hello", {**versions(), "token": self.place.token, "pid": os.getpid(), "host": socket.gethostname()},
                rank=self.place.rank, port=port,
            )  # fmt: skip
            if self._next("welcome") is None:
                return 1
            while (order := self._next()) is not None:
                if order.kind == "end":
                    self._over = True
                    return 0
                self._obey(order)
            return 1
        except MoshiError as error:
            text = str(error)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            text = f"{type(error).__name__}: {error}"
        self._over = True
        with suppress(RankError):
            self.channel.send("error", text)
        print(f"rank {self.place.rank}: {text}", file=sys.stderr, flush=True)
        return 1

    def _next(self, kind: str | None = None) -> Message | None:
        """The next order; None if rank 0 has gone."""
        while True:
            try:
                message = self._orders.get(timeout=BEAT)
            except queue.Empty:
                if self.channel.closed and self._orders.empty():
                    return None
                continue
            if kind is None or message.kind == kind:
                return message

    def _receive(self, message: Message) -> None:
        if message.kind != "beat":
            self._orders.put(message)

    def _beat(self) -> None:
        """Tell rank 0 how far this rank is; end the process if rank 0 has gone, since MLX may wait for it for ever."""
        while not self._over:
            time.sleep(BEAT)
            with suppress(RankError):
                self.channel.send("beat", begun=self.begun, done=self.done)
            silent = time.monotonic() - self.channel.heard
            if (self.channel.closed or silent > SILENCE) and not self._over:
                time.sleep(BEAT)  # an "end" may be waiting to be read
                if self._over:
                    return
                why = "has gone" if self.channel.closed else f"has been silent for {silent:.1f} s"
                with suppress(OSError):
                    print(f"rank {self.place.rank}: rank 0 {why}", file=sys.stderr, flush=True)
                os._exit(1)

    def _obey(self, order: Message) -> None:
        number = order.about.get("number", 0)
        self.begun = max(self.begun, number)
        does: Callable[[Any], Any] = getattr(self, f"do_{order.kind}")
        answer = does(order.tree())
        mx.eval(state_arrays(answer) if isinstance(answer, dict) and order.kind == "snapshot" else [])
        self.done = max(self.done, number)
        if answer is not None:
            self.channel.send("answer", answer, number=number)

    # Orders

    def do_files(self, what: dict[str, Any]) -> Any:
        """Find the model's files here; answer what they are."""
        said = 0.0

        def tell(name: str, here: int, size: int) -> None:
            nonlocal said
            if time.monotonic() - said > 1 or here >= size:
                said = time.monotonic()
                self.channel.send("progress", f"{name}: {here / 1e6:,.1f} of {size / 1e6:,.1f} MB")

        self._files = resolve(what["source"], weights=what["weights"], progress=tell)
        self._config = load_config(self._files.config, self._files.weights)
        self._lora = what["lora"] or self._files.lora
        return describe_files(self._files, self._lora)

    def do_group(self, ring: list[list[str]] | None) -> Any:
        """Join MLX's group; ``ring`` has its addresses if they are not in the environment."""
        self._group = join_group(self.place, ring)
        return {"size": self._group.size()}

    def do_load(self, what: dict[str, Any]) -> Any:
        """Load this rank's part of the weights; answer their type and size."""
        dtype = None if what["dtype"] is None else getattr(mx, what["dtype"])
        split = lambda lm: split_lm(lm, self._group)  # noqa: E731
        if self._files.weights:
            scaling = what["lora_scaling"]
            self._lm = load_lm(
                self._config, self._files.weights, lora=self._lora, lora_scaling=scaling, dtype=dtype, prepare=split
            )
        else:
            mx.random.seed(what["seed"])
            self._lm = Lm(self._config.lm)
            split(self._lm)
        self._lm.backend = "mlx"
        return {"dtype": str(self._lm.dtype)}

    def do_new(self, what: dict[str, Any]) -> None:
        """Begin a generator's rows."""
        backend = Backend(self._lm, compiled=mx.default_device() != mx.cpu)
        default = config_from(np.array(what["config"], np.float32))
        self._numpy_backend, self._rows[what["rows"]] = backend, Rows(self._lm, backend, default, what["kv_bits"])

    def do_drop(self, names: list[int]) -> None:
        """Forget generators."""
        for name in names:
            del self._rows[name]

    def do_join(self, what: dict[str, Any]) -> None:
        """As :meth:`Rows.join`."""
        joining = [
            (0, config_from(np.array(settings, np.float32)), _condition(condition), _condition(null))
            for settings, condition, null in what["joining"]
        ]
        self._rows[what["rows"]].join(joining)

    def do_leave(self, what: dict[str, Any]) -> None:
        """As :meth:`Rows.leave`."""
        self._rows[what["rows"]].leave(what["name"])

    def do_fill(self, what: dict[str, Any]) -> None:
        """As :meth:`Rows.fill`."""
        self._rows[what["rows"]].fill(what["name"])

    def do_clear(self, what: dict[str, Any]) -> None:
        """As :meth:`Rows.clear`."""
        self._rows[what["rows"]].clear()

    def do_step(self, what: dict[str, Any]) -> None:
        """One position of some rows."""
        rows = self._rows[what["rows"]]
        team = rows.team(tuple(what["names"]))
        rows.make_room()
        given = {"column": mx.array(what["column"])}
        if "rows" in team.fixed:
            given["rows"] = team.fixed["rows"]
        made = self._numpy_backend.run(_temporal, "temporal", given, rows.state)
        rows.state["transformer"] = made["state"]
        self._numpy_backend.fetch(rows.state, made["hidden"][..., 0])
        rows.book["position"][team.mains] += 1

    def do_snapshot(self, what: dict[str, Any]) -> State:
        """This rank's part of a snapshot."""
        snapshot = self._rows[what["rows"]].snapshot(what["names"])
        return {name: snapshot[name] for name in ("lm", "null") if name in snapshot}

    def do_restore(self, what: dict[str, Any]) -> None:
        """As :meth:`Rows.restore`."""
        self._rows[what["rows"]].restore(what["snapshot"], what["names"])

    def do_adopt(self, what: dict[str, Any]) -> None:
        """As :meth:`Rows.adopt`."""
        self._rows[what["rows"]].adopt(what["snapshot"])


def _temporal(backend: Backend, lm: Lm, kind: str, given: dict[str, Any], state: State) -> dict[str, Any]:
    """The part of :func:`moshi_mlx.engine.choose.choose_text` that all ranks compute."""
    hidden = backend.temporal(given["column"], state, given.get("rows"))
    return {"hidden": hidden, "state": state["transformer"]}


def _condition(values: Any) -> Any:
    """Conditions as :func:`moshi_mlx.sharding.leading.plain_condition` wrote them."""
    if values is None:
        return None
    return {
        name: TensorCondition(value["tensor"], value["mask"]) if isinstance(value, dict) else value
        for name, value in values.items()
    }


def join_group(place: Place, ring: list[list[str]] | None) -> Any:
    """MLX's group of all ranks. Waits for them, without a bound: something else must watch.

    Raises
    ------
    RankError
        If MLX cannot connect, or finds another number of ranks.
    """
    path = None
    if ring is not None:
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump(ring, file)
        path = os.environ["MLX_HOSTFILE"] = file.name
        os.environ["MLX_RANK"] = str(place.rank)
    try:
        group = mx.distributed.init(strict=True, backend=place.backend)
    except RuntimeError as error:
        raise RankError(f"MLX cannot connect the machines: {error}") from error
    finally:
        if path is not None:
            os.unlink(path)
    if (group.rank(), group.size()) != (place.rank, place.size):
        found = f"rank {group.rank()} of {group.size()}"
        raise RankError(f"this is rank {place.rank} of {place.size}, but MLX says {found}: something started it twice")
    return group
