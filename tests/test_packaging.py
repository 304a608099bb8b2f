"""What a person who installs the project gets: the commands, the packages, the bounds."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def project_dependencies() -> list[str]:
    """The requirement lines of pyproject.toml, every extra's included (Python 3.10 cannot read TOML itself)."""
    table = PYPROJECT[PYPROJECT.index("dependencies = [") : PYPROJECT.index("[project.scripts]")]
    return re.findall(r'"([^"\n]+)"', re.sub(r"#.*", "", table))


@pytest.mark.parametrize("command", ["moshi-mlx-local", "moshi-mlx-quantize", "moshi-mlx-finetune"])
def test_console_commands_exist(command: str) -> None:
    """If this fails, an installed command ends in an ImportError."""
    target = re.search(rf'^{command} = "([\w.]+):(\w+)"$', PYPROJECT, re.MULTILINE)
    assert target is not None
    assert callable(getattr(importlib.import_module(target[1]), target[2]))


@pytest.mark.parametrize("module", ["moshi_mlx_app", "moshi_mlx_quantize", "moshi_mlx_finetune"])
def test_help_needs_no_model(module: str) -> None:
    """If this fails, `--help` needs a download, an audio library or a minute."""
    code = f"import sys; from {module}.cli import main; sys.exit(main(['--help']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in (".", "app", "quantize", "finetune")),
        },
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_quantizing_nothing_is_an_error() -> None:
    """If this fails, the quantize command ends with success although it was told nothing to do."""
    from moshi_mlx_quantize.cli import main

    assert main([]) == 2


def test_no_upper_bounds() -> None:
    """If this fails, the project stops installing beside next year's packages."""
    lines = project_dependencies()
    assert len(lines) > 15
    for line in lines:
        requirement = line.partition(";")[0]
        assert re.fullmatch(r"[\w-]+(\[\w+\])?>=[\d.]+", requirement.strip()), f"{line}: one lower bound and no more"


def test_mlx_has_a_backend_on_both_systems() -> None:
    """If this fails, a fresh install on a Mac or on Linux cannot import mlx.core."""
    mlx = sorted(line for line in project_dependencies() if re.match(r"mlx(\[|>)", line))
    assert [re.sub(r">=[\d.]+", "", line) for line in mlx] == [
        "mlx; sys_platform == 'darwin'",
        "mlx[cpu]; sys_platform == 'linux'",
        "mlx[cuda13]; sys_platform == 'linux'",
    ]
    assert len(set(re.findall(r">=[\d.]+", " ".join(mlx)))) == 1, "one bound for all of them"


def test_lowest_versions_cover_every_dependency() -> None:
    """If this fails, `make lowest` no longer tests the oldest version of something."""
    said = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "lowest.py")], capture_output=True, text=True, check=True
    )
    named = {line.partition("==")[0] for line in said.stdout.split()}
    block = PYPROJECT[PYPROJECT.index("dependencies = [") : PYPROJECT.index("[project.optional-dependencies]")]
    wanted = set(re.findall(r'^\s*"([\w-]+)', block, re.MULTILINE))
    assert named == wanted


def test_an_old_python_is_told_so(tmp_path: Path) -> None:
    """If this fails, `make test` on a machine with an old Python ends in a syntax error instead of advice."""
    code = (
        "import sys, runpy\n"
        "sys.version_info = (3, 9, 18)\n"
        f"sys.argv = ['make_venv.py', {str(tmp_path / 'v')!r}, 'x']\n"
        f"runpy.run_path({str(ROOT / 'scripts' / 'make_venv.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert done.returncode == 1
    assert "needs Python 3.10 or newer" in done.stderr and "make PYTHON=" in done.stderr
    assert "Traceback" not in done.stderr
