"""Programs that a benchmark runs beside itself, and how it talks to them.

A worker is a Python script that reads one JSON object a line from stdin and answers each with one on stdout. It works
only while it is asked, so that two of them, ours and Kyutai's, take turns on a machine that others use as well. The
peer's packages live in an environment of their own, named by the variable KYUTAI_PYTHON.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

__all__ = ["Worker", "clocks", "machine", "peer_python", "resident", "summary"]

FOLDER = Path(__file__).resolve().parent


def peer_python() -> str | None:
    """The Python that has Kyutai's moshi_mlx, if one was named."""
    return os.environ.get("KYUTAI_PYTHON") or None


class Worker:
    """A running worker. Use with ``with``.

    Parameters
    ----------
    script : str
        File name in this folder.
    settings : dict
        Given to the script as JSON.
    python : str
        Interpreter; by default this one.
    """

    def __init__(self, script: str, settings: dict[str, Any], python: str = sys.executable):
        root = FOLDER.parents[1]
        path = str(root) if python == sys.executable else ""
        self._process = subprocess.Popen(
            [python, str(FOLDER / script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.about = self._answer()
        """What the worker said when it was ready."""

    def ask(self, **question: Any) -> dict[str, Any]:
        """Ask, and wait for the answer, to which ``resident_mb`` is added: megabytes that the worker then holds."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        answer["resident_mb"] = resident(self._process.pid) / 1e6
        return answer

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args!r} ended: see its message above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def resident(process: int | None = None) -> int:
    """Bytes of memory that a process holds now, this one by default."""
    held: int = psutil.Process(process).memory_info().rss
    return held


def clocks() -> np.ndarray:
    """Seconds of processor time of this process, all threads, and of wall time."""
    return np.array([time.process_time(), time.perf_counter()])


def machine() -> dict[str, Any]:
    """Processor, system, versions and load: what a figure depends on."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    elif sys.platform == "darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        processor = asked.stdout.strip() or processor
    versions = {}
    for name in ("mlx", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
        "load": round(os.getloadavg()[0], 2),
    }


def summary(values: list[float]) -> dict[str, float]:
    """Smallest, median and 95th percentile."""
    array = np.array(values)
    return {
        "min": round(float(array.min()), 2),
        "p50": round(float(np.median(array)), 2),
        "p95": round(float(np.percentile(array, 95)), 2),
    }
