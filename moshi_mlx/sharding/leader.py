"""Rank 0: it has the sound, samples the tokens, and tells the other ranks what to do.

A generator on a model that is split (``lm.sharding``) is the usual one, with a stepper and rows of this module, which
send an order for whatever changes the language model's state before they do it themselves. Only rank 0 samples:
the tokens of a position are part of the order for the next one, which would be sent in any case, and the depth
transformer and its noise are computed once.

Everything that waits for other ranks runs in one thread (:class:`Bounded`), so that the order of what is sent is the
order of what is computed. Who calls it waits at most until a rank has gone, is silent or late, and gets its name.
"""

from __future__ import annotations

import atexit
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..checkpoint.resolve import CheckpointFiles
from ..cpu.lm import Stepper
from ..engine.choose import GenerationConfig, Team, choose_text, settings_of
from ..engine.rows import Rows
from ..errors import MoshiError, RankError
from ..layers.conditioning import TensorCondition
from ..models.lm import Lm
from ..state import State
from .channel import Channel, Message
from .follower import BEAT, join_group
from .identity import Place, describe_files, versions
from .split import Description, check_split, split_lm

__all__ = ["LATE", "SILENCE", "Leader"]

SILENCE = 1.5
"""Seconds without a sign of life after which a rank counts as stopped; while it loads, :data:`LOADING`."""
LOADING = 20.0
LATE = 2.0
"""Seconds after an order within which a rank must have obeyed, at least; eight times the longest so far if longer."""
_FIRST = 120.0
"""The same for orders that load, compile or move much."""
_FILES = 4 * 3600.0
_JOIN_WITHIN = 60.0
_POLL = 0.05
_LINGER = 2.0
_HEADS = ("keys", "values", "cross_keys", "cross_values")

T = TypeVar("T")


class _Peer:
    """Another rank, as rank 0 knows it."""

    def __init__(self, leader: Leader, connection: socket.socket, address: str):
        self.rank, self.address, self.host, self.pid, self.port = -1, address, address, 0, 0
        self.begun = self.done = 0
        self.error = ""
        self.answers: queue.Queue[Message] = queue.Queue()
        self._leader = leader
        self.channel = Channel(connection, self._receive)

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"

    def _receive(self, message: Message) -> None:
        if message.kind == "beat":
            self.begun, self.done = message.about["begun"], message.about["done"]
        elif message.kind == "error":
            self.error = str(message.tree())
        elif message.kind == "progress":
            self._leader.say(f"{self}: {message.tree()}")
        else:
            self.done = max(self.done, message.about.get("number", 0))
            self.answers.put(message)


