"""Load a checkpoint by its name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Literal, TypeVar, overload

import mlx.core as mx
import numpy as np

from .checkpoint.download import Progress
from .checkpoint.finite import check_finite
from .checkpoint.fit import load_config, load_lm
from .checkpoint.readers import read_json, read_safetensors
from .checkpoint.resolve import BUILTIN, CheckpointFiles, resolve
from .codec.base import Codec, RustMimi, make_codec, measure_codecs, mimi_codec
from .config import LmConfig, ModelConfig
from .cpu.lm import NumpyBackend
from .engine.text import TextTokenizer
from .errors import CheckpointError, CodecError, ConfigError
from .models.lm import Lm
from .models.mimi import Mimi, MimiConfig
from .sharding.leader import Leader
from .tasks import TASKS
from .tasks.dialogue import Moshi

__all__ = ["load", "load_codec", "measure_backend", "measure_codec"]

_UNTRAINED_SEED = 0
_Task = TypeVar("_Task", bound=Moshi)


@overload
def load(
    source: str | os.PathLike[str] = "small",
    *,
    weights: str | None = None,
    codec: Literal["auto", "rust", "mlx", "numpy"] = "auto",
    lora: str | os.PathLike[str] | None = None,
    lora_scaling: float | None = None,
    dtype: mx.Dtype | None = None,
    backend: Literal["auto", "mlx", "numpy"] = "auto",
    on_progress: Callable[[str], None] | None = None,
    sharding: Leader | None = None,
) -> Moshi: ...


@overload
def load(
    source: str | os.PathLike[str] = "small",
    *,
    task: type[_Task],
    weights: str | None = None,
    codec: Literal["auto", "rust", "mlx", "numpy"] = "auto",
    lora: str | os.PathLike[str] | None = None,
    lora_scaling: float | None = None,
    dtype: mx.Dtype | None = None,
    backend: Literal["auto", "mlx", "numpy"] = "auto",
    on_progress: Callable[[str], None] | None = None,
    sharding: Leader | None = None,
) -> _Task: ...


def load(
    source: str | os.PathLike[str] = "small",
    *,
    task: type[Moshi] = Moshi,
    weights: str | None = None,
    codec: Literal["auto", "rust", "mlx", "numpy"] = "auto",
    lora: str | os.PathLike[str] | None = None,
    lora_scaling: float | None = None,
    dtype: mx.Dtype | None = None,
    backend: Literal["auto", "mlx", "numpy"] = "auto",
    on_progress: Callable[[str], None] | None = None,
    sharding: Leader | None = None,
) -> Moshi:
    """Load a checkpoint: language model, codec and tokenizer.

    Parameters
    ----------
    source : str or path
        A folder, ``org/repo`` or ``org/repo@revision`` on the hub, or the name of a built-in model.
    task : type, optional
        What the model is to be used for, such as :class:`moshi_mlx.SpeechToText`: another checkpoint is refused, and
        type checkers know what comes back.
    weights : str, optional
        Which file of weights to load if a checkpoint has several, for instance ``model.q4.safetensors``.
    codec : {"auto", "rust", "mlx", "numpy"}
        Implementation of the codec; see :func:`moshi_mlx.codec.base.make_codec`.
    lora : path, optional
        ``lora.safetensors`` of moshi-finetune or moshi-mlx-finetune, merged, or kept beside quantized weights; by
        default the one that the checkpoint names.
    lora_scaling : float, optional
        Its scale; by default the checkpoint's.
    dtype : mx.Dtype, optional
        Type of weights that are not quantized; by default the file's.
    backend : {"auto", "mlx", "numpy"}
        What computes the language model: MLX, or numpy, which takes float32 models up to 2 GB in memory. ``auto`` is
        numpy for those where MLX computes on the CPU, otherwise MLX; :func:`measure_backend` says which is faster.
    on_progress : callable, optional
        Called with a short sentence at each stage, and as files come in.
    sharding : Leader, optional
        Other machines or processes among which the language model is divided: :func:`moshi_mlx.sharding.launch`.

    Returns
    -------
    Moshi
        Of the class for its task: see :data:`moshi_mlx.tasks.TASKS`.

    Raises
    ------
    DownloadError
        If the source cannot be found or fetched.
    CheckpointError, ConfigError
        If a file is broken or does not fit, or the model is for another task.
    RankError
        If another machine does not come, has other files or versions, or goes.
    """
    if sharding is not None and backend == "numpy":
        raise ConfigError("numpy computes on one machine only: choose the backend mlx for several")
    say = on_progress or (lambda _: None)
    say(f"looking for {source}")
    files = resolve(source, weights=weights, progress=_telling(on_progress))
    config = load_config(files.config, files.weights)
    kind = TASKS[config.model_type]
    if not issubclass(kind, task):
        raise ConfigError(
            f"{source} is for {kind.purpose} ({kind.__name__}), and {task.__name__} was asked for: name another model"
        )
    builtin = files.folder.parent == BUILTIN
    say("reading the language model")
    trained = bool(files.weights)
    prepare = None
    if sharding is not None:
        given = None if dtype is None else str(dtype).rpartition(".")[2]
        named = None if lora is None else os.fspath(lora)
        sharding.gather(
            files, source=os.fspath(source), weights=weights, lora=named, lora_scaling=lora_scaling, dtype=given,
            seed=_UNTRAINED_SEED,
        )  # fmt: skip
        prepare = sharding.prepare
    if trained:
        lm = load_lm(
            config, files.weights, lora=lora or files.lora, lora_scaling=lora_scaling, dtype=dtype, prepare=prepare
        )
    else:
        lm = _random_lm(config.lm)
        if prepare is not None:
            prepare(lm)
    lm.backend = backend
    if sharding is not None:
        sharding.finish(lm)
    if backend == "numpy" and not NumpyBackend.suits(lm):
        raise ConfigError(f"{source} is too large for the backend numpy, or not in float32: choose the backend mlx")
    say("reading the codec")
    voice = load_codec(config, files, codec)
    tokenizer = None if files.tokenizer is None else TextTokenizer(files.tokenizer)
    if tokenizer is None and voice is not None:
        raise _lacking(files, "tokenizer", "a SentencePiece model for its text")
    if tokenizer is not None and tokenizer.vocab_size != config.lm.text_card:
        raise CheckpointError(
            f"{files.tokenizer} has {tokenizer.vocab_size} pieces, but the model's text_card is {config.lm.text_card}: "
            "it belongs to another model"
        )
    name = str(source) if builtin or files.revision is not None else files.folder.name
    heard = trained and (voice is None or files.mimi is not None)
    return kind(config, lm, voice, tokenizer, name=name, trained=heard, source=str(source))


def measure_codec(source: str | os.PathLike[str] = "small", *, weights: str | None = None) -> dict[str, float]:
    """Time of encoding and decoding a frame with every codec implementation that a checkpoint supports.

    Takes two or three seconds for the published codec, half a second for the built-in one. The result is valid
    until the machine or the versions change: keep the fastest, and pass it to :func:`load` as ``codec``.

    Parameters
    ----------
    source, weights
        As for :func:`load`.

    Returns
    -------
    dict of str to float
        See :func:`moshi_mlx.codec.base.measure_codecs`; empty if the checkpoint has no codec.

    Raises
    ------
    DownloadError, CheckpointError, ConfigError
        As :func:`load`.
    """
    files = resolve(source, weights=weights)
    sizes, codebooks = _codec_sizes(load_config(files.config, files.weights), files)
    return measure_codecs(files.mimi, sizes, codebooks) if codebooks and files.mimi is not None else {}


def measure_backend(model: Moshi, seconds: float = 0.2) -> dict[str, float]:
    """How long a step of a language model takes here with every backend that can compute it.

    Parameters
    ----------
    model : Moshi
    seconds : float
        For each; the first steps, which compile and allocate, do not count.

    Returns
    -------
    dict of str to float
        Milliseconds of one conversation's step (wall time, median) by backend, the fastest first; empty for a model
        that only one can compute. What is the fastest once is so until machine or versions change: keep it, and give
        it to :func:`load` as ``backend``.
    """
    lm, asked = model.lm, model.lm.backend
    if not lm.config.n_q or not NumpyBackend.suits(lm):
        return {}
    codes = np.zeros((1, lm.config.user_q), np.int32) if lm.config.user_q else None
    found: dict[str, float] = {}
    try:
        for backend in ("numpy", "mlx"):
            lm.backend = backend
            predict = model.stages.predict()
            predict.join(0)
            predict.open(0)
            took: list[float] = []
            until = time.perf_counter() + seconds
            while len(took) < 5 or time.perf_counter() < until:
                began = time.perf_counter()
                predict.step([0], [np.zeros(0, np.int32) if codes is None else codes[0]])
                took.append(time.perf_counter() - began)
            found[backend] = 1e3 * float(np.median(took[2:]))
    finally:
        lm.backend = asked
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _codec_sizes(config: ModelConfig, files: CheckpointFiles) -> tuple[MimiConfig, int]:
    """Sizes of a checkpoint's codec, and how many codebooks the model uses; 0 if it needs no codec."""
    lm = config.lm
    codebooks = max(lm.own_q, lm.user_q)
    if not codebooks:
        return MimiConfig(), 0
    if lm.own_q not in (0, codebooks):
        raise ConfigError(f"{lm.own_q} own and {lm.user_q} user codebooks: one codec cannot serve both")
    sizes = MimiConfig() if files.mimi_config is None else MimiConfig.from_dict(read_json(files.mimi_config))
    if sizes.quantizer.bins != lm.card:
        unnamed = (
            "" if files.mimi_config else ". config.json names no mimi_config.json (mimi_config_name) with its sizes"
        )
        raise ConfigError(
            f"the codec has {sizes.quantizer.bins} entries per codebook, the language model {lm.card}{unnamed}"
        )
    return sizes, codebooks


