"""``/v1/live/sessions``, OpenAI's Live protocol: both sides speak whenever they like, and there are no turns.

::

    session.start                       > session.started
    session.input_audio.append
                                        > session.output_audio.delta, one a frame, silence as well
                                        > session.output_transcript.delta, with times
    session.input_audio.mute, .unmute   > session.input_audio.muted, .unmuted
    session.close                       > session.closed

Between two things that the model says, sound is sent as zeros: clients take it for silence below an RMS of 0.0006, and
what a codec makes of silence may be above.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from aiohttp import WSCloseCode, web

from moshi_mlx.realtime import Conversation
from moshi_mlx.tasks.dialogue import SessionFrame

from ..connection import End
from ..settings import Settings
from .audio_format import AudioFormat
from .openai import EventError, EventTalk, conversations, field, new_id

if TYPE_CHECKING:
    from ..server import Server

__all__ = ["LiveTalk", "add_routes"]

_USAGE = 15.0  # seconds between two reports
_LONGEST = 24 * 3600.0  # seconds


def add_routes(app: web.Application, server: Server) -> None:
    """Let ``app`` answer ``/v1/live/sessions`` with conversations on ``server``."""
    conversations(app, server, "/v1/live/sessions", LiveTalk)


class LiveTalk(EventTalk):
    """A client of the Live protocol; parameters as for :class:`EventTalk`."""

    backlog = 0.48  # LiveKit sends 100 ms at once; beyond it the oldest is dropped, as elsewhere

    def __init__(self, *shared: Any):
        super().__init__(*shared)
        self._session: dict[str, Any] = {}
        self._start_id: str | None = None
        self._reported = 0.0
        self._closing: str | None = None  # the event that asked for it
        self._unread = False  # it said something that the model cannot be told

    # ---------------------------------------------------------------------------------------------- what comes

    def _take_start(self, event: dict[str, Any]) -> None:
        if self._session:
            raise EventError("session_already_started", "this session has been started")
        config = field(event, "session", dict)
        field(config, "model", str, "session.")
        chosen = _part(config, "audio", "session.")
        told = _part(chosen, "format", "session.audio.")
        if told:
            name = field(told, "type", str, "session.audio.format.")
            rate = 8_000 if told.get("rate") is None and name != "audio/pcm" else told.get("rate")
            try:
                rate = rate if isinstance(rate, int) and not isinstance(rate, bool) else -1
                self._input = self._output = AudioFormat(name, rate, self._model.sample_rate)
            except ValueError:
                raise EventError(
                    "invalid_value",
                    "the format must be audio/pcm at 16000 or 24000 Hz, or audio/pcmu or audio/pcma at 8000 Hz",
                    "session.audio.format",
                ) from None
        delegation = _part(config, "delegation", "session.")
        for owner in ("responses", "decisions"):
            if _part(delegation, owner, "session.delegation.").get("tools"):
                raise EventError("tools_not_supported", f"{self._model.name} has no tools", "session.delegation")
        if config.get("triggers"):
            raise EventError("triggers_not_supported", f"{self._model.name} has no triggers", "session.triggers")
        voice = _part(chosen, "output", "session.audio.").get("voice")
        unread = not self._prompt(config.get("instructions"), voice)
        self._unread = unread or bool(config.get("input"))
        self._session = {
            "id": new_id("sess"),
            "model": self._model.name,
            "status": "active",
            "expires_at": int(time.time() + _LONGEST),
            "audio": {
                "format": {"type": self._input.name, "rate": self._input.rate},
                "output": {"voice": self._voice_name or self._model.name},
            },
            **({"instructions": self._instructions} if self._instructions else {}),
        }
        said = event.get("event_id")
        self._start_id = said if isinstance(said, str) and len(said) <= 512 else None
        self._ready.set()

    def _begin(self, conversation: Conversation, settings: Settings) -> None:
        super()._begin(conversation, settings)
        self._answer("session.started", {"session": self._session}, self._start_id)
        if self._unread:
            self._event("info", {"code": "instructions_not_supported", "message": self._no_instructions})

    @property
    def _no_instructions(self) -> str:
        if self._roles is not None:
            return f"{self._model.name} takes instructions with session.start only, and no other text"
        return f"{self._model.name} takes no instructions and no text: it hears sound only"

    def _take_sound(self, event: dict[str, Any]) -> None:
        if not self._session:
            self._started()
        self._append(event)

    def _take_mute(self, event: dict[str, Any]) -> None:
        self._started()
        muted = event["type"] == "session.input_audio.mute"
        if self._conversation is not None:
            self._conversation.mute(muted)
        self._answer("session.input_audio." + ("muted" if muted else "unmuted"), {}, event.get("event_id"))

    def _take_text(self, event: dict[str, Any]) -> None:
        self._started()
        raise EventError("instructions_not_supported", self._no_instructions, "content")

    def _take_update(self, event: dict[str, Any]) -> None:
        self._started()
        delegation = _part(field(event, "session", dict), "delegation", "session.")
        for owner in ("responses", "decisions"):
            if _part(delegation, owner, "session.delegation.").get("tools"):
                raise EventError("tools_not_supported", f"{self._model.name} has no tools", "session.delegation")
        self._answer("session.updated", {"session": self._session}, event.get("event_id"))

    def _take_other(self, event: dict[str, Any]) -> None:
        raise EventError("delegation_not_supported", f"{self._model.name} delegates nothing", "type")

    def _take_close(self, event: dict[str, Any]) -> None:
        self._started()
        self._closing = event.get("event_id") if isinstance(event.get("event_id"), str) else ""
        self.end(End(WSCloseCode.OK, "the client closed the session", fault=False))

    def _started(self) -> None:
        if self._conversation is None:
            raise EventError("session_not_started", "send session.start, and wait for session.started")

    handlers: ClassVar[Mapping[str, Callable[[Any, dict[str, Any]], None]]] = {
        "session.start": _take_start,
        "session.input_audio.append": _take_sound,
        "session.input_audio.mute": _take_mute,
        "session.input_audio.unmute": _take_mute,
        "session.instructions.append": _take_text,
        "session.thinking.append": _take_text,
        "session.commentary.append": _take_text,
        "session.update": _take_update,
        "session.close": _take_close,
        "response.create": _take_other,
        "response.item.create": _take_other,
        "decision.create": _take_other,
        "decision.item.create": _take_other,
        "decision.item.delete": _take_other,
    }

    # --------------------------------------------------------------------------------------------- what goes out

    def _say(self, frame: SessionFrame) -> None:
        self._levels.popleft()
        self._frames += 1
        pcm = frame.pcm if self._pauses.step(frame) else np.zeros_like(frame.pcm)
        delta = self._output.encode(pcm)
        if delta:  # a resampler gives nothing for its first samples
            self._post_sound(delta)
        if frame.text:
            start = round((self._frames - 1) * self._frame_seconds * 1e3)
            end = round(self._frames * self._frame_seconds * 1e3)
            about = {"delta": frame.text, "start_ms": start, "end_ms": end}
            self._event("session.output_transcript.delta", about)

    def _post_sound(self, delta: str) -> None:
        # base64 needs no escaping; the only event without an id of its own
        self._post(f'{{"type":"session.output_audio.delta","delta":"{delta}"}}', sound=True)

    def _queued(self, place: int) -> None:
        self._event("info", {"code": "queued", "message": f"busy: {place} in line"})

    def _news(self, conversation: Conversation) -> None:
        now = time.monotonic() - self._began
        if now - self._reported >= _USAGE:
            self._reported = now
            self._event("session.usage.updated", {"usage": self._usage()})
        if now >= _LONGEST:
            self._closing = ""
            self.end(End(WSCloseCode.OK, "the session expired", fault=False))

    def _usage(self) -> dict[str, float]:
        return {"seconds": float(round(self._frames * self._frame_seconds, 2))}

    def _answer(self, kind: str, about: Mapping[str, Any], to: Any) -> None:
        self._event(kind, {**about, **({"client_event_id": to} if isinstance(to, str) and len(to) <= 512 else {})})

    def _refuse(self, error: EventError, event_id: str | None) -> None:
        self._event("error", {"error": {**self._error(error), "client_event_id": event_id}})

    def _last_words(self, end: End) -> list[bytes | str]:
        last = super()._last_words(end)
        if self._session and end.reason != "the client left":
            reason = "close_requested" if self._closing is not None else "connection_lost"
            reason = "expired" if "expired" in end.reason else reason
            about: dict[str, Any] = {"reason": reason, "session": self._session, "usage": self._usage()}
            if self._closing:
                about["client_event_id"] = self._closing
            last.append(self._written("session.closed", about))
        return last


def _part(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """An object in a configuration, empty if it is not there."""
    return {} if config.get(name) is None else dict(field(config, name, dict, where))
