"""``python -m moshi_mlx_finetune``."""

import sys

from moshi_mlx_finetune.cli import main

sys.exit(main())
