"""One face for both codecs: Mimi in MLX, and Kyutai's own in Rust (the package ``rustymimi``).

Numpy in, numpy out. A codec encodes and decodes whole recordings, and makes streams that work a frame at a time::

    codec = make_codec("mimi.safetensors", num_codebooks=8)
    codes = codec.encode(pcm)                  # [8, frames] int32
    encoder, decoder = codec.encoder(), codec.decoder()
    column = encoder.encode(frame)             # [8] int32
    frame = decoder.decode(column)             # [frame_size] float32

A stream belongs to one thread at a time; an encoder and a decoder may run in two threads at once.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from .errors import AudioError, CheckpointError, CodecError, ConfigError, TokenError
from .lean_codec import LeanDecoder, LeanEncoder
from .mimi import Mimi, MimiConfig
from .mimi_weights import is_published_layout, load_mimi
from .streaming import State, state_arrays

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["Codec", "DecoderStream", "EncoderStream", "MimiCodec", "RustMimi", "make_codec"]


class EncoderStream(ABC):
    """Turns frames into columns of codes, one after the other.

    Parameters
    ----------
    codec : Codec
        Whose sizes it has.
    """

    def __init__(self, codec: Codec):
        self._codec = codec

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
            If the frame has another shape or type, or holds NaN or infinity. The stream can go on with the next one.
        CodecError
            If the codec itself fails.
        """
        size = self._codec.frame_size
        pcm = _samples(frame)
        if len(pcm) != size:
            raise AudioError(f"a frame has {size} samples, not {len(pcm)}")
        return self._encode(pcm)[:, 0]

    @abstractmethod
    def reset(self) -> None:
        """Forget everything heard so far."""

    @abstractmethod
    def _encode(self, pcm: NDArray[np.float32]) -> NDArray[np.int32]:
        """Codes [num_codebooks, frames] of checked whole frames."""


class DecoderStream(ABC):
    """Turns columns of codes into frames, one after the other.

    Parameters
    ----------
    codec : Codec
        Whose sizes it has.
    """

    def __init__(self, codec: Codec):
        self._codec = codec

    def decode(self, codes: ArrayLike) -> NDArray[np.float32]:
        """Samples of the next frame.

        Parameters
        ----------
        codes : array [num_codebooks], integer
            Each 0 .. card - 1.

        Returns
        -------
        array [frame_size], float32
            A frame of its own, nominally within -1 .. 1, not clipped.

        Raises
        ------
        TokenError
            If there are more or fewer codes, or one is out of range. The stream can go on with the next column.
        CodecError
            If the codec itself fails.
        """
        column = np.asarray(codes)
        if column.ndim != 1:
            raise TokenError(f"a column of codes has one axis, not shape {list(column.shape)}")
        return self._decode(_codes(column[:, None], self._codec))

    @abstractmethod
    def reset(self) -> None:
        """Forget everything said so far."""

    @abstractmethod
    def _decode(self, codes: NDArray[np.int32]) -> NDArray[np.float32]:
        """Samples [frames * frame_size] of checked codes [num_codebooks, frames]."""


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

    chunk = 1
    """How many frames of a recording go through at once."""

    def __init__(self, config: MimiConfig):
        if config.channels != 1:
            raise ConfigError(f"the codec takes one channel, not {config.channels}")
        self.config = config
        self.sample_rate = config.sample_rate
        self.frame_rate = config.frame_rate
        self.frame_size = config.frame_size
        self.num_codebooks = config.quantizer.n_q
        self.card = config.quantizer.bins

    @abstractmethod
    def encoder(self) -> EncoderStream:
        """A new stream from frames to codes."""

    @abstractmethod
    def decoder(self) -> DecoderStream:
        """A new stream from codes to frames."""

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
        stream, step = self.encoder(), self.chunk * self.frame_size
        return np.concatenate([stream._encode(samples[at : at + step]) for at in range(0, len(samples), step)], axis=1)

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
        stream = self.decoder()
        parts = [stream._decode(columns[:, at : at + self.chunk]) for at in range(0, columns.shape[1], self.chunk)]
        return np.concatenate(parts)


