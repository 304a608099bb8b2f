"""What quantizing does to a model's outputs, measured against the source on calibration tokens.

All tokens are given (teacher forcing), so both models see the same past. The divergence of a frame is the sum of the
Kullback-Leibler divergences of its text token and its codes: by the chain rule that is the divergence of the whole
frame's distribution. Reference: Kullback & Leibler 1951; in nats.

Models are evaluated with weights that were quantized and expanded again, which is what the saved file computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moshi_mlx.audio import as_mono
from moshi_mlx.checkpoint.quantization import FLOATS, Quantization
from moshi_mlx.checkpoint.resolve import CheckpointFiles
from moshi_mlx.config import ModelConfig
from moshi_mlx.engine.generator import GenerationConfig, Generator
from moshi_mlx.engine.text import SILENT_IDS
from moshi_mlx.errors import AudioError, CheckpointError, ConfigError
from moshi_mlx.loading import load_codec
from moshi_mlx.models.lm import Lm
from moshi_mlx.models.sampling import GREEDY
from moshi_mlx.printable import printable

from ..plan.recipes import Plan
from ..source import Source, any_conditions
from ..write.convert import dequantize, quantize

__all__ = [
    "Calibration",
    "Cost",
    "Outputs",
    "Recording",
    "Subject",
    "calibrate",
    "codes_of",
    "compare",
    "make_subject",
    "read_recording",
    "same_text",
]

Ints = NDArray[np.int32]

SAME_FRAMES = 12
"""About a second: what is said so much sooner or later counts as the same."""


@dataclass(frozen=True)
class Cost:
    """How far outputs are from the source's.

    Attributes
    ----------
    text_kl, audio_kl : float
        Mean divergence of a text token, and of a code, in nats.
    frame_kl : float
        Of a whole frame: the text token and all codes.
    text_top1, audio_top1 : float
        How often the likeliest token is the same.
    """

    text_kl: float
    audio_kl: float
    frame_kl: float
    text_top1: float
    audio_top1: float


@dataclass(frozen=True)
class Calibration:
    """Tokens to measure on.

    Attributes
    ----------
    tokens : array [1, streams, frames], int32
        Text, own codes, user codes, not delayed.
    user : array [frames, user_q], int32
        What the user said.
    """

    tokens: Ints
    user: Ints


@dataclass(frozen=True)
class Outputs:
    """Log-probabilities where the model predicts something: text [n, words] and audio [m, card], float32."""

    text: mx.array
    audio: mx.array
    codebooks: int


class Subject:
    """A dense model in memory whose modules can be replaced by their quantized selves and put back.

    Parameters
    ----------
    lm : Lm
        Dense.
    stored : mx.Dtype
        The type in which weights are rounded and scales are kept when the checkpoint is written.
    """

    def __init__(self, lm: Lm, stored: mx.Dtype):
        self.lm = lm
        self.stored = stored
        self._modules: dict[str, Any] = dict(lm.named_modules())
        self._weights: dict[str, mx.array] = {}
        self._applied: dict[str, tuple[Quantization, bool]] = {}
        self.conditions = any_conditions(lm.config)

    def apply(
        self,
        choices: Mapping[str, Quantization | None],
        tuned: Mapping[str, Mapping[str, mx.array]] | None = None,
    ) -> None:
        """Quantize these modules, some perhaps to given parts; all others get their own weights back."""
        tuned = tuned or {}
        for name in [name for name in self._weights if choices.get(name) is None]:
            self._modules[name].weight = self._weights.pop(name)
            del self._applied[name]
        for name, q in choices.items():
            if q is None or (self._applied.get(name) == (q, False) and name not in tuned):
                continue
            module = self._modules[name]
            exact = self._weights.setdefault(name, module.weight)
            dense = dequantize(tuned[name] if name in tuned else quantize(exact.astype(self.stored), q), q)
            module.weight = dense.astype(exact.dtype)
            mx.eval(module.weight)
            self._applied[name] = (q, name in tuned)

    def outputs(self, calibration: Calibration) -> Outputs:
        """The model's predictions on calibration tokens."""
        lm = self.lm
        out = lm(mx.array(calibration.tokens), lm.condition(self.conditions))
        text = _chosen(out.text_logits, out.text_mask)
        return Outputs(text, _chosen(out.logits, out.mask), lm.config.dep_q)


