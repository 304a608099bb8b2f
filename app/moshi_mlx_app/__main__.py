"""``python -m moshi_mlx_app`` is the same program as ``moshi-mlx-local``."""

from __future__ import annotations

import sys

from moshi_mlx_app.start import main

if __name__ == "__main__":
    sys.exit(main())
