"""One interface for all codecs: Mimi in MLX, Mimi in numpy, and Kyutai's own in Rust (the package ``rustymimi``).

Numpy in, numpy out. A codec encodes and decodes whole recordings, and makes streams that work a frame at a time::

    codec = make_codec("mimi.safetensors", num_codebooks=8)
    codes = codec.encode(pcm)                  # [8, frames] int32
    encoder, decoder = codec.encoder(), codec.decoder()
    column = encoder.encode(frame)             # [8] int32
    frame = decoder.decode(column)             # [frame_size] float32

Many streams are the rows of one state, and a step advances those that have a frame::

    state = codec.init_encoder_state(batch=12)
    codes = codec.encode_step(frames, state, rows=[0, 3, 7])       # [3, 8, 1]

Rows join, leave and restart with :func:`~moshi_mlx.state.put_rows` and related functions. A stream belongs to one
thread at a time; an encoder and a decoder may run in two threads at once.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import mlx.core as mx
import numpy as np

from ..checkpoint.mimi import is_published_layout, load_mimi
from ..cpu.backend import choose_backend
from ..cpu.mimi import Decoder, Encoder, Rows
from ..errors import AudioError, CheckpointError, CodecError, ConfigError, StateError, TokenError
from ..models.mimi import Mimi, MimiConfig
from ..state import State, as_numpy, count_rows, put_rows, state_arrays, take_rows, update_state

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "KINDS",
    "Codec",
    "DecoderStream",
    "EncoderStream",
    "MimiCodec",
    "MlxMimi",
    "NumpyMimi",
    "RustMimi",
    "make_codec",
    "measure_codecs",
    "mimi_codec",
]

KINDS = ("auto", "rust", "mlx", "numpy")
"""What :func:`make_codec` can be asked for."""
_WAY_OUT = "choose the codec mlx or numpy"


class _Stream(ABC):
    """A codec, and the state of one stream.

    Parameters
    ----------
    codec : Codec

    Attributes
    ----------
    state : State
        With one row; see :meth:`Codec.init_encoder_state`.
    """

    def __init__(self, codec: Codec):
        self._codec = codec
        self.state = self._fresh()
        self._used = False

    @abstractmethod
    def _fresh(self) -> State:
        """The initial state of a stream."""

    def reset(self) -> None:
        """Restart with silence."""
        if self._used:
            self.state, self._used = self._fresh(), False

    def snapshot(self) -> State:
        """The state of the stream, as numpy arrays that later frames do not change.

        Raises
        ------
        CodecError
            If the codec cannot give its state (Rust).
        """
        return self._codec.export_state(self.state)

    def restore(self, snapshot: State) -> None:
        """Continue from a :meth:`snapshot`, of this codec in MLX or in numpy.

        Raises
        ------
        StateError
            If it belongs to another codec or is damaged; the stream is as it was then.
        """
        self._codec.export_state(self.state)  # a codec that cannot save cannot restore
        state = self._fresh()
        update_state(state, snapshot)
        if (np.array(state["transformer"]["offset"]) < 0).any():
            raise StateError("the snapshot is damaged: it holds positions before the first")
        self.state, self._used = state, True


class EncoderStream(_Stream):
    """Turns frames into columns of codes, one after the other."""

    def _fresh(self) -> State:
        return self._codec.init_encoder_state(1)

    def encode(self, frame: ArrayLike) -> NDArray[np.int32]:
        """Codes of the next frame.

        Parameters
        ----------
        frame : array [frame_size], float32
            Samples at the codec's rate.

        Returns
        -------
        array [num_codebooks], int32

        Raises
        ------
        AudioError
            If the frame has another shape or type, or holds NaN or infinity. The stream can continue with the next one.
        CodecError
            If the codec itself fails.
        """
        size = self._codec.frame_size
        pcm = _samples(frame)
        if len(pcm) != size:
            raise AudioError(f"a frame has {size} samples, not {len(pcm)}")
        self._used = True
        codes: NDArray[np.int32] = self._codec._encode(pcm[None], self.state, _ALONE)[0, :, 0]
        return codes


class DecoderStream(_Stream):
    """Turns columns of codes into frames, one after the other."""

    def _fresh(self) -> State:
        return self._codec.init_decoder_state(1)

    def decode(self, codes: ArrayLike) -> NDArray[np.float32]:
        """Samples of the next frame.

        Parameters
        ----------
        codes : array [num_codebooks], integer
            Each 0 .. card - 1.

        Returns
        -------
        array [frame_size], float32
            A new array, nominally within -1 .. 1, not clipped.

        Raises
        ------
        TokenError
            If there are more or fewer codes, or one is out of range. The stream can continue with the next column.
        CodecError
            If the codec itself fails.
        """
        column = np.asarray(codes)
        if column.ndim != 1:
            raise TokenError(f"a column of codes has one axis, not shape {list(column.shape)}")
        checked = _codes(column[:, None], self._codec)
        self._used = True
        pcm: NDArray[np.float32] = self._codec._decode(checked[None], self.state, _ALONE)[0]
        return pcm


class Codec(ABC):
    """Sizes, streams, and whole recordings.

    Parameters
    ----------
    config : MimiConfig
        Its quantizer counts the codebooks that are in use.

    Attributes
    ----------
    sample_rate, frame_size, num_codebooks, card : int
        Samples a second, samples per frame, codes per frame, entries per codebook.
    frame_rate : float
        Frames a second.
    """

    kind: ClassVar[str]
    """As :func:`make_codec` calls it."""
    chunk: ClassVar[int] = 1
    """How many frames of a recording go through at once."""
    batched: ClassVar[bool] = True
    """Whether rows that advance together cost less than one after the other. If not, step them singly: of rows that
    advance together, one that fails keeps the others' results back."""

    def __init__(self, config: MimiConfig):
        if config.channels != 1:
            raise ConfigError(f"the codec takes one channel, not {config.channels}")
        self.config = config
        self.sample_rate = config.sample_rate
        self.frame_rate = config.frame_rate
        self.frame_size = config.frame_size
        self.num_codebooks = config.quantizer.n_q
        self._fewest: int | None = None
        self.card = config.quantizer.bins

    @abstractmethod
    def init_encoder_state(self, batch: int = 1) -> State:
        """The state of :meth:`encode_step` for ``batch`` streams that begin with silence.

        Rows are taken out, replaced and joined by :func:`~moshi_mlx.state.take_rows`,
        :func:`~moshi_mlx.state.put_rows` and :func:`~moshi_mlx.state.concatenate_rows`.
        """

    @abstractmethod
    def init_decoder_state(self, batch: int = 1) -> State:
        """The state of :meth:`decode_step` for ``batch`` streams that begin with silence."""

    def encode_step(self, pcm: ArrayLike, state: State, rows: Sequence[int] | None = None) -> NDArray[np.int32]:
        """Codes of the next frames of some streams.

        Parameters
        ----------
        pcm : array [rows, frames * frame_size], float32
            Samples at the codec's rate, for each stream that has them.
        state : State
            From :meth:`init_encoder_state`; advances in place.
        rows : sequence of int, optional
            The rows of ``state`` that they belong to, each once; by default all. The others stay as they are.

        Returns
        -------
        array [rows, num_codebooks, frames], int32
            For each row what it would be alone: in numpy bit for bit, in MLX up to the rounding of sums.

        Raises
        ------
        AudioError
            If shape or type do not fit, or some samples are NaN or infinite; no row has advanced then.
        StateError
            If ``rows`` do not fit the state.
        """
        array = np.asarray(pcm)
        if array.ndim != 2 or not array.size or array.shape[1] % self.frame_size:
            raise AudioError(
                f"samples of several streams have shape [rows, whole frames of {self.frame_size}], "
                f"not {list(array.shape)}"
            )
        for row in array:
            _samples(row)
        return self._encode(np.ascontiguousarray(array), state, _rows(state, rows, len(array)))

    def decode_step(self, codes: ArrayLike, state: State, rows: Sequence[int] | None = None) -> NDArray[np.float32]:
        """The next samples of some streams.

        Parameters
        ----------
        codes : array [rows, num_codebooks, frames], integer
            Each 0 .. card - 1. In MLX and numpy there may be the first few codebooks only.
        state : State
            From :meth:`init_decoder_state`; advances in place.
        rows : sequence of int, optional
            As for :meth:`encode_step`.

        Returns
        -------
        array [rows, frames * frame_size], float32
            As for :meth:`encode_step`; nominally within -1 .. 1, not clipped.

        Raises
        ------
        TokenError
            If the shape does not fit, or a code is out of range; no row has advanced then.
        StateError
            If ``rows`` do not fit the state.
        """
        array = np.asarray(codes)
        if array.ndim != 3 or not len(array):
            raise TokenError(f"codes of several streams have three axes, not shape {list(array.shape)}")
        checked = np.stack([_codes(row, self, self._fewest) for row in array])
        return self._decode(checked, state, _rows(state, rows, len(array)))

    def export_state(self, state: State) -> State:
        """A copy of a state as numpy arrays, the same for a codec in MLX and in numpy.

        Raises
        ------
        CodecError
            If the codec cannot give its state (Rust).
        """
        return as_numpy(state)

    def encoder(self) -> EncoderStream:
        """A new stream from frames to codes."""
        return EncoderStream(self)

    def decoder(self) -> DecoderStream:
        """A new stream from codes to frames."""
        return DecoderStream(self)

    @abstractmethod
    def _encode(self, pcm: NDArray[np.float32], state: State, rows: Rows) -> NDArray[np.int32]:
        """As :meth:`encode_step`, of what was checked."""

    @abstractmethod
    def _decode(self, codes: NDArray[np.int32], state: State, rows: Rows) -> NDArray[np.float32]:
        """As :meth:`decode_step`, of what was checked."""

    def encode(self, pcm: ArrayLike) -> NDArray[np.int32]:
        """Codes of a whole recording.

        Parameters
        ----------
        pcm : array [samples], float32
            At :attr:`sample_rate`; zeros are added on the right up to a whole frame.

        Returns
        -------
        array [num_codebooks, frames], int32

        Raises
        ------
        AudioError
            If there are no samples, or some are NaN or infinite, or shape or type do not fit.
        """
        samples = _samples(pcm)
        if not len(samples):
            raise AudioError("there are no samples to encode")
        samples = np.pad(samples, (0, -len(samples) % self.frame_size))
        state, step = self.init_encoder_state(1), self.chunk * self.frame_size
        parts = [self._encode(samples[None, at : at + step], state, _ALONE) for at in range(0, len(samples), step)]
        codes: NDArray[np.int32] = np.concatenate(parts, axis=2)[0]
        return codes

    def decode(self, codes: ArrayLike) -> NDArray[np.float32]:
        """Waveform of a whole recording.

        Parameters
        ----------
        codes : array [num_codebooks, frames], integer

        Returns
        -------
        array [frames * frame_size], float32

        Raises
        ------
        TokenError
            If the shape does not fit, or a code is out of range.
        """
        columns = _codes(np.asarray(codes), self)
        state, frames = self.init_decoder_state(1), columns.shape[1]
        parts = [
            self._decode(columns[None, :, at : at + self.chunk], state, _ALONE) for at in range(0, frames, self.chunk)
        ]
        pcm: NDArray[np.float32] = np.concatenate(parts, axis=1)[0]
        return pcm