class Leader:
    """All ranks, as rank 0 sees them.

    Parameters
    ----------
    place : Place
        Rank 0's.
    process : Popen, optional
        ``mlx.launch``, if this process has started it.
    silence, late : float
        See :data:`SILENCE` and :data:`LATE`.
    on_progress : callable, optional
        Called with a short sentence now and then.

    Attributes
    ----------
    described : Description
        The weights before they were split.
    orders, order_bytes : int
        Messages sent to other ranks, and their bytes.
    """

    def __init__(
        self,
        place: Place,
        process: subprocess.Popen[bytes] | None = None,
        *,
        listener: socket.socket | None = None,
        silence: float = SILENCE,
        late: float = LATE,
        on_progress: Callable[[str], None] | None = None,
    ):
        self.place, self._process, self._silence, self._late = place, process, silence, late
        self.say = on_progress or (lambda _: None)
        self.described: Description = {}
        self.orders = 0
        self._pending: deque[tuple[int, float, float]] = deque()  # order, when it was sent, how long it may take
        self._took = 0.0
        self._peers: list[_Peer] = []
        self._failed: RankError | None = None
        self._loaded = self._closed = False
        self._lock, self._lock_failed = threading.Lock(), threading.RLock()
        self._names = 0
        self._dropped: deque[int] = deque()
        self._bounded = Bounded(self)
        self._group: Any = None
        self._said = b""
        self._listener = listener or socket.create_server((place.host, place.port))
        if process is not None:
            threading.Thread(target=self._read_errors, name="moshi launch", daemon=True).start()
        atexit.register(self.close)

    def __deepcopy__(self, memo: dict[int, Any]) -> Leader:
        return self

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def order_bytes(self) -> int:
        """Bytes sent to all other ranks, signs of life included; not those of MLX."""
        return sum(peer.channel.sent for peer in self._peers)

    # Beginning

    def gather(self, files: CheckpointFiles, **what: Any) -> None:
        """Wait for all ranks, and refuse those with other versions or files.

        Parameters
        ----------
        files : CheckpointFiles
            The model's, here.
        what
            ``source``, ``weights``, ``lora``, ``lora_scaling``, ``dtype``, ``seed``: how the others load it.

        Raises
        ------
        RankError
            If a rank does not come, or differs.
        """
        try:
            self._what = what
            self.say(f"waiting for {self.place.size - 1} other machines")
            self._accept()
            for peer in self._peers:
                peer.channel.send("welcome")
            threading.Thread(target=self._beat, name="moshi beat", daemon=True).start()
            mine = describe_files(files, what["lora"] or files.lora)
            for peer, its in zip(self._peers, self.ask("files", what, within=_FILES), strict=True):
                differ = [name for name in {**mine, **its} if mine.get(name) != its.get(name)]
                if differ:
                    raise RankError(
                        f"{peer} has other files of {what['source']} than this machine: {', '.join(differ)} "
                        "differ. All machines need the same"
                    )
            ring = None
            if self.place.token:
                ports = [_free_port(self.place.host), *(peer.port for peer in self._peers)]
                hosts = [self.place.host, *(peer.address for peer in self._peers)]
                ring = [[f"{host}:{port}"] for host, port in zip(hosts, ports, strict=True)]
            self._order("group", ring, within=_FIRST)
            self._group = self.call(join_group, self.place, ring)
            self._collect()
        except BaseException:
            self.close()
            raise

    def prepare(self, lm: Lm) -> None:
        """Keep rank 0's part of a model whose weights are not read yet, while the others load theirs."""
        try:
            check_split(lm, self.place.size)
            self._order("load", self._what, within=_FIRST)
            self.described = split_lm(lm, self._group)
        except BaseException:
            self.close()
            raise

    def finish(self, lm: Lm) -> None:
        """Wait until all ranks have loaded; from now on ``lm`` computes on all of them."""
        try:
            for peer, its in zip(self._peers, self._collect(), strict=True):
                if its["dtype"] != str(lm.dtype):
                    raise RankError(
                        f"{peer} computes in {its['dtype']}, this machine in {lm.dtype}: a Mac and a CPU do not go "
                        "together unless dtype says which"
                    )
        except BaseException:
            self.close()
            raise
        self._loaded = True
        lm.backend, lm.sharding = "mlx", self

    def _accept(self) -> None:
        self._listener.settimeout(_POLL)
        waiting: list[_Peer] = []
        until = time.monotonic() + _JOIN_WITHIN
        with self._listener:
            while len(self._peers) < self.place.size - 1:
                with suppress(TimeoutError, socket.timeout):
                    connection, address = self._listener.accept()
                    waiting.append(_Peer(self, connection, address[0]))
                for peer in [peer for peer in waiting if not peer.answers.empty()]:
                    waiting.remove(peer)
                    self._admit(peer, peer.answers.get())
                missing = sorted(set(range(1, self.place.size)) - {peer.rank for peer in self._peers})
                ended = self._process is not None and self._process.poll() is not None
                if missing and (ended or time.monotonic() > until):
                    names = ", ".join(f"rank {rank}" for rank in missing)
                    why = self._last_words() or f"nothing came within {_JOIN_WITHIN:.0f} s"
                    raise RankError(f"{names} did not start: {why}")
        self._peers.sort(key=lambda peer: peer.rank)

    def _admit(self, peer: _Peer, hello: Message) -> None:
        about, mine = hello.tree(), versions()
        peer.rank, peer.port = int(hello.about["rank"]), int(hello.about["port"])
        peer.pid, peer.host = int(about["pid"]), str(about["host"])
        known = {0, *(other.rank for other in self._peers)}
        if about["token"] != self.place.token or peer.rank in known or not 0 < peer.rank < self.place.size:
            peer.channel.close()  # something else that found the port
            return
        differ = [
            f"{name} {about.get(name)} there, {mine[name]} here" for name in mine if about.get(name) != mine[name]
        ]
        self._peers.append(peer)
        if differ:
            raise RankError(f"{peer} has other versions: {'; '.join(differ)}. All machines need the same")

    # Orders

    def ask(self, kind: str, body: Any = None, *, within: float | None = None) -> list[Any]:
        """Give an order that all ranks answer; returns their answers, by rank."""
        self._order(kind, body, within=within)
        return self._collect()

    def order(self, kind: str, body: Any, *, within: float | None = None) -> None:
        """Give an order, to all ranks alike; the generators that are no longer used are dropped before it."""
        dropped = []
        while self._dropped:
            dropped.append(self._dropped.popleft())
        if dropped:
            self._order("drop", dropped)
        self._order(kind, body, within=within)

    def order_each(self, kind: str, bodies: Sequence[Any], *, within: float | None = None) -> None:
        """Give an order that differs from rank to rank; ``bodies`` are for ranks 1 and higher."""
        self._order(kind, None, within=within, bodies=bodies)

    def _order(self, kind: str, body: Any, *, within: float | None = None, bodies: Sequence[Any] | None = None) -> None:
        self.check()
        with self._lock:
            self.orders += 1
            limit = within or max(self._late, 8 * self._took)
            self._pending.append((self.orders, time.monotonic(), limit))
            for index, peer in enumerate(self._peers):
                try:
                    peer.channel.send(kind, body if bodies is None else bodies[index], number=self.orders)
                except RankError as error:
                    raise self._fail(f"{peer} has gone: {error}") from error

    def _collect(self) -> list[Any]:
        return [self._answer(peer) for peer in self._peers]

    def _answer(self, peer: _Peer) -> Any:
        while True:
            try:
                return peer.answers.get(timeout=_POLL).tree()
            except queue.Empty:
                self.check()

    def check(self) -> None:
        """Look after the other ranks.

        Raises
        ------
        RankError
            If one has gone, is silent or late. It is named, all end, and the same error comes ever after.
        """
        if self._failed is not None:
            raise self._failed
        if self._closed:
            raise RankError("the other machines were told that this is over")
        now = time.monotonic()
        for peer in self._peers:
            if peer.error:
                raise self._fail(f"{peer} failed: {peer.error}")
            if peer.channel.closed:
                raise self._fail(f"{peer} has gone: its process has ended, or the connection is down")
        most = self._silence if self._loaded else max(self._silence, LOADING)
        for peer in self._peers:
            silent = now - peer.channel.heard
            if silent > most:
                raise self._fail(f"{peer} does not respond: nothing for {silent:.1f} s. Is it stopped, or asleep?")
        done = min((peer.done for peer in self._peers), default=self.orders)
        with self._lock:
            while self._pending and self._pending[0][0] <= done:
                self._pending.popleft()
            overdue = next((order for order, sent, limit in self._pending if now - sent > limit), None)
        if overdue is not None:
            behind = [peer for peer in self._peers if peer.done < overdue]
            # A rank that has begun may be waiting for one that has not.
            late = [peer for peer in behind if peer.begun < overdue] or behind
            names = ", ".join(map(str, late))
            raise self._fail(
                f"{names} is late: no answer within the time that is given. Is it busy with something else?"
            )

    def _fail(self, text: str) -> RankError:
        """Remember the first error, and end all other ranks, so that nobody waits for them."""
        with self._lock_failed:
            if self._failed is None:
                self._failed = RankError(text)
                self._end_others(at_once=True)
        return self._failed

    def _beat(self) -> None:
        while not self._closed and self._failed is None:
            for peer in self._peers:
                with suppress(RankError):
                    peer.channel.send("beat")
            time.sleep(BEAT)

    # The model's hooks

    def stepper(self, lm: Lm) -> Stepper:
        """See :func:`moshi_mlx.cpu.lm.make_stepper`."""
        return LeadingStepper(lm, self)

    def rows(self, lm: Lm, stepper: Stepper, config: GenerationConfig, kv_bits: int | None) -> Rows:
        """The rows of a new generator."""
        assert isinstance(stepper, LeadingStepper)
        return LeadingRows(self, lm, stepper, config, kv_bits)

    def bounded(self, make: Callable[[], Any]) -> Any:
        """An object whose methods run in the thread that computes; who calls them waits no longer than is useful."""
        return _Proxy(self._bounded, self._bounded.call(make))

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function in the thread that computes, and wait for it.

        Raises
        ------
        RankError
            As :meth:`check`.
        """
        return self._bounded.call(function, *args)

    def new_name(self, rows: LeadingRows) -> int:
        """A name for a generator; it is dropped everywhere when its rows are no longer used."""
        self._names += 1
        weakref.finalize(rows, self._dropped.append, self._names).atexit = False
        return self._names

    def took(self, seconds: float) -> None:
        """Note how long a step took: a later one may take eight times as long."""
        self._took = max(self._took, seconds)

    # The end

    def close(self) -> None:
        """Let all other ranks end. Waits two seconds at most."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._listener.close()
        for peer in self._peers:
            with suppress(RankError):
                peer.channel.send("end")
        self._end_others(at_once=self._failed is not None)
        if self._bounded.stuck(_LINGER if self._failed is not None else 0.0):
            # MLX would wait for ever when it is torn down.
            atexit.register(_leave)

    def _end_others(self, at_once: bool) -> None:
        """Make sure that no process of other ranks is left."""
        until = time.monotonic() + (0.0 if at_once else _LINGER)
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(max(until - time.monotonic(), 0))
        for peer in self._peers:
            if at_once and self.place.token:
                _kill(peer.address, peer.pid, peer.address == self.place.host)
            elif self._process is None and not at_once:
                while not peer.channel.closed and time.monotonic() < until:
                    time.sleep(_POLL)
            if at_once:
                peer.channel.close()
        if self._process is not None and self._process.poll() is None:
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_LINGER)
            if self._process.poll() is None:
                with suppress(OSError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def _read_errors(self) -> None:
        """Keep what ``mlx.launch`` and the others print: it says why one did not start."""
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            self._said = (self._said + line)[-4000:]

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._said.decode(errors="replace").splitlines() if line.strip()]
        lines = [line for line in lines if "[WARN]" not in line]
        return lines[-1][:300] if lines else ""


