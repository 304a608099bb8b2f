"""Programs that speak OpenAI's protocols talk with the built-in model: the libraries as they are on the index."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest

import moshi_mlx

from .serving import serving

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACKAGES = {
    "realtime": "openai",
    "live": "openai",
    "agents": "agents",
    "pipecat": "pipecat",
    "livekit": "livekit.plugins.openai",
    "livekit-live": "livekit.plugins.openai",
}


def python_with(package: str) -> str:
    """An interpreter that has this client; skips the test if there is none."""
    places = [*os.environ.get("OPENAI_PYTHON", "").split(os.pathsep), str(ROOT / ".venv-openai/bin/python")]
    for place in places:
        if place and Path(place).exists():
            look = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
            if subprocess.run([place, "-c", look], capture_output=True).returncode == 0:
                return place
    pytest.skip("no environment with this client: make openai-clients, or name some in OPENAI_PYTHON")


@pytest.mark.parametrize("client", PACKAGES)
def test_a_conversation(client):
    """If it fails, programs made with this library are not understood by the server, are thrown out, log errors, hear
    nothing, or get other words than the model says."""
    python = python_with(PACKAGES[client])
    seconds = float(os.environ.get("MOSHI_CLIENT_SECONDS", "14"))  # 38.6 are all eight questions

    async def run() -> subprocess.CompletedProcess[str]:
        async with serving(moshi_mlx.load("small"), places=1) as served:
            url = served.url.replace("http", "ws") + "/v1"
            command = [python, str(HERE / "openai_clients.py"), client, url, str(seconds)]
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=240)
            await served.until_free(1)
            return done

    done = asyncio.run(run())
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{client}: {report}")
    assert report["log"] == [] and report["interrupted"] >= 1
    # Where the machine is late, an interruption cuts off more.
    assert any(word in report["text"] for word in ("Hello", "Moshi", "Paris")) and report["loud"] > 0.05
