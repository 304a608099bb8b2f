"""LiveKit's client for PersonaPlex talks with this server: role and voice arrive, turns end, it comes back."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from moshi_mlx_app.server.access import Guard
from moshi_mlx_app.server.engine import Engine
from moshi_mlx_app.server.queue import Line
from moshi_mlx_app.server.roles import Roles
from moshi_mlx_app.server.server import Server, listening

from moshi_mlx.engine.generator import GenerationConfig
from tests.helpers.parrot import Parrot

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def livekit_python() -> str:
    """An interpreter that has LiveKit's client; empty if there is none."""
    for place in [os.environ.get("LIVEKIT_PYTHON", ""), str(ROOT / ".venv-livekit/bin/python")]:
        if place and Path(place).exists():
            look = "import sys, importlib.util as u; sys.exit(not u.find_spec('livekit.plugins.nvidia'))"
            if subprocess.run([place, "-c", look]).returncode == 0:
                return place
    return ""


class Actor(Parrot):
    """A parrot that is told who it is."""

    takes_role = True

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[Any, Any]] = []

    def opening(self, role: Any = None, voice: Any = None, *, pin: bool = True) -> None:
        self.told.append((role, voice))

    def voices(self) -> list[str]:
        return ["NATF2"]


def test_livekits_client() -> None:
    """If it fails, LiveKit's agents get no role or voice from this server, or never see the end of a turn."""
    python = livekit_python()
    if not python:
        pytest.skip("no environment with LiveKit's client: make livekit-client, or name one in LIVEKIT_PYTHON")
    actor, said = Actor(), list[str]()

    async def run() -> subprocess.CompletedProcess[str]:
        served = Server(
            Engine(actor), Guard("localhost", ""), Line(2), GenerationConfig(), roles=Roles(actor), on_talk=said.append
        )
        async with listening(served, "127.0.0.1", 0) as port:
            return await asyncio.to_thread(
                subprocess.run,
                [python, str(HERE / "livekit_client.py"), f"ws://127.0.0.1:{port}"],
                capture_output=True,
                text=True,
                timeout=200,
                env={**os.environ, "PYTHONPATH": ""},
            )

    done = asyncio.run(run())
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found, file=sys.stderr)
    assert not found["errors"], (found, said)
    assert actor.told[1:] == [("You sing.", "NATF2.pt"), ("You tell jokes.", "NATF2.pt")]
    assert found["before"] >= 2 and len(found["answers"]) > found["before"]
    # What it hears of an answer is the sound of its turn, not the silence behind it: turns end by themselves.
    spoken = [answer for answer in found["answers"] if answer["audio"] >= 0.8]
    assert len(spoken) >= 3 and all(answer["audio"] <= 2.2 for answer in spoken), found
