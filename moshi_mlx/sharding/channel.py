"""Messages between rank 0 and each other rank, over TCP, beside MLX's own connections.

What is computed together goes through MLX (:mod:`mx.distributed`), whose calls wait for ever for a machine that has
stopped. Orders, answers and signs of life come this way, where every wait has a bound. A message is a small JSON
object and arrays; nothing in it is executed.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import RankError

__all__ = ["Channel", "Message", "connect"]

_LENGTH = struct.Struct("!I")
_LONGEST = 16 * 2**20
_CHUNK = 2**20
_DTYPES = ("bool", "bfloat16", "float16", "float32", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")


class Message:
    """What came: ``about`` (JSON) and buffers that :meth:`tree` reads, in the thread that uses the arrays."""

    def __init__(self, about: dict[str, Any], buffers: list[bytearray]):
        self.about, self._buffers = about, buffers

    @property
    def kind(self) -> str:
        """The message's name."""
        return str(self.about["kind"])

    def tree(self) -> Any:
        """What was sent: dicts, lists, strings, numbers, and arrays (numpy's, MLX's where numpy lacks the type)."""
        return self._read(self.about.get("body"))

    def _read(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._read(one) for one in value]
        if not isinstance(value, dict):
            return value
        if "array" not in value:
            return {key: self._read(one) for key, one in value.items()}
        buffer, dtype, shape = self._buffers[value["array"]], value["dtype"], value["shape"]
        if dtype == "bfloat16":
            return mx.view(mx.array(np.frombuffer(buffer, np.uint16).reshape(shape)), mx.bfloat16)
        return np.frombuffer(buffer, dtype).reshape(shape)


class Channel:
    """One connection. Any thread may send; a thread of its own receives.

    Parameters
    ----------
    connection : socket
    receive : callable
        Called with each :class:`Message`, in the receiving thread.

    Attributes
    ----------
    heard : float
        When the other side last sent anything (:func:`time.monotonic`).
    sent : int
        Bytes sent.
    closed : bool
        Whether the connection has ended, by whichever side.
    """

    def __init__(self, connection: socket.socket, receive: Callable[[Message], object]):
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection, self._receive = connection, receive
        self._sending = threading.Lock()
        self.heard, self.sent, self.closed = time.monotonic(), 0, False
        self._thread = threading.Thread(target=self._listen, name="moshi channel", daemon=True)
        self._thread.start()

    def send(self, kind: str, body: Any = None, **about: Any) -> None:
        """Send a message; ``body`` is a tree of dicts and lists with arrays in it.

        Raises
        ------
        RankError
            If the connection has ended.
        """
        buffers: list[Any] = []
        header = json.dumps({"kind": kind, **about, "body": _pack(body, buffers)}).encode()
        sizes = json.dumps([len(buffer) for buffer in buffers]).encode()
        parts = [_LENGTH.pack(len(header)), _LENGTH.pack(len(sizes)), header, sizes]
        if sum(len(buffer) for buffer in buffers) < _CHUNK:
            parts, buffers = [b"".join([*parts, *buffers])], []
        try:
            with self._sending:
                for part in (*parts, *buffers):
                    self._connection.sendall(part)
                    self.sent += len(part)
        except OSError as error:
            self.closed = True
            raise RankError(f"the connection has ended: {error}") from error

    def close(self) -> None:
        """End the connection."""
        self.closed = True
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _listen(self) -> None:
        try:
            while True:
                lengths = [_LENGTH.unpack(self._exactly(4))[0] for _ in range(2)]
                if max(lengths) > _LONGEST:
                    return
                about, sizes = (json.loads(self._exactly(length)) for length in lengths)
                self._receive(Message(about, [self._exactly(size) for size in sizes]))
        except (OSError, ValueError, KeyError, TypeError):
            pass
        finally:
            self.closed = True

    def _exactly(self, count: int) -> bytearray:
        buffer = bytearray(count)
        view = memoryview(buffer)
        while view:
            got = self._connection.recv_into(view[:_CHUNK])
            if not got:
                raise OSError("closed")
            self.heard = time.monotonic()
            view = view[got:]
        return buffer


def connect(host: str, port: int, within: float) -> socket.socket:
    """A connection to rank 0, which may start to listen later.

    Raises
    ------
    RankError
        If there is none in ``within`` seconds.
    """
    until = time.monotonic() + within
    while True:
        try:
            return socket.create_connection((host, port), timeout=2)
        except OSError as error:
            if time.monotonic() >= until:
                raise RankError(f"rank 0 does not answer at {host}:{port}: {error}") from error
            time.sleep(0.1)


def _pack(value: Any, buffers: list[Any]) -> Any:
    if isinstance(value, dict):
        return {key: _pack(one, buffers) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(one, buffers) for one in value]
    if not isinstance(value, (mx.array, np.ndarray)):
        return value
    dtype = str(value.dtype).removeprefix("mlx.core.")
    if dtype not in _DTYPES:
        raise RankError(f"arrays of type {dtype} are not sent between machines")
    plain = np.array(mx.view(mx.array(value), mx.uint16) if dtype == "bfloat16" else value)
    buffers.append(np.ascontiguousarray(plain).reshape(-1).view(np.uint8).data)
    return {"array": len(buffers) - 1, "dtype": dtype, "shape": list(value.shape)}
