"""A loaded checkpoint, and conversations on it: sound in, sound and text out.

::

    model = moshi_mlx.load("small")
    session = model.session(seed=0)
    frame = session.step(pcm)        # 80 ms in; frame.pcm is 80 ms out, frame.text what was said

:class:`Moshi` holds weights only and serves any number of sessions; a :class:`Session` holds everything that changes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .audio import TAIL, as_mono, check_frame, check_tail
from .config import ModelConfig
from .errors import ConfigError, StateError
from .generate import GenerationConfig, Generator, Step
from .lm import Lm
from .sampling import GREEDY, Sampling
from .text import TextTokenizer, Word, WordTracker

if TYPE_CHECKING:
    from .codec import Codec

__all__ = [
    "Moshi",
    "Reply",
    "Session",
    "SessionFrame",
    "TextReader",
    "generation_defaults",
    "make_generator",
]

Pcm = NDArray[np.float32]


@dataclass(frozen=True)
class SessionFrame:
    """What one frame of a conversation produced.

    Attributes
    ----------
    index : int
        Frame number, from 0.
    pcm : array [frame_size], float32
        The model's voice; silence while it has none yet.
    text : str
        What the model began to say in this frame, ready for display; mostly empty.
    words : tuple of Word
        Words that ended in this frame, with start and end in seconds of the model's voice.
    step : Step or None
        Tokens and codes behind it.
    """

    index: int
    pcm: Pcm
    text: str
    words: tuple[Word, ...]
    step: Step | None = None


@dataclass(frozen=True)
class Reply:
    """The answer to a recording.

    Attributes
    ----------
    pcm, user_pcm : array [samples], float32
        The model's voice, and the recording as the model heard it (mono, ``sample_rate``), equally long.
    sample_rate : int
        Hertz.
    text : str
    words : tuple of Word
    frames : int
    seconds_audio, seconds_computed : float
        Length of the sound, and time taken.
    """

    pcm: Pcm
    user_pcm: Pcm
    sample_rate: int
    text: str
    words: tuple[Word, ...]
    frames: int
    seconds_audio: float
    seconds_computed: float


class Moshi:
    """A loaded checkpoint. Made by :func:`moshi_mlx.load`.

    Parameters
    ----------
    config : ModelConfig
    lm : Lm
    codec : Codec or None
        None for text models.
    tokenizer : TextTokenizer or None
    name : str
        What to call it.
    trained : bool
        False if the weights are random: the sound is noise then.
    """

    def __init__(
        self,
        config: ModelConfig,
        lm: Lm,
        codec: Codec | None,
        tokenizer: TextTokenizer | None,
        *,
        name: str = "moshi",
        trained: bool = True,
    ):
        self.config = config
        self.lm = lm
        self.codec = codec
        self.tokenizer = tokenizer
        self.name = name
        self.trained = trained

    @property
    def sample_rate(self) -> int:
        """Samples a second, in and out."""
        return self._codec.sample_rate

    @property
    def frame_size(self) -> int:
        """Samples in one frame."""
        return self._codec.frame_size

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self._codec.frame_rate

    @property
    def description(self) -> str:
        """One line for people."""
        lm, trained = self.lm.config, "" if self.trained else ", untrained: its weights are random"
        return (
            f"{self.name} ({self.config.model_type}, {lm.dim} x {lm.num_layers} layers, "
            f"{lm.own_q} own and {lm.user_q} user codebooks{trained})"
        )

    def session(
        self,
        *,
        seed: int = 0,
        generation: GenerationConfig | None = None,
        conditions: Mapping[str, Any] | None = None,
        null_conditions: Mapping[str, Any] | None = None,
        kv_bits: int | None = None,
    ) -> Session:
        """Begin a conversation.

        Parameters
        ----------
        seed : int
            The same seed, settings and sound give the same answer.
        generation : GenerationConfig, optional
            How tokens are chosen; by default what the checkpoint or the reference says.
        conditions, null_conditions : mapping, optional
            Values for the model's conditioners.
        kv_bits : {None, 8}
            Precision of the cache.
        """
        return Session(self, seed, generation, conditions, null_conditions, kv_bits)

    def reply(
        self,
        pcm: ArrayLike,
        sample_rate: float,
        *,
        seed: int = 0,
        generation: GenerationConfig | None = None,
        conditions: Mapping[str, Any] | None = None,
        tail: float = TAIL,
        on_frame: Callable[[SessionFrame], None] | None = None,
    ) -> Reply:
        """Play a recording to the model and collect what it says.

        Parameters
        ----------
        pcm : array [samples] or [samples, channels]
            The recording: floats from -1 to 1, or integers (:mod:`moshi_mlx.audio`). Channels are averaged.
        sample_rate : float
            Its rate in hertz; resampled to the model's.
        seed, generation, conditions
            As for :meth:`session`.
        tail : float
            Seconds of silence after the recording, in which the answer can end: a model begins to speak when the
            question is over.
        on_frame : callable, optional
            Called with every :class:`SessionFrame` as it comes.

        Raises
        ------
        AudioError
            If the samples, their rate or ``tail`` cannot be used.
        """
        began = time.perf_counter()
        user = as_mono(pcm, sample_rate, self.sample_rate)
        size = self.frame_size
        before, after = self.silence(tail)
        user = np.concatenate([np.zeros(before, np.float32), user, np.zeros(after, np.float32)])
        user = np.concatenate([user, np.zeros(-len(user) % size, np.float32)])
        session = self.session(seed=seed, generation=generation, conditions=conditions)
        voice: list[Pcm] = []
        text: list[str] = []
        words: list[Word] = []

        def take(frame: SessionFrame) -> None:
            if frame.pcm.size:
                voice.append(frame.pcm)
            text.append(frame.text)
            words.extend(frame.words)
            if on_frame is not None:
                on_frame(frame)

        with session:
            for start in range(0, len(user), size):
                take(session.step(user[start : start + size]))
            take(session.finish())
        return Reply(
            pcm=np.concatenate(voice)[before:],
            user_pcm=user[before:],
            sample_rate=self.sample_rate,
            text="".join(text).strip(),
            words=tuple(words),
            frames=len(user) // size,
            seconds_audio=len(user) / self.sample_rate,
            seconds_computed=time.perf_counter() - began,
        )

    def silence(self, tail: float = 0.0) -> tuple[int, int]:
        """Samples of silence to play before and after a recording: what the checkpoint asks for, and ``tail`` seconds.

        Speech-to-text writes a word some time after its sound, so the last one needs that time, and a second to end.

        Raises
        ------
        AudioError
            If ``tail`` is not a number of seconds from 0 to 3,600.
        """
        check_tail(tail)
        stt = self.config.stt_config
        if self.config.model_type == "stt":
            tail = max(tail, float(stt.get("audio_delay_seconds", 0.0)) + 1.0)
        lead = float(stt.get("audio_silence_prefix_seconds", 0.0))
        return round(lead * self.sample_rate), round(tail * self.sample_rate)

    def default_conditions(self) -> dict[str, Any] | None:
        """What the checkpoint's conditioners are set to when nobody says otherwise (as Kyutai's programs do)."""
        conditioners = self.lm.config.conditioners
        if not conditioners:
            return None
        usual = {"description": "very_good", "control": "ok", "cfg": "2.0"}
        return {
            name: usual[name] if usual.get(name) in config.possible_values else None
            for name, config in conditioners.items()
        }

    @property
    def _codec(self) -> Codec:
        if self.codec is None:
            raise ConfigError(f"{self.name} is a text model: it has no codec, so it can neither hear nor speak")
        return self.codec


class Session:
    """One conversation, frame by frame. Made by :meth:`Moshi.session`.

    Belongs to one thread at a time: threads that take turns are fine, two at once are refused. Use it with ``with``, or
    call :meth:`close`.

    Attributes
    ----------
    on_stage : callable or None
        Called for every frame with "encode", "model" and "decode", and when each began and ended
        (:func:`time.monotonic`); for traces.
    """

    def __init__(
        self,
        model: Moshi,
        seed: int,
        generation: GenerationConfig | None,
        conditions: Mapping[str, Any] | None,
        null_conditions: Mapping[str, Any] | None,
        kv_bits: int | None,
    ):
        lm = model.lm.config
        self.model = model
        self._codec = model._codec
        self._generator = make_generator(model, seed, generation, conditions, null_conditions, kv_bits)
        self._encoder = self._codec.encoder() if lm.user_q else None
        self._decoder = self._codec.decoder() if lm.own_q else None
        self._silence = np.zeros(model.frame_size, np.float32)
        self._reader = TextReader(model)
        self._closed = False
        self._frames = 0
        self._busy = threading.Lock()
        self.on_stage: Callable[[str, float, float], object] | None = None
        # Position 0 runs before any sound: what it says is shown with the first frame.
        self._early = self._reader.step(self._generator.first)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def frames(self) -> int:
        """Frames taken so far."""
        return self._frames

    @property
    def generator(self) -> Generator:
        """The tokens' side of the conversation: its state can be inspected, saved and restored."""
        return self._generator

    def step(self, pcm: ArrayLike) -> SessionFrame:
        """Hear one frame, and speak one.

        Parameters
        ----------
        pcm : array [frame_size]
            The user's sound: floats from -1 to 1, or integers (:mod:`moshi_mlx.audio`).

        Returns
        -------
        SessionFrame

        Raises
        ------
        AudioError
            If the frame has another size, or samples that cannot be used.
        StateError
            After :meth:`close`, or while another thread is in this session.
        """
        samples = check_frame(pcm, self.model.frame_size)
        with self._alone():
            if self._closed:
                raise StateError("this session is closed; begin another with model.session()")
            return self._step(samples)

    def _step(self, samples: Pcm) -> SessionFrame:
        marks = [time.monotonic()]
        codes = None if self._encoder is None else self._encoder.encode(samples)
        marks.append(time.monotonic())
        step = self._generator.step(None if codes is None else codes[: self.model.lm.config.user_q])
        marks.append(time.monotonic())
        voice = self._silence
        if self._decoder is not None and step.codes is not None and step.codes.min() >= 0:
            voice = self._decoder.decode(step.codes[0])
        marks.append(time.monotonic())
        if self.on_stage is not None:
            for name, began, ended in zip(("encode", "model", "decode"), marks, marks[1:], strict=False):
                self.on_stage(name, began, ended)
        (early_text, early_words), self._early = self._early, ("", ())
        text, words = self._reader.step(step)
        frame = SessionFrame(self._frames, voice, early_text + text, early_words + words, step)
        self._frames += 1
        return frame

    def finish(self) -> SessionFrame:
        """The last text and words, which only the end completes; its ``pcm`` is empty."""
        with self._alone():
            text, words = self._reader.flush()
        return SessionFrame(self._frames, np.zeros(0, np.float32), text, words)

    def reset(self) -> None:
        """Begin anew, as after :meth:`Moshi.session`."""
        with self._alone():
            first = self._generator.reset()
            for stream in (self._encoder, self._decoder):
                if stream is not None:
                    stream.reset()
            self._reader.reset()
            self._closed = False
            self._frames = 0
            self._early = self._reader.step(first)

    def close(self) -> None:
        """End the conversation; its memory goes with the last reference to it."""
        self._closed = True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else is in the session: two threads at once would mix their frames, or crash MLX."""
        if not self._busy.acquire(blocking=False):
            raise StateError(
                "another thread is in this session: a session belongs to one thread at a time. Give each thread a "
                "session of its own, or let them take turns with a lock"
            )
        try:
            yield
        finally:
            self._busy.release()


def make_generator(
    model: Moshi,
    seed: int = 0,
    generation: GenerationConfig | None = None,
    conditions: Mapping[str, Any] | None = None,
    null_conditions: Mapping[str, Any] | None = None,
    kv_bits: int | None = None,
) -> Generator:
    """The tokens' side of one conversation, with the checkpoint's own settings where none are given.

    Raises
    ------
    ConfigError
        If the model cannot converse.
    """
    if model.config.model_type == "tts":
        raise ConfigError(f"{model.name} turns text into speech: it does not converse")
    if not model.lm.config.n_q:
        raise ConfigError(f"{model.name} is a text model: it does not converse")
    conditions = model.default_conditions() if conditions is None else conditions
    return Generator(
        model.lm,
        generation or generation_defaults(model.config),
        seeds=[seed],
        conditions=None if conditions is None else [conditions],
        null_conditions=None if null_conditions is None else [null_conditions],
        kv_bits=kv_bits,
    )


class TextReader:
    """Text of a conversation: tokens in, display text and timed words out.

    Parameters
    ----------
    model : Moshi
    lead : float, optional
        Seconds of silence that the model hears first, which words are not to be timed by; by default what its
        checkpoint asks for.
    """

    def __init__(self, model: Moshi, lead: float | None = None):
        tokenizer, stt = model.tokenizer, model.config.stt_config
        self._detokenizer = None if tokenizer is None else tokenizer.detokenizer()
        self._tracker = None if tokenizer is None else WordTracker(tokenizer, frame_seconds=1 / model.frame_rate)
        self._delay = model.lm.config.delays[0]
        # Speech-to-text writes a word some time after its sound, which itself comes after the silent prefix.
        prefix = float(stt.get("audio_silence_prefix_seconds", 0.0)) if lead is None else lead
        self._shift = float(stt.get("audio_delay_seconds", 0.0)) + prefix

    def step(self, step: Step) -> tuple[str, tuple[Word, ...]]:
        """Text that a position began to say, and the words that it ended."""
        token = int(step.text[0])
        index = step.index + 1 - self._delay
        if self._detokenizer is None or self._tracker is None or token < 0 or index < 0:
            return "", ()
        return self._detokenizer.step(token), self._shifted(self._tracker.step(index, token))

    def flush(self) -> tuple[str, tuple[Word, ...]]:
        """What only the end completes."""
        if self._detokenizer is None or self._tracker is None:
            return "", ()
        return self._detokenizer.flush(), self._shifted(self._tracker.flush())

    def reset(self) -> None:
        """Begin anew."""
        if self._detokenizer is not None and self._tracker is not None:
            self._detokenizer.reset()
            self._tracker.reset()

    def _shifted(self, words: Sequence[Word]) -> tuple[Word, ...]:
        if not self._shift:
            return tuple(words)
        return tuple(
            replace(word, start=max(word.start - self._shift, 0.0), end=max(word.end - self._shift, 0.0))
            for word in words
        )


def generation_defaults(config: ModelConfig) -> GenerationConfig:
    """What a checkpoint's ``lm_gen_config`` says, over the reference's defaults. Speech-to-text is greedy."""
    base = GenerationConfig()
    if config.model_type == "stt":
        return replace(base, text=GREEDY)
    saved = config.lm_gen_config
    text, audio = base.text, base.audio
    temperature = saved.get("temp_text", saved.get("text_temp"))
    text = Sampling(
        text.temperature if temperature is None else float(temperature), int(saved.get("top_k_text", text.top_k))
    )
    audio = Sampling(float(saved.get("temp", audio.temperature)), int(saved.get("top_k", audio.top_k)))
    return replace(base, text=text, audio=audio)
