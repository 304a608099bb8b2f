"""The links that lead to a running server, and their QR codes."""

from __future__ import annotations

import io
import shutil
from typing import TYPE_CHECKING, TextIO

from .hosts import ANYWHERE, reachable

if TYPE_CHECKING:
    import segno

__all__ = ["links", "qr_svg", "qr_text"]

_BORDER = 2  # modules


def links(scheme: str, host: str, port: int, token: str) -> list[str]:
    """Every link to a server that listens on ``host``, with its key: first the one that reaches farthest, last the one
    for a browser on this machine."""
    hosts = [reachable(host), "localhost"] if host in ANYWHERE else [reachable(host)]
    return [f"{scheme}://{each}:{port}/{f'?token={token}' if token else ''}" for each in dict.fromkeys(hosts)]


def qr_svg(link: str) -> bytes:
    """The QR code as a picture, black on white."""
    picture = io.BytesIO()
    _code(link).save(picture, kind="svg", light="#fff", border=_BORDER, scale=4, xmldecl=False)
    return picture.getvalue()


def qr_text(link: str, stream: TextIO) -> str:
    """The QR code in block letters, light on dark in any terminal; empty where ``stream`` has no room or letters."""
    drawn = io.StringIO()
    _code(link).terminal(drawn, compact=True, border=_BORDER)
    lines = drawn.getvalue().splitlines()
    try:
        "█▀▄".encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return ""
    if shutil.get_terminal_size().columns < len(lines[0]):
        return ""
    return "".join(f"\033[38;5;231;48;5;16m{line}\033[0m\n" for line in lines)


def _code(link: str) -> segno.QRCode:
    import segno

    return segno.make(link, error="l", boost_error=False, micro=False)