class MimiCodec(Codec):
    """Mimi in MLX, of any size.

    Parameters
    ----------
    mimi : Mimi
        With its weights evaluated, as :func:`~moshi_mlx.mimi_weights.load_mimi` leaves them: streams in other threads
        read them.
    lean : bool or None
        Whether streams compute in numpy; None: where MLX computes on the CPU, and is several times slower.
    """

    chunk = 25

    def __init__(self, mimi: Mimi, lean: bool | None = None):
        super().__init__(mimi.config)
        self.mimi = mimi
        self.lean = mx.default_device().type == mx.cpu if lean is None else lean

    def encoder(self) -> EncoderStream:
        return LeanMimiEncoder(self) if self.lean else MimiEncoder(self)

    def decoder(self) -> DecoderStream:
        return LeanMimiDecoder(self) if self.lean else MimiDecoder(self)


class LeanMimiEncoder(EncoderStream):
    def __init__(self, codec: MimiCodec):
        super().__init__(codec)
        self._mimi = codec.mimi
        self.reset()

    def reset(self) -> None:
        self._step = LeanEncoder(self._mimi)

    def _encode(self, pcm: NDArray[np.float32]) -> NDArray[np.int32]:
        return self._step(pcm)


class LeanMimiDecoder(DecoderStream):
    def __init__(self, codec: MimiCodec):
        super().__init__(codec)
        self._mimi = codec.mimi
        self.reset()

    def reset(self) -> None:
        self._step = LeanDecoder(self._mimi)

    def _decode(self, codes: NDArray[np.int32]) -> NDArray[np.float32]:
        return self._step(codes)


class MimiEncoder(EncoderStream):
    def __init__(self, codec: MimiCodec):
        super().__init__(codec)
        self._mimi = codec.mimi
        self.reset()

    def reset(self) -> None:
        # Evaluated, since the thread that steps may be another one, and unevaluated arrays belong to their thread.
        self.state: State = self._mimi.init_encoder_state(1)
        mx.eval(state_arrays(self.state))

    def _encode(self, pcm: NDArray[np.float32]) -> NDArray[np.int32]:
        codes = self._mimi.encode_step(mx.array(pcm)[None, None], self.state)
        mx.eval(codes, state_arrays(self.state))
        return np.array(codes[0])


class MimiDecoder(DecoderStream):
    def __init__(self, codec: MimiCodec):
        super().__init__(codec)
        self._mimi = codec.mimi
        self.reset()

    def reset(self) -> None:
        self.state: State = self._mimi.init_decoder_state(1)
        mx.eval(state_arrays(self.state))

    def _decode(self, codes: NDArray[np.int32]) -> NDArray[np.float32]:
        pcm = self._mimi.decode_step(mx.array(codes)[None], self.state)
        mx.eval(pcm, state_arrays(self.state))
        return np.array(pcm[0, 0])


