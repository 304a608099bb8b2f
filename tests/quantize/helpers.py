"""What the tests of the command share."""

from __future__ import annotations

import pytest
from moshi_mlx_quantize.cli import main


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 1) -> str:
    """Run the command, expect an error in one line, and return it."""
    assert main([str(argument) for argument in arguments]) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ") or "error: " in line]
    assert len(lines) == 1 and "unexpected" not in lines[0], lines
    return lines[0]
