"""What OpenAI's two WebSocket protocols have in common, and ``/v1/models``.

Messages are JSON objects with a ``type``. One that is wrong gets an ``error`` event, and the connection goes on. The
model hears and speaks all the time, frame by frame; a client may send its sound in bursts, or none while nobody speaks:
then the model hears silence, at the pace of the clock.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from aiohttp import WSCloseCode, WSMessage, WSMsgType, web
from numpy.typing import NDArray

from moshi_mlx.realtime import Captions, Conversation
from moshi_mlx.tasks.dialogue import SessionFrame

from ..connection import End, ProtocolError, Talk
from ..roles import Roles
from ..settings import BadQuery, Settings, read_settings
from .audio_format import AudioFormat

if TYPE_CHECKING:
    from ..server import Server

__all__ = ["EventError", "EventTalk", "Pauses", "add_routes", "conversations", "field", "new_id"]

_GRACE = 0.2  # seconds that sound may be late before silence takes its place
_PACE = 0.08  # seconds between two looks at it
_SOUND = 0.003  # RMS of a frame; what the codec makes of silence is below
_PAUSE = 0.64  # seconds without a word or sound that end what the model says
_CODES = {WSCloseCode.TRY_AGAIN_LATER: "server_busy", WSCloseCode.INTERNAL_ERROR: "server_error"}


def add_routes(app: web.Application, server: Server) -> None:
    """Let ``app`` answer ``/v1/models`` with the models that are loaded."""
    began = int(time.time())

    async def models(request: web.Request) -> web.Response:
        loaded = [server.engine.model, *(one.model for one in (server.stt and server.stt.engine, server.tts) if one)]
        about = {"object": "model", "created": began, "owned_by": "moshi-mlx-local"}
        data = [{"id": model.name, **about} for model in loaded]
        name = request.match_info.get("name")
        if name is None:
            return web.json_response({"object": "list", "data": data})
        for model in data:
            if name == model["id"]:
                return web.json_response(model)
        error = {"type": "invalid_request_error", "code": "model_not_found", "param": "model"}
        return web.json_response({"error": {"message": "this model is not loaded", **error}}, status=404)

    app.router.add_get("/v1/models", models)
    app.router.add_get("/v1/models/{name}", models)


def conversations(app: web.Application, server: Server, path: str, make: type[EventTalk]) -> None:
    """Let ``app`` answer ``path`` with conversations of one protocol."""

    async def talk(request: web.Request) -> web.StreamResponse:
        settings: Settings | BadQuery
        try:
            settings = read_settings({**request.query, "audio": "pcm"}, server.generation, server.seed)
        except BadQuery as error:
            settings = error
        return await server.talk(request, make, (settings, server.roles, server.captions))

    app.router.add_get(path, talk)


def new_id(kind: str) -> str:
    """An identifier in OpenAI's form."""
    return f"{kind}_{uuid.uuid4().hex[:24]}"


class EventError(Exception):
    """An event cannot be done.

    Parameters
    ----------
    code : str
        For programs.
    said : str
        For people.
    param : str, optional
        The field that is wrong.
    """

    def __init__(self, code: str, said: str, param: str | None = None):
        super().__init__(said)
        self.code, self.param = code, param


def field(event: Mapping[str, Any], name: str, kind: type, where: str = "") -> Any:
    """A field of an event, of this type; raises EventError."""
    param = f"{where}{name}"
    value = event.get(name)
    if value is None:
        raise EventError("missing_required_parameter", f"{param} is missing", param)
    number = kind in (int, float)
    if not isinstance(value, (int, float) if kind is float else kind) or (number and isinstance(value, bool)):
        raise EventError("invalid_type", f"{param} must be {_TYPES[kind]}", param)
    return value


_TYPES: Mapping[type, str] = {
    str: "a string", int: "a whole number", float: "a number", dict: "an object", list: "a list",
}  # fmt: skip


class Pauses:
    """Whether the model speaks: from a word, or sound, until neither has come for some time.

    Parameters
    ----------
    frame_seconds : float
    """

    def __init__(self, frame_seconds: float):
        self._frames = self._quiet = math.ceil(_PAUSE / frame_seconds)

    def step(self, frame: SessionFrame) -> bool:
        """Whether it speaks in this frame."""
        said = frame.text != "" or float(np.sqrt(np.mean(np.square(frame.pcm)))) >= _SOUND
        self._quiet = 0 if said else self._quiet + 1
        return self._quiet < self._frames


