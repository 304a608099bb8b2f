"""Print pip constraints that hold every direct dependency at its lower bound: ``make lowest`` tests with them.

Where the lowest version has no wheel for the running Python, the oldest one that has is named in NEWER.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# numpy's first releases for newer Pythons.
NEWER = {(3, 13): {"numpy": "2.1.0"}, (3, 14): {"numpy": "2.3.2"}}


def main() -> None:
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    newer = NEWER.get(sys.version_info[:2], {})
    bounds = dict(re.findall(r'^\s*"([\w-]+)(?:\[\w+\])?>=([\d.]+)', block[1], re.MULTILINE))
    for name, version in sorted({**bounds, **newer}.items()):
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
