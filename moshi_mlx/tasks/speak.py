"""Text to speech: Kyutai's models that read text ahead of its sound.

::

    model = moshi_mlx.load("kyutai/tts-1.6b-en_fr")
    speech = model.speak("Hello there.")           # speech.pcm, speech.sample_rate, speech.words

    with model.speaker() as speaker:                 # while the text is still being written
        for piece in pieces:
            speaker.feed(piece)
            for frame in speaker.frames():
                play(frame.pcm)
        speaker.finish()
        for frame in speaker.frames():
            play(frame.pcm)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..audio import as_mono
from ..checkpoint.voices import VOICES, find_speaker, load_speaker
from ..engine.generator import GenerationConfig
from ..engine.pipeline import Engine, generation_defaults
from ..engine.text import Word
from ..errors import ConfigError, StateError, TextError
from ..layers.conditioning import TensorCondition
from .dialogue import Moshi
from .speaking import GUIDANCE, MAX_SPEAKERS, SAMPLING, Manner, SpeechRows, Spoken, Timing, Voice
from .tts_machine import Entry
from .tts_script import Script

__all__ = ["DEFAULT_VOICE", "Manner", "Speaker", "Speech", "Spoken", "TextToSpeech", "Voice"]

Pcm = NDArray[np.float32]

DEFAULT_VOICE = "expresso/ex03-ex01_happy_001_channel1_334s.wav"
"""The voice of Kyutai's scripts, for models that need one."""
_PREFIX_CUT = 2  # frames at the end of a recording, whose codes have seen the silence after it (moshi ``get_prefix``)


@dataclass(frozen=True)
class Speech:
    """A text, spoken.

    Attributes
    ----------
    pcm : array [samples], float32
    sample_rate : int
        Hertz.
    words : tuple of Word
        With start and end in seconds of ``pcm``. A word's sound begins at its start or a little later.
    seconds_computed : float
    """

    pcm: Pcm
    sample_rate: int
    words: tuple[Word, ...]
    seconds_computed: float


