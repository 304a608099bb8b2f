"""Conversations in real time: ring buffers and worker threads around a model, for apps that handle their own audio."""

from __future__ import annotations

from .captions import Caption, Captions
from .conversation import Conversation, Event
from .ring import Ring
from .scheduler import Scheduler
from .stats import Stats
from .trace import Trace

__all__ = ["Caption", "Captions", "Conversation", "Event", "Ring", "Scheduler", "Stats", "Trace"]
