"""``/api/asr-streaming``, the protocol of Kyutai's speech-to-text server: MessagePack maps in binary messages.

The client sends ``Audio{pcm}`` (floats at 24 kHz, any length), ``OggOpus{data}`` and ``Marker{id}``. The server answers
``Ready``, ``Word{text, start_time}`` at the first padding after a word, ``EndWord{stop_time}`` where the next one
begins, ``Step{step_idx, prs, buffered_pcm}`` with a model that predicts pauses, ``Marker{id}`` once everything before
it has been written down, and ``Error{message}``. Times are seconds of this client's sound.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
from aiohttp import WSCloseCode, WSMessage, WSMsgType, web
from numpy.typing import NDArray

from moshi_mlx.engine.text import EPAD, TextTokenizer
from moshi_mlx.realtime import Conversation
from moshi_mlx.tasks.dialogue import SessionFrame
from moshi_mlx.tasks.transcribe import SpeechToText

from ..connection import End, ProtocolError, Talk
from ..settings import Settings
from .kyutai import Opus, opus_missing

if TYPE_CHECKING:
    from ..server import Server

__all__ = ["KyutaiAsr", "Words", "add_routes"]

_PAD = 3
_LONGEST = 10  # seconds of sound in one message


def add_routes(app: web.Application, server: Server) -> None:
    """Let ``app`` answer ``/api/asr-streaming``, if ``server`` has a speech-to-text model."""
    service = server.stt
    if service is None:
        return

    async def asr(request: web.Request) -> web.StreamResponse:
        return await server.talk(request, KyutaiAsr, None, engine=service.engine, line=service.line)

    app.router.add_get("/api/asr-streaming", asr)


class Words:
    """Text tokens into words with the times of Kyutai's server.

    A word begins where its 0 token stands, and ends where the next one does.

    Parameters
    ----------
    tokenizer : TextTokenizer
    rate : float
        Frames a second.
    delay : float
        Seconds by which the text runs behind the sound.
    """

    def __init__(self, tokenizer: TextTokenizer, rate: float, delay: float):
        self._tokenizer, self._rate, self._delay = tokenizer, rate, delay
        self._pending: list[int] = []
        self._last = 0.0
        self._open = False

    def step(self, index: int, token: int) -> list[dict[str, Any]]:
        """Messages that follow from the text token that was written after sound frame ``index``."""
        said: list[dict[str, Any]] = []
        if token not in (EPAD, _PAD):
            self._pending.append(token)
            return said
        if self._pending:
            text = self._tokenizer.decode(self._pending).strip()
            said.append({"type": "Word", "text": text, "start_time": self._last})
            self._pending, self._open = [], True
        if token == EPAD:
            now = max(round((index + 2) / self._rate - self._delay, 4), 0.0)
            if self._open:
                said.append({"type": "EndWord", "stop_time": now})
                self._open = False
            self._last = now
        return said


class KyutaiAsr(Talk):
    """A client whose speech is written down. It may send some seconds at once: they are heard as fast as they can be.

    Parameters
    ----------
    settings : None
    *shared
        As for :class:`Talk`.
    """

    weight = 4  # MessagePack's floats take 5 bytes, and files come in blocks
    backlog = 8.0

    def __init__(self, settings: None, *shared: Any):
        super().__init__(settings, *shared)
        model = self._model
        assert isinstance(model, SpeechToText) and model.tokenizer is not None
        self._words = Words(model.tokenizer, model.frame_rate, model.audio_delay)
        self._lead = model.engine.lead
        self._delay = model.audio_delay * model.frame_rate
        self._opus: Opus | None = None
        self._fed = 0  # samples
        self._markers: deque[tuple[float, Any]] = deque()  # the frame after which each is due

    def _put(self, kind: str, **values: Any) -> None:
        self._post(msgpack.packb({"type": kind, **values}, use_single_float=True))

    def _queued(self, place: int) -> None:
        """Kyutai's clients know no queue: nothing is said until there is a place."""

    async def _settled(self) -> Settings:
        from moshi_mlx.engine.pipeline import generation_defaults

        return Settings("pcm", False, 0, generation_defaults(self._model.config))

    def _begin(self, conversation: Conversation, settings: Settings) -> None:
        self._put("Ready")

    def _take(self, received: WSMessage) -> None:
        if received.type != WSMsgType.BINARY:
            raise ProtocolError("messages here are binary: MessagePack maps with a type")
        self._wordless = 0
        try:
            given = msgpack.unpackb(received.data, max_map_len=8)
        except Exception as error:
            raise ProtocolError(f"not MessagePack: {type(error).__name__}") from None
        kind = given.get("type") if isinstance(given, dict) else None
        if kind == "Audio":
            self._sound(_samples(given.get("pcm")))
        elif kind == "OggOpus":
            if opus_missing():
                raise ProtocolError("this server has no Opus: send Audio")
            if not isinstance(given.get("data"), bytes):
                raise ProtocolError("OggOpus needs data, bytes")
            self._opus = self._opus or Opus(self._model.sample_rate)
            self._sound(self._opus.decode(given["data"]))
        elif kind == "Marker":
            frames = self._fed / self._model.frame_size
            self._markers.append((frames + self._delay, given.get("id")))
            if len(self._markers) > 1000:
                raise ProtocolError("more than 1000 markers are waiting")
        else:
            raise ProtocolError(f"unknown type of message: {str(kind)[:40]!r}")

    def _sound(self, samples: NDArray[np.float32]) -> None:
        self._fed += len(samples)
        self._hear(samples)

    def _say(self, frame: SessionFrame) -> None:
        step = frame.step
        assert step is not None
        index = step.index - self._lead
        if step.heads is not None:
            waiting = 0 if self._conversation is None else round(self._conversation.backlog * self._model.sample_rate)
            prs = [float(head[0]) for head in step.heads[0]]
            self._put("Step", step_idx=index + 1, prs=prs, buffered_pcm=waiting)
        for said in self._words.step(index, int(step.text[0])):
            self._post(msgpack.packb(said, use_single_float=True))
        while self._markers and index + 1 >= self._markers[0][0]:
            self._put("Marker", id=self._markers.popleft()[1])
        self._unsent -= 1  # no sound of it waits to be sent

    def _last_words(self, end: End) -> list[bytes | str]:
        if end.code == WSCloseCode.TRY_AGAIN_LATER:
            return [msgpack.packb({"type": "Error", "message": "no free channels"})]
        return [msgpack.packb({"type": "Error", "message": end.reason})] if end.fault else []


def _samples(pcm: Any) -> NDArray[np.float32]:
    """Samples [n] of a message; raises ProtocolError."""
    if not isinstance(pcm, list) or len(pcm) > _LONGEST * 24_000:
        raise ProtocolError(f"Audio needs pcm, a list of at most {_LONGEST} seconds of samples")
    try:
        samples = np.asarray(pcm, np.float32)
    except (TypeError, ValueError, OverflowError):
        raise ProtocolError("pcm holds something that is no number") from None
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise ProtocolError("pcm holds something that is no finite number")
    return np.clip(samples, -1, 1)
