"""Dialogue: a loaded checkpoint and conversations on it, sound in, sound and text out.

::

    model = moshi_mlx.load("small")
    session = model.session(seed=0)
    frame = session.step(pcm)        # 80 ms in; frame.pcm is 80 ms out, frame.text what was said

:class:`Moshi` holds weights only and serves any number of sessions; a :class:`Session` holds everything that changes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..audio import TAIL, as_mono, check_tail
from ..config import ModelConfig
from ..engine.generator import GenerationConfig
from ..engine.pipeline import Engine, Opening, SessionFrame, Settings, generation_defaults
from ..engine.session import Session, play
from ..engine.text import TextTokenizer, Word
from ..errors import ConfigError
from ..models.lm import Lm

if TYPE_CHECKING:
    from ..codec.base import Codec

__all__ = ["Moshi", "Reply", "Session", "SessionFrame", "generation_defaults"]

Pcm = NDArray[np.float32]


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
        The model's name.
    trained : bool
        False if the weights are random, so that the sound is noise.
    source : str
        Where it was loaded from; empty if from nowhere.

    Attributes
    ----------
    purpose : str
        What the model is for.
    command : str
        The program's command for it.
    takes_role : bool
        Whether a conversation can begin with a role and a voice.
    """

    purpose: ClassVar[str] = "dialogue"
    command: ClassVar[str] = "talk"
    takes_role: ClassVar[bool] = False

    def __init__(
        self,
        config: ModelConfig,
        lm: Lm,
        codec: Codec | None,
        tokenizer: TextTokenizer | None,
        *,
        name: str = "moshi",
        trained: bool = True,
        source: str = "",
    ):
        self.config = config
        self.lm = lm
        self.codec = codec
        self.tokenizer = tokenizer
        self.name = name
        self.trained = trained
        self.source = source

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
        """A one-line description."""
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
        role: str | None = None,
        voice: str | os.PathLike[str] | None = None,
        pin: bool = True,
        on_opening: Callable[[int, int], object] | None = None,
    ) -> Session:
        """Begin a conversation.

        Parameters
        ----------
        seed : int
            The same seed, settings and sound give the same answer.
        generation : GenerationConfig, optional
            Sampling settings; defaults come from the checkpoint or the reference.
        conditions, null_conditions : mapping, optional
            Values for the model's conditioners.
        kv_bits : {None, 8}
            Precision of the cache.
        role, voice, pin
            As for :meth:`opening`.
        on_opening : callable, optional
            Told, after each of the steps before the first frame, how many there were, and how many there are.
        """
        opening = self.opening(role, voice, pin=pin)
        settings = Settings(seed, generation, conditions, null_conditions, opening)
        return Session(self.engine, settings, kv_bits=kv_bits, on_opening=on_opening)

    def opening(
        self, role: str | None = None, voice: str | os.PathLike[str] | None = None, *, pin: bool = True
    ) -> Opening | None:
        """What a conversation begins with, for :class:`~moshi_mlx.engine.pipeline.Settings`: None for this model.

        Raises
        ------
        ConfigError
            If a role or a voice is given: only PersonaPlex takes them.
        """
        for what, given in (("role", role), ("voice", voice)):
            if given:
                raise ConfigError(
                    f"this model takes no {what}: {self.name} is a model for {self.purpose} without prompts. Load "
                    "PersonaPlex (nvidia/personaplex-7b-v1) for it, or leave it out"
                )
        return None

    def voices(self) -> list[str]:
        """Names of the voices that come with the model; empty if none do."""
        return []

    @property
    def default_role(self) -> str:
        """The role of a conversation that is given none; empty if there is none."""
        return ""

    @property
    def engine(self) -> Engine:
        """The engine of the model: for many conversations together, and for threads.

        Raises
        ------
        ConfigError
            If the model cannot converse.
        """
        return self.stages

    @property
    def stages(self) -> Engine:
        """The stages of a frame, whatever the model is for: :attr:`engine` is for conversations.

        Raises
        ------
        ConfigError
            If it is a text model.
        """
        return Engine(self.config, self.lm, self.codec, self.tokenizer, self.name)

    def reply(
        self,
        pcm: ArrayLike,
        sample_rate: float,
        *,
        seed: int = 0,
        generation: GenerationConfig | None = None,
        conditions: Mapping[str, Any] | None = None,
        role: str | None = None,
        voice: str | os.PathLike[str] | None = None,
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
        seed, generation, conditions, role, voice
            As for :meth:`session`.
        tail : float
            Seconds of silence after the recording, so that the answer can end: a model begins to speak when the
            question is over.
        on_frame : callable, optional
            Called with every new :class:`SessionFrame`.

        Raises
        ------
        AudioError
            If the samples, their rate or ``tail`` cannot be used.
        """
        began = time.perf_counter()
        user, size = as_mono(pcm, sample_rate, self.sample_rate), self.frame_size
        user = np.concatenate([user, np.zeros(self.trailing_silence(tail), np.float32)])
        user = np.concatenate([user, np.zeros(-len(user) % size, np.float32)])
        said: list[SessionFrame] = []
        with self.session(seed=seed, generation=generation, conditions=conditions, role=role, voice=voice) as session:
            for _, frame in play(session, (user[start : start + size] for start in range(0, len(user), size))):
                said.append(frame)
                if on_frame is not None:
                    on_frame(frame)
        return Reply(
            pcm=np.concatenate([frame.pcm for frame in said]),
            user_pcm=user,
            sample_rate=self.sample_rate,
            text="".join(frame.text for frame in said).strip(),
            words=tuple(word for frame in said for word in frame.words),
            frames=len(user) // size,
            seconds_audio=len(user) / self.sample_rate,
            seconds_computed=time.perf_counter() - began,
        )

    def trailing_silence(self, tail: float) -> int:
        """Samples of silence to play after a recording: ``tail`` seconds, or as many as the model needs.

        Raises
        ------
        AudioError
            If ``tail`` is not a number of seconds from 0 to 3,600.
        """
        check_tail(tail)
        return round(tail * self.sample_rate)

    @property
    def _codec(self) -> Codec:
        if self.codec is None:
            raise ConfigError(f"{self.name} is a text model: it has no codec, so it can neither hear nor speak")
        return self.codec
