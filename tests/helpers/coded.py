"""A codec whose codes are written in the samples: what a model reads is then known to the last code.

It is the stand-in of `tests/golden/make_translate.py`, for models of this project.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from moshi_mlx.codec.base import Codec
from moshi_mlx.models.mimi import MimiConfig
from moshi_mlx.state import State

__all__ = ["Coded"]


class Coded(Codec):
    """Code k of a frame is its sample k in steps of 1 / card, so silence is code 0; decoding is the reverse.

    Parameters
    ----------
    card, books : int
    memory : bool
        Codes also depend on how many frames the encoder has heard, as those of a real codec do.
    """

    kind = "numpy"

    def __init__(self, card: int, books: int, *, memory: bool = False):
        usual = MimiConfig()
        super().__init__(replace(usual, quantizer=replace(usual.quantizer, bins=card, n_q=books)))
        self.memory = memory

    def init_encoder_state(self, batch: int = 1) -> State:
        return {"transformer": {"offset": np.zeros(batch, np.int32)}}

    def init_decoder_state(self, batch: int = 1) -> State:
        return {"transformer": {"offset": np.zeros(batch, np.int32)}}

    def frame(self, codes: Any) -> np.ndarray:
        """A frame of sound with these codes."""
        pcm = np.zeros(self.frame_size, np.float32)
        pcm[: self.num_codebooks] = np.asarray(codes) / self.card
        return pcm

    def _encode(self, pcm: np.ndarray, state: State, rows: Any) -> np.ndarray:
        heard = state["transformer"]["offset"]
        codes = np.rint(pcm[:, : self.num_codebooks] * self.card).astype(np.int32)
        if self.memory:
            codes = (codes + heard[rows][:, None]) % self.card
        heard[rows] += 1
        return codes[:, :, None]

    def _decode(self, codes: np.ndarray, state: State, rows: Any) -> np.ndarray:
        state["transformer"]["offset"][rows] += 1
        return np.stack([self.frame(one[:, 0]) for one in codes])