def _chosen(logits: mx.array, mask: mx.array) -> mx.array:
    """Log-probabilities [n, card] at the positions of the mask."""
    rows = np.flatnonzero(np.array(mask).reshape(-1))
    if not rows.size:
        return mx.zeros((0, logits.shape[-1]))
    flat = logits.reshape(-1, logits.shape[-1])[mx.array(rows)].astype(mx.float32)
    result = flat - mx.logsumexp(flat, axis=-1, keepdims=True)
    mx.eval(result)
    return result


def make_subject(source: Source) -> Subject:
    """The whole model in memory, dense: float32 on a CPU, the source's type elsewhere."""
    dtype = mx.float32 if mx.default_device() == mx.cpu else source.dtype
    lm = Lm(source.config.lm)
    params: dict[str, mx.array] = {}
    for name, value in source.tensors.items():
        module, _, leaf = name.rpartition(".")
        if module in source.quantized and leaf in ("scales", "biases"):
            continue
        if module in source.quantized and leaf == "weight":
            value = dequantize(source.parts(module), source.quantized[module])
        keep = name.startswith("condition_provider.") or value.dtype not in FLOATS
        params[name] = value.astype(mx.float32) if keep else value.astype(dtype)
    lm.load_weights(list(params.items()), strict=True)
    lm.eval()
    mx.eval(lm.parameters())
    return Subject(lm, source.dtype)


def compare(reference: Outputs, other: Outputs) -> Cost:
    """The cost of ``other`` against the source's outputs."""
    text_kl, text_same = _divergence(reference.text, other.text)
    audio_kl, audio_same = _divergence(reference.audio, other.audio)
    return Cost(text_kl, audio_kl, text_kl + reference.codebooks * audio_kl, text_same, audio_same)


def _divergence(p: mx.array, q: mx.array) -> tuple[float, float]:
    """Mean KL(p || q) of log-probabilities [n, card], and how often both have the same first choice."""
    if not p.size:
        return 0.0, 1.0
    kl = (mx.exp(p) * (p - q)).sum(axis=-1).mean()
    same = (mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)).mean()
    mx.eval(kl, same)
    return max(0.0, float(kl)), float(same)


# -------------------------------------------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Recording:
    """What the user says.

    Attributes
    ----------
    pcm : array [samples], float32
    rate : int
    origin : str
        Where it comes from, for the report.
    """

    pcm: NDArray[np.float32]
    rate: int
    origin: str


def read_recording(path: Path | None, seconds: float) -> Recording:
    """The beginning of a recording, by default of the recorded questions.

    Raises
    ------
    AudioError
        If it cannot be read.
    """
    import soundfile

    if path is None:
        with as_file(files("moshi_mlx") / "assets" / "questions.wav") as questions:
            return replace(read_recording(questions, seconds), origin="the recorded questions")
    if not path.is_file():
        raise AudioError(f"{path}: no such file")
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            pcm = file.read(int(seconds * rate) + 1, dtype="float32", always_2d=True)
        return Recording(as_mono(pcm, rate, rate), rate, "a recording")
    except (soundfile.LibsndfileError, OSError, AudioError) as error:
        raise AudioError(f"{path} cannot be read: {error}") from error


def codes_of(recording: Recording, checkpoint: CheckpointFiles, config: ModelConfig) -> Ints:
    """Codes [frames, user_q] of a recording.

    Raises
    ------
    MoshiError
        If the model hears nothing, or its codec cannot be used.
    """
    if not config.lm.user_q:
        raise ConfigError("the model hears nothing")
    codec = None if checkpoint.mimi is None else load_codec(config, checkpoint)
    if codec is None:
        raise CheckpointError("there is no codec to hear a recording with")
    codes = codec.encode(as_mono(recording.pcm, recording.rate, codec.sample_rate))
    return np.ascontiguousarray(codes[: config.lm.user_q].T, dtype=np.int32)