class MimiCodec(Codec):
    """Mimi of any size, from weights in memory: in MLX or in numpy.

    Parameters
    ----------
    mimi : Mimi
        With its weights evaluated, as :func:`~moshi_mlx.checkpoint.mimi.load_mimi` leaves them: streams in other
        threads read them. They must stay as they are: where they are replaced, make another codec.
    """

    chunk = 25

    def __init__(self, mimi: Mimi):
        super().__init__(mimi.config)
        self.mimi = mimi
        self._fewest = mimi.config.quantizer.n_q_semantic


class MlxMimi(MimiCodec):
    """Mimi in MLX, where MLX computes: on the GPU if there is one."""

    kind = "mlx"

    def init_encoder_state(self, batch: int = 1) -> State:
        return _evaluated(self.mimi.init_encoder_state(batch))

    def init_decoder_state(self, batch: int = 1) -> State:
        return _evaluated(self.mimi.init_decoder_state(batch))

    def _encode(self, pcm: NDArray[np.float32], state: State, rows: Rows) -> NDArray[np.int32]:
        with _part(state, rows) as part:
            return np.array(self.mimi.encode_step(mx.array(pcm)[:, None], part))

    def _decode(self, codes: NDArray[np.int32], state: State, rows: Rows) -> NDArray[np.float32]:
        with _part(state, rows) as part:
            return np.array(self.mimi.decode_step(mx.array(codes), part)[:, 0])


