"""Speech to text: Kyutai's models that write words down some time after their sound.

::

    model = moshi_mlx.load("kyutai/stt-1b-en_fr-mlx")
    print(model.transcribe(pcm, rate).text)

    with model.listen() as listener:             # as sound comes in
        for heard in listener.feed(pcm):
            print(*(word.text for word in heard.words))

The text stream runs ``audio_delay_seconds`` behind the sound, so a word is known half a second (1B) or two and a half
(2.6B) after it was said. At the end of a turn it need not be waited for: a copy of the conversation hears that much
silence at once, and its words are given right away. The original goes on unchanged, and says the same words again when
their time comes; they are recognised by their times and left out.

These models were trained on a minute or so and fall silent in long streams (delayed-streams-modeling issues 11, 146).
A stream is therefore begun anew, with times going on, in a pause when 60 % of the context is used, or at the latest
shortly before it is full; in that case the last seconds are heard once more, and words that were given are left out.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..audio import as_mono, check_block
from ..engine.batch import Batch
from ..engine.generator import GenerationConfig
from ..engine.pipeline import SessionFrame, Settings
from ..engine.text import Word
from ..errors import AudioError, CodecError, ConfigError, StateError
from .dialogue import Moshi

__all__ = ["Heard", "Listener", "SpeechToText", "Transcription", "advance"]

Pcm = NDArray[np.float32]

PAUSE_HEAD = 2
"""The head that says whether nobody speaks for the next two seconds: the end of a turn for Kyutai's scripts."""
PAUSE = 0.5
"""Probability from which it counts as one."""
_QUIET = 0.01  # RMS of a frame without speech, for models without heads
_QUIET_SECONDS = 0.8
_SOFT, _FULL = 0.6, 0.9  # shares of the context: begin anew in the next pause, or at once
_AGAIN = 25  # frames that are heard twice where there was no pause
_SAME = 2.5  # frames within which two words are the same one
_AT_ONCE = 16  # recordings that go through the model together


@dataclass(frozen=True)
class Heard:
    """The result of one frame.

    Attributes
    ----------
    time : float
        Seconds of sound heard so far.
    text : str
        What the model began to write in this frame; it runs ahead of ``words`` and is never taken back, except that the
        words of a turn's end are written once more.
    words : tuple of Word
        Words that are complete now, with start and end in seconds of the sound.
    pause : float
        Probability of a pause; 0 or 1 where it comes from the sound's level alone.
    turn_ended : bool
        A pause begins; true once for each.
    """

    time: float
    text: str
    words: tuple[Word, ...]
    pause: float
    turn_ended: bool


@dataclass(frozen=True)
class Transcription:
    """The words of a recording.

    Attributes
    ----------
    text : str
    words : tuple of Word
        With start and end in seconds of the recording.
    turns : tuple of float
        Where turns end, in seconds.
    seconds_audio, seconds_computed : float
    """

    text: str
    words: tuple[Word, ...]
    turns: tuple[float, ...]
    seconds_audio: float
    seconds_computed: float


