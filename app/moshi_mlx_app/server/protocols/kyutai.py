"""Messages on the WebSocket: the first byte says what the rest is.

Kinds 0 to 6 are Kyutai's (its Rust server, Python server and web client). 0x10 and 0x11 are this project's; they are
sent only to who asks for them in the query, because Kyutai's page stops at kinds that it does not know.
"""

from __future__ import annotations

import enum
import json
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Control", "Kind", "Opus", "Pcm", "ProtocolError", "Sound", "message", "opus_missing", "read_json"]

Samples = NDArray[np.float32]
_FULL_SCALE = 32768.0


class ProtocolError(Exception):
    """The other side sent something that this protocol has no place for."""


class Kind(enum.IntEnum):
    """First byte of a message."""

    HANDSHAKE = 0x00
    AUDIO = 0x01
    TEXT = 0x02
    CONTROL = 0x03
    METADATA = 0x04
    ERROR = 0x05
    PING = 0x06
    PCM = 0x10
    EVENT = 0x11


class Control(enum.IntEnum):
    """Second byte of a control message, as in Kyutai's page."""

    START = 0
    END_TURN = 1
    PAUSE = 2
    RESTART = 3


def message(kind: Kind, content: bytes | str | dict[str, Any] = b"") -> bytes:
    """One message: text as UTF-8, a dict as JSON."""
    if isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if isinstance(content, str):
        content = content.encode("utf-8", "replace")
    return bytes([kind]) + content


def read_json(content: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises
    ------
    ProtocolError
        If it is anything else.
    """
    try:
        value = json.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {' '.join(str(error).split())[:100]}") from None
    if not isinstance(value, dict):
        raise ProtocolError("not a JSON object")
    return value


class Sound(Protocol):
    """One connection's sound, both ways. Each direction belongs to one thread at a time.

    Attributes
    ----------
    name : str
        As in the query and the metadata.
    kind : Kind
        Of its messages.
    """

    name: str
    kind: Kind

    def decode(self, content: bytes) -> Samples:
        """Samples [n], float32, of one message; raises ProtocolError."""

    def encode(self, frame: Samples) -> bytes:
        """Content of the message for one frame [frame_size], float32."""


class Pcm:
    """Little-endian 16-bit samples as they are."""

    name, kind = "pcm", Kind.PCM

    def decode(self, content: bytes) -> Samples:
        if len(content) % 2:
            raise ProtocolError(f"{len(content)} bytes are no whole number of 16-bit samples")
        return np.frombuffer(content, "<i2").astype(np.float32) / _FULL_SCALE

    def encode(self, frame: Samples) -> bytes:
        return bytes(np.clip(np.rint(frame * _FULL_SCALE), -_FULL_SCALE, _FULL_SCALE - 1).astype("<i2").tobytes())


def opus_missing() -> str:
    """Why there is no Opus here; empty if there is."""
    try:
        import sphn  # noqa: F401
    except ImportError as error:
        return f"this server has no Opus ({error}): ask for uncompressed sound with audio=pcm"
    return ""


class Opus:
    """A stream of Ogg/Opus pages, by Kyutai's sphn.

    Parameters
    ----------
    sample_rate : int
        Hertz; one of Opus's.
    """

    name, kind = "opus", Kind.AUDIO

    def __init__(self, sample_rate: int):
        import sphn

        self._reader = sphn.OpusStreamReader(sample_rate)
        self._writer = sphn.OpusStreamWriter(sample_rate)

    def decode(self, content: bytes) -> Samples:
        try:
            return np.asarray(self._reader.append_bytes(content), np.float32).reshape(-1)
        except Exception as error:  # pyo3 has no common class for what Rust returns
            raise ProtocolError(f"not Ogg/Opus: {' '.join(str(error).split())[:100]}") from None

    def encode(self, frame: Samples) -> bytes:
        return bytes(self._writer.append_pcm(np.ascontiguousarray(frame, np.float32)))
