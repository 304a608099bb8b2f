"""Dialogue in a role: PersonaPlex, a Moshi with a voice and a role given by prompts.

A conversation begins with prompts, which are opening steps (:class:`~moshi_mlx.engine.pipeline.Opening`): the voice,
half a second of silence, the role with one token a frame, silence again, and one position in which the model chooses
for the first time. Own codes and text are forced, and the user's side is a sine tone (NVIDIA/personaplex,
``moshi/models/lm.py``; tests/test_personaplex.py compares where each token goes with that code).

A voice is a recording, whose codes are forced, or a file with the summed embeddings that it gave and the tokens that
follow them, which needs no codec and no encoder to be replayed.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import ClassVar

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..audio import as_mono
from ..checkpoint.resolve import resolve
from ..checkpoint.voices import VoicePrompt, list_voices, load_voice_prompt
from ..config import PAD_ID, UNGENERATED, LmConfig
from ..engine.pipeline import Engine, Opening
from ..errors import AudioError, CheckpointError, ConfigError, DownloadError
from ..loudness import at_loudness
from .dialogue import Moshi

__all__ = ["DEFAULT_ROLE", "PersonaPlex", "make_opening", "wrap_role"]

Ints = NDArray[np.int32]

DEFAULT_ROLE = "You are a wise and friendly teacher. Answer questions or provide advice in a clear and engaging way."
"""The role of NVIDIA's programs where none is given."""
ARCHIVE = "voices.tgz"
DEFAULT_VOICE = "NATF0"
LOUDNESS = -24.0
"""LUFS of a recording that gives a voice."""
LONGEST_VOICE = 30.0
"""Seconds; the published voices have four."""
_SILENT_SECONDS = 0.5
# Codes of a frame of silence, and of a sine of 440 Hz and amplitude 0.5, with the published codec.
_SILENCE = (948, 243, 1178, 546, 1736, 1030, 1978, 2008)
_SINE = (430, 1268, 381, 1611, 1095, 1495, 56, 472)
_TAG = "<system>"


def wrap_role(text: str) -> str:
    """A role as the model was trained to read it: between two ``<system>``; empty if there is none."""
    text = text.strip()
    if not text or (text.startswith(_TAG) and text.endswith(_TAG)):
        return text
    return f"{_TAG} {text} {_TAG}"


def make_opening(
    lm: LmConfig, voice: VoicePrompt | Ints | None, role: list[int], silence: Ints, sine: Ints, pause: int, pin: bool
) -> Opening:
    """The prompts as positions.

    Parameters
    ----------
    lm : LmConfig
    voice : VoicePrompt, or array [frames, own_q], or None
        Of a recording's codes the first frame is left out, as in NVIDIA's generator.
    role : list of int
    silence : array [own_q], int32
    sine : array [user_q], int32
    pause : int
        Frames of silence before and after the role.
    pin : bool
        Whether the prompts stay in view beyond the context.

    Raises
    ------
    CheckpointError
        If the voice is of another model.
    ConfigError
        If the prompts take more than half of the context.
    """
    embedded = np.zeros((0, lm.dim), np.float32)
    if isinstance(voice, VoicePrompt):
        embedded = np.array(voice.embeddings.astype(mx.float32))
        spoken = np.tile(silence, (len(embedded), 1))
    else:
        spoken = np.zeros((0, lm.own_q), np.int32) if voice is None else voice[1:]
    text = np.array([*[PAD_ID] * (len(spoken) + pause), *role, *[PAD_ID] * pause, UNGENERATED], np.int32)
    count = len(text)
    if count > lm.context // 2:
        raise ConfigError(
            f"the prompts take {count} positions ({len(spoken)} for the voice, {len(role)} for the role), and half of "
            f"the model's {lm.context} must be left for the conversation: shorten the role"
        )
    own = np.full((count, lm.own_q), UNGENERATED, np.int32)
    own[: len(spoken)] = spoken
    own[len(spoken) : count - 1] = silence
    user = np.tile(sine, (count, 1)).astype(np.int32)
    user[0] = UNGENERATED
    if isinstance(voice, VoicePrompt):
        _follow(lm, voice, len(embedded), text, own, user)
    return Opening(text, own, user, embedded, count if pin else 0)