class SpeechToText(Moshi):
    """A loaded speech-to-text checkpoint."""

    purpose: ClassVar[str] = "speech-to-text"
    command: ClassVar[str] = "transcribe"

    @property
    def audio_delay(self) -> float:
        """Seconds by which the text runs behind the sound."""
        return float(self.config.stt_config.get("audio_delay_seconds", 0.0))

    def trailing_silence(self, tail: float) -> int:
        """Samples of silence to play after a recording: ``tail`` seconds, or as many as the last word needs."""
        return max(super().trailing_silence(tail), round((self.audio_delay + 1.0) * self.sample_rate))

    def listen(
        self, *, seed: int = 0, generation: GenerationConfig | None = None, kv_bits: int | None = None
    ) -> Listener:
        """Begin to listen to a stream of any length.

        Parameters
        ----------
        seed, generation, kv_bits
            As for :meth:`session`; these models are greedy by default.
        """
        return Listener(self, Batch(self.engine, kv_bits=kv_bits), Settings(seed, generation))

    def rows(self, *, kv_bits: int | None = None) -> Callable[[], Listener]:
        """A function that begins a stream; all its streams share one batch, for :func:`advance`."""
        batch = Batch(self.engine, kv_bits=kv_bits)
        return lambda: Listener(self, batch, Settings(0, None))

    def transcribe(
        self,
        pcm: ArrayLike,
        sample_rate: float,
        *,
        seed: int = 0,
        generation: GenerationConfig | None = None,
        on_heard: Callable[[Heard], None] | None = None,
    ) -> Transcription:
        """Write down a recording of any length.

        Parameters
        ----------
        pcm : array [samples] or [samples, channels]
            As for :meth:`reply`.
        sample_rate : float
            Its rate in hertz; resampled to the model's.
        seed, generation
            As for :meth:`session`.
        on_heard : callable, optional
            Called with every frame's :class:`Heard`.

        Raises
        ------
        AudioError
            If the samples or their rate cannot be used.
        """
        sound = as_mono(pcm, sample_rate, self.sample_rate)
        frames = _frames(sound, self.frame_size)
        return self.transcribe_all([frames], seed=seed, generation=generation, on_heard=_only(on_heard))[0]

    def transcribe_all(
        self,
        recordings: Iterable[Iterable[Pcm]],
        *,
        seed: int = 0,
        generation: GenerationConfig | None = None,
        at_once: int = _AT_ONCE,
        on_heard: Callable[[int, Heard], None] | None = None,
        kv_bits: int | None = None,
    ) -> list[Transcription]:
        """Write down many recordings, several of them together in one forward pass.

        Parameters
        ----------
        recordings : iterable of iterable of array [frame_size], float32
            Each recording as its frames at the model's rate. They are read as they are needed.
        at_once : int
            How many go through the model together. Each gives what it would give alone, up to rounding.
        on_heard : callable, optional
            Called with the number of the recording and its :class:`Heard`, frame by frame.

        Returns
        -------
        list of Transcription
            In the order of ``recordings``.
        """
        if at_once < 1:
            raise ConfigError(f"at_once must be at least 1, found {at_once}")
        batch, waiting = Batch(self.engine, kv_bits=kv_bits), enumerate(recordings)
        settings = Settings(seed, generation)
        playing: dict[Listener, _Playing] = {}
        try:
            return self._play_all(batch, settings, waiting, playing, at_once, on_heard)
        finally:
            for listener in playing:
                listener.close()

    def _play_all(
        self,
        batch: Batch,
        settings: Settings,
        waiting: Iterator[tuple[int, Iterable[Pcm]]],
        playing: dict[Listener, _Playing],
        at_once: int,
        on_heard: Callable[[int, Heard], None] | None,
    ) -> list[Transcription]:
        found: dict[int, Transcription] = {}
        while True:
            while len(playing) < at_once and (one := next(waiting, None)) is not None:
                playing[Listener(self, batch, settings)] = _Playing(one[0], iter(one[1]))
            if not playing:
                return [found[number] for number in sorted(found)]
            frames = {listener: frame for listener, each in playing.items() if (frame := each.next()) is not None}
            for listener in [listener for listener in playing if listener not in frames]:
                each = playing.pop(listener)
                for heard in listener.finish():
                    each.take(heard, on_heard)
                found[each.number] = each.transcription()
            for listener, heard in advance(frames).items():
                playing[listener].take(heard, on_heard)


