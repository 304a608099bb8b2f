"""The codec's streams of many conversations in several processes, so that a CPU's other cores compute too.

In numpy a frame of the codec is some hundred small operations that hold the interpreter, so threads of one process
share one core (docs/findings.md). Here each row of a stage lives in this process or in a child, whichever has fewer;
the children work while this process computes its own share. Rows move as snapshots, since a state is a value::

    with CodecProcesses(engine, 1) as processes:
        batch = Batch(engine, processes=processes)

A row gives the same codes and samples, bit for bit, wherever it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..codec.base import NumpyMimi
from ..errors import CodecError, MoshiError
from ..models.mimi import Mimi, MimiConfig
from ..state import State
from .batch import Stage, run_rows
from .pipeline import Decode, Encode, Engine

__all__ = ["CodecProcesses", "codec_processes_for"]

_WITHIN = 10.0  # seconds for an answer, and for a process to begin; then it counts as lost
_MOST = 4
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from moshi_mlx.engine.codec_processes import main; main(int(sys.argv[1]))"
)


def codec_processes_for(engine: Engine) -> int:
    """How many child processes are of use for many conversations: none where the codec does not run in numpy."""
    if not isinstance(engine.codec, NumpyMimi) or os.name != "posix" or not sys.executable:
        return 0
    return min(max((os.cpu_count() or 1) // 2, 0), _MOST)


class CodecProcesses:
    """Child processes that hold rows of the codec's stages. Used by one thread.

    Parameters
    ----------
    engine : Engine
        With a codec in numpy.
    count : int
        Children. Each takes the memory of an interpreter and of the codec.

    Raises
    ------
    CodecError
        If the codec does not run in numpy.
    """

    def __init__(self, engine: Engine, count: int):
        if not isinstance(engine.codec, NumpyMimi):
            raise CodecError("codec processes need the codec numpy: choose the codec numpy for this model")
        mimi = engine.codec.mimi
        weights = {name: np.array(value) for name, value in cast(Any, tree_flatten(mimi.parameters()))}
        self._setup = _Setup(
            mimi.config,
            mimi.num_codebooks,
            weights,
            engine.own_q,
            engine.user_q,
            engine.audio_start_id,
            engine.hears_end,
        )
        self.children = [_Child(self._setup) for _ in range(count)]

    def __enter__(self) -> CodecProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> None:
        """Wait until all children have begun, or are lost."""
        for child in self.children:
            with suppress(CodecError):
                child.ready(wait=True)

    def spread(self, stage: Encode | Decode) -> Spread:
        """A stage, still without rows, whose rows will be spread over the processes."""
        return Spread(stage, self)

    def replace(self, lost: _Child) -> None:
        """Start another process in place of one that has ended."""
        self.children[self.children.index(lost)] = _Child(self._setup)

    def close(self) -> None:
        """End the processes; returns at once."""
        for child in self.children:
            child.close()
        self.children = []


class Spread:
    """A stage of the codec whose rows are spread over this process and children.

    Parameters
    ----------
    local : Encode or Decode
        The stage in this process, still without rows.
    processes : CodecProcesses
    """

    batched = True

    def __init__(self, local: Encode | Decode, processes: CodecProcesses):
        self._local, self._processes = local, processes
        self._at: dict[int, _Child | None] = {}

    def join(self, row: int, snapshot: State | None = None) -> None:
        """Add a row, or continue one from a conversation's snapshot."""
        self._local.join(row, snapshot)
        self._at[row] = None
        self._balance()

    def leave(self, row: int) -> None:
        """Forget a row, if it is there."""
        child = self._at.pop(row, None)
        if child is None:
            self._local.leave(row)
        elif not child.lost:
            with suppress(CodecError):
                child.ask(self._local.part, "leave", row)
        self._balance()

    def snapshot(self, row: int) -> State:
        """This stage's part of a conversation's state, as numpy arrays."""
        child = self._at[row]
        if child is None:
            return self._local.snapshot(row)
        return cast(State, child.ask(self._local.part, "snapshot", row))

    def step(self, rows: Sequence[int], values: Sequence[Any]) -> list[Any]:
        """As the stage's own; a row that fails has its exception in place of a result."""
        shares: dict[_Child | None, tuple[list[int], list[Any]]] = {None: ([], [])}
        for row, value in zip(rows, values, strict=True):
            mine, its = shares.setdefault(self._at[row], ([], []))
            mine.append(row)
            its.append(value)
        found: dict[int, Any] = {}
        asked = {child: share for child, share in shares.items() if child is not None}
        for child, share in asked.items():
            child.send(self._local.part, "step", *share)
        own = shares[None]
        if own[0]:
            found.update(run_rows(self._local, *own, found))
        for child, (mine, _) in asked.items():
            try:
                found.update(child.receive())
            except MoshiError as error:
                found.update(dict.fromkeys(mine, error))
        return [found[row] for row in rows]

    def _balance(self) -> None:
        """Move rows, one by one, until no process has two more than another; replace processes that were lost."""
        for child in self._processes.children:
            if child.lost and child not in self._at.values():
                self._processes.replace(child)
        places: list[_Child | None] = [None, *(child for child in self._processes.children if child.ready())]
        while True:
            counts = {place: sum(at is place for at in self._at.values()) for place in places}
            least = min(counts, key=lambda place: counts[place])
            most = max(counts, key=lambda place: counts[place])
            if counts[most] < counts[least] + 2:
                return
            row = next(row for row, at in self._at.items() if at is most)
            state = self.snapshot(row)
            for place, action in ((least, "join"), (most, "leave")):
                arguments = (row, state) if action == "join" else (row,)
                if place is None:
                    getattr(self._local, action)(*arguments)
                else:
                    place.ask(self._local.part, action, *arguments)
            self._at[row] = least