class TextToSpeech(Moshi):
    """A loaded text-to-speech checkpoint."""

    purpose: ClassVar[str] = "text-to-speech"
    command: ClassVar[str] = "speak"

    @property
    def engine(self) -> Engine:
        raise ConfigError(f"{self.name} turns text into speech: it does not converse")

    @property
    def timing(self) -> Timing:
        """Delay, words ahead and padding of the model."""
        return Timing.of(self.config, self.frame_rate)

    @property
    def has_speakers(self) -> bool:
        """Whether its voices are speaker embeddings."""
        return any(config.type == "tensor" for config in self.lm.config.conditioners.values())

    def rows(self, *, kv_bits: int | None = None) -> SpeechRows:
        """Many texts at once, for servers."""
        return SpeechRows(self.stages, self.timing, kv_bits=kv_bits)

    def script(self) -> Script:
        """What turns text into the words of this model."""
        if self.tokenizer is None:
            raise ConfigError(f"{self.name} has no tokenizer: it cannot read")
        return Script(self.tokenizer, self.frame_rate, speakers=self.has_speakers)

    def voice(self, *names: str | os.PathLike[str], source: str = VOICES) -> Voice:
        """Voices by name: of the main speaker, then of the others.

        Parameters
        ----------
        *names : str or path
            Files here or names in ``source``; none: the voice of Kyutai's scripts, if the model needs one.
        source : str
            A repository of voices on the hub, or a folder.

        Raises
        ------
        ConfigError, CheckpointError, DownloadError
            If there is no such voice, or it does not fit the model. Another voice is never taken.
        """
        if not self.has_speakers:
            if names:
                raise ConfigError(
                    f"{self.name} has no voices by name: it continues a recording (voice_of), or has one voice"
                )
            return Voice()
        if len(names) > MAX_SPEAKERS:
            raise ConfigError(f"at most {MAX_SPEAKERS} voices, found {len(names)}")
        identity = self.config.model_id
        ending = f".{identity.get('sig')}@{identity.get('epoch')}.safetensors"
        found = [load_speaker(find_speaker(os.fspath(name), ending, source)) for name in names or (DEFAULT_VOICE,)]
        return self._voice([np.array(one) for one in found])

    def voice_of(self, pcm: ArrayLike, sample_rate: float) -> Voice:
        """The voice of a recording, which the model continues. Parameters as for :func:`moshi_mlx.audio.as_mono`.

        Raises
        ------
        ConfigError
            If the model's voices are speaker embeddings; those cannot be made from a recording.
        AudioError
            If the recording cannot be used.
        """
        if self.has_speakers:
            raise ConfigError(f"{self.name} needs speaker embeddings: name a voice of {VOICES}")
        codes = self._codec.encode(as_mono(pcm, sample_rate, self.sample_rate))
        if codes.shape[1] <= _PREFIX_CUT:
            raise ConfigError(f"a voice needs a recording of more than {_PREFIX_CUT / self.frame_rate:.2f} s")
        return Voice(prefix=np.ascontiguousarray(codes[: self.lm.config.own_q, :-_PREFIX_CUT], np.int32))

    def _voice(self, embeddings: Sequence[NDArray[np.float32]]) -> Voice:
        """Embeddings [frames, dim] in a row of :data:`MAX_SPEAKERS`; the unused places are masked."""
        frames, dim = embeddings[0].shape
        if any(one.shape != (frames, dim) for one in embeddings):
            raise ConfigError(f"voices of one text have equal shapes, found {[one.shape for one in embeddings]}")
        tensor, mask = np.zeros((MAX_SPEAKERS, frames, dim), np.float32), np.zeros((MAX_SPEAKERS, frames), bool)
        tensor[: len(embeddings)], mask[: len(embeddings)] = np.stack(embeddings), True
        return Voice(TensorCondition(tensor.reshape(-1, dim), mask.reshape(-1)))

    def manner(
        self,
        *,
        voice: str | Path | Voice | None = None,
        second_voice: str | Path | None = None,
        padding_bonus: float = 0.0,
        cfg: float | None = GUIDANCE,
        codebooks: int | None = None,
        seed: int = 0,
        generation: GenerationConfig | None = None,
    ) -> Manner:
        """Settings of a text; parameters and errors as for :meth:`speaker`."""
        if isinstance(voice, Voice):
            chosen = voice
        else:
            chosen = self.voice(*(name for name in (voice, second_voice) if name is not None))
        base = generation or self.sampling
        return Manner(chosen, seed, replace(base, padding_bonus=padding_bonus or base.padding_bonus), cfg, codebooks)

    @property
    def sampling(self) -> GenerationConfig:
        """The checkpoint's sampling settings, Kyutai's where it names none."""
        return generation_defaults(self.config, SAMPLING)

    def speaker(
        self,
        *,
        voice: str | Path | Voice | None = None,
        second_voice: str | Path | None = None,
        padding_bonus: float = 0.0,
        cfg: float | None = GUIDANCE,
        codebooks: int | None = None,
        seed: int = 0,
        generation: GenerationConfig | None = None,
        kv_bits: int | None = None,
    ) -> Speaker:
        """Begin a text that comes word by word.

        Parameters
        ----------
        voice, second_voice : str, path or Voice
            Of the main and the other speaker: see :meth:`voice` and :meth:`voice_of`.
        padding_bonus : float
            Speed, from -2 (faster) to 2 (slower).
        cfg : float or None
            Guidance: :class:`Manner`.
        codebooks : int, optional
            Fewer are faster and rougher.
        seed : int
        generation : GenerationConfig, optional
        kv_bits : {None, 8}
            Precision of the cache.

        Raises
        ------
        ConfigError, CheckpointError, DownloadError
            If a setting or a voice does not fit.
        """
        manner = self.manner(
            voice=voice, second_voice=second_voice, padding_bonus=padding_bonus, cfg=cfg, codebooks=codebooks,
            seed=seed, generation=generation,
        )  # fmt: skip
        return Speaker(self.rows(kv_bits=kv_bits), manner, self.script())

    def speak(
        self,
        text: str | Sequence[str],
        *,
        voice: str | Path | Voice | None = None,
        second_voice: str | Path | None = None,
        padding_bonus: float = 0.0,
        cfg: float | None = GUIDANCE,
        codebooks: int | None = None,
        seed: int = 0,
        generation: GenerationConfig | None = None,
        on_frame: Callable[[Spoken], None] | None = None,
    ) -> Speech:
        """Speak a text.

        Parameters
        ----------
        text : str or sequence of str
            A text, or turns of two speakers that alternate; begin with an empty one to let the other speaker begin.
            ``<break time="1.5s"/>`` is a pause.
        voice, second_voice, padding_bonus, cfg, codebooks, seed, generation
            As for :meth:`speaker`.
        on_frame : callable, optional
            Called with every frame.

        Raises
        ------
        TextError
            If there is nothing to say, or a word or a break is too long.
        ConfigError, CheckpointError, DownloadError
            As :meth:`speaker`.
        """
        began = time.perf_counter()
        turns = [text] if isinstance(text, str) else list(text)
        with self.speaker(
            voice=voice, second_voice=second_voice, padding_bonus=padding_bonus, cfg=cfg, codebooks=codebooks,
            seed=seed, generation=generation,
        ) as speaker:  # fmt: skip
            for number, turn in enumerate(turns):
                speaker.turn(number)
                speaker.feed(turn)
            speaker.finish()
            frames: list[Spoken] = []
            for frame in speaker.frames():
                frames.append(frame)
                if on_frame is not None:
                    on_frame(frame)
        sound = [frame.pcm for frame in frames if frame.pcm is not None]
        return Speech(
            pcm=np.concatenate(sound) if sound else np.zeros(0, np.float32),
            sample_rate=self.sample_rate,
            words=tuple(word for frame in frames for word in frame.words),
            seconds_computed=time.perf_counter() - began,
        )


