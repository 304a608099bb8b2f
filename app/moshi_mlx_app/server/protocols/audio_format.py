"""Sound as OpenAI's protocols send it: base64 of 16-bit PCM, μ-law or A-law, at a rate of the client's choice."""

from __future__ import annotations

import base64
import binascii
import io
from functools import cache

import numpy as np
from numpy.typing import NDArray

from moshi_mlx_app.audio.resampling import Resampler

__all__ = ["AudioFormat"]

Samples = NDArray[np.float32]
_FULL_SCALE = 32768.0
_G711 = {"audio/pcmu": "ULAW", "audio/pcma": "ALAW"}


class AudioFormat:
    """One direction of one connection, or both.

    Parameters
    ----------
    name : {"audio/pcm", "audio/pcmu", "audio/pcma"}
    rate : int
        Hertz: 16,000 or 24,000, of G.711 8,000.
    model_rate : int
        Hertz, of the model's samples.

    Raises
    ------
    ValueError
        If there is no such format.
    """

    def __init__(self, name: str, rate: int, model_rate: int):
        rates = {"audio/pcm": (16_000, 24_000), "audio/pcmu": (8_000,), "audio/pcma": (8_000,)}.get(name, ())
        if rate not in rates:
            raise ValueError(f"{name} at {rate} Hz is not an audio format of this server")
        self.name, self.rate = name, rate
        self._from_client, self._to_client = Resampler(rate, model_rate), Resampler(model_rate, rate)

    def decode(self, text: str) -> Samples:
        """Samples [n], float32, at the model's rate.

        Raises
        ------
        ValueError
            If it is not base64, or no whole number of samples.
        """
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"not base64: {error}") from None
        if self.name in _G711:
            pcm = _tables(self.name)[1][np.frombuffer(data, np.uint8)]
        elif len(data) % 2:
            raise ValueError(f"{len(data)} bytes are no whole number of 16-bit samples")
        else:
            pcm = np.frombuffer(data, "<i2")
        return self._from_client(pcm.astype(np.float32) / _FULL_SCALE)

    def encode(self, frame: Samples) -> str:
        """A frame [frame_size], float32, at the model's rate; where rates differ, the resampler holds some back."""
        samples = self._to_client(np.ascontiguousarray(frame, np.float32))
        pcm = np.clip(np.rint(samples * _FULL_SCALE), -_FULL_SCALE, _FULL_SCALE - 1).astype("<i2")
        data = _tables(self.name)[0][pcm.view("<u2")] if self.name in _G711 else pcm
        return base64.b64encode(data.tobytes()).decode("ascii")


@cache
def _tables(name: str) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    """Codes of all 16-bit samples, read as unsigned, and samples of all codes: G.711, as libsndfile writes it."""
    import soundfile

    every = np.arange(65_536, dtype=np.uint16).view(np.int16)
    written = io.BytesIO()
    soundfile.write(written, every, 8_000, format="RAW", subtype=_G711[name])
    codes = np.frombuffer(written.getvalue(), np.uint8)
    read = io.BytesIO(bytes(range(256)))
    samples = soundfile.read(read, dtype="int16", channels=1, samplerate=8_000, format="RAW", subtype=_G711[name])[0]
    return codes, samples
