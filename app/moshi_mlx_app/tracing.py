"""``--trace FILE``: a timeline of the program's threads, for Perfetto or chrome://tracing."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moshi_mlx_app.recording.interrupt import no_interrupt
from moshi_mlx_app.recording.outputs import Output
from moshi_mlx_app.screen.terminal import warn

if TYPE_CHECKING:
    from moshi_mlx.realtime import Trace

__all__ = ["add_trace_option", "trace_output", "tracing"]


def add_trace_option(parser: argparse._ActionsContainer) -> None:
    """``--trace``."""
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="at the end, write a timeline of the last minutes of each thread, for https://ui.perfetto.dev",
    )


def trace_output(path: str) -> Output:
    """The trace as an output file of a command."""
    target = Path(path)
    return Output("the trace", "--trace", target, target.parent / f"{target.name}.partial")


@contextlib.contextmanager
def tracing(path: str | None) -> Iterator[Trace | None]:
    """A trace that is written to ``path`` at the end, also after an error; None without a path."""
    if path is None:
        yield None
        return
    from moshi_mlx.realtime import Trace

    target = Path(path)
    trace = Trace()
    try:
        yield trace
    finally:
        with no_interrupt():
            try:
                trace.write(target)
                if trace.forgotten:
                    warn(
                        f"{target} holds the last {trace.kept} events; {trace.forgotten} earlier ones are left out",
                        "trace",
                    )
                else:
                    warn(str(target), "trace")
            except OSError as error:
                warn(f"{target} could not be written: {error.strerror or error}", "trace")
