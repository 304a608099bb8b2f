"""``/v1/realtime``, OpenAI's Realtime protocol: turns, cut out of a model that has none.

A response opens at the model's first word or sound and closes when it pauses; its sound is sent as it comes. The user's
turns are found by loudness (:class:`Voice`), or end where a recogniser beside it predicts a pause, which also writes
them down (:class:`Transcripts`). The model cannot be told to speak, to be silent or to forget: ``response.create``
opens a response before its first word, ``response.cancel`` and ``conversation.item.truncate`` mute it until it pauses,
and items of text are kept for the client and not read by the model. Events are those of the general release
(``response.output_audio.delta``), not of the beta.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import field as attribute
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from moshi_mlx.realtime import Conversation
from moshi_mlx.tasks.dialogue import SessionFrame

from ..connection import End
from ..settings import Settings
from ..transcripts import Transcripts
from .audio_format import AudioFormat
from .openai import EventError, EventTalk, conversations, field, new_id

if TYPE_CHECKING:
    from ..server import Server

__all__ = ["RealtimeTalk", "Voice", "add_routes"]

_PATIENCE = 8.0  # seconds that a response which was asked for waits for the model to speak
_ITEMS, _LETTERS = 500, 1_000_000  # that are kept
_BETA = ("modalities", "voice", "input_audio_format", "output_audio_format", "input_audio_transcription")
_VAD = {"type": "server_vad", "threshold": 0.5, "prefix_padding_ms": 300, "silence_duration_ms": 500}
_DOES = {"create_response": True, "interrupt_response": False}
_PARTS = {
    "user": {"input_text": ("text",), "input_audio": ("transcript",)},
    "system": {"input_text": ("text",)},
    "assistant": {"output_text": ("text",), "output_audio": ("transcript",)},
}


def add_routes(app: web.Application, server: Server) -> None:
    """Let ``app`` answer ``/v1/realtime`` with conversations on ``server``."""
    conversations(app, server, "/v1/realtime", RealtimeTalk)


class Voice:
    """When the user speaks, by loudness above the room's noise.

    Parameters
    ----------
    frame_seconds : float

    Attributes
    ----------
    silence, padding : float
        Seconds: of quiet that end a turn, and before its first sound that belong to it.
    speaking : bool
    """

    def __init__(self, frame_seconds: float):
        self._frame = frame_seconds
        self.silence, self.padding = 0.5, 0.3
        self.speaking = False
        self._room = 0.02  # RMS: falls to the quietest frame at once, rises slowly
        self._loud = self._quiet = 0

    def step(self, level: float) -> str:
        """The RMS of the next frame: ``started``, ``stopped``, or empty."""
        self._room = min(level, self._room * 1.02 + 1e-6)
        loud = level > min(max(4 * self._room, 0.004), 0.05)
        self._loud, self._quiet = (self._loud + 1, 0) if loud else (0, self._quiet + 1)
        if not self.speaking and self._loud >= 2:
            self.speaking = True
            return "started"
        if self.speaking and self._quiet * self._frame >= self.silence:
            self.speaking = False
            return "stopped"
        return ""


@dataclass
class _Response:
    asked: int  # frame
    metadata: dict[str, str] | None = None
    id: str = attribute(default_factory=lambda: new_id("resp"))
    item_id: str = attribute(default_factory=lambda: new_id("item"))
    begun: bool = False  # its item is there
    transcript: str = ""
    frames: int = 0
    words: int = 0


class RealtimeTalk(EventTalk):
    """A client of the Realtime protocol; parameters as for :class:`EventTalk`."""

    def __init__(self, *shared: Any):
        super().__init__(*shared)
        self._detection: dict[str, Any] | None = {**_VAD, **_DOES}
        self._voice = Voice(self._frame_seconds)
        self._turn = ""  # item of the user's turn
        self._items: dict[str, dict[str, Any]] = {}
        self._letters = 0
        self._last_item: str | None = None
        self._response: _Response | None = None
        self._muted = False  # until the model pauses
        self._appended = False  # sound, since the last commit
        self._counted = 0  # frames of the user's that the usage has had
        self._transcripts: Transcripts | None = None
        self._turn_began: dict[str, float] = {}  # seconds, of turns whose words are not all there

    async def run(self) -> End:
        try:
            return await super().run()
        finally:
            self._transcribe(False)

    def _open(self) -> None:
        super()._open()
        self._event("session.created", {"session": self._session()})

    def _session(self) -> dict[str, Any]:
        """The session as it is, whatever was asked for."""
        return {
            "type": "realtime",
            "model": self._model.name,
            "output_modalities": ["audio"],
            "instructions": self._instructions,
            "tools": [],
            "tool_choice": "none",
            "max_output_tokens": "inf",
            "audio": {
                "input": {
                    "format": _about(self._input),
                    "transcription": None if self._transcripts is None else {"model": self._transcripts.model},
                    "noise_reduction": None,
                    "turn_detection": self._detection,
                },
                "output": {
                    "format": _about(self._output),
                    "voice": self._voice_name or self._model.name,
                    "speed": 1.0,
                },
            },
        }

    # ------------------------------------------------------------------------------------------------- session

    def _take_update(self, event: dict[str, Any]) -> None:
        session = field(event, "session", dict)
        beta = [name for name in _BETA if name in session]
        if beta:
            raise EventError(
                "beta_api_shape_disabled",
                f"session.{beta[0]} is the beta's name: this server speaks the general release's protocol",
                f"session.{beta[0]}",
            )
        if session.get("type", "realtime") != "realtime":
            raise EventError("invalid_value", "session.type must be realtime", "session.type")
        self._check_modalities(session, "session.")
        self._check_tools(session, "session.")
        audio = session.get("audio") or {}
        if not isinstance(audio, dict):
            raise EventError("invalid_type", "session.audio must be an object", "session.audio")
        sides = {}
        for name in ("input", "output"):
            sides[name] = {} if audio.get(name) is None else field(audio, name, dict, "session.audio.")
        heard = self._format(sides["input"], self._input, "session.audio.input.")
        said = self._format(sides["output"], self._output, "session.audio.output.")
        detection = self._detection
        if "turn_detection" in sides["input"]:
            detection = _detection(sides["input"], "session.audio.input.")
        if not self._ready.is_set():  # later the answer says that nothing has changed
            self._prompt(session.get("instructions"), sides["output"].get("voice"))
        self._input, self._output, self._detection = heard, said, detection
        if "transcription" in sides["input"]:
            self._transcribe(sides["input"]["transcription"] is not None)
        if detection is not None:
            self._voice.silence = detection["silence_duration_ms"] / 1e3
            self._voice.padding = detection["prefix_padding_ms"] / 1e3
        self._event("session.updated", {"session": self._session()})

    def _transcribe(self, wanted: bool) -> None:
        """Write down what the user says, with the recogniser that is here, or no more; the session's answer says it."""
        recogniser = self._recogniser
        if wanted and self._transcripts is None and recogniser is not None:
            if recogniser.model.sample_rate == self._model.sample_rate:
                self._transcripts = Transcripts(recogniser, self._heard_word, self._heard_turn, self._heard_pause)
        elif not wanted and self._transcripts is not None:
            self._transcripts.close()
            self._transcripts = None

    def _heard_word(self, item_id: str, delta: str) -> None:
        about = {"item_id": item_id, "content_index": 0, "delta": delta}
        self._event("conversation.item.input_audio_transcription.delta", about)

    def _heard_turn(self, item_id: str, text: str, until: float) -> None:
        item = self._items.get(item_id)
        if item is not None and item["content"]:
            self._letters += len(text)
            item["content"][0]["transcript"] = text
        usage = {"type": "duration", "seconds": round(until - self._turn_began.pop(item_id, until), 3)}
        about = {"item_id": item_id, "content_index": 0, "transcript": text, "usage": usage}
        self._event("conversation.item.input_audio_transcription.completed", about)

    def _heard_pause(self) -> None:
        """The recogniser says that the user pauses: that ends the turn."""
        if self._voice.speaking:
            self._voice.speaking = False
            self._speech_stopped()

    def _tap(self, heard: NDArray[np.float32], frame: SessionFrame) -> None:
        if self._transcripts is not None:
            self._transcripts.hear(heard, frame.index * self._frame_seconds)
        super()._tap(heard, frame)

    def _format(self, side: dict[str, Any], now: AudioFormat, where: str) -> AudioFormat:
        if side.get("format") is None:
            return now
        told = field(side, "format", dict, where)
        name = field(told, "type", str, f"{where}format.")
        rate = told.get("rate", 24_000) if name == "audio/pcm" else 8_000
        if name not in ("audio/pcm", "audio/pcmu", "audio/pcma") or (name == "audio/pcm" and rate != 24_000):
            raise EventError(
                "invalid_value",
                f"{where}format must be audio/pcm at 24000 Hz, audio/pcmu or audio/pcma",
                f"{where}format",
            )
        return now if (name, rate) == (now.name, now.rate) else AudioFormat(name, rate, self._model.sample_rate)

    def _check_modalities(self, config: dict[str, Any], where: str) -> None:
        if "audio" not in (config.get("output_modalities") or ["audio"]):
            raise EventError(
                "modality_not_supported",
                f"{self._model.name} answers with its voice: output_modalities must be ['audio']",
                f"{where}output_modalities",
            )

    def _check_tools(self, config: dict[str, Any], where: str) -> None:
        if config.get("tools"):
            raise EventError("tools_not_supported", f"{self._model.name} has no tools", f"{where}tools")

    # -------------------------------------------------------------------------------------------------- buffer

    def _take_sound(self, event: dict[str, Any]) -> None:
        self._append(event)
        self._appended = True
        self._ready.set()

    def _take_commit(self, event: dict[str, Any]) -> None:
        if not self._appended:
            raise EventError("input_audio_buffer_commit_empty", "the buffer has no sound to commit")
        self._said_all()
        if self._voice.speaking:
            self._voice.speaking = False
            self._speech_stopped()
        else:
            self._commit(new_id("item"))

    def _take_clear(self, event: dict[str, Any]) -> None:
        self._appended = False
        self._event("input_audio_buffer.cleared", {})

    def _commit(self, item_id: str) -> None:
        """The user has said something."""
        self._appended = False
        self._event("input_audio_buffer.committed", {"item_id": item_id, "previous_item_id": self._last_item})
        content = [{"type": "input_audio", "transcript": None}]
        self._add(_item(item_id, "user", content))
        if self._transcripts is not None:
            self._transcripts.end(item_id, self._frames * self._frame_seconds)

    def _listen(self, level: float) -> None:
        """Whether the user begins or ends to speak in this frame."""
        heard = self._voice.step(level)
        if self._detection is None or not heard:
            return
        if heard == "stopped":
            self._speech_stopped()
            return
        self._turn = new_id("item")
        began = max((self._frames - 2) * self._frame_seconds - self._voice.padding, 0.0)
        if self._transcripts is not None:
            self._turn_began[self._turn] = began
            self._transcripts.begin(self._turn)
        about = {"audio_start_ms": round(began * 1e3), "item_id": self._turn}
        self._event("input_audio_buffer.speech_started", about)

    def _speech_stopped(self) -> None:
        turn, self._turn = self._turn or new_id("item"), ""
        if self._detection is not None:
            about = {"audio_end_ms": round(self._frames * self._frame_seconds * 1e3), "item_id": turn}
            self._event("input_audio_buffer.speech_stopped", about)
        self._commit(turn)

    # --------------------------------------------------------------------------------------------------- items

    def _add(self, item: dict[str, Any], *, done: bool = True) -> None:
        """Keep an item, and tell of it."""
        about = {"item": item, "previous_item_id": self._last_item}
        self._last_item = item["id"]
        self._items[item["id"]] = item
        self._letters += _letters(item)
        while len(self._items) > _ITEMS or self._letters > _LETTERS:
            self._letters -= _letters(self._items.pop(next(iter(self._items))))
        self._event("conversation.item.added", about)
        if done:
            self._event("conversation.item.done", about)

    def _take_item(self, event: dict[str, Any]) -> None:
        given = field(event, "item", dict)
        kind = field(given, "type", str, "item.")
        if kind != "message":
            raise EventError("tools_not_supported", f"{self._model.name} has no tools: {kind[:60]!r}", "item.type")
        role = field(given, "role", str, "item.")
        known = _PARTS.get(role)
        if known is None:
            raise EventError("invalid_value", "item.role must be user, assistant or system", "item.role")
        item_id = given.get("id") or new_id("item")
        if not isinstance(item_id, str) or len(item_id) > 256:
            raise EventError("invalid_value", "item.id must be a string of 256 letters at most", "item.id")
        if item_id in self._items:
            raise EventError("item_create_duplicate_item_id", "there is an item of this id", "item.id")
        parts = []
        for part in field(given, "content", list, "item."):
            name = part.get("type") if isinstance(part, dict) else None
            if name == "text":  # the beta's
                name = "output_text" if role == "assistant" else "input_text"
            if name not in known:
                raise EventError(
                    "content_not_supported", f"content of type {str(name)[:60]!r} cannot be used here", "item.content"
                )
            parts.append({"type": name, **{key: part[key] for key in known[name] if isinstance(part.get(key), str)}})
        self._add(_item(item_id, role, parts))

    def _take_retrieve(self, event: dict[str, Any]) -> None:
        self._event("conversation.item.retrieved", {"item": self._known(event, "item_retrieve_invalid_item_id")})

    def _take_delete(self, event: dict[str, Any]) -> None:
        item = self._known(event, "item_delete_invalid_item_id")
        if self._response is not None and self._response.item_id == item["id"]:
            raise EventError("item_delete_invalid_item_id", "this item is being said", "item_id")
        self._letters -= _letters(self._items.pop(item["id"]))
        if self._last_item == item["id"]:
            self._last_item = next(reversed(self._items), None)
        self._event("conversation.item.deleted", {"item_id": item["id"]})

    def _take_truncate(self, event: dict[str, Any]) -> None:
        item = self._known(event, "item_truncate_invalid_item_id")
        index, until = field(event, "content_index", int), field(event, "audio_end_ms", int)
        if item["role"] != "assistant" or index != 0 or until < 0:
            raise EventError("invalid_value", "only what the model says, from content_index 0 on, can be truncated")
        if self._response is not None and self._response.item_id == item["id"]:
            self._muted = True
        about = {"item_id": item["id"], "content_index": index, "audio_end_ms": until}
        self._event("conversation.item.truncated", about)

    def _known(self, event: dict[str, Any], code: str) -> dict[str, Any]:
        item = self._items.get(field(event, "item_id", str))
        if item is None:
            raise EventError(code, "there is no item of this id", "item_id")
        return item

    # ----------------------------------------------------------------------------------------------- responses

    def _take_create(self, event: dict[str, Any]) -> None:
        asked = {} if event.get("response") is None else field(event, "response", dict)
        self._check_modalities(asked, "response.")
        self._check_tools(asked, "response.")
        metadata = asked.get("metadata") or {}
        if not (
            isinstance(metadata, dict)
            and len(metadata) <= 16
            and all(isinstance(value, str) and len(key) + len(value) <= 600 for key, value in metadata.items())
        ):
            raise EventError("invalid_value", "response.metadata must be 16 short strings at most", "response.metadata")
        if self._response is not None:
            raise EventError(
                "conversation_already_has_active_response",
                f"Conversation already has an active response in progress: {self._response.id}",
            )
        self._said_all()
        self._ready.set()
        self._respond(dict(metadata) or None)

    def _take_cancel(self, event: dict[str, Any]) -> None:
        response, named = self._response, event.get("response_id")
        if response is None or (named is not None and named != response.id):
            raise EventError("response_cancel_not_active", "Cancellation failed: no active response found")
        self._muted = True
        self._close("cancelled", {"type": "cancelled", "reason": "client_cancelled"})

    def _respond(self, metadata: dict[str, str] | None = None) -> _Response:
        response = self._response = _Response(self._frames, metadata)
        self._event("response.created", {"response": self._about(response, "in_progress")})
        return response

    def _about(self, response: _Response, status: str) -> dict[str, Any]:
        output = [self._items[response.item_id]] if response.item_id in self._items and status != "in_progress" else []
        about: dict[str, Any] = {
            "id": response.id,
            "object": "realtime.response",
            "status": status,
            "status_details": None,
            "output": output,
            "output_modalities": ["audio"],
            "max_output_tokens": "inf",
            "audio": {"output": {"format": _about(self._output), "voice": self._voice_name or self._model.name}},
            "metadata": response.metadata,
            "usage": None,
        }
        return about

    def _begin_item(self, response: _Response) -> None:
        """The model has begun to speak."""
        response.begun = True
        item = _item(response.item_id, "assistant", [], "in_progress")
        self._event("response.output_item.added", {"response_id": response.id, "output_index": 0, "item": item})
        self._add(item, done=False)
        self._part(response, "response.content_part.added", {"part": {"type": "audio", "transcript": ""}})

    def _part(self, response: _Response, kind: str, about: Mapping[str, Any], *, sound: bool = False) -> None:
        where = {"response_id": response.id, "item_id": response.item_id, "output_index": 0, "content_index": 0}
        self._event(kind, {**where, **about}, sound=sound)

    def _close(self, status: str, details: dict[str, Any] | None = None) -> None:
        """End the response that is open."""
        response, self._response = self._response, None
        if response is None:
            return
        if response.begun:
            said = response.transcript
            self._part(response, "response.output_audio.done", {})
            self._part(response, "response.output_audio_transcript.done", {"transcript": said})
            self._part(response, "response.content_part.done", {"part": {"type": "audio", "transcript": said}})
            state = "completed" if status == "completed" else "incomplete"
            item = _item(response.item_id, "assistant", [{"type": "output_audio", "transcript": said}], state)
            before = self._before(response.item_id)
            if response.item_id in self._items:
                self._items[response.item_id] = item
                self._letters += len(said)
            self._event("response.output_item.done", {"response_id": response.id, "output_index": 0, "item": item})
            self._event("conversation.item.done", {"item": item, "previous_item_id": before})
        about = self._about(response, status)
        about["status_details"] = details
        about["usage"] = self._usage(response)
        self._event("response.done", {"response": about})

    def _before(self, item_id: str) -> str | None:
        """The item before this one."""
        names = list(self._items)
        place = names.index(item_id) if item_id in names else 0
        return names[place - 1] if place else None

    def _usage(self, response: _Response) -> dict[str, Any]:
        """Tokens as the model counts them: codes of both voices, and words' pieces."""
        config = self._model.lm.config
        heard, self._counted = (self._frames - self._counted) * config.user_q, self._frames
        said = response.frames * config.own_q
        return {
            "input_tokens": heard,
            "output_tokens": said + response.words,
            "total_tokens": heard + said + response.words,
            "input_token_details": {
                "audio_tokens": heard,
                "text_tokens": 0,
                "cached_tokens": 0,
                "cached_tokens_details": {"audio_tokens": 0, "text_tokens": 0},
            },
            "output_token_details": {"audio_tokens": said, "text_tokens": response.words},
        }

    # ------------------------------------------------------------------------------------------------ each frame

    def _begin(self, conversation: Conversation, settings: Settings) -> None:
        super()._begin(conversation, settings)
        if self._response is not None:
            self._said_all()

    def _say(self, frame: SessionFrame) -> None:
        self._frames += 1
        self._listen(self._levels.popleft())
        speaks = self._pauses.step(frame)
        self._muted = self._muted and speaks
        response = self._response
        if response is None and speaks and not self._muted:
            response = self._respond()
        if response is None:
            return
        if not speaks:
            waited = (self._frames - response.asked) * self._frame_seconds
            if response.begun or waited >= _PATIENCE:
                self._close("completed", {"type": "completed"})
            return
        if self._muted:
            return
        if not response.begun:
            self._begin_item(response)
        response.frames += 1
        delta = self._output.encode(frame.pcm)
        if delta:
            self._part(response, "response.output_audio.delta", {"delta": delta}, sound=True)
        if frame.text:
            text = frame.text if response.transcript else frame.text.lstrip()
            response.transcript += text
            response.words += 1
            if text:
                self._part(response, "response.output_audio_transcript.delta", {"delta": text})

    def _refuse(self, error: EventError, event_id: str | None) -> None:
        self._event("error", {"error": {**self._error(error), "event_id": event_id}})

    handlers: ClassVar[Mapping[str, Callable[[Any, dict[str, Any]], None]]] = {
        "session.update": _take_update,
        "input_audio_buffer.append": _take_sound,
        "input_audio_buffer.commit": _take_commit,
        "input_audio_buffer.clear": _take_clear,
        "conversation.item.create": _take_item,
        "conversation.item.retrieve": _take_retrieve,
        "conversation.item.delete": _take_delete,
        "conversation.item.truncate": _take_truncate,
        "response.create": _take_create,
        "response.cancel": _take_cancel,
    }


