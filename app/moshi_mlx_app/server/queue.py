"""Who talks and who waits: a number of places, and a line.

The line is in the order of coming, but no address gets a second turn before another's first, and who shows no sign of
life or of a person is passed by those who do.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

__all__ = ["Full", "Line", "Ticket"]


class Full(Exception):
    """The line is as long as it may be."""


class Ticket:
    """One who came. ``place`` is 0 for those who talk, else how many turns it takes."""

    def __init__(self, who: str, gone: Callable[[], bool], dismiss: Callable[[], None]):
        self.place = 0
        self.news = asyncio.Event()
        self._who, self._gone, self._dismiss = who, gone, dismiss

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
        How many may wait; half as many from one address.
    """

    def __init__(self, places: int, longest: int = 16):
        self.places, self.longest = places, longest
        self._from_one = max(1, longest // 2)
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

    def join(self, who: str, gone: Callable[[], bool], dismiss: Callable[[], None]) -> Ticket:
        """Come in, and talk or wait.

        Parameters
        ----------
        who : str
            The address, or what counts as one.
        gone : callable
            Whether this one has given no sign for so long that its place may be given away.
        dismiss : callable
            Told when that happens; it has to :meth:`leave` then, as when it ends by itself.

        Raises
        ------
        Full
        """
        ticket = Ticket(who, gone, dismiss)
        if len(self._talking) >= self.places:
            near = [each for each in self._waiting if each._who == who]
            if len(near) >= self._from_one:
                self._make_room(near, f"{len(near)} of your address are waiting already: try again later")
            if len(self._waiting) >= self.longest:
                self._make_room(
                    self._waiting, f"all {self.places} places are taken and {self.longest} are waiting: try again later"
                )
        self._waiting.append(ticket)
        self.settle()
        ticket.news.clear()
        return ticket

    def _make_room(self, crowd: list[Ticket], complaint: str) -> None:
        """Let the latest of these go who has given no sign."""
        for ticket in reversed(crowd):
            if ticket._gone():
                self._waiting.remove(ticket)
                ticket._dismiss()
                return
        raise Full(complaint)

    def leave(self, ticket: Ticket) -> None:
        """Give the place back, or leave the line."""
        for those in (self._talking, self._waiting):
            if ticket in those:
                those.remove(ticket)
        self.settle()

    def settle(self) -> None:
        """Let in who can be let in, and tell the others where they stand. To be called now and then."""
        while self._waiting and len(self._talking) < self.places:
            first = self._order()[0]
            self._waiting.remove(first)
            self._talking.append(first)
            first.place = 0
            first.news.set()
        for ticket in [ticket for ticket in self._talking if ticket._gone()][: len(self._waiting)]:
            ticket._dismiss()
        for place, ticket in enumerate(self._order(), 1):
            if ticket.place != place:
                ticket.place = place
                ticket.news.set()

    def _order(self) -> list[Ticket]:
        """Those who wait, in the order in which they will be let in."""
        held = Counter(ticket._who for ticket in self._talking)
        turn: dict[Ticket, tuple[bool, int]] = {}
        for ticket in self._waiting:
            turn[ticket] = (ticket._gone(), held[ticket._who])
            held[ticket._who] += 1
        return sorted(self._waiting, key=lambda ticket: turn[ticket])