class Listener:
    """A stream of sound whose words are written down. Made by :meth:`SpeechToText.listen`.

    Belongs to one thread at a time. Several on one batch are advanced together by :func:`advance`.
    """

    def __init__(self, model: SpeechToText, batch: Batch, settings: Settings):
        self._model, self.batch, self._settings = model, batch, settings
        self._size, self._rate = model.frame_size, model.frame_rate
        self._delay = math.ceil(model.audio_delay * self._rate - 1e-9)
        context = model.lm.config.context
        # Positions of a row until it is left; what is drained and heard again must still fit behind the last one.
        self._soft = max(int(_SOFT * context), 1)
        self._full = max(int(_FULL * context) - self._delay, 2 * _AGAIN, self._soft)
        self._frames = self._base = 0  # frames heard in all, and before the current row began
        self._recent: deque[Pcm] = deque(maxlen=_AGAIN)
        self._rest: Pcm = np.zeros(0, np.float32)
        self._early: list[Word] = []  # given before their time: they come again
        self._late: list[Word] = []  # given lately: they come again where sound is heard twice
        self._given = -math.inf  # start of the last word
        self._speaking = False
        self._ended = -self._delay  # the frame at which the last turn ended
        self._quiet = 0
        self._closed = False
        self._begin()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def time(self) -> float:
        """Seconds of sound heard so far."""
        return self._frames / self._rate

    def close(self) -> None:
        """End the stream and free its row."""
        if not self._closed:
            self._closed = True
            self.batch.leave(self._row)

    def feed(self, pcm: ArrayLike) -> Iterator[Heard]:
        """Hear more sound, of any length.

        Parameters
        ----------
        pcm : array [samples]
            At the model's rate. What does not fill a frame waits for the next call.

        Yields
        ------
        Heard
            One for each whole frame.

        Raises
        ------
        AudioError
            If the samples cannot be used.
        """
        self._rest = np.concatenate([self._rest, check_block(pcm)])
        while len(self._rest) >= self._size:
            frame, self._rest = self._rest[: self._size], self._rest[self._size :]
            yield advance({self: frame})[self]

    def finish(self) -> Iterator[Heard]:
        """The last words, and the end of the stream.

        Yields
        ------
        Heard
            Of what was waiting, and of the silence in which the last words are written.
        """
        if len(self._rest):
            yield from self.feed(np.zeros(self._size - len(self._rest), np.float32))
        words = self._kept(self._drained(self._row, flush=True), again=True)
        ended, self._speaking = self._speaking or bool(words), False
        self.close()
        yield Heard(self.time, "", words, 1.0, ended)

    # What `advance` calls

    @property
    def row(self) -> int:
        """The stream's row of the batch."""
        if self._closed:
            raise StateError("this stream has ended: begin another with model.listen()")
        return self._row

    def take(self, pcm: Pcm, frame: SessionFrame) -> Heard:
        """What follows from a frame and what the model wrote in it."""
        self._frames += 1
        self._recent.append(pcm)
        words = self._kept(self._timed(frame.words), again=False)
        # For the model's delay after a turn, the text is still that turn's.
        self._speaking |= bool(words or frame.text.strip()) and self._frames > self._ended + self._delay
        pause = self._pause(pcm, frame)
        ended = self._speaking and pause > PAUSE
        if ended:
            words += self._end_of_turn()
            self._speaking, self._ended = False, self._frames
        used = self._frames - self._base
        if (used >= self._soft and pause > PAUSE) or used >= self._full:
            words += self._begin_anew(paused=pause > PAUSE)
        return Heard(self.time, frame.text, words, pause, ended)

    def _begin(self) -> None:
        self._row = self.batch.join(self._settings)
        self.batch.open(self._row)

    def _pause(self, pcm: Pcm, frame: SessionFrame) -> float:
        """Probability of a pause; from the level of the sound where the model has no heads for it."""
        heads = None if frame.step is None else frame.step.heads
        if heads is not None and heads.shape[1] > PAUSE_HEAD:
            return float(heads[0, PAUSE_HEAD, 0])
        quiet = float(np.sqrt(np.mean(np.square(pcm)))) < _QUIET
        self._quiet = self._quiet + 1 if quiet else 0
        return float(self._quiet >= _QUIET_SECONDS * self._rate)

    def _end_of_turn(self) -> tuple[Word, ...]:
        """The words of the delay, from a copy that hears silence; nothing where the codec cannot be copied."""
        try:
            copy = self.batch.join(snapshot=self.batch.snapshot(self._row))
        except CodecError:
            return ()
        words = self._kept(self._drained(copy, flush=True), again=True)
        self.batch.leave(copy)
        return words

    def _begin_anew(self, paused: bool) -> tuple[Word, ...]:
        """Take the words that are still to come from the old row, and go on with another."""
        drained = self._drained(self._row, flush=True)
        again = [] if paused else list(self._recent)
        if again:  # a word that was cut off is heard whole the second time; what was given comes again
            drained = [word for word in drained if word.end < self.time - 2 / self._rate]
            self._early += [word for word in self._late if word not in self._early]
        words = self._kept(drained, again=True)
        self.batch.leave(self._row)
        self._begin()
        self._base = self._frames - len(again)
        for pcm in again:
            frame = _checked(self.batch.step({self._row: pcm})[self._row])
            words += self._kept(self._timed(frame.words), again=True)
        return words

    def _drained(self, row: int, flush: bool) -> list[Word]:
        """What a row writes in the silence of the model's delay. Words that begin in that silence are invented."""
        silence, words = np.zeros(self._size, np.float32), list[Word]()
        for _ in range(self._delay + 2):
            words += self._timed(_checked(self.batch.step({row: silence})[row]).words)
        if flush:
            words += self._timed(self.batch.flush(row)[1])
        return [replace(word, end=min(word.end, self.time)) for word in words if word.start < self.time]

    def _timed(self, words: Sequence[Word]) -> list[Word]:
        """Words of a row in seconds of the whole stream."""
        base = self._base / self._rate
        return [replace(word, start=word.start + base, end=word.end + base) for word in words]

    def _kept(self, words: Sequence[Word], *, again: bool) -> tuple[Word, ...]:
        """The words that were not given before. ``again``: they may come once more, in their time."""
        same, kept = _SAME / self._rate, list[Word]()
        for word in words:
            known = next((early for early in self._early if abs(early.start - word.start) <= same), None)
            if known is not None:
                if not again:
                    self._early.remove(known)
                continue
            if word.start <= self._given - same:
                continue  # heard twice
            word = replace(word, start=max(word.start, self._given), end=max(word.end, word.start))
            self._given = word.start
            kept.append(word)
        self._early = [early for early in self._early if early.start > self.time - 2 * self._delay / self._rate - 2]
        if again:
            self._early += kept
        self._late = [late for late in self._late + kept if late.start > self.time - (_AGAIN + _SAME) / self._rate]
        return tuple(kept)