def _about(sound: AudioFormat) -> dict[str, Any]:
    return {"type": sound.name, "rate": sound.rate} if sound.name == "audio/pcm" else {"type": sound.name}


def _item(item_id: str, role: str, content: list[dict[str, Any]], status: str = "completed") -> dict[str, Any]:
    return {
        "id": item_id,
        "object": "realtime.item",
        "type": "message",
        "status": status,
        "role": role,
        "content": content,
    }


def _letters(item: dict[str, Any]) -> int:
    return len(item["id"]) + sum(len(text or "") for part in item["content"] for text in part.values())


def _detection(side: dict[str, Any], where: str) -> dict[str, Any] | None:
    """What finds the user's turns: always loudness, and never interrupting the model, which hears that by itself."""
    if side["turn_detection"] is None:
        return None
    told = field(side, "turn_detection", dict, where)
    if told.get("type") not in ("server_vad", "semantic_vad"):
        raise EventError("invalid_value", f"{where}turn_detection must be server_vad or semantic_vad", where[:-1])
    found: dict[str, Any] = {**_VAD, **_DOES}
    for name in ("prefix_padding_ms", "silence_duration_ms"):
        if told.get(name) is not None:
            found[name] = field(told, name, int, f"{where}turn_detection.")
            if not 0 <= found[name] <= 10_000:
                raise EventError("invalid_value", f"{name} must be from 0 to 10000", f"{where}turn_detection.{name}")
    return found