def _evaluated(state: State) -> State:
    """The thread that steps may be another one, and unevaluated arrays belong to their thread."""
    mx.eval(state_arrays(state))
    return state


@contextmanager
def _part(state: State, rows: Rows) -> Iterator[State]:
    """Some rows as a separate state, whose changes are copied back."""
    batch = count_rows(state)
    if isinstance(rows, slice) and rows == slice(0, batch):
        yield state
    else:
        index = range(batch)[rows] if isinstance(rows, slice) else rows.tolist()
        part = take_rows(state, index)
        yield part
        put_rows(state, index, part)
    _evaluated(state)


class NumpyMimi(MimiCodec):
    """Mimi in numpy: for a CPU, where it is several times faster than in MLX."""

    kind = "numpy"

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.mimi)

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.mimi)

    def init_encoder_state(self, batch: int = 1) -> State:
        return self._encoder.init_state(batch)

    def init_decoder_state(self, batch: int = 1) -> State:
        return self._decoder.init_state(batch)

    def _encode(self, pcm: NDArray[np.float32], state: State, rows: Rows) -> NDArray[np.int32]:
        return self._encoder.step(pcm, state, rows)

    def _decode(self, codes: NDArray[np.int32], state: State, rows: Rows) -> NDArray[np.float32]:
        return self._decoder.step(codes, state, rows)


