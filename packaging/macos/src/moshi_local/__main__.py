"""What the bundle runs: `moshi-mlx-local`, with the same arguments."""

import sys

from moshi_mlx_app.start import main

if __name__ == "__main__":
    sys.exit(main())
