"""``python -m moshi_mlx.sharding``: a rank other than 0. Started by :func:`moshi_mlx.sharding.launch`."""

from __future__ import annotations

import signal
import sys

from ..errors import MoshiError
from .follower import follow
from .identity import place_here


def main() -> int:
    """Serve rank 0. Returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides when all end
    try:
        place = place_here()
    except MoshiError as error:
        print(error, file=sys.stderr)
        return 2
    if place is None or not place.rank:
        print(
            "this is started by moshi-mlx-local on several machines, or by mlx.launch for ranks 1 and higher",
            file=sys.stderr,
        )
        return 2
    return follow(place)


if __name__ == "__main__":
    sys.exit(main())
