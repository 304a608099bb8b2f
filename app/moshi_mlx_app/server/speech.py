"""Texts of many clients, spoken together by one thread on one text-to-speech model.

A connection knows nothing of the thread but :class:`SpeechService` and the :class:`Utterance` that is its own; neither
makes the event loop wait.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moshi_mlx.errors import StateError

if TYPE_CHECKING:
    from moshi_mlx.tasks.speak import Manner, Spoken, TextToSpeech
    from moshi_mlx.tasks.speaking import SpeechRows
    from moshi_mlx.tasks.tts_machine import Entry

__all__ = ["SpeechService", "SpokenText", "Utterance"]

UNSENT = 250
"""Frames of a client that may wait to be sent; then its text waits."""
_IDLE = 0.2


class Utterance:
    """One client's text. Its methods may be called from any thread.

    Parameters
    ----------
    service : SpeechService
    manner : Manner
    tell : callable
        Gets every :class:`~moshi_mlx.tasks.speak.Spoken`, or the exception that ended it, in the thread that computes:
        it must not take time.
    """

    def __init__(self, service: SpeechService, manner: Manner, tell: Callable[[Spoken | Exception], object]):
        self._service, self.manner, self.tell = service, manner, tell
        self.row: int | None = None  # the thread's
        self.unsent = 0

    def push(self, entries: Sequence[Entry]) -> None:
        """Add to the text."""
        self._service.ask(lambda rows: None if self.row is None else rows.push(self.row, entries))

    def finish(self) -> None:
        """The text is complete."""
        self._service.ask(lambda rows: self._service.finish(self, rows))

    def end(self) -> None:
        """Speak no more of it, and give its place to another."""
        self._service.leave(self)

    def sent(self) -> None:
        """A frame has been sent."""
        self.unsent -= 1
        self._service.wake()


class SpeechService:
    """A text-to-speech model for many clients.

    Parameters
    ----------
    model : TextToSpeech
    places : int
        How many may speak at once.
    kv_bits : int, optional
        Of the attention's memory.
    voices : str
        The repository or folder of voices.
    """

    def __init__(
        self, model: TextToSpeech, places: int = 32, kv_bits: int | None = None, voices: str = "kyutai/tts-voices"
    ):
        self.model, self.places, self.voices, self._kv_bits = model, places, voices, kv_bits
        self._asked: deque[Callable[[SpeechRows], object]] = deque()
        self._bell = threading.Condition()
        self._utterances: set[Utterance] = set()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._failure = ""

    @property
    def free(self) -> int:
        """Places that are left."""
        return self.places - len(self._utterances)

    def begin(self, manner: Manner, tell: Callable[[Spoken | Exception], object]) -> Utterance:
        """A new text.

        Raises
        ------
        StateError
            If all places are taken, or the thread has failed.
        """
        if self._failure:
            raise StateError(f"the text-to-speech model has failed: {self._failure}")
        if self.free <= 0:
            raise StateError("no free channels")
        utterance = Utterance(self, manner, tell)
        self._utterances.add(utterance)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="moshi speech", daemon=True)
            self._thread.start()
        self.ask(lambda rows: self._join(utterance, rows))
        return utterance

    def leave(self, utterance: Utterance) -> None:
        """End a text, if it has not ended."""
        if utterance in self._utterances:
            self._utterances.discard(utterance)
            self.ask(lambda rows: None if utterance.row is None else rows.leave(utterance.row))

    def finish(self, utterance: Utterance, rows: SpeechRows) -> None:
        """In the thread: a text is complete."""
        from moshi_mlx.tasks.speak import Spoken

        if utterance.row is None or utterance.row not in rows.rows:
            return
        rows.finish(utterance.row)
        if utterance.row not in rows.rows:  # it had no words
            utterance.tell(Spoken(last=True))

    def ask(self, wish: Callable[[SpeechRows], object]) -> None:
        """Let the thread do something between two steps."""
        self._asked.append(wish)
        self.wake()

    def wake(self) -> None:
        """Let the thread look again."""
        with self._bell:
            self._bell.notify()

    def stop(self) -> None:
        """End the thread; takes a second at most."""
        self._stopping = True
        self.wake()
        if self._thread is not None:
            self._thread.join(1.0)

    def _join(self, utterance: Utterance, rows: SpeechRows) -> None:
        if utterance not in self._utterances:
            return
        try:
            utterance.row = rows.join(utterance.manner)
        except Exception as error:
            utterance.tell(error)

    def _run(self) -> None:
        try:
            rows = self.model.rows(kv_bits=self._kv_bits)
            while not self._stopping:
                while self._asked:
                    self._asked.popleft()(rows)
                by_row = {
                    one.row: one for one in tuple(self._utterances) if one.row is not None and one.unsent < UNSENT
                }
                ready = [row for row in rows.ready if row in by_row]
                if not ready:
                    with self._bell:
                        if not self._asked:
                            self._bell.wait(_IDLE)
                    continue
                for row, result in rows.step(ready).items():
                    if isinstance(result, Exception) or result.pcm is not None:
                        by_row[row].unsent += 1
                    by_row[row].tell(result)
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}"
            for utterance in tuple(self._utterances):
                utterance.tell(StateError(f"the text-to-speech model has failed: {self._failure}"))


class SpokenText:
    """A text and the queue of what is spoken of it, for the event loop.

    Parameters
    ----------
    service : SpeechService
    manner : Manner

    Raises
    ------
    StateError
        If all places are taken, or the thread has failed.
    """

    def __init__(self, service: SpeechService, manner: Manner):
        loop = asyncio.get_running_loop()
        self.spoken: asyncio.Queue[Spoken | Exception] = asyncio.Queue()

        def tell(result: Spoken | Exception) -> None:
            try:
                loop.call_soon_threadsafe(self.spoken.put_nowait, result)
            except RuntimeError:  # the loop has ended
                pass

        self.utterance: Utterance = service.begin(manner, tell)
        self.script = service.model.script()

    def feed(self, text: str) -> int:
        """Add words; the ends of ``text`` are ends of words. Returns how many entries there were."""
        entries = [*self.script.feed(text), *self.script.flush()]
        self.utterance.push(entries)
        return len(entries)
