"""What goes wrong inside the server, said in one line and not again and again."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

__all__ = ["Faults"]

_AGAIN = 60.0  # seconds after which the same may be said again
_KINDS = 20  # different ones in that time


class Faults(logging.Handler):
    """Says a fault once a minute, however often it comes. Also takes what asyncio and aiohttp log.

    Parameters
    ----------
    tell : callable
        Gets the sentence.
    clock : callable
        Seconds, monotonic.
    """

    def __init__(self, tell: Callable[[str], object], clock: Callable[[], float] = time.monotonic):
        super().__init__(logging.WARNING)
        self._tell, self._clock = tell, clock
        self._said: dict[str, tuple[float, int]] = {}  # when, and how often since

    def say(self, text: str) -> None:
        """This went wrong."""
        now = self._clock()
        for other in [other for other, (then, _) in self._said.items() if now - then >= 10 * _AGAIN]:
            del self._said[other]
        then, since = self._said.get(text, (-math.inf, 0))
        if now - then < _AGAIN or (text not in self._said and len(self._said) >= _KINDS):
            if text in self._said:
                self._said[text] = (then, since + 1)
            return
        self._said[text] = (now, 0)
        self._tell(f"{text} ({since} times more since it was last said)" if since else text)

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.say(record.getMessage().splitlines()[0] + (f": {named(error)}" if error is not None else ""))


def named(error: BaseException) -> str:
    """One line about an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