def mimi_codec(mimi: Mimi, kind: str = "auto") -> MimiCodec:
    """The codec of weights in memory.

    Parameters
    ----------
    mimi : Mimi
    kind : {"auto", "mlx", "numpy"}
        ``auto`` takes numpy where MLX computes on the CPU, and MLX on a GPU.
    """
    if kind == "auto":
        kind = choose_backend()
    return NumpyMimi(mimi) if kind == "numpy" else MlxMimi(mimi)


class RustMimi(Codec):
    """The published Mimi in Rust. A frame costs a fraction of what it costs in MLX on a CPU.

    Each row of a state is a separate ``rustymimi.Tokenizer`` (about 0.5 GB), because one object cannot encode and
    decode at the same time; ``rustymimi.StreamTokenizer`` could, but it cannot be reset, must be polled, and drops its
    errors. Neither exposes its state, so streams can be neither saved nor restored.

    Parameters
    ----------
    path : path
        A file in the published layout.
    num_codebooks : int

    Raises
    ------
    CodecError
        If the package is missing or cannot read the file.
    """

    kind = "rust"
    batched = False

    def __init__(self, path: str | os.PathLike[str], num_codebooks: int = 8):
        published = MimiConfig()
        if not 1 <= num_codebooks <= published.quantizer.n_q:
            raise ConfigError(f"num_codebooks {num_codebooks} is not between 1 and {published.quantizer.n_q}")
        super().__init__(replace(published, quantizer=replace(published.quantizer, n_q=num_codebooks)))
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise CheckpointError(f"{self.path}: no such file")
        # Latents that a tokenizer can count. Its tables grow with it: 190 MB for this, which is three hours.
        self.max_latents = 2**18

    def init_encoder_state(self, batch: int = 1) -> State:
        return self._streams(batch)

    def init_decoder_state(self, batch: int = 1) -> State:
        return self._streams(batch)

    def _streams(self, batch: int) -> State:
        """A state whose rows are objects: they can be moved between states, but not copied or saved."""
        streams = np.empty(batch, object)
        for row in range(batch):
            streams[row] = _RustTokenizer(self)
        return {"streams": streams}

    def export_state(self, state: State) -> State:
        raise CodecError(f"a conversation with the Rust codec cannot be saved or resumed: {_WAY_OUT} for it")

    def _encode(self, pcm: NDArray[np.float32], state: State, rows: Rows) -> NDArray[np.int32]:
        frames = pcm.reshape(len(pcm), -1, self.frame_size)
        each = zip(state["streams"][rows], frames, strict=True)
        return np.stack([np.stack([stream.encode(frame) for frame in own], axis=1) for stream, own in each])

    def _decode(self, codes: NDArray[np.int32], state: State, rows: Rows) -> NDArray[np.float32]:
        each = zip(state["streams"][rows], codes, strict=True)
        return np.stack([np.concatenate([stream.decode(column) for column in own.T]) for stream, own in each])

    def tokenizer(self) -> Any:
        """A new ``rustymimi.Tokenizer``."""
        try:
            import rustymimi
        except ImportError as error:
            raise CodecError(
                f"the Rust codec needs the package rustymimi, which has no wheel for every Python; install it, "
                f"or {_WAY_OUT}"
            ) from error
        with _rust_errors(f"the Rust codec cannot load {self.path}"):
            return rustymimi.Tokenizer(self.path, num_codebooks=self.num_codebooks, max_seq_len=self.max_latents)


