"""Entry point: installs a Ctrl-C handler before the slow imports, so that Ctrl-C gives a message, not a traceback."""

from __future__ import annotations

import os
import signal

__all__ = ["end", "main"]


def end(number: int, frame: object) -> None:
    """Handle Ctrl-C immediately: MLX, numpy and others abort or ignore it while they are imported."""
    try:
        os.write(2, b"stopped: nothing was written\n")
    except OSError:  # standard error is closed
        pass
    os._exit(130)


def main() -> int:
    """Run the program with the process's arguments. Returns the exit status."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
    from moshi_mlx_app.cli import main as run

    return run()
