"""``python -m moshi_mlx_quantize``."""

import sys

from moshi_mlx_quantize.cli import main

sys.exit(main())