class Bounded:
    """One thread in which everything runs that may have to wait for other ranks."""

    def __init__(self, leader: Leader):
        self._leader = leader
        self._calls: queue.Queue[_Call] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._current: _Call | None = None

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function there and wait for it; see :meth:`Leader.call`."""
        if threading.current_thread() is self._thread:
            return function(*args)
        self._leader.check()
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="moshi sharded", daemon=True)
            self._thread.start()
        call = _Call(function, args)
        self._current = call
        self._calls.put(call)
        while not call.done.wait(_POLL):
            self._leader.check()
        if call.error is not None:
            if isinstance(call.error, RuntimeError) and not isinstance(call.error, MoshiError):
                self._who_has_gone(call.error)
            raise call.error
        result: T = call.result
        return result

    def stuck(self, within: float) -> bool:
        """Whether a call is still running after some seconds."""
        return self._current is not None and not self._current.done.wait(within)

    def _who_has_gone(self, error: RuntimeError) -> None:
        """MLX's connection has ended: say which rank it was."""
        if "peer" not in str(error) and "[ring]" not in str(error):
            return
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            self._leader.check()
            time.sleep(_POLL)
        raise RankError(f"the connection between the machines has failed: {error}") from error

    def _serve(self) -> None:
        while True:
            call = self._calls.get()
            try:
                call.result = call.function(*call.args)
            except BaseException as error:  # handed to who waits for it
                call.error = error
            call.done.set()