class _RustTokenizer:
    """A stream: a tokenizer that is replaced before it can no longer count.

    Its own ``reset`` keeps its place in the count, and does not pad the first frame again: a new one is the reset. It
    is made in about half a second, so that its end, every three hours, is put into a pause if one comes in time.
    """

    def __init__(self, codec: RustMimi):
        self._codec = codec
        self._limit = codec.max_latents // codec.config.resample_stride
        self._frames = 0
        self._tokenizer = codec.tokenizer()
        self._quiet = False

    def encode(self, pcm: NDArray[np.float32]) -> NDArray[np.int32]:
        """Codes [num_codebooks] of the next frame."""
        tokenizer = self._next(quiet=bool(np.abs(pcm).max() < 1e-3))
        with _rust_errors("the Rust codec failed to encode a frame"):
            codes = tokenizer.encode_step(np.ascontiguousarray(pcm[None, None]))
        if codes is None or codes.shape != (1, self._codec.num_codebooks, 1):
            raise CodecError("the Rust codec gave no codes for a frame")
        return np.asarray(codes[0, :, 0], np.int32)

    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.float32]:
        """Samples [frame_size] of the next column."""
        tokenizer = self._next(self._quiet)
        with _rust_errors("the Rust codec failed to decode a frame"):
            pcm = tokenizer.decode_step(np.ascontiguousarray(codes[None, :, None], np.uint32))
        if pcm is None or pcm.shape != (1, 1, self._codec.frame_size):
            raise CodecError("the Rust codec gave no samples for a frame")
        self._quiet = bool(np.abs(pcm).max() < 1e-3)
        return np.asarray(pcm[0, 0], np.float32)

    def _next(self, quiet: bool) -> Any:
        """The tokenizer for one more frame; ``quiet`` says that a frame without sound is a good time for a new one."""
        if self._frames >= self._limit or (quiet and self._frames >= 0.9 * self._limit):
            self._tokenizer, self._frames = self._codec.tokenizer(), 0
        self._frames += 1
        return self._tokenizer


def make_codec(
    path: str | os.PathLike[str],
    config: MimiConfig | None = None,
    num_codebooks: int | None = None,
    kind: str = "auto",
) -> Codec:
    """The codec for a file of weights.

    Parameters
    ----------
    path : path
        A safetensors file.
    config : MimiConfig
        Default: the published Mimi.
    num_codebooks : int or None
        How many codebooks to use; None: all that the configuration counts.
    kind : {"auto", "rust", "mlx", "numpy"}
        What computes. ``auto`` takes Rust for the published sizes and layout where ``rustymimi`` is installed,
        otherwise numpy where MLX computes on the CPU, and MLX on a GPU. :func:`measure_codecs` says which is fastest.

    Raises
    ------
    CheckpointError
        If the file cannot be read or does not fit.
    CodecError
        If ``rust`` is requested and not available.
    ConfigError
        If ``kind`` is not one of these, or there are fewer codebooks than asked for.
    """
    config = config or MimiConfig()
    if num_codebooks is None:
        num_codebooks = config.quantizer.n_q
    if kind not in KINDS:
        raise ConfigError(f"the kind of codec is {', '.join(KINDS[:-1])} or {KINDS[-1]}, not {kind!r}")
    if kind in ("auto", "rust"):
        fits = _has_published_sizes(config) and is_published_layout(path)
        if kind == "rust" and not fits:
            raise CodecError(f"the Rust codec knows the published Mimi only: {_WAY_OUT} for this one")
        if fits and (kind == "rust" or _rust_is_installed()):
            return RustMimi(path, num_codebooks)
    return mimi_codec(load_mimi(path, config, num_codebooks), kind)