def calibrate(
    subject: Subject, frames: int, recording: Ints | None = None, *, seed: int = 0, greedy: bool = False
) -> Calibration:
    """Tokens of a conversation that the model itself had: sampled once, then given to every model.

    Parameters
    ----------
    subject : Subject
    frames : int
        Its length; a recording may end it sooner.
    recording : array [frames, user_q], optional
        What the user said. Without one, the user repeats the model's own last frame, and a model that only listens
        hears random codes.
    seed : int
    greedy : bool
        Take the likeliest text instead of sampling it.
    """
    config = subject.lm.config
    settings = GenerationConfig(text=GREEDY) if greedy else GenerationConfig()
    generator = Generator(subject.lm, settings, seeds=[seed], conditions=subject.conditions)
    rng = np.random.default_rng(seed)
    count = frames if recording is None else min(frames, len(recording))
    user = np.zeros((count, config.user_q), np.int32)
    said: dict[int, Ints] = {}
    last = np.zeros(config.own_q, np.int32)
    for index in range(count):
        if recording is not None:
            user[index] = recording[index]
        elif config.user_q:
            user[index] = last if config.own_q == config.user_q else rng.integers(0, config.card, config.user_q)
        step = generator.step(user[index] if config.user_q else None)
        if step.aligned_text is not None:
            codes = np.zeros(0, np.int32) if step.codes is None else step.codes[0]
            last = np.maximum(codes, 0)
            said[step.frame] = np.concatenate([step.aligned_text, codes])
    length = max(said, default=-1) + 1
    own = np.stack([said[i] for i in range(length)]) if length else np.zeros((0, 1 + config.own_q), np.int32)
    tokens = np.concatenate([own, user[:length]], axis=1).T[None]
    return Calibration(np.ascontiguousarray(tokens, dtype=np.int32), user)


# ----------------------------------------------------------------------------------------------------- whole recipes


def cost_of(
    subject: Subject,
    plan: Plan,
    calibration: Calibration,
    reference: Outputs,
    tuned: Mapping[str, Mapping[str, mx.array]] | None = None,
) -> Cost:
    """The cost of a plan, with its own rounding or given parts; the model is as before afterwards."""
    subject.apply(plan.choices, tuned)
    try:
        return compare(reference, subject.outputs(calibration))
    finally:
        subject.apply({})


def what_it_says(
    subject: Subject,
    plan: Plan | None,
    calibration: Calibration,
    tuned: Mapping[str, Mapping[str, mx.array]] | None = None,
    seed: int = 0,
) -> Ints:
    """Text tokens [frames] of a free run with the likeliest text, on the same user codes."""
    subject.apply({} if plan is None else plan.choices, tuned)
    try:
        run = calibrate(subject, len(calibration.user), calibration.user, seed=seed, greedy=True)
    finally:
        subject.apply({})
    text: Ints = run.tokens[0, 0]
    return text


def spoken(text: Ints) -> list[tuple[int, int]]:
    """(frame, token) of every text token that is no mark of silence."""
    return [(frame, int(token)) for frame, token in enumerate(text) if token >= 0 and token not in SILENT_IDS]


def same_text(text: Ints, other: Ints, within: int = SAME_FRAMES) -> float | None:
    """How much of what was said is the same, a little sooner or later.

    Parameters
    ----------
    text, other : array [frames]
        Text tokens.
    within : int
        By how many frames the same token may be shifted.

    Returns
    -------
    float or None
        Twice the longest common subsequence of what both say, over all that they say; None where both say nothing.
    """
    said, heard = spoken(text), spoken(other)
    if not said and not heard:
        return None
    longest = [0] * (len(heard) + 1)
    for at, token in said:
        before, longest = longest, [0]
        for i, (then, same) in enumerate(heard):
            matched = before[i] + 1 if token == same and abs(at - then) <= within else 0
            longest.append(max(matched, before[i + 1], longest[i]))
    return 2 * longest[-1] / (len(said) + len(heard))


def words(tokens: Sequence[int], tokenizer: Path | None) -> str | None:
    """Text tokens as people read them; None without a tokenizer."""
    if tokenizer is None:
        return None
    from moshi_mlx.engine.text import TextTokenizer

    detokenizer = TextTokenizer(tokenizer).detokenizer()
    text = "".join(detokenizer.step(int(token)) for token in tokens if token >= 0) + detokenizer.flush()
    return printable(" ".join(text.split()))
