"""``/v1/audio/speech`` and ``/v1/audio/transcriptions``, OpenAI's requests for text to speech and speech to text.

Speech is sent as it is spoken, as a file or as events (``stream_format``). A transcription is json, text, srt, vtt or
verbose_json, or, with ``stream``, events with the words as they are found. An unknown voice is an error.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import soundfile
from aiohttp import BodyPartReader, web
from numpy.typing import NDArray

from moshi_mlx.engine.text import Word
from moshi_mlx.errors import MoshiError
from moshi_mlx.tasks.speak import DEFAULT_VOICE, Manner, Spoken
from moshi_mlx.tasks.transcribe import Heard, SpeechToText
from moshi_mlx_app.recording.audio_files import Recording
from moshi_mlx_app.recording.subtitles import lines, written
from moshi_mlx_app.recording.wav import header

from ..speech import SpeechService, SpokenText

if TYPE_CHECKING:
    from ..server import Server

__all__ = ["add_routes"]

_LONGEST_BODY, _LONGEST_TEXT = 1 << 16, 4096
_LONGEST_UPLOAD = 100 << 20
_TYPES = {"wav": "audio/wav", "pcm": "audio/pcm", "flac": "audio/flac", "mp3": "audio/mpeg", "opus": "audio/ogg"}
_FILES = {"flac": ("FLAC", "PCM_16"), "mp3": ("MP3", "MPEG_LAYER_III"), "opus": ("OGG", "OPUS")}
_RESPONSES = ("json", "text", "srt", "vtt", "verbose_json")
_FIELDS = 1 << 12  # bytes of a form's field
_WAITING = 8  # recordings that are here at once


class _Refused(Exception):
    """A request that cannot be done: what OpenAI's clients raise as BadRequestError and its like."""

    def __init__(self, said: str, param: str | None = None, code: str = "invalid_value", status: int = 400):
        super().__init__(said)
        self.param, self.code, self.status = param, code, status

    def response(self) -> web.Response:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return web.json_response({"error": error}, status=self.status)


def add_routes(app: web.Application, server: Server) -> None:
    """Let ``app`` answer, if ``server`` has the models."""
    tts, stt = server.tts, server.stt
    if tts is not None:
        speaker = tts

        async def speech(request: web.Request) -> web.StreamResponse:
            try:
                return await _speech(speaker, request)
            except _Refused as refused:
                return refused.response()

        app.router.add_post("/v1/audio/speech", speech)
    if stt is not None:
        model = stt.engine.model
        assert isinstance(model, SpeechToText)
        writer = _Writer(model, _WAITING)

        async def transcriptions(request: web.Request) -> web.StreamResponse:
            try:
                return await _transcription(writer, request)
            except _Refused as refused:
                return refused.response()

        async def stop(app: web.Application) -> None:
            writer.stop()

        app.router.add_post("/v1/audio/transcriptions", transcriptions)
        app.on_shutdown.append(stop)


# Text to speech


class _Sound:
    """Blocks of samples as the bytes of a file that has no known end.

    Parameters
    ----------
    form : str
        One of ``_TYPES``.
    rate : int
    """

    def __init__(self, form: str, rate: int):
        self._head = header(rate, 1, None) if form == "wav" else b""
        self._bytes, self._file = io.BytesIO(), None
        if form in _FILES:
            kind, subtype = _FILES[form]
            self._file = soundfile.SoundFile(self._bytes, "w", rate, 1, format=kind, subtype=subtype)
        self._sent = 0

    def take(self, pcm: NDArray[np.float32]) -> bytes:
        """The next bytes, none if the encoder keeps them for now."""
        if self._file is None:
            head, self._head = self._head, b""
            values: NDArray[np.int16] = np.rint(np.clip(pcm, -1, 1) * 32767).astype("<i2")
            return head + values.tobytes()
        self._file.write(pcm)
        return self._rest()

    def end(self) -> bytes:
        """The last bytes."""
        if self._file is None:
            return self._head
        self._file.close()
        return self._rest()

    def _rest(self) -> bytes:
        written = self._bytes.getvalue()
        if not self._sent and any(name in written[:200] for name in (b"Info", b"Xing")):
            # An mp3 begins with a frame that says how long it is, which nobody knows yet.
            second = written.find(written[:2], 4)
            if second < 0:
                return b""
            self._sent = second
        found = written[self._sent :]
        self._sent += len(found)
        return found