def measure_codecs(
    path: str | os.PathLike[str],
    config: MimiConfig | None = None,
    num_codebooks: int | None = None,
    seconds: float = 0.2,
) -> dict[str, float]:
    """Time of encoding and decoding a frame with every codec that is available for a file of weights.

    Parameters
    ----------
    path, config, num_codebooks
        As for :func:`make_codec`.
    seconds : float
        Time to measure each, in addition to loading it; a much slower one gets less.

    Returns
    -------
    dict of str to float
        Milliseconds of one stream (wall time, the smallest of several frames) by kind, the fastest first. They hold
        for these sizes, this machine and these versions.

    Raises
    ------
    CheckpointError, ConfigError
        As :func:`make_codec`.
    """
    config = config or MimiConfig()
    codebooks = config.quantizer.n_q if num_codebooks is None else num_codebooks
    mimi = load_mimi(path, config, codebooks)
    candidates: list[Codec] = [NumpyMimi(mimi), MlxMimi(mimi)]
    if _has_published_sizes(config) and is_published_layout(path) and _rust_is_installed():
        rust = RustMimi(path, codebooks)
        rust.max_latents = 2**10  # small tables are made sooner
        candidates.append(rust)
    found: dict[str, float] = {}
    for codec in candidates:
        with suppress(CodecError):
            found[codec.kind] = 1e3 * _frame_seconds(codec, seconds, min(found.values(), default=np.inf) / 1e3)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _frame_seconds(codec: Codec, budget: float, best: float) -> float:
    """Smallest time of a frame in and out. One that takes four times the ``best`` is given up early."""
    encoder, decoder = codec.encoder(), codec.decoder()
    frame = (0.1 * np.random.default_rng(0).standard_normal(codec.frame_size)).astype(np.float32)
    took: list[float] = []
    enough = 1 if _on_cpu() else 2  # a GPU compiles its kernels with the first frame
    until = time.perf_counter() + budget
    while len(took) < 2 or time.perf_counter() < until:
        began = time.perf_counter()
        decoder.decode(encoder.encode(frame))
        took.append(time.perf_counter() - began)
        if len(took) == enough and min(took) > 4 * best:
            break
    return min(took)


def _on_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return bool(mx.default_device().type == mx.cpu)


def _rust_is_installed() -> bool:
    try:
        import rustymimi  # noqa: F401
    except ImportError:
        return False
    return True


def _has_published_sizes(config: MimiConfig) -> bool:
    published = MimiConfig()
    free = replace(config.quantizer, n_q=published.quantizer.n_q)
    return config.quantizer.n_q <= published.quantizer.n_q and replace(config, quantizer=free) == published


_ALONE = slice(0, 1)


def _rows(state: State, rows: Sequence[int] | None, given: int) -> Rows:
    """Which rows of ``state`` advance, as a slice where they are neighbours."""
    held = count_rows(state)
    if rows is None:
        if given != held:
            raise StateError(f"the state holds {held} sequences, the input {given}")
        return slice(0, held)
    index = np.asarray(rows, np.intp)
    if index.shape != (given,):
        raise StateError(f"there are {given} sequences, and rows of shape {list(index.shape)} for them")
    if index.min() < 0 or index.max() >= held or len(np.unique(index)) < given:
        raise StateError(f"rows must be distinct and within 0 .. {held - 1}, not {index.tolist()}")
    if (np.diff(index) == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def _samples(pcm: ArrayLike) -> NDArray[np.float32]:
    array = np.asarray(pcm)
    if array.dtype != np.float32:
        raise AudioError(f"samples must be float32 within -1 .. 1, not {array.dtype}: convert them first")
    if array.ndim != 1:
        raise AudioError(f"samples must have one axis, not shape {list(array.shape)}: the codec takes one channel")
    if not np.isfinite(array).all():
        raise AudioError(f"sample {int(np.argmin(np.isfinite(array)))} is not a finite number")
    return np.ascontiguousarray(array)


def _codes(codes: NDArray[Any], codec: Codec, fewest: int | None = None) -> NDArray[np.int32]:
    most = codec.num_codebooks
    if codes.ndim != 2 or not (most if fewest is None else fewest) <= len(codes) <= most or not codes.shape[1]:
        raise TokenError(f"codes must have shape [{most}, frames], not {list(codes.shape)}")
    if not np.issubdtype(codes.dtype, np.integer):
        raise TokenError(f"codes must be integers, not {codes.dtype}")
    outside = (codes < 0) | (codes >= codec.card)
    if outside.any():
        book, frame = np.argwhere(outside)[0]
        raise TokenError(
            f"code {int(codes[book, frame])} of codebook {book}, frame {frame}, is not within 0 .. {codec.card - 1}"
        )
    return codes.astype(np.int32)


@contextmanager
def _rust_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (
        Exception
    ) as error:  # the bindings raise various types; the first line is the message, the rest a Rust backtrace
        raise CodecError(f"{what}: {(str(error) or type(error).__name__).splitlines()[0]}") from None
