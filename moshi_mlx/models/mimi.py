"""Mimi, the codec of the Moshi family (Défossez et al. 2024, https://arxiv.org/abs/2410.00037), in MLX.

::

    pcm > SEANet encoder > transformer > /2 > split RVQ > codes
    24 kHz      25 Hz                 12.5 Hz              [batch, codebooks, frames]
    pcm < SEANet decoder < transformer < x2 < split RVQ < codes

Everything is causal and in float32. One frame of samples gives one column of codes from the very first call, and one
column of codes gives one frame of samples: the delay is a frame, never more.

Sizes come from a configuration in the JSON structure that Kyutai's loader reads; the default is the published codec.
Weight files are read by :mod:`moshi_mlx.checkpoint.mimi`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import mlx.core as mx
import mlx.nn as nn

from ..errors import AudioError, ConfigError, StateError, TokenError
from ..layers.attention import Rope
from ..layers.conv import CausalConv, DepthwiseConvTranspose
from ..layers.rvq import SplitResidualQuantizer
from ..layers.seanet import SEANetDecoder, SEANetEncoder
from ..layers.transformer import Transformer
from ..schema import Range, check_fields, read_fields
from ..state import State, state_arrays

__all__ = ["Mimi", "MimiConfig", "MimiTransformerConfig", "QuantizerConfig", "SEANetConfig"]

# Sizes far beyond those of any codec: a file that says more is broken, or made to exhaust the machine.
Size = Annotated[int, Range(1, 2**16)]
Kernel = Annotated[int, Range(1, 1024)]


@dataclass(frozen=True)
class SEANetConfig:
    """The convolutional encoder and decoder; the field names are those of Kyutai's configuration."""

    channels: Annotated[int, Range(1, 64)] = 1
    dimension: Size = 512
    causal: Literal[True] = True
    n_filters: Size = 64
    n_residual_layers: Annotated[int, Range(0, 64)] = 1
    activation: Literal["ELU"] = "ELU"
    compress: Size = 2
    dilation_base: Kernel = 2
    disable_norm_outer_blocks: Annotated[int, Range(0, 1024)] = 0
    kernel_size: Kernel = 7
    residual_kernel_size: Kernel = 3
    last_kernel_size: Kernel = 3
    # A norm is folded into the weights when they are read, so both mean the same network.
    norm: Literal["none", "weight_norm"] = "none"
    pad_mode: Literal["constant"] = "constant"
    ratios: tuple[int, ...] = (8, 6, 5, 4)
    true_skip: Literal[True] = True

    def __post_init__(self) -> None:
        check_fields(self, "seanet")
        if not self.ratios or min(self.ratios) < 1:
            raise ConfigError(f"seanet.ratios must be a list of positive integers, not {list(self.ratios)}")
        _at_most("the number of seanet.ratios", len(self.ratios), 16)
        _at_most("the largest of seanet.ratios", max(self.ratios), 1024)
        if self.n_filters % self.compress:
            raise ConfigError(f"seanet.n_filters {self.n_filters} must be a multiple of compress {self.compress}")
        _at_most("the channels that seanet.n_filters and seanet.ratios make", self.n_filters << len(self.ratios), 2**16)
        reach = self.dilation_base ** (self.n_residual_layers - 1) if self.n_residual_layers else 0
        _at_most("the dilation that seanet.n_residual_layers and seanet.dilation_base make", reach, 2**16)


@dataclass(frozen=True)
class QuantizerConfig:
    """The split residual vector quantizer. ``n_q`` counts all codebooks, ``n_q_semantic`` those of the first group."""

    dimension: Size = 256
    n_q: Kernel = 32
    bins: Annotated[int, Range(1, 2**20)] = 2048
    input_dimension: Size = 512
    output_dimension: Size = 512
    n_q_semantic: Size = 1

    def __post_init__(self) -> None:
        check_fields(self, "quantizer")
        if self.n_q < self.n_q_semantic:
            raise ConfigError(f"quantizer.n_q {self.n_q} is less than n_q_semantic {self.n_q_semantic}")


