"""Who talks and who waits: a number of places, and a line in the order of coming."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Full", "Line", "Ticket"]


class Full(Exception):
    """The line is as long as it may be."""


class Ticket:
    """One who came. ``place`` is 0 for those who talk, else how many turns it takes."""

    def __init__(self, gone: Callable[[], bool], dismiss: Callable[[], None]):
        self.place = 0
        self.news = asyncio.Event()
        self._gone, self._dismiss = gone, dismiss

    async def changed(self) -> None:
        """Wait until the place is another."""
        await self.news.wait()
        self.news.clear()


class Line:
    """Everything happens on one event loop.

    Parameters
    ----------
    places : int
        How many may talk at once.
    longest : int
        How many may wait.
    """

    def __init__(self, places: int, longest: int = 16):
        self.places, self.longest = places, longest
        self._talking: list[Ticket] = []
        self._waiting: list[Ticket] = []

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def free(self) -> int:
        """How many could begin to talk now: a place whose owner has fallen silent can be had."""
        return self.places - sum(not ticket._gone() for ticket in self._talking)

    def join(self, gone: Callable[[], bool], dismiss: Callable[[], None]) -> Ticket:
        """Come in, and talk or wait.

        Parameters
        ----------
        gone : callable
            Whether nothing has been heard of this one for so long that its place may be given away.
        dismiss : callable
            Told when that happens; it has to :meth:`leave` then, as when it ends by itself.

        Raises
        ------
        Full
        """
        ticket = Ticket(gone, dismiss)
        if len(self._talking) >= self.places and len(self._waiting) >= self.longest:
            raise Full(f"all {self.places} places are taken and {self.longest} are waiting: try again later")
        self._waiting.append(ticket)
        self.settle()
        ticket.news.clear()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give the place back, or leave the line."""
        for those in (self._talking, self._waiting):
            if ticket in those:
                those.remove(ticket)
        self.settle()

    def settle(self) -> None:
        """Let in who can be let in, and tell the others where they stand. To be called now and then."""
        while self._waiting and len(self._talking) < self.places:
            first = self._waiting.pop(0)
            self._talking.append(first)
            first.place = 0
            first.news.set()
        for ticket in [ticket for ticket in self._talking if ticket._gone()][: len(self._waiting)]:
            ticket._dismiss()
        for place, ticket in enumerate(self._waiting, 1):
            if ticket.place != place:
                ticket.place = place
                ticket.news.set()