def _follow(lm: LmConfig, voice: VoicePrompt, count: int, text: Ints, own: Ints, user: Ints) -> None:
    """Put the tokens that a saved voice holds where the positions behind its embeddings read them.

    Column c of its ring is what position c reads: of a stream delayed by d, the token with index c - 1 - d. It holds
    column ``count``, and for delayed streams those until ``count + d``.
    """
    cache, delays = np.array(voice.cache), lm.delays
    slots = max(delays) + 3
    highest = np.array([lm.text_card] + [lm.card] * lm.n_q)
    if cache.shape != (lm.num_streams, slots) or voice.embeddings.shape[1] != lm.dim or not count:
        raise CheckpointError(
            f"this voice is of another model: it has embeddings {list(voice.embeddings.shape)} and tokens "
            f"{list(cache.shape)}, and this model needs [frames, {lm.dim}] and {[lm.num_streams, slots]}"
        )
    if not np.isfinite(np.array(voice.embeddings.astype(mx.float32))).all():
        raise CheckpointError("this voice is damaged: its embeddings are not finite numbers")
    for stream, delay in enumerate(delays):
        for column in range(count, count + delay + 1):
            index, token = column - 1 - delay, int(cache[stream, column % slots])
            if not -1 <= token <= highest[stream]:
                raise CheckpointError(f"this voice is of another model: it has the token {token}")
            if index < 0:
                continue
            if not stream:
                text[index] = token
            elif stream <= lm.own_q:
                own[index, stream - 1] = token
            else:
                user[index + 1, stream - 1 - lm.own_q] = token


