"""``python -m moshi_mlx`` is the command ``moshi-mlx-local``, where that program is installed."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

COMMAND = "moshi-mlx-local"


def main() -> int:
    """Run the installed command with the process's arguments. Returns the exit status."""
    found = list(entry_points(group="console_scripts", name=COMMAND))
    if not found:
        print(f"the command {COMMAND} is not installed: this moshi_mlx is only the library", file=sys.stderr)
        return 2
    run = found[0].load()
    return int(run() or 0)


if __name__ == "__main__":
    sys.exit(main())
