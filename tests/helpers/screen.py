"""A terminal for tests: what a person would see of what a program wrote, as far as rich's live displays need it."""

from __future__ import annotations

import re
from io import StringIO

__all__ = ["Screen", "Terminal"]

_TOKEN = re.compile(r"\x1b\[(?P<codes>[?\d;]*)(?P<kind>[A-Za-z])|(?P<one>.)", re.DOTALL)


class Screen:
    """Lines of a terminal that never scrolls anything away.

    Attributes
    ----------
    lines : list of str
    broken : int
        Lines that the terminal itself had to break, because they were wider than it.
    """

    def __init__(self, width: int):
        self.width = width
        self.lines, self._row, self._column = [""], 0, 0
        self.broken = 0

    def write(self, text: str) -> None:
        """Take what a program wrote; an unknown sequence is an error of the test."""
        for token in _TOKEN.finditer(text):
            kind, letter = token["kind"], token["one"]
            if kind is None:
                self._put(letter)
            elif kind == "A":
                self._row -= int(token["codes"] or 1)
                assert self._row >= 0, "the cursor leaves the screen"
            elif kind == "K":
                assert token["codes"] == "2"
                self.lines[self._row] = ""
            else:
                assert kind in "mhl", f"unknown sequence {token[0]!r}"

    def _put(self, letter: str) -> None:
        if letter in "\r\n":
            self._column = 0
            self._row += letter == "\n"
        else:
            assert letter.isprintable(), f"{letter!r} reached the terminal"
            if self._column == self.width:
                self.broken += 1
                self._row, self._column = self._row + 1, 0
        while self._row >= len(self.lines):
            self.lines.append("")
        if letter not in "\r\n":
            line = self.lines[self._row].ljust(self._column)
            self.lines[self._row] = line[: self._column] + letter + line[self._column + 1 :]
            self._column += 1


class Terminal(StringIO):
    """A stream that says that it is a terminal, for ``sys.stdout`` and ``sys.stderr``; COLUMNS gives its width."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self, width: int) -> Screen:
        """What stands there now."""
        screen = Screen(width)
        screen.write(self.getvalue())
        return screen