async def _speech(service: SpeechService, request: web.Request) -> web.StreamResponse:
    given = await _json(request)
    text, form = given.get("input"), given.get("response_format") or "mp3"
    if not isinstance(text, str) or not text.strip():
        raise _Refused("input is the text to speak, a string with words", "input")
    if len(text) > _LONGEST_TEXT:
        raise _Refused(f"input has {len(text):,} characters, and at most {_LONGEST_TEXT:,} are spoken at once", "input")
    if form not in _TYPES:
        raise _Refused(f"response_format {form!r:.40} is not one of {', '.join(_TYPES)}", "response_format")
    if given.get("speed") not in (None, 1):
        raise _Refused("these models have one speed: leave speed out", "speed")
    stream = given.get("stream_format") or "audio"
    if stream not in ("audio", "sse"):
        raise _Refused(f"stream_format {stream!r:.40} is not audio or sse", "stream_format")
    client: SpokenText | None = None
    try:
        manner = await asyncio.to_thread(_manner, service, given.get("voice"))
        client = SpokenText(service, manner)
        if not client.feed(text):
            raise _Refused("input has nothing that can be spoken", "input")
        client.utterance.finish()
        first = await client.spoken.get()
        if isinstance(first, Exception):
            raise _Refused(str(first), code="server_error", status=500)
        kind = "text/event-stream" if stream == "sse" else _TYPES[form]
        response = web.StreamResponse(headers={"Content-Type": kind})
        await response.prepare(request)
        sound = _Sound(form, service.model.sample_rate)
        spoken: Spoken | Exception = first
        while not isinstance(spoken, Exception):
            if spoken.pcm is not None:
                await _send(response, stream, sound.take(spoken.pcm))
                client.utterance.sent()
            if spoken.last:
                break
            spoken = await client.spoken.get()
        if isinstance(spoken, Exception):  # too late for another status: the answer is cut off
            assert request.transport is not None
            request.transport.abort()
            return response
        await _send(response, stream, sound.end())
        if stream == "sse":
            words = len(text.split())
            usage = {"input_tokens": words, "output_tokens": 0, "total_tokens": words}
            await _event(response, {"type": "speech.audio.done", "usage": usage})
        await response.write_eof()
        return response
    except MoshiError as error:
        busy = service.free <= 0
        param = None if busy else "voice"
        raise _Refused(str(error), param, "server_busy" if busy else "invalid_value", 503 if busy else 400) from None
    finally:
        if client is not None:
            client.utterance.end()


def _manner(service: SpeechService, voice: Any) -> Manner:
    """How it is spoken. May fetch a voice; "default" is the model's own."""
    model = service.model
    name = voice.get("id") if isinstance(voice, dict) else voice
    if not isinstance(name, str) or not name:
        raise _Refused('voice is the name of one, or "default"', "voice")
    if name == "default":
        name = DEFAULT_VOICE if model.has_speakers else ""
    return model.manner(voice=model.voice(*([name] * 2 if name else []), source=service.voices))