class PersonaPlex(Moshi):
    """A loaded PersonaPlex checkpoint."""

    purpose: ClassVar[str] = "dialogue"
    command: ClassVar[str] = "talk"
    takes_role: ClassVar[bool] = True

    @property
    def engine(self) -> Engine:
        return Engine(self.config, self.lm, self.codec, self.tokenizer, self.name, pinning=self.lm.sharding is None)

    @property
    def default_role(self) -> str:
        return DEFAULT_ROLE

    def voices(self) -> list[str]:
        """Names of the voices that come with the model; empty if none do."""
        archive = self._archive()
        return [] if archive is None else list_voices(archive)

    def opening(
        self, role: str | None = None, voice: str | os.PathLike[str] | None = None, *, pin: bool = True
    ) -> Opening | None:
        """Prompts of a conversation; see :meth:`Moshi.opening`.

        Parameters
        ----------
        role : str, optional
            What the model is told before the conversation; default: that of NVIDIA's programs; empty: nothing.
        voice : str or path, optional
            A voice that comes with the model (``NATF0``), a file that :meth:`save_voice` or NVIDIA's program wrote, or
            a recording. Default: the first voice that comes with the model, if there are any; empty: none.
        pin : bool
            Whether the prompts stay in view when the conversation is longer than the model's context.

        Raises
        ------
        ConfigError
            If there is no such voice, or the role is too long.
        CheckpointError
            If the voice is of another model, or damaged.
        AudioError
            If a recording cannot be used.
        """
        assert self.tokenizer is not None
        ids = self.tokenizer.encode(wrap_role(DEFAULT_ROLE if role is None else role))
        lm = self.lm.config
        silence, sine = self._frame_codes()
        pause = int(_SILENT_SECONDS * self.frame_rate)
        return make_opening(lm, self._find_voice(voice), ids, silence, sine, pause, pin and self.lm.sharding is None)

    def save_voice(self, pcm: ArrayLike, sample_rate: float, path: str | os.PathLike[str]) -> int:
        """Write a recording's voice as a file of embeddings (``.safetensors`` or ``.pt``).

        Parameters
        ----------
        pcm : array [samples] or [samples, channels]
            Of several channels the first is heard.
        sample_rate : float
            Hertz.
        path : path

        Returns
        -------
        int
            Frames of the voice.

        Raises
        ------
        AudioError
            If the recording is too short, too long, silent or damaged.
        CheckpointError
            If the file cannot be written.
        """
        from ..checkpoint.readers import write_safetensors

        target = Path(path)
        if target.suffix not in (".pt", ".safetensors"):
            raise ConfigError(f"{target}: a voice is a file .safetensors or .pt")
        voice = self.encode_voice(pcm, sample_rate)
        saved = self._as_prompt(voice)
        tensors = {"embeddings": saved.embeddings[:, None, None], "cache": saved.cache[None]}
        if target.suffix == ".pt":
            from ..checkpoint.pickled import write_torch_tensors

            write_torch_tensors(target, tensors)
        else:
            write_safetensors(target, tensors)
        return len(voice)

    def encode_voice(self, pcm: ArrayLike, sample_rate: float) -> Ints:
        """Codes [frames, own_q] of a recording, levelled as PersonaPlex's voices are; the last frame is padded."""
        sound = np.asarray(pcm)
        if sound.ndim == 2:
            sound = sound[:, 0]
        samples, size = as_mono(sound, sample_rate, self.sample_rate), self.frame_size
        seconds = len(samples) / self.sample_rate
        if seconds > LONGEST_VOICE:
            raise AudioError(f"a voice needs a few seconds, {LONGEST_VOICE:g} at most, found {seconds:.1f}: cut it")
        samples = at_loudness(samples, self.sample_rate, LOUDNESS)
        samples = np.concatenate([samples, np.zeros(-len(samples) % size, np.float32)])
        stream = self._codec.encoder()
        frames = [stream.encode(samples[start : start + size]) for start in range(0, len(samples), size)]
        codes: Ints = np.stack(frames)[:, : self.lm.config.own_q].astype(np.int32)
        if len(codes) < 2:
            raise AudioError("a voice needs two frames of sound at least")
        return codes

    def _as_prompt(self, codes: Ints) -> VoicePrompt:
        """What replays codes: embeddings of the positions that read them, and the tokens that follow."""
        lm = self.lm.config
        delays = np.array(lm.delays)
        count, slots = len(codes) - 1, max(lm.delays) + 3
        _, sine = self._frame_codes()
        starts = np.array([lm.text_start_id] + [lm.audio_start_id] * lm.n_q)
        columns = np.full((lm.num_streams, count + max(lm.delays) + 1), UNGENERATED, np.int64)
        for column in range(columns.shape[1]):
            index = column - 1 - delays
            for stream in range(lm.num_streams):
                if column <= delays[stream]:
                    columns[stream, column] = starts[stream]
                elif index[stream] < count:
                    frame = index[stream]
                    own = 0 < stream <= lm.own_q
                    columns[stream, column] = (
                        PAD_ID if not stream else codes[frame + 1, stream - 1] if own else sine[stream - 1 - lm.own_q]
                    )
        vectors = self.lm.embed(mx.array(columns[None, :, :count].astype(np.int32)))[0]
        cache = np.full((lm.num_streams, slots), UNGENERATED, np.int64)
        for column in range(max(0, columns.shape[1] - slots), columns.shape[1]):
            cache[:, column % slots] = columns[:, column]
        return VoicePrompt(vectors, mx.array(cache))

    def _find_voice(self, voice: str | os.PathLike[str] | None) -> VoicePrompt | Ints | None:
        name = "" if voice is None else os.fspath(voice)
        if voice is not None and not name:
            return None
        if name and (os.path.exists(name) or os.sep in name):
            return self._read_voice(Path(name))
        archive = self._archive()
        if voice is None:
            if archive is None:
                return None
            names = list_voices(archive)
            name = DEFAULT_VOICE if DEFAULT_VOICE in names else names[0] if names else ""
            return load_voice_prompt(archive, name) if name else None
        plain = name.removesuffix(".pt")
        names = [] if archive is None else list_voices(archive)
        if archive is None or plain not in names:
            raise ConfigError(f"there is no voice {name[:60]!r} here: {_choice(names)}")
        return load_voice_prompt(archive, plain)

    def _read_voice(self, path: Path) -> VoicePrompt | Ints:
        if path.suffix in (".pt", ".safetensors"):
            return load_voice_prompt(path)
        import soundfile

        try:
            pcm, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
        except (OSError, RuntimeError) as error:
            raise AudioError(f"{path} is no voice: neither a recording that can be read nor a .pt file") from error
        return self.encode_voice(pcm, rate)

    def _archive(self) -> Path | None:
        if not self.source:
            return None
        try:
            return resolve(self.source, extras=(ARCHIVE,)).extras[ARCHIVE]
        except (CheckpointError, DownloadError):
            return None

    def _frame_codes(self) -> tuple[Ints, Ints]:
        """Codes of a frame of silence [own_q], and of the sine that stands for the user [user_q]."""
        lm = self.lm.config
        if (lm.card, lm.own_q, lm.user_q) == (2048, 8, 8):
            return np.array(_SILENCE, np.int32), np.array(_SINE, np.int32)
        times = np.arange(self.frame_size) / self.sample_rate
        sine = (0.5 * np.sin(2 * math.pi * 440 * times)).astype(np.float32)
        found = [self._codec.encoder().encode(sound) for sound in (np.zeros_like(sine), sine)]
        return found[0][: lm.own_q].astype(np.int32), found[1][: lm.user_q].astype(np.int32)


def _choice(names: list[str]) -> str:
    if not names:
        return "this model comes without voices; name a file: a recording, or what moshi-mlx-local voice wrote"
    return f"it has {', '.join(names)}; or name a file"
