"""The exceptions that this package raises on purpose.

::

    MoshiError
    ├── ConfigError        a configuration says something unknown, unsupported or contradictory
    ├── CheckpointError    a file of weights is broken, incomplete or does not fit its configuration
    ├── DownloadError      a file could not be fetched: network, gate, token, disk space
    ├── AudioError         samples that the program cannot use: shape, dtype, rate, NaN
    ├── StateError         a session's state does not fit the model, or a session was used wrongly
    ├── TokenError         a text token or an audio code outside its range
    ├── TextError          a text that cannot be spoken
    ├── CodecError         the codec failed while it ran
    └── RankError          one of several machines that share a model has gone, does not respond or is late

Each message names the problem and what to do. ``assert`` is kept for internal invariants.
"""

from __future__ import annotations

__all__ = [
    "AudioError",
    "CheckpointError",
    "CodecError",
    "ConfigError",
    "DownloadError",
    "MoshiError",
    "RankError",
    "StateError",
    "TextError",
    "TokenError",
]

_LONGEST = 1200


class MoshiError(Exception):
    """Base class of all errors raised on purpose by this package."""

    def __str__(self) -> str:
        text = super().__str__()  # it may quote a file's contents, which may be anything
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 300]} ... {text[-290:]}"


class ConfigError(MoshiError, ValueError):
    """A configuration key or value is unknown, unsupported or contradicts another."""


class CheckpointError(MoshiError):
    """A checkpoint file is broken, incomplete, or does not fit its configuration."""


class DownloadError(MoshiError):
    """A file could not be fetched or found."""


class AudioError(MoshiError, ValueError):
    """Audio samples have a shape, type, rate or value that cannot be used."""


class StateError(MoshiError):
    """A session's state does not fit its model, or a session was used in a wrong order."""


class TokenError(MoshiError, ValueError):
    """A text token or an audio code is outside its range."""


class TextError(MoshiError, ValueError):
    """A text cannot be spoken: it has no words, or a word or a break is too long."""


class CodecError(MoshiError):
    """The audio codec failed while it ran."""


class RankError(MoshiError):
    """One of several machines that share a model has gone, does not respond, is late, or does not fit the others."""