@dataclass(frozen=True)
class MimiTransformerConfig:
    """The two transformers, after the encoder and before the decoder; they differ in their weights only."""

    d_model: Size = 512
    num_heads: Size = 8
    num_layers: Annotated[int, Range(0, 256)] = 8
    causal: Literal[True] = True
    layer_scale: Annotated[float, Range(0, 1e6, above=True)] | None = 0.01
    context: Annotated[int, Range(1, 100_000)] = 250
    conv_layout: Literal[True] = True
    max_period: Annotated[float, Range(0, 1e12, above=True)] = 10000
    gating: Literal["none"] = "none"
    norm: Literal["layer_norm"] = "layer_norm"
    positional_embedding: Literal["rope"] = "rope"
    dim_feedforward: Annotated[int, Range(1, 2**18)] = 2048
    input_dimension: Size = 512
    output_dimensions: tuple[int, ...] = (512,)

    def __post_init__(self) -> None:
        check_fields(self, "transformer")
        if self.d_model % self.num_heads or self.d_model // self.num_heads % 2:
            raise ConfigError(
                f"transformer.d_model {self.d_model} must split into num_heads {self.num_heads} of an even size"
            )
        if self.input_dimension != self.d_model or self.output_dimensions != (self.d_model,):
            raise ConfigError(
                f"transformer.input_dimension {self.input_dimension} and output_dimensions "
                f"{list(self.output_dimensions)} must be d_model {self.d_model}: projections are not supported"
            )


