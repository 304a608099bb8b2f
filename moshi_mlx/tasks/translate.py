"""Speech translation: Hibiki hears one language and speaks another while the speaker goes on.

::

    model = moshi_mlx.load("kyutai/hibiki-1b-mlx-bf16")
    translation = model.translate(pcm, sample_rate)     # pcm, text, words

A translation ends when the model says so: after the recording it reads one frame of start codes, in place of the
speaker's, and then the codes of silence, until the end of text comes (moshi ``run_inference.py``). Where it does not
come within :data:`WAIT` seconds the translation is cut there, and says so.

Frame by frame: :meth:`Hibiki.interpret`. Live: a :class:`~moshi_mlx.realtime.Conversation`, whose ``end`` says that the
speaker has finished; :func:`finished` says of its frames whether the model has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from numbers import Real
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..audio import as_mono
from ..config import EOS_ID
from ..engine.generator import GenerationConfig
from ..engine.pipeline import Engine, SessionFrame, generation_defaults
from ..engine.session import Session
from ..engine.text import Word
from ..errors import AudioError, ConfigError
from .dialogue import Moshi

__all__ = ["TRAINED", "WAIT", "Hibiki", "Translation", "ends_text", "finished"]

Pcm = NDArray[np.float32]

WAIT = 20.0
"""Seconds after the end of the speaker's sound within which the model should have said all."""
TRAINED = 120.0
"""Seconds of the longest recordings that the published models were trained on."""
_LONGEST_WAIT = 3600.0


@dataclass(frozen=True)
class Translation:
    """A translated recording.

    Attributes
    ----------
    pcm : array [samples], float32
        The translation as it is spoken; begins with the recording, and ends with the model's end of text.
    sample_rate : int
        Hertz.
    text : str
    words : tuple of Word
        With start and end in seconds of ``pcm``.
    end_frame : int
        Frame in which the model read the end of the recording: its length in frames.
    complete : bool
        Whether the model said that it is done; otherwise the translation was cut.
    early_ends : int
        Ends of text before that of the recording, after which the model went on.
    seconds_computed : float
        Time taken.
    """

    pcm: Pcm
    sample_rate: int
    text: str
    words: tuple[Word, ...]
    end_frame: int
    complete: bool
    early_ends: int
    seconds_computed: float