class EventTalk(Talk):
    """A client of one of OpenAI's protocols.

    Parameters
    ----------
    wishes : tuple of (Settings or BadQuery, Roles or None, Captions or None)
        Sampling, from the query: the names are those of ``/api/chat``. What makes prompts of instructions and a voice.
        The recogniser beside the conversations.
    *shared
        As for :class:`Talk`.

    Attributes
    ----------
    handlers : mapping of str to callable
        What is done with each type of event.
    """

    weight = 4  # base64; and LiveKit keeps what was said until it is connected, and sends it at once
    backlog = 6.0
    handlers: ClassVar[Mapping[str, Callable[[Any, dict[str, Any]], None]]] = {}

    def __init__(self, wishes: tuple[Settings | BadQuery, Roles | None, Captions | None], *shared: Any):
        super().__init__(wishes[0], *shared)
        self._roles = wishes[1] if self._model.takes_role else None
        self._recogniser = wishes[2]
        self._instructions = self._voice_name = ""  # what the model was, or will be, told
        self._input = self._output = AudioFormat("audio/pcm", 24_000, self._model.sample_rate)
        self._ready = asyncio.Event()  # the conversation can begin
        self._placed = False
        self._early: list[NDArray[np.float32]] = []  # sound that came while it begins
        self._given = math.inf  # when the sound that the model was given ended, by the clock
        self._levels: deque[float] = deque()
        self._pauses = Pauses(self._frame_seconds)
        self._frames = 0

    # ---------------------------------------------------------------------------------------------- what comes

    def _open(self) -> None:
        if isinstance(self._settings, BadQuery):
            self.end(End(WSCloseCode.POLICY_VIOLATION, str(self._settings)))

    async def _settled(self) -> Settings:
        self._placed = True
        await self._ready.wait()
        assert isinstance(self._settings, Settings)
        if self._roles is None:
            return self._settings
        asked = {"text_prompt": self._instructions, "voice_prompt": self._voice_name}
        asked = {name: text for name, text in asked.items() if text}
        try:
            opening = await asyncio.to_thread(self._roles.opening, asked)
        except BadQuery as error:
            raise ProtocolError(str(error)) from None
        return replace(self._settings, opening=opening)

    def _prompt(self, instructions: Any, voice: Any) -> bool:
        """Keep what the conversation is to begin with; False if instructions are given and the model takes none.

        Clients always name a voice, of another model mostly: one that is not here is left out."""
        told = isinstance(instructions, str) and bool(instructions.strip())
        if self._roles is None:
            return not told
        if told:
            self._instructions = instructions
        if isinstance(voice, str) and voice.removesuffix(".pt") in self._roles.voices:
            self._voice_name = voice
        return True

    def _begin(self, conversation: Conversation, settings: Settings) -> None:
        for samples in self._early:
            conversation.feed(samples)
        self._early.clear()
        self._given = time.monotonic()

    def _take(self, received: WSMessage) -> None:
        self._wordless = 0
        event_id: str | None = None
        try:
            event = _read(received)
            said = event.get("event_id")
            event_id = said if isinstance(said, str) and len(said) <= 512 else None
            handler = self.handlers.get(field(event, "type", str))
            if handler is None:
                raise EventError("invalid_value", f"unknown type of event: {event['type'][:60]!r}", "type")
            handler(self, event)
        except EventError as error:
            self._refuse(error, event_id)

    def _refuse(self, error: EventError, event_id: str | None) -> None:
        """Tell that an event was not done."""
        raise NotImplementedError

    def _append(self, event: dict[str, Any]) -> None:
        """The user's sound."""
        text = field(event, "audio", str)
        try:
            samples = self._input.decode(text)
        except ValueError as error:
            raise EventError("invalid_value", f"audio cannot be used: {error}", "audio") from None
        now, seconds = time.monotonic(), len(samples) / self._model.sample_rate
        self._given = max(self._given, now - seconds) + seconds
        self._hear(samples)
        if self._conversation is None and self._placed:  # nothing is kept of who waits in line
            self._early.append(samples)

    def _said_all(self) -> None:
        """The user says no more for now: what comes next is due now, however much was sent at once."""
        self._given = min(self._given, time.monotonic())

    async def _accompany(self) -> None:
        """Silence for the model where the client sends nothing."""
        while True:
            await asyncio.sleep(_PACE)
            missing = time.monotonic() - self._given
            if self._conversation is None or missing < _GRACE:
                continue
            if missing > self._limits.ahead:  # this program, or the machine, stood still
                self._given += missing - _GRACE
                missing = _GRACE
            count = round((missing - _GRACE / 2) * self._model.sample_rate)
            self._conversation.feed(np.zeros(count, np.float32))
            self._given += count / self._model.sample_rate

    # --------------------------------------------------------------------------------------------- what goes out

    def _tap(self, heard: NDArray[np.float32], frame: SessionFrame) -> None:
        self._levels.append(float(np.sqrt(np.mean(np.square(heard)))))
        super()._tap(heard, frame)

    def _event(self, kind: str, about: Mapping[str, Any], *, sound: bool = False) -> None:
        """Post an event."""
        self._post(self._written(kind, about), sound=sound)

    def _written(self, kind: str, about: Mapping[str, Any]) -> str:
        # A client may have sent half a surrogate pair: escaped, it is text again.
        event = {"type": kind, "event_id": new_id("event"), **about}
        return json.dumps(event, allow_nan=False, separators=(",", ":"))

    def _queued(self, place: int) -> None:
        pass

    def _error(self, error: EventError, kind: str = "invalid_request_error") -> dict[str, Any]:
        return {"type": kind, "code": error.code, "message": str(error), "param": error.param}

    def _last_words(self, end: End) -> list[bytes | str]:
        if not end.fault:
            return []
        kind = "invalid_request_error" if end.code == WSCloseCode.POLICY_VIOLATION else "server_error"
        error = self._error(EventError(_CODES.get(WSCloseCode(end.code), "policy_violation"), end.reason), kind)
        return [self._written("error", {"error": error})]


def _read(received: WSMessage) -> dict[str, Any]:
    """A JSON object; raises EventError."""
    if received.type != WSMsgType.TEXT:
        raise EventError("invalid_message", "messages here are text: JSON objects")
    try:
        event = json.loads(received.data)
    except (ValueError, RecursionError) as error:
        raise EventError("invalid_json", f"not JSON: {' '.join(str(error).split())[:100]}") from None
    if not isinstance(event, dict):
        raise EventError("invalid_json", "not a JSON object")
    return event
