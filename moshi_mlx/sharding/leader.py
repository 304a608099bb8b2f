"""Rank 0: it has the sound, samples the tokens, and tells the other ranks what to do.

A generator on a model that is split (``lm.sharding``) is the usual one, with a backend and rows of this module, which
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from ..checkpoint.resolve import CheckpointFiles
from ..cpu.lm import Backend
from ..engine.choose import GenerationConfig
from ..engine.rows import Rows
from ..errors import RankError
from ..models.lm import Lm
from .bounded import Bounded, Proxy
from .channel import Channel, Message
from .follower import BEAT, join_group
from .identity import Place, describe_files, versions
from .leading import FIRST, LeadingBackend, LeadingRows
from .split import Description, check_split, split_lm

__all__ = ["LATE", "SILENCE", "Leader"]

SILENCE = 1.5
"""Seconds without a sign of life after which a rank counts as stopped; while it loads, :data:`LOADING`."""
LOADING = 20.0
LATE = 2.0
"""Seconds after an order within which a rank must have obeyed, at least; eight times the longest so far if longer."""
_FILES = 4 * 3600.0
_JOIN_WITHIN = 60.0
_POLL = 0.05
_LINGER = 2.0

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
            self._order("group", ring, within=FIRST)
            self._group = self.call(join_group, self.place, ring)
            self._collect()
        except BaseException:
            self.close()
            raise

    def prepare(self, lm: Lm) -> None:
        """Keep rank 0's part of a model whose weights are not read yet, while the others load theirs."""
        try:
            check_split(lm, self.place.size)
            self._order("load", self._what, within=FIRST)
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

    def backend(self, lm: Lm) -> Backend:
        """See :func:`moshi_mlx.cpu.lm.make_backend`."""
        return LeadingBackend(lm, self)

    def rows(self, lm: Lm, backend: Backend, config: GenerationConfig, kv_bits: int | None) -> Rows:
        """The rows of a new generator."""
        assert isinstance(backend, LeadingBackend)
        return LeadingRows(self, lm, backend, config, kv_bits)

    def bounded(self, make: Callable[[], Any]) -> Any:
        """An object whose methods run in the thread that computes; who calls them waits no longer than is useful."""
        return Proxy(self._bounded, self._bounded.call(make))

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