class RustMimi(Codec):
    """The published Mimi in Rust. A frame costs a fraction of what it costs in MLX on a CPU.

    Each stream has a ``rustymimi.Tokenizer`` of its own (about 0.5 GB), because one object cannot encode and decode at
    the same time. ``rustymimi.StreamTokenizer`` could, but it cannot be reset, must be polled, and drops its errors.

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

    def encoder(self) -> RustEncoder:
        return RustEncoder(self)

    def decoder(self) -> RustDecoder:
        return RustDecoder(self)

    def tokenizer(self) -> Any:
        """A new ``rustymimi.Tokenizer``."""
        try:
            import rustymimi
        except ImportError as error:
            raise CodecError(
                "the Rust codec needs the package rustymimi, which has no wheel for every Python; "
                "install it or use kind='mlx'"
            ) from error
        with _rust_errors(f"the Rust codec cannot load {self.path}"):
            return rustymimi.Tokenizer(self.path, num_codebooks=self.num_codebooks, max_seq_len=self.max_latents)


class _RustTokenizer:
    """A tokenizer that is replaced before it can no longer count.

    Its own ``reset`` keeps its place in the count, and does not pad the first frame again: a new one is the reset. It
    is made in about half a second, so that its end, every three hours, is put into a pause if one comes in time.
    """

    def __init__(self, codec: RustMimi):
        self._codec = codec
        self._latents = codec.config.resample_stride
        self._limit = codec.max_latents // self._latents
        self._frames = 0
        self._tokenizer = codec.tokenizer()

    def reset(self) -> None:
        if self._frames:
            self._tokenizer, self._frames = self._codec.tokenizer(), 0

    def next(self, quiet: bool) -> Any:
        """The tokenizer for one more frame; ``quiet`` says that a frame without sound is a good time for a new one."""
        if self._frames >= self._limit or (quiet and self._frames >= 0.9 * self._limit):
            self.reset()
        self._frames += 1
        return self._tokenizer


class RustEncoder(EncoderStream):
    def __init__(self, codec: RustMimi):
        super().__init__(codec)
        self._tokenizer = _RustTokenizer(codec)

    def reset(self) -> None:
        self._tokenizer.reset()

    def _encode(self, pcm: NDArray[np.float32]) -> NDArray[np.int32]:
        tokenizer = self._tokenizer.next(quiet=bool(np.abs(pcm).max() < 1e-3))
        with _rust_errors("the Rust codec failed to encode a frame"):
            codes = tokenizer.encode_step(np.ascontiguousarray(pcm[None, None]))
        if codes is None or codes.shape != (1, self._codec.num_codebooks, 1):
            raise CodecError("the Rust codec gave no codes for a frame")
        return np.asarray(codes[0], np.int32)


class RustDecoder(DecoderStream):
    def __init__(self, codec: RustMimi):
        super().__init__(codec)
        self._tokenizer = _RustTokenizer(codec)
        self._quiet = False

    def reset(self) -> None:
        self._tokenizer.reset()

    def _decode(self, codes: NDArray[np.int32]) -> NDArray[np.float32]:
        tokenizer = self._tokenizer.next(self._quiet)
        with _rust_errors("the Rust codec failed to decode a frame"):
            pcm = tokenizer.decode_step(np.ascontiguousarray(codes[None], np.uint32))
        if pcm is None or pcm.shape != (1, 1, self._codec.frame_size):
            raise CodecError("the Rust codec gave no samples for a frame")
        self._quiet = bool(np.abs(pcm).max() < 1e-3)
        return np.asarray(pcm[0, 0], np.float32)


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
    kind : {"auto", "rust", "mlx"}
        ``auto`` takes Rust for the published sizes and layout where ``rustymimi`` is installed, MLX otherwise.

    Raises
    ------
    CheckpointError
        If the file cannot be read or does not fit.
    CodecError
        If ``rust`` is asked for and cannot be had.
    ConfigError
        If ``kind`` is not one of the three, or there are fewer codebooks than asked for.
    """
    config = config or MimiConfig()
    if num_codebooks is None:
        num_codebooks = config.quantizer.n_q
    if kind not in ("auto", "rust", "mlx"):
        raise ConfigError(f"the kind of codec is auto, rust or mlx, not {kind!r}")
    if kind != "mlx":
        fits = _has_published_sizes(config) and is_published_layout(path)
        if kind == "rust" and not fits:
            raise CodecError("the Rust codec knows the published Mimi only: use kind='mlx' for this one")
        if fits and (kind == "rust" or _rust_is_installed()):
            return RustMimi(path, num_codebooks)
    return MimiCodec(load_mimi(path, config, num_codebooks))


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


def _samples(pcm: ArrayLike) -> NDArray[np.float32]:
    array = np.asarray(pcm)
    if array.dtype != np.float32:
        raise AudioError(f"samples must be float32 within -1 .. 1, not {array.dtype}: convert them first")
    if array.ndim != 1:
        raise AudioError(f"samples must have one axis, not shape {list(array.shape)}: the codec takes one channel")
    if not np.isfinite(array).all():
        raise AudioError(f"sample {int(np.argmin(np.isfinite(array)))} is not a finite number")
    return np.ascontiguousarray(array)


def _codes(codes: NDArray[Any], codec: Codec) -> NDArray[np.int32]:
    if codes.ndim != 2 or len(codes) != codec.num_codebooks or not codes.shape[1]:
        raise TokenError(f"codes must have shape [{codec.num_codebooks}, frames], not {list(codes.shape)}")
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
    except Exception as error:  # whatever the bindings raise; the first line tells, the rest is a Rust backtrace
        raise CodecError(f"{what}: {(str(error) or type(error).__name__).splitlines()[0]}") from None
