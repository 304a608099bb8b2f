"""The path of a frame through a model: one conversation at a time, or many together."""

from __future__ import annotations

from .batch import Batch
from .pipeline import Engine, SessionFrame, Settings
from .session import Session

__all__ = ["Batch", "Engine", "Session", "SessionFrame", "Settings"]
