"""A hint for users of ``moshi_mlx.local``, the program of Kyutai's package; here it is ``moshi-mlx-local``."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.exit(
        "this moshi_mlx is not Kyutai's: here `moshi-mlx-local` (or `python -m moshi_mlx`) talks at the microphone, "
        "`moshi-mlx-local web` in the browser; for -q 4 say --model kyutai/moshiko-mlx-q4, and see --help"
    )
