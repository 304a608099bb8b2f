"""What computes behind the connections: conversations on the loaded model, and their recordings.

One thread computes for all of them (:class:`~moshi_mlx.realtime.Scheduler`). A connection knows nothing of it but
:class:`Engine`, and the :class:`Running` that is its own; neither ever makes the event loop wait.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.engine.codec_processes import codec_processes_for
from moshi_mlx.realtime import Conversation, Scheduler
from moshi_mlx.tasks.dialogue import Moshi, SessionFrame
from moshi_mlx_app.recording.recorder import Recorder
from moshi_mlx_app.recording.transcript import Transcript

from .settings import Settings

__all__ = ["Engine", "Running", "Tap"]

Tap = Callable[[NDArray[np.float32], SessionFrame], object]


class Engine:
    """What every conversation has in common.

    Parameters
    ----------
    model : Moshi
    kv_bits : int, optional
        Of the attention's memory.
    record : Path, optional
        Folder into which every conversation is recorded.
    alone : bool
        There is never more than one conversation: its stages work side by side, in threads of its own. A machine that
        has not the time for all of a frame in one thread may have it so.
    """

    def __init__(self, model: Moshi, kv_bits: int | None = None, record: Path | None = None, *, alone: bool = False):
        self.model, self.kv_bits, self.record, self.alone = model, kv_bits, record, alone
        self._scheduler: Scheduler | None = None
        self._news: deque[Callable[[], object]] = deque()
        self._rung = False

    def transcript(self, settings: Settings) -> Transcript:
        """The beginning of a conversation's transcript."""
        return Transcript.of(self.model, settings.seed, settings.generation, kv_bits=self.kv_bits)

    def computing(self) -> Moshi | Scheduler:
        """What conversations are made on: the thread that computes; another one, should it have failed."""
        if self.alone:
            return self.model
        if self._scheduler is None or not self._scheduler.running:
            processes = codec_processes_for(self.model.engine)
            self._scheduler = Scheduler(self.model, kv_bits=self.kv_bits, codec_processes=processes).start()
        return self._scheduler

    def stop(self) -> None:
        """End the thread; takes a second at most."""
        if self._scheduler is not None:
            self._scheduler.stop()

    def tell(self, loop: asyncio.AbstractEventLoop, news: Callable[[], object]) -> None:
        """From the thread that computes: let ``loop`` call ``news``. What comes together wakes it once."""
        self._news.append(news)
        if not self._rung:
            self._rung = True
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody hears it any more
                loop.call_soon_threadsafe(self._pass_on)

    def _pass_on(self) -> None:
        self._rung = False  # first: what comes from now on may miss the last look at the news
        while self._news:
            self._news.popleft()()


class Running:
    """A conversation, and its recorder if there is one.

    Parameters
    ----------
    engine : Engine
    settings : Settings
    tap : callable
        Gets every frame, in the thread that computes: it must not take time.
    backlog : float
        Seconds of the user's sound that may wait.
    on_opening : callable, optional
        As for :class:`~moshi_mlx.realtime.Conversation`.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        tap: Tap,
        backlog: float = 0.32,
        on_opening: Callable[[int, int], object] | None = None,
    ):
        self._engine = engine
        self.recorder: Recorder | None = None
        if engine.record is not None:
            about = engine.transcript(settings)
            self.recorder = Recorder(engine.record, engine.model.sample_rate, engine.model.frame_size, about)
        recorder = self.recorder

        def both(heard: NDArray[np.float32], frame: SessionFrame) -> None:
            if recorder is not None:
                recorder.tap(heard, frame)
            tap(heard, frame)

        self.conversation = Conversation(
            engine.computing(),
            seed=settings.seed,
            generation=settings.generation,
            kv_bits=engine.kv_bits,
            backlog=backlog,
            tap=both,
            opening=settings.opening,
            on_opening=on_opening,
        )

    @property
    def waits(self) -> bool:
        """Whether beginning and ending take other threads' time, and what has begun must end before it is stopped."""
        return self._engine.alone or self.recorder is not None

    async def start(self) -> None:
        """Begin.

        Raises
        ------
        MoshiError
            If it cannot begin.
        OSError
            If it cannot be recorded.
        """
        if self.recorder is not None:
            await asyncio.to_thread(self.recorder.start)
        loop = asyncio.get_running_loop()
        begun = loop.create_future()

        def tell() -> None:
            if not begun.done():
                begun.set_result(None)

        if self._engine.alone:
            await asyncio.to_thread(self.conversation.start)
        else:
            self.conversation.start(lambda: self._engine.tell(loop, tell))
            await begun
        self.conversation.check()

    async def stop(self) -> None:
        """End it, at once; a recording takes up to three seconds where the disk is full."""
        if self.waits:
            await asyncio.to_thread(self.conversation.stop)  # its last frames are recorded, too
        else:
            self.conversation.stop(wait=False)
        if self.recorder is not None:
            await asyncio.to_thread(self.recorder.stop)

    def notices(self) -> list[str]:
        """What the owner of the server should know of the recording."""
        return [] if self.recorder is None else self.recorder.notices()
