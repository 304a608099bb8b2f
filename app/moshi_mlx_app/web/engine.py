"""What computes behind the connections: conversations on the loaded model, and their recordings.

A connection knows nothing of either but :class:`Engine` and what :meth:`Engine.begin` gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moshi_mlx.realtime import Conversation
from moshi_mlx.tasks.dialogue import Moshi, SessionFrame
from moshi_mlx_app.recording.recorder import Recorder
from moshi_mlx_app.recording.transcript import Transcript

from .settings import Settings

__all__ = ["Engine", "Running", "Tap"]

Tap = Callable[[NDArray[np.float32], SessionFrame], object]


@dataclass
class Engine:
    """What every conversation has in common.

    Attributes
    ----------
    model : Moshi
    kv_bits : int, optional
        Of the attention's memory.
    record : Path, optional
        Folder into which every conversation is recorded.
    """

    model: Moshi
    kv_bits: int | None = None
    record: Path | None = None

    def transcript(self, settings: Settings) -> Transcript:
        """The beginning of a conversation's transcript."""
        return Transcript.of(self.model, settings.seed, settings.generation, kv_bits=self.kv_bits)

    def begin(self, settings: Settings, tap: Tap) -> Running:
        """Start a conversation; takes a moment.

        Parameters
        ----------
        settings : Settings
        tap : callable
            Gets every frame, in a thread of the conversation's.

        Raises
        ------
        MoshiError
            If it cannot begin.
        OSError
            If it cannot be recorded.
        """
        recorder = None
        if self.record is not None:
            about = self.transcript(settings)
            recorder = Recorder(self.record, self.model.sample_rate, self.model.frame_size, about)
            recorder.start()
        running = Running(self, settings, tap, recorder)
        try:
            running.conversation.start()
        except BaseException:
            running.stop()
            raise
        return running


class Running:
    """A conversation, and its recorder if there is one. ``stop`` ends both."""

    def __init__(self, engine: Engine, settings: Settings, tap: Tap, recorder: Recorder | None):
        def both(heard: NDArray[np.float32], frame: SessionFrame) -> None:
            if recorder is not None:
                recorder.tap(heard, frame)
            tap(heard, frame)

        self.recorder = recorder
        self.conversation = Conversation(
            engine.model, seed=settings.seed, generation=settings.generation, kv_bits=engine.kv_bits, tap=both
        )

    def stop(self) -> None:
        """End it; takes up to three seconds where the disk is full."""
        self.conversation.stop()
        if self.recorder is not None:
            self.recorder.stop()

    def notices(self) -> list[str]:
        """What the owner of the server should know of the recording."""
        return [] if self.recorder is None else self.recorder.notices()