class _Call:
    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]):
        self.function, self.args = function, args
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None


class _Proxy:
    """An object whose methods run in another thread."""

    def __init__(self, bounded: Bounded, inner: Any):
        self._bounded, self._inner = bounded, inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value
        return lambda *args, **kwargs: self._bounded.call(lambda: value(*args, **kwargs))


class LeadingStepper(Stepper):
    """A stepper that has the other ranks step too.

    Attributes
    ----------
    rows : int
        The name of the generator's rows.
    names : tuple of int
        The conversations that step.
    """

    def __init__(self, lm: Lm, leader: Leader):
        super().__init__(lm, compiled=mx.default_device() != mx.cpu)
        self._leader = leader
        self.rows = 0
        self.names: tuple[int, ...] = ()
        self._began = 0.0
        self._seen: set[Any] = set()

    def run(self, function: Callable[..., Any], kind: Any, *args: Any) -> Any:
        if function is not choose_text:
            return super().run(function, kind, *args)
        self._began = time.monotonic()
        column, slots = np.array(args[0]["column"]), args[1]["transformer"]["0"]["keys"].shape[2]
        shape = (kind, column.shape, slots)
        first = shape not in self._seen  # it compiles
        self._seen.add(shape)
        what = {"rows": self.rows, "names": list(self.names), "column": column}
        self._leader.order("step", what, within=_FIRST if first and self._compiled is not None else None)
        made = super().run(function, kind, *args)
        mx.async_eval(made["hidden"])  # all sums, even where nothing reads the last ones
        return made

    def fetch(self, state: State, *arrays: Any) -> list[Any]:
        found = super().fetch(state, *arrays)
        if self._began:
            self._leader.took(time.monotonic() - self._began)
            self._began = 0.0
        return found


