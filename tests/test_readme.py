"""The README's Python is run, so that it cannot rot.

A block whose first line is ``# runnable`` is run as it stands. The others need a download or a device: they must at
least be Python, and what they take from moshi_mlx must exist.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_readme_has_python() -> None:
    """If this fails, the tests below run nothing."""
    assert any(block.startswith("# runnable") for block in BLOCKS)


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.startswith("# runnable")], ids=lambda b: b.splitlines()[1][:40]
)
def test_runnable_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, a reader who copies the README gets an error."""
    monkeypatch.chdir(tmp_path)
    seconds = 0.4 * np.sin(2 * np.pi * 220 * np.arange(24000) / 24000)
    exec(compile(block, "README.md", "exec"), {"pcm": seconds.astype(np.float32), "sample_rate": 24000})


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_block_is_python_with_real_names(block: str) -> None:
    """If this fails, the README names something that moshi_mlx does not have."""
    import moshi_mlx

    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "moshi_mlx":
            assert hasattr(moshi_mlx, node.attr), f"moshi_mlx.{node.attr}"


def test_files_named_in_the_readme_exist() -> None:
    """If this fails, a link or a path in the README leads nowhere."""
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)#:]+(?:#[^)]*)?)\)", README)]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_make_targets_named_in_the_readme_exist() -> None:
    """If this fails, a `make` line of the README is answered with "No rule to make target"."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    documents = [README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")]
    targets = {name for text in documents for name in re.findall(r"(?:^    |`)make ([a-z-]+)\b", text, re.MULTILINE)}
    assert {"test", "talk", "check"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
