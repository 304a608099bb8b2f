"""Curves of a training log.

python -m moshi_mlx_training.codec.plot runs/codec/codec.jsonl codec.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a line cut short by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moshi_mlx_training.codec.plot", description="Curves of a training log."
    )
    parser.add_argument("log", type=Path)
    parser.add_argument("image", type=Path, help="a .png or .svg file to write")
    options = parser.parse_args(arguments)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(options.log)
    numbers = {name for line in lines for name, value in line.items() if isinstance(value, (int, float))}
    names = sorted(numbers - {"step", "hours_heard"})
    figure, axes = pyplot.subplots(len(names), 1, figsize=(8, 1.8 * len(names)), sharex=True, squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line and "step" in line]
        axis.plot(*zip(*points, strict=True))
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(options.image)


if __name__ == "__main__":
    main()