class _Child:
    """A process, and the connection to it."""

    def __init__(self, setup: _Setup):
        self.lost = False
        self._begun = False
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # must not receive Ctrl-C
            )
        self._put(setup)

    def ready(self, wait: bool = False) -> bool:
        """Whether it takes rows."""
        if not self._begun and not self.lost and (wait or self._connection.poll()):
            with suppress(CodecError):
                self.receive()
                self._begun = True
        return self._begun and not self.lost

    def ask(self, part: str, action: str, *arguments: Any) -> Any:
        """Call a method of a stage there; raises what it raises."""
        self.send(part, action, *arguments)
        return self.receive()

    def send(self, part: str, action: str, *arguments: Any) -> None:
        if not self.lost:
            self._put((part, action, arguments))

    def receive(self) -> Any:
        """The next answer.

        Raises
        ------
        CodecError
            If the process has ended or does not answer.
        """
        with suppress(EOFError, OSError):
            if not self.lost and self._connection.poll(_WITHIN):
                answer = self._connection.recv()
                if isinstance(answer, Exception):
                    raise answer
                return answer
        self.close()
        raise CodecError("the process that computed this conversation's sound has ended: begin the conversation again")

    def close(self) -> None:
        self.lost = True
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _put(self, message: Any) -> None:
        with suppress(OSError):  # it has ended: whoever waits for its answer is told
            self._connection.send(message)


@dataclass(frozen=True)
class _Setup:
    """What a child needs of an engine: the codec, and how many codes are heard and spoken."""

    config: MimiConfig
    codebooks: int
    weights: dict[str, np.ndarray[Any, Any]]
    own_q: int
    user_q: int
    audio_start_id: int
    hears_end: bool

    def stages(self) -> dict[str, Encode | Decode]:
        mimi = Mimi(self.config, self.codebooks)
        mimi.update(tree_unflatten([(name, mx.array(value)) for name, value in self.weights.items()]))
        mx.eval(mimi.parameters())
        engine = cast(
            Engine,
            _CodecOnly(
                NumpyMimi(mimi), self.own_q, self.user_q, self.audio_start_id, self.hears_end, mimi.config.frame_size
            ),
        )
        return {stage.part: stage for stage in (Encode(engine), Decode(engine))}


@dataclass(frozen=True)
class _CodecOnly:
    """Takes an engine's place for the codec's stages. Rows arrive as snapshots, after any leading silence."""

    codec: NumpyMimi
    own_q: int
    user_q: int
    audio_start_id: int
    hears_end: bool
    frame_size: int
    lead: int = 0


def main(number: int) -> None:
    """The child: answers requests from file descriptor ``number`` until it is closed."""
    with Connection(number) as connection, suppress(EOFError, BrokenPipeError, ConnectionError):
        stages = cast(_Setup, connection.recv()).stages()
        connection.send(None)
        while True:
            part, action, arguments = connection.recv()
            connection.send(_answer(stages[part], action, arguments))


def _answer(stage: Stage, action: str, arguments: Sequence[Any]) -> Any:
    try:
        if action != "step":
            return getattr(stage, action)(*arguments)
        failed: dict[int, Exception] = {}
        rows, values = arguments
        done = run_rows(stage, rows, values, failed)
        return {**done, **{row: _portable(error) for row, error in failed.items()}}
    except Exception as error:
        return _portable(error)


def _portable(error: Exception) -> Exception:
    """An exception that can be sent: those of this package as they are."""
    return error if isinstance(error, MoshiError) else CodecError(f"the codec failed: {error!r}")