class Speaker:
    """A text that is spoken while it comes. Made by :meth:`TextToSpeech.speaker`.

    Parameters
    ----------
    rows : SpeechRows
        For this text alone.
    manner : Manner
    script : Script
    """

    def __init__(self, rows: SpeechRows, manner: Manner, script: Script):
        self._rows, self._script = rows, script
        self._row: int = rows.join(manner)
        self._said = self._finished = False

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def said(self) -> bool:
        """Whether there has been a word."""
        return self._said

    @property
    def waiting(self) -> int:
        """Words that are still to be read."""
        return 0 if self.over else self._rows.waiting(self._row)

    @property
    def over(self) -> bool:
        """Whether all has been spoken."""
        return self._row not in self._rows.rows

    def feed(self, text: str) -> None:
        """Add text, in pieces of any size: a word is read when white space follows it.

        Raises
        ------
        TextError
            If a word or a break is too long.
        StateError
            After :meth:`finish` or :meth:`close`.
        """
        self._check()
        self._push(self._script.feed(text))

    def turn(self, number: int | None = None) -> None:
        """Begin the other speaker's turn, or turn ``number``: even ones are the main speaker's."""
        self._check()
        self._push(self._script.turn(number))

    def finish(self) -> None:
        """The text is complete.

        Raises
        ------
        TextError
            If it had no words.
        """
        self._check()
        self._push(self._script.flush())
        self._finished = True
        self._rows.finish(self._row)
        if not self._said:
            self.close()
            skipped = self._script.skipped
            raise TextError(
                "there is nothing to say: the text has no words"
                + (f" ({skipped} that are only symbols)" if skipped else "")
            )

    def step(self) -> Spoken | None:
        """The next step; None if it waits for text, or all has been spoken."""
        if self.over or self._row not in self._rows.ready:
            return None
        result = self._rows.step()[self._row]
        if isinstance(result, Exception):
            raise result
        return result

    def frames(self) -> Iterator[Spoken]:
        """All steps that are possible now: until the text so far is used up, after :meth:`finish` until the end."""
        while (spoken := self.step()) is not None:
            yield spoken

    def close(self) -> None:
        """End it; what was not spoken is dropped."""
        self._rows.leave(self._row)

    def _push(self, entries: list[Entry]) -> None:
        self._said = self._said or any(entry.tokens for entry in entries)
        self._rows.push(self._row, entries)

    def _check(self) -> None:
        if self._finished or self.over:
            raise StateError("this text is complete: begin another with model.speaker()")