def advance(frames: Mapping[Listener, Pcm]) -> dict[Listener, Heard]:
    """Let listeners of one batch hear a frame each, in one forward pass.

    Parameters
    ----------
    frames : mapping of Listener to array [frame_size], float32

    Raises
    ------
    MoshiError
        If one of them failed; it has ended then.
    """
    if not frames:
        return {}
    batches = {id(listener.batch): listener.batch for listener in frames}
    if len(batches) != 1:
        raise StateError(f"these listeners are on {len(batches)} batches: advance those of one together")
    (batch,) = batches.values()
    answers = batch.step({listener.row: pcm for listener, pcm in frames.items()})
    return {listener: listener.take(pcm, _checked(answers[listener.row])) for listener, pcm in frames.items()}


class _Playing:
    """A recording that is being heard, and what was written."""

    def __init__(self, number: int, frames: Iterator[Pcm]):
        self.number, self._frames = number, frames
        self._heard = 0.0
        self._words: list[Word] = []
        self._turns: list[float] = []
        self._began = time.perf_counter()

    def next(self) -> Pcm | None:
        return next(self._frames, None)

    def take(self, heard: Heard, on_heard: Callable[[int, Heard], None] | None) -> None:
        self._words += heard.words
        self._heard = heard.time
        if heard.turn_ended:
            self._turns.append(heard.time)
        if on_heard is not None:
            on_heard(self.number, heard)

    def transcription(self) -> Transcription:
        words = tuple(sorted(self._words, key=lambda word: word.start))
        text = " ".join(word.text.strip() for word in words)
        return Transcription(text, words, tuple(self._turns), self._heard, time.perf_counter() - self._began)


def _frames(sound: Pcm, size: int) -> Iterator[Pcm]:
    if not len(sound):
        raise AudioError("there are no samples to transcribe")
    padded = np.concatenate([sound, np.zeros(-len(sound) % size, np.float32)])
    yield from padded.reshape(-1, size)


def _only(on_heard: Callable[[Heard], None] | None) -> Callable[[int, Heard], None] | None:
    return None if on_heard is None else lambda _, heard: on_heard(heard)


def _checked(answer: SessionFrame | Exception) -> SessionFrame:
    if isinstance(answer, Exception):
        raise answer
    return answer