class Hibiki(Moshi):
    """A loaded translation checkpoint: Hibiki 1B or 2B, or Hibiki-Zero."""

    purpose: ClassVar[str] = "translation"
    command: ClassVar[str] = "translate"

    @property
    def zero(self) -> bool:
        """Whether it is Hibiki-Zero, which takes no conditions, so that there is nothing to guide with.

        Its program (hibiki-zero ``inference.py``) lets the model hear silence first, as many frames as the longest
        delay, and the codec a frame of silence in place of the end.
        """
        lm = self.lm.config
        return not lm.conditioners and lm.positional_embedding == "rope_concat"

    @property
    def engine(self) -> Engine:
        """As :attr:`Moshi.engine`, with Hibiki-Zero's rules where it is that."""
        # The reference's generator does not read the first frame that it is given.
        warm_up = max(self.lm.config.max_delay - 1, 0) if self.zero else 0
        parts = self.config, self.lm, self.codec, self.tokenizer, self.name
        return Engine(*parts, warm_up=warm_up, hears_end=self.zero)

    def guided(self, generation: GenerationConfig | None, cfg: float | None) -> GenerationConfig:
        """Sampling settings with guidance.

        Parameters
        ----------
        generation : GenerationConfig, optional
            Default: the checkpoint's.
        cfg : float, optional
            Classifier-free guidance between the conditions "very_good" and "very_bad": above 1 the voice is more like
            the speaker's (Kyutai suggest 3), at twice the cost. 1: none, the default.

        Raises
        ------
        ConfigError
            If the model takes no conditions, and guidance is asked for.
        """
        generation = generation or generation_defaults(self.config)
        generation = generation if cfg is None else replace(generation, cfg_coef=cfg)
        if generation.cfg_coef != 1.0 and "description" not in self.lm.config.conditioners:
            raise ConfigError(f"{self.name} takes no conditions to guide it with: leave the guidance (cfg) at 1")
        return generation

    def patience(self, seconds: float) -> float:
        """Seconds to wait for the end of the translation of a recording that long, by default.

        Hibiki-Zero's program always goes on to the end of the two minutes that it was trained on.
        """
        return max(WAIT, TRAINED - seconds) if self.zero else WAIT

    def interpret(
        self, session: Session, frames: Iterable[Pcm], *, wait: float | None = None
    ) -> Iterator[tuple[Pcm, SessionFrame]]:
        """Play a speaker's frames to a session, then their end, and silence until the model has said all.

        Parameters
        ----------
        session : Session
        frames : iterable of array [frame_size]
        wait : float, optional
            Seconds of silence at most; by default :meth:`patience`.

        Yields
        ------
        array [frame_size], SessionFrame
            What was heard, zeros after the end, and the answer; finally what is complete only at the end, with empty
            sound. The frame before that is :func:`finished` unless the time was over.

        Raises
        ------
        AudioError
            If ``wait`` is no number of seconds.
        """
        _check_wait(wait)
        count = 0
        for pcm in frames:
            yield pcm, session.step(pcm)
            count += 1
        frame = session.end()
        silence = np.zeros_like(frame.pcm)
        yield silence, frame
        seconds = self.patience(count / self.frame_rate) if wait is None else wait
        for _ in range(round(seconds * self.frame_rate)):
            if finished(frame):
                break
            frame = session.step(silence)
            yield silence, frame
        last = session.finish()
        yield last.pcm, last

    def translate(
        self,
        pcm: ArrayLike,
        sample_rate: float,
        *,
        seed: int = 0,
        generation: GenerationConfig | None = None,
        cfg: float | None = None,
        wait: float | None = None,
        kv_bits: int | None = None,
        on_frame: Callable[[SessionFrame], None] | None = None,
    ) -> Translation:
        """Translate a recording.

        Parameters
        ----------
        pcm : array [samples] or [samples, channels]
            The recording: floats from -1 to 1, or integers (:mod:`moshi_mlx.audio`). Channels are averaged.
        sample_rate : float
            Its rate in hertz; resampled to the model's.
        seed, generation, kv_bits
            As for :meth:`session`.
        cfg : float, optional
            See :meth:`guided`.
        wait : float, optional
            Seconds after the recording within which the model should have ended by itself (default: :meth:`patience`);
            the translation is cut there otherwise.
        on_frame : callable, optional
            Called with every new :class:`SessionFrame`.

        Raises
        ------
        AudioError
            If the samples, their rate or ``wait`` cannot be used.
        ConfigError
            As :meth:`guided`.
        """
        began = time.perf_counter()
        _check_wait(wait)
        generation = self.guided(generation, cfg)
        source, size = as_mono(pcm, sample_rate, self.sample_rate), self.frame_size
        source = np.concatenate([source, np.zeros(-len(source) % size, np.float32)])
        said: list[SessionFrame] = []
        with self.session(seed=seed, generation=generation, kv_bits=kv_bits) as session:
            frames = (source[start : start + size] for start in range(0, len(source), size))
            for _, frame in self.interpret(session, frames, wait=wait):
                said.append(frame)
                if on_frame is not None:
                    on_frame(frame)
        # A delayed voice comes some frames late: without those it begins with the recording, as the words' times do.
        voice = [frame.pcm for frame in said if frame.step is not None and frame.voiced]
        return Translation(
            pcm=np.concatenate([*voice, np.zeros(0, np.float32)]),
            sample_rate=self.sample_rate,
            text="".join(frame.text for frame in said).strip(),
            words=tuple(word for frame in said for word in frame.words),
            end_frame=len(source) // size,
            complete=any(map(finished, said)),
            early_ends=sum(ends_text(frame) and not frame.ended for frame in said),
            seconds_computed=time.perf_counter() - began,
        )


def ends_text(frame: SessionFrame) -> bool:
    """Whether the model's text ends with this frame of its voice; it may do so before the speaker has finished."""
    step = frame.step
    return step is not None and step.aligned_text is not None and int(step.aligned_text[0]) == EOS_ID


def finished(frame: SessionFrame) -> bool:
    """Whether the model has said all: its text ends with this frame, and the speaker's sound has ended."""
    return frame.ended and ends_text(frame)


def _check_wait(seconds: float | None) -> None:
    if seconds is None:
        return
    if not isinstance(seconds, Real) or not 0 <= seconds <= _LONGEST_WAIT:
        raise AudioError(
            f"wait is the time for the end of a translation, from 0 to {_LONGEST_WAIT:g} seconds, "
            f"found {str(seconds)[:60]}"
        )