def load_codec(config: ModelConfig, files: CheckpointFiles, kind: str = "auto") -> Codec | None:
    """A checkpoint's codec; None if it has no use for one. Parameters and errors as :func:`load`."""
    sizes, codebooks = _codec_sizes(config, files)
    if not codebooks:
        return None
    if files.mimi is not None:
        made = make_codec(files.mimi, sizes, codebooks, kind)
        if isinstance(made, RustMimi):  # it reads the file itself, without this check
            check_finite(read_safetensors(files.mimi)[0], str(files.mimi))
        return made
    if files.folder.parent != BUILTIN:
        raise _lacking(files, "mimi", "the weights of its codec")
    if kind == "rust":
        raise CodecError("the Rust codec knows the published Mimi only: choose the codec mlx or numpy for this model")
    return mimi_codec(_random_mimi(sizes, codebooks), kind)


def _telling(on_progress: Callable[[str], None] | None) -> Progress | None:
    """Report downloads as messages, a few per second at most."""
    if on_progress is None:
        return None
    said: dict[str, float] = {}

    def tell(name: str, here: int, size: int) -> None:
        now = time.monotonic()
        if here >= size or now - said.get(name, -1.0) >= 0.2:
            said[name] = now
            on_progress(f"{name}: {here / 1e6:,.1f} of {size / 1e6:,.1f} MB")

    return tell


def _lacking(files: CheckpointFiles, part: str, what: str) -> CheckpointError:
    looked_for = files.names.get(part)
    hint = f": put {looked_for} next to its weights, or name another file in config.json" if looked_for else ""
    return CheckpointError(f"{files.folder} lacks {what}{hint}")


def _random_lm(config: LmConfig) -> Lm:
    """Weights for a built-in model that is not trained yet: always the same."""
    mx.random.seed(_UNTRAINED_SEED)
    lm = Lm(config)
    mx.eval(lm.parameters())
    return lm


def _random_mimi(config: MimiConfig, codebooks: int) -> Mimi:
    mx.random.seed(_UNTRAINED_SEED)
    mimi = Mimi(config, codebooks)
    mx.eval(mimi.parameters())
    return mimi
