"""A conversation in real time: rings and worker threads around a loaded model, for an app that has its own audio."""

from __future__ import annotations

from .conversation import Conversation, Event
from .ring import Ring
from .scheduler import Scheduler
from .stats import Stats
from .trace import Trace

__all__ = ["Conversation", "Event", "Ring", "Scheduler", "Stats", "Trace"]
