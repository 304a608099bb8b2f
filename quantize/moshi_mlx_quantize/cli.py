"""The command ``moshi-mlx-quantize``. Writing quantized checkpoints is planned, not built."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Say that the command does nothing yet; the exit status is 2 so that no script takes it for success."""
    parser = argparse.ArgumentParser(prog="moshi-mlx-quantize", description=__doc__)
    parser.parse_args(argv)
    print(
        "moshi-mlx-quantize: not built yet. Quantized checkpoints that others published load as they are.",
        file=sys.stderr,
    )
    return 2