@dataclass(frozen=True)
class MimiConfig:
    """A whole codec; the default is the published Mimi (24 kHz, 12.5 frames a second, 32 codebooks of 2048)."""

    sample_rate: Annotated[int, Range(1, 768_000)] = 24000
    channels: Annotated[int, Range(1, 64)] = 1
    frame_rate: Annotated[float, Range(0, 2**16, above=True)] = 12.5
    seanet: SEANetConfig = field(default_factory=SEANetConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    transformer: MimiTransformerConfig = field(default_factory=MimiTransformerConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.seanet.channels != self.channels:
            raise ConfigError(f"seanet.channels {self.seanet.channels} differs from channels {self.channels}")
        for name, value in (
            ("quantizer.input_dimension", self.quantizer.input_dimension),
            ("quantizer.output_dimension", self.quantizer.output_dimension),
            ("transformer.d_model", self.transformer.d_model),
        ):
            if value != self.seanet.dimension:
                raise ConfigError(f"{name} {value} differs from seanet.dimension {self.seanet.dimension}")
        exact = self.sample_rate / self.frame_rate
        _at_most("the samples of a frame, sample_rate / frame_rate,", exact, 2**20)
        if exact != self.frame_size or self.frame_size % self.hop_length:
            raise ConfigError(
                f"a frame of sample_rate {self.sample_rate} / frame_rate {self.frame_rate} = {exact:g} samples must be "
                f"a whole multiple of the product of seanet.ratios, {self.hop_length}"
            )

    @property
    def frame_size(self) -> int:
        """Samples per frame."""
        return round(self.sample_rate / self.frame_rate)

    @property
    def hop_length(self) -> int:
        """Samples per latent of the SEANet."""
        return math.prod(self.seanet.ratios)

    @property
    def resample_stride(self) -> int:
        """Latents per frame."""
        return self.frame_size // self.hop_length

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MimiConfig:
        """Read the JSON structure of Kyutai's Mimi configuration.

        Raises
        ------
        ConfigError
            If a key is unknown or missing, or a value is of a wrong type, unsupported, or contradicts another.
        """
        config, published = cls(**read_fields(cls, data, whole="mimi_config.json")), cls().to_dict()
        for part, wanted in {"": published, **published}.items():
            for key in wanted if isinstance(wanted, dict) else ():
                if key not in (data[part] if part else data):
                    raise ConfigError(f"mimi_config.json lacks {part and part + '.'}{key}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The JSON structure that :meth:`from_dict` and Kyutai's loader read."""
        data: dict[str, Any] = _plain(asdict(self))
        if self.quantizer.n_q_semantic == QuantizerConfig.n_q_semantic:
            del data["quantizer"]["n_q_semantic"]  # Kyutai's file does not say it
        return data


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    return list(data) if isinstance(data, tuple) else data


def _at_most(name: str, value: float, most: float) -> None:
    if not value <= most:
        raise ConfigError(f"{name} must be at most {most:g}, found {value}")


class Mimi(nn.Module):
    """Waveforms to codes and back.

    Parameters
    ----------
    config : MimiConfig
    num_codebooks : int or None
        How many of the configuration's codebooks to use; None: all. :attr:`config` then counts these.

    Notes
    -----
    Encoding and decoding have separate states, and both may run at the same time.
    """

    def __init__(self, config: MimiConfig | None = None, num_codebooks: int | None = None):
        super().__init__()
        config = config or MimiConfig()
        quantizer, seanet, transformer = config.quantizer, config.seanet, config.transformer
        if num_codebooks is None:
            num_codebooks = quantizer.n_q
        if not quantizer.n_q_semantic <= num_codebooks <= quantizer.n_q:
            raise ConfigError(
                f"num_codebooks {num_codebooks} is not between {quantizer.n_q_semantic} and {quantizer.n_q}"
            )
        self.config = replace(config, quantizer=replace(quantizer, n_q=num_codebooks))
        sizes: dict[str, Any] = {
            "channels": seanet.channels,
            "dimension": seanet.dimension,
            "n_filters": seanet.n_filters,
            "ratios": seanet.ratios,
            "n_residual_layers": seanet.n_residual_layers,
            "kernel_size": seanet.kernel_size,
            "residual_kernel_size": seanet.residual_kernel_size,
            "last_kernel_size": seanet.last_kernel_size,
            "dilation_base": seanet.dilation_base,
            "compress": seanet.compress,
        }
        self.encoder = SEANetEncoder(**sizes)
        self.decoder = SEANetDecoder(**sizes)
        for name in ("encoder_transformer", "decoder_transformer"):
            layers = Transformer(
                transformer.num_layers,
                transformer.d_model,
                transformer.num_heads,
                transformer.dim_feedforward,
                context=transformer.context,
                rope=Rope(interleaved=True, max_period=transformer.max_period),
                gated=False,
                norm=transformer.norm,
                layer_scale=transformer.layer_scale,
            )
            setattr(self, name, layers)
        stride = config.resample_stride
        if stride > 1:
            self.downsample = CausalConv(
                seanet.dimension, seanet.dimension, 2 * stride, stride=stride, bias=False, padding="replicate"
            )
            self.upsample = DepthwiseConvTranspose(seanet.dimension, 2 * stride, stride=stride)
        self.quantizer = SplitResidualQuantizer(
            quantizer.input_dimension,
            quantizer.dimension,
            quantizer.output_dimension,
            num_codebooks,
            quantizer.bins,
            semantic=quantizer.n_q_semantic,
        )

    @property
    def sample_rate(self) -> int:
        """Samples a second."""
        return self.config.sample_rate

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.config.frame_rate

    @property
    def frame_size(self) -> int:
        """Samples per frame."""
        return self.config.frame_size

    @property
    def num_codebooks(self) -> int:
        """Codes per frame."""
        return self.config.quantizer.n_q

    @property
    def card(self) -> int:
        """Entries per codebook: codes are 0 .. card - 1."""
        return self.config.quantizer.bins

    # Whole sequences

    def encode(self, pcm: mx.array) -> mx.array:
        """Codes of a whole waveform.

        Parameters
        ----------
        pcm : mx.array [batch, channels, samples], float32
            At :attr:`sample_rate`; zeros are added on the right up to a whole frame.

        Returns
        -------
        mx.array [batch, num_codebooks, frames], int32
        """
        self._check_pcm(pcm)
        short = -pcm.shape[-1] % self.frame_size
        return self.quantizer.encode(self.latent(mx.pad(pcm, [(0, 0), (0, 0), (0, short)])))

    def latent(self, pcm: mx.array) -> mx.array:
        """What the quantizer sees, [batch, frames, dimension], of whole frames ``pcm`` [batch, channels, samples]."""
        x = self.encoder_transformer(self.encoder(pcm.swapaxes(1, 2)))
        out: mx.array = self.downsample(x) if "downsample" in self else x
        return out

    def decode(self, codes: mx.array) -> mx.array:
        """Waveform of a whole sequence of codes.

        Parameters
        ----------
        codes : mx.array [batch, n, frames], integer
            The first n codebooks; n may be less than :attr:`num_codebooks`. Each 0 .. card - 1, which is not checked.

        Returns
        -------
        mx.array [batch, channels, frames * frame_size], float32
        """
        self._check_codes(codes)
        return self.synthesize(self.quantizer.decode(codes))

    def synthesize(self, latent: mx.array) -> mx.array:
        """Waveform [batch, channels, samples] of a quantized latent [batch, frames, dimension]."""
        x = self.upsample(latent) if "upsample" in self else latent
        pcm: mx.array = self.decoder(self.decoder_transformer(x)).swapaxes(1, 2)
        return pcm

    # Frame by frame

    def init_encoder_state(self, batch: int = 1) -> State:
        """The state of :meth:`encode_step`. Its size never changes."""
        state: State = {
            "seanet": self.encoder.init_state(batch),
            "transformer": self.encoder_transformer.init_state(batch),
        }
        if "downsample" in self:
            state["downsample"] = self.downsample.init_state(batch)
        return state

    def init_decoder_state(self, batch: int = 1) -> State:
        """The state of :meth:`decode_step`. Its size never changes."""
        state: State = {
            "transformer": self.decoder_transformer.init_state(batch),
            "seanet": self.decoder.init_state(batch),
        }
        if "upsample" in self:
            state["upsample"] = self.upsample.init_state(batch)
        return state

    def encode_step(self, pcm: mx.array, state: State) -> mx.array:
        """Codes [batch, num_codebooks, frames] of the next frames ``pcm`` [batch, channels, frames * frame_size]."""
        self._check_pcm(pcm)
        if pcm.shape[-1] % self.frame_size:
            raise AudioError(
                f"streaming takes whole frames of {self.frame_size} samples, not {pcm.shape[-1]}; buffer the rest"
            )
        _check_state(state, pcm.shape[0])
        x = self.encoder.step(pcm.swapaxes(1, 2), state["seanet"])
        x = self.encoder_transformer.step(x, state["transformer"])
        if "downsample" in self:
            x = self.downsample.step(x, state["downsample"])
        return self.quantizer.encode(x)

    def decode_step(self, codes: mx.array, state: State) -> mx.array:
        """The next samples [batch, channels, frames * frame_size] from ``codes`` [batch, n, frames]."""
        self._check_codes(codes)
        _check_state(state, codes.shape[0])
        x = self.quantizer.decode(codes)
        if "upsample" in self:
            x = self.upsample.step(x, state["upsample"])
        x = self.decoder_transformer.step(x, state["transformer"])
        return self.decoder.step(x, state["seanet"]).swapaxes(1, 2)

    def _check_pcm(self, pcm: mx.array) -> None:
        if pcm.ndim != 3 or pcm.shape[1] != self.config.channels or 0 in pcm.shape:
            raise AudioError(
                f"Mimi encodes samples of shape [batch, {self.config.channels}, samples], not {list(pcm.shape)}"
            )
        if pcm.dtype != mx.float32:
            raise AudioError(f"Mimi encodes float32 samples, not {pcm.dtype}")

    def _check_codes(self, codes: mx.array) -> None:
        most, least = self.num_codebooks, self.config.quantizer.n_q_semantic
        if codes.ndim != 3 or not least <= codes.shape[1] <= most or 0 in codes.shape:
            raise TokenError(f"Mimi decodes codes of shape [batch, {least} to {most}, frames], not {list(codes.shape)}")
        if not mx.issubdtype(codes.dtype, mx.integer):
            raise TokenError(f"Mimi decodes integer codes, not {codes.dtype}")


def _check_state(state: State, batch: int) -> None:
    held = state_arrays(state)[0].shape[0]
    if held != batch:
        raise StateError(f"the state holds {held} sequences, the input {batch}")