async def _send(response: web.StreamResponse, stream: str, data: bytes) -> None:
    if data and stream == "sse":
        await _event(response, {"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})
    elif data:
        await response.write(data)


async def _event(response: web.StreamResponse, about: Mapping[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(about).encode() + b"\n\n")


async def _json(request: web.Request) -> dict[str, Any]:
    body = bytearray()
    async for chunk in request.content.iter_chunked(1 << 14):
        body += chunk
        if len(body) > _LONGEST_BODY:
            raise _Refused(f"the body has more than {_LONGEST_BODY:,} bytes", status=413)
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise _Refused("the body is not JSON") from None
    if not isinstance(given, dict):
        raise _Refused("the body is not a JSON object")
    return given


# Speech to text


class _Writer:
    """Writes recordings down, one after the other, in a thread of its own.

    Parameters
    ----------
    model : SpeechToText
    waiting : int
        How many requests may be here at once.
    """

    def __init__(self, model: SpeechToText, waiting: int):
        self.model, self._free = model, waiting
        self._thread = ThreadPoolExecutor(1, "moshi transcriptions")
        self._stopped = threading.Event()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Room for a request; raises _Refused."""
        if not self._free:
            raise _Refused("too many recordings are waiting: try again", code="server_busy", status=503)
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1

    async def heard(self, path: Path) -> AsyncIterator[Heard]:
        """What is found in a recording, as it is found; a client that goes ends it."""
        loop, gone = asyncio.get_running_loop(), threading.Event()
        found: asyncio.Queue[Heard | Exception | None] = asyncio.Queue()

        def tell(result: Heard | Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(found.put_nowait, result)

        def run() -> None:
            try:
                with Recording(path) as recording:
                    frames = recording.frames(self.model.sample_rate, self.model.frame_size)
                    sounds = (frame for frame in frames if not self._over(gone))
                    self.model.transcribe_all([sounds], on_heard=lambda _, heard: tell(heard))
                tell(None)
            except _Gone:
                pass
            except Exception as error:
                tell(error)

        task = loop.run_in_executor(self._thread, run)
        try:
            while (result := await found.get()) is not None:
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            gone.set()
            await asyncio.shield(asyncio.gather(task, return_exceptions=True))

    def _over(self, gone: threading.Event) -> bool:
        if gone.is_set() or self._stopped.is_set():
            raise _Gone
        return False

    def stop(self) -> None:
        """End what is being written down."""
        self._stopped.set()
        self._thread.shutdown(wait=False, cancel_futures=True)


class _Gone(Exception):
    """The client, or the server."""


async def _transcription(writer: _Writer, request: web.Request) -> web.StreamResponse:
    if request.content_type != "multipart/form-data":
        raise _Refused("a transcription is asked for by multipart/form-data with a file")
    with writer.place(), tempfile.TemporaryDirectory(prefix="moshi-") as folder:
        path, form = await _form(request, Path(folder))
        shape = form.get("response_format", ["json"])[-1]
        if shape not in _RESPONSES:
            raise _Refused(f"response_format {shape!r:.40} is not one of {', '.join(_RESPONSES)}", "response_format")
        fine = {*form.get("timestamp_granularities[]", []), *form.get("timestamp_granularities", [])} or {"segment"}
        if not fine <= {"word", "segment"}:
            raise _Refused("timestamp_granularities are word and segment", "timestamp_granularities")
        try:
            if form.get("stream", ["false"])[-1].lower() in ("true", "1"):
                return await _streamed(writer, path, request)
            words: list[Word] = []
            turns: list[float] = []
            seconds = 0.0
            async for heard in writer.heard(path):
                words += heard.words
                seconds = heard.time
                if heard.turn_ended:
                    turns.append(heard.time)
        except (MoshiError, OSError) as error:
            said = str(error).replace(str(path), "the file")
            raise _Refused(said, "file") from None
        return _shaped(shape, words, turns, seconds, fine)


async def _form(request: web.Request, folder: Path) -> tuple[Path, dict[str, list[str]]]:
    """The file, written into a folder, and the other fields."""
    path, form, size = folder / "upload", dict[str, list[str]](), 0
    try:
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader):
                raise _Refused("the form has a form inside")
            with open(path, "wb") if part.name == "file" else io.BytesIO() as file:
                size = await _copied(part, file, size)
                if isinstance(file, io.BytesIO):
                    form.setdefault(part.name or "", []).append(file.getvalue().decode("utf-8", "replace"))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise _Refused(f"the form cannot be read: {error}") from None
    if not path.exists():
        raise _Refused("the form has no file", "file", "missing_required_parameter")
    return path, form


async def _copied(part: BodyPartReader, file: IO[bytes], size: int) -> int:
    most = _FIELDS if isinstance(file, io.BytesIO) else _LONGEST_UPLOAD
    while chunk := await part.read_chunk(1 << 16):
        size += len(chunk)
        if size > _LONGEST_UPLOAD or file.tell() + len(chunk) > most:
            raise _Refused(f"{part.name or 'a field'} has more than {most:,} bytes", part.name, status=413)
        file.write(chunk)
    return size


def _shaped(shape: str, words: list[Word], turns: list[float], seconds: float, fine: set[str]) -> web.Response:
    """The whole answer."""
    text = " ".join(word.text.strip() for word in words)
    if shape == "text":
        return web.Response(text=text + "\n")
    if shape in ("srt", "vtt"):
        return web.Response(text=written(shape, words, turns))
    usage = {"type": "duration", "seconds": round(seconds)}
    if shape == "json":
        return web.json_response({"text": text, "usage": usage})
    found: dict[str, Any] = {"text": text, "duration": round(seconds, 3), "language": "", "usage": usage}
    if "word" in fine:
        found["words"] = [
            {"word": word.text.strip(), "start": round(word.start, 3), "end": round(word.end, 3)} for word in words
        ]
    if "segment" in fine:
        found["segments"] = [_segment(number, line) for number, line in enumerate(lines(words, turns))]
    return web.json_response(found)


def _segment(number: int, words: list[Word]) -> dict[str, Any]:
    """A turn. These models give no tokens or likelihoods of Whisper's."""
    return {
        "id": number, "seek": 0, "start": round(words[0].start, 3), "end": round(words[-1].end, 3),
        "text": " ".join(word.text.strip() for word in words), "tokens": [], "temperature": 0.0,
        "avg_logprob": 0.0, "compression_ratio": 0.0, "no_speech_prob": 0.0,
    }  # fmt: skip


async def _streamed(writer: _Writer, path: Path, request: web.Request) -> web.StreamResponse:
    """Words as they are found."""
    response: web.StreamResponse | None = None
    said = ""
    async for heard in writer.heard(path):
        if response is None:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
        for word in heard.words:
            delta = f"{' ' if said else ''}{word.text.strip()}"
            said += delta
            await _event(response, {"type": "transcript.text.delta", "delta": delta})
    if response is None:
        raise _Refused("the file holds no sound", "file")
    await _event(response, {"type": "transcript.text.done", "text": said})
    await response.write_eof()
    return response
