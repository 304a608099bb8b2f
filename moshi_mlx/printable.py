"""Text from files, models and networks, made safe to print.

This module uses no terminal: it only removes what a terminal would interpret.
"""

from __future__ import annotations

import unicodedata

__all__ = ["printable"]

# Controls, line and paragraph separators, and halves of surrogate pairs, which no encoding can write.
_OBEYED = {"Cc", "Cs", "Zl", "Zp"}
# Unicode's bidirectional controls (UAX #9): they reorder what is read around them.
_BIDIRECTIONAL = {*"\u061c\u200e\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}


def printable(text: str) -> str:
    """``text`` on one line, with a space for each control character, separator and bidirectional mark."""
    return "".join(
        " " if letter in _BIDIRECTIONAL or unicodedata.category(letter) in _OBEYED else letter for letter in text
    )
