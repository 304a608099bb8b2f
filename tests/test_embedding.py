"""What a program that embeds the library is told: its example is run, its bundle files are read."""

from __future__ import annotations

import ast
import plistlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).resolve().parent.parent
MACOS = ROOT / "packaging" / "macos"
MICROPHONE, ENTITLEMENT = "NSMicrophoneUsageDescription", "com.apple.security.device.audio-input"


def test_files_named_in_the_documentation_exist() -> None:
    """If this fails, a link leads nowhere."""
    for document in (ROOT / "docs" / "embedding.md", MACOS / "README.md"):
        links = re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8"))
        assert links
        for link in links:
            assert (document.parent / link).exists(), f"{document}: {link}"


def test_the_example_converses(tmp_path: Path) -> None:
    """If this fails, the example does not run, or sound does not go in and come out."""
    code = ast.parse((ROOT / "examples" / "embedding.py").read_text(encoding="utf-8"))
    imported = {
        name.name.split(".")[0] for node in ast.walk(code) if isinstance(node, ast.Import) for name in node.names
    }
    assert not imported & {"sounddevice", "moshi_mlx_app"}, "it is to run without devices and without the program"
    question = tmp_path / "question.wav"
    pcm, rate = soundfile.read(ROOT / "moshi_mlx" / "assets" / "questions.wav", dtype="float32")
    soundfile.write(question, pcm[: 2 * rate], rate)
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "embedding.py", question, tmp_path / "answer.wav", "--tail", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answer, answer_rate = soundfile.read(tmp_path / "answer.wav")
    assert answer_rate == 24_000 and len(answer) == 3 * answer_rate and np.abs(answer).max() > 1e-4
    said = re.search(r"(\d+) frames", done.stderr)
    assert said is not None and int(said[1]) > 10, done.stderr


def test_property_lists() -> None:
    """If this fails, macOS ends a bundle as it opens the microphone, or lets it hear silence."""
    info = plistlib.loads((MACOS / "Info.plist").read_bytes())
    entitlements = plistlib.loads((MACOS / "entitlements.plist").read_bytes())
    assert len(info[MICROPHONE]) > 20 and info["LSMinimumSystemVersion"] == "14.0"
    assert entitlements[ENTITLEMENT] is True and all(value is True for value in entitlements.values())


def test_the_briefcase_recipe() -> None:
    """If this fails, the recipe and the files beside it disagree, or it names what is not there."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    recipe: dict[str, Any] = tomllib.loads((MACOS / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["briefcase"]
    app = recipe["app"]["moshi-local"]
    info = plistlib.loads((MACOS / "Info.plist").read_bytes())
    assert app["permission"]["microphone"] == info[MICROPHONE]
    assert app["macOS"]["entitlement"][ENTITLEMENT] is True
    assert app["macOS"]["min_os_version"] == info["LSMinimumSystemVersion"]
    assert info["CFBundleIdentifier"] == f"{recipe['bundle']}.moshi-local"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert recipe["version"] == project["version"] == info["CFBundleShortVersionString"]
    for path in (*app["sources"], *app["requires"], *recipe["license-files"]):
        assert (MACOS / path).exists(), path
    code = (MACOS / app["sources"][0] / "__main__.py").read_text(encoding="utf-8")
    assert "from moshi_mlx_app.start import main" in code
