"""``--trace FILE``: what the program did and when, for Perfetto or chrome://tracing."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moshi_mlx_app.interrupt import no_interrupt
from moshi_mlx_app.terminal import warn

if TYPE_CHECKING:
    from moshi_mlx.realtime import Trace

__all__ = ["add_trace_option", "tracing"]


def add_trace_option(parser: argparse._ActionsContainer) -> None:
    """``--trace``."""
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="at the end, write what each thread did in the last minutes, for https://ui.perfetto.dev",
    )


@contextlib.contextmanager
def tracing(path: str | None) -> Iterator[Trace | None]:
    """A trace that is written to ``path`` at the end, however that comes; None without a path.

    Raises
    ------
    OSError
        If there is no such folder, or nothing may be written there: at once, and not after the work.
    """
    if path is None:
        yield None
        return
    from moshi_mlx.realtime import Trace

    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; name a file for the trace")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: there is no such folder for the trace")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{target.parent}: the trace cannot be written there; choose another folder")
    trace = Trace()
    try:
        yield trace
    finally:
        with no_interrupt():
            try:
                trace.write(target)
                if trace.forgotten:
                    warn(
                        f"{target} holds the last {trace.kept} events; {trace.forgotten} before them are left out",
                        "trace",
                    )
                else:
                    warn(str(target), "trace")
            except OSError as error:
                warn(f"{target} could not be written: {error.strerror or error}", "trace")