class LeadingRows(Rows):
    """Rows that have the other ranks do the same with theirs.

    What may be refused is done here first. Snapshots have the heads of all ranks: they are the same with any number of
    machines.
    """

    def __init__(self, leader: Leader, lm: Lm, stepper: LeadingStepper, config: GenerationConfig, kv_bits: int | None):
        super().__init__(lm, stepper, config, kv_bits)
        self._leader, self._leading = leader, stepper
        self._name = stepper.rows = leader.new_name(self)
        default = settings_of(config).tolist()
        leader.order("new", {"rows": self._name, "kv_bits": kv_bits, "config": default})

    def team(self, names: tuple[int, ...]) -> Team:
        self._leading.names = names
        return super().team(names)

    def join(self, joining: Sequence[tuple[int, GenerationConfig, Any, Any]]) -> list[int]:
        names = super().join(joining)
        told = [
            [settings_of(config).tolist(), plain_condition(condition), plain_condition(null)]
            for _, config, condition, null in joining
        ]
        self._order("join", joining=told)
        return names

    def leave(self, name: int) -> None:
        super().leave(name)
        self._order("leave", name=name)

    def fill(self, name: int) -> None:
        super().fill(name)
        self._order("fill", name=name)

    def clear(self) -> None:
        super().clear()
        self._order("clear")

    def snapshot(self, names: Sequence[int]) -> State:
        snapshot = super().snapshot(names)
        what = {"rows": self._name, "names": list(names)}
        others = self._leader.ask("snapshot", what, within=_FIRST)
        for part in ("lm", "null"):
            if part in snapshot:
                _gather_heads(snapshot[part]["transformer"], [other[part]["transformer"] for other in others])
        return snapshot

    def restore(self, snapshot: State, names: Sequence[int]) -> None:
        parts = self._parts(snapshot)
        super().restore(parts[0], names)
        self._order_parts("restore", parts, names=list(names))

    def adopt(self, snapshot: State) -> list[int]:
        parts = self._parts(snapshot)
        names = super().adopt(parts[0])
        self._order_parts("adopt", parts)
        return names

    def _order(self, kind: str, **what: Any) -> None:
        self._leader.order(kind, {"rows": self._name, **what}, within=_FIRST)

    def _order_parts(self, kind: str, parts: list[State], **what: Any) -> None:
        bodies = [{"rows": self._name, "snapshot": part, **what} for part in parts[1:]]
        self._leader.order_each(kind, bodies, within=_FIRST)

    def _parts(self, snapshot: State) -> list[State]:
        """Each rank's part of a snapshot; what does not fit is refused by who reads it."""
        size = self._leader.place.size
        heads: int = self._lm.transformer.layers[0].self_attn.kv_heads * size
        return [_take_heads(snapshot, rank, size, heads) for rank in range(size)]


def plain_condition(values: Mapping[str, Any] | None) -> Any:
    """Conditions as they are sent."""
    if values is None:
        return None
    return {
        name: {"tensor": value.tensor, "mask": value.mask} if isinstance(value, TensorCondition) else value
        for name, value in values.items()
    }


def _is_heads(name: str) -> bool:
    return name.startswith(_HEADS)


def _gather_heads(mine: State, others: Sequence[State]) -> None:
    """Put the heads of all ranks together, in place."""
    for number, layer in mine.items():
        for name in list(layer) if isinstance(layer, dict) else ():
            if _is_heads(name):
                parts = [layer[name], *(mx.array(other[number][name]) for other in others)]
                layer[name] = mx.concatenate(parts, axis=1)
                mx.eval(layer[name])


def _take_heads(tree: State, rank: int, size: int, heads: int) -> State:
    """A snapshot with the heads of one rank."""
    made: State = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            made[name] = _take_heads(value, rank, size, heads)
        elif _is_heads(name) and value.ndim == 4 and value.shape[1] % size == 0 and value.shape[1] >= heads:
            share = value.shape[1] // size
            made[name] = value[:, rank * share : (rank + 1) * share]
        else:
            made[name] = value
    return made


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _kill(address: str, pid: int, here: bool) -> None:
    """End a rank that may be stopped."""
    if here:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
        return
    with suppress(OSError):  # without waiting: the machine may be off
        subprocess.Popen(
            ["ssh", "-o", "ConnectTimeout=2", address, "kill", "-9", str(pid)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


def _leave() -> None:
    """End the process without MLX's own tidying, which waits for a rank that does not answer."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)
