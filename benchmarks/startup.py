"""Start-up: import, load, first frame; and what reading weights costs in memory.

Fresh processes, the smallest of several, since others use the machine: ``import moshi_mlx`` (wall and processor time,
and the five slowest modules as ``python -X importtime`` sees them), and from the command to the first frame of the
built-in model. Then a checkpoint of 400 MB is opened and read, with the resident memory at each stage.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .workers import machine

ROOT = Path(__file__).resolve().parents[1]

IMPORT = """
import json, time
began, used = time.perf_counter(), time.process_time()
import moshi_mlx
print(json.dumps({"wall": time.perf_counter() - began, "cpu": time.process_time() - used}))
"""
FIRST_FRAME = """
import json, time
marks = [(time.perf_counter(), time.process_time())]
def mark(): marks.append((time.perf_counter(), time.process_time()))
import numpy as np, moshi_mlx
mark()
model = moshi_mlx.load("small")
mark()
session = model.session()
mark()
session.step(np.zeros(model.frame_size, np.float32))
mark()
session.step(np.zeros(model.frame_size, np.float32))
mark()
names = "import", "load", "session", "first frame", "second frame"
print(json.dumps({f"{name}, {clock}": marks[i + 1][kind] - marks[i][kind]
    for i, name in enumerate(names) for kind, clock in enumerate(("wall", "cpu"))}))
"""
READ = """
import json, sys
import mlx.core as mx
import psutil
def resident():
    return psutil.Process().memory_info().rss / 1e6
mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))
before = resident()
arrays = mx.load(sys.argv[1])
opened = resident()
mx.eval(arrays["0"])
one = resident()
mx.eval(arrays)
print(json.dumps({"open": opened - before, "one of 100 tensors": one - before, "all": resident() - before}))
"""
WRITE = """
import sys
import mlx.core as mx
mx.save_safetensors(sys.argv[1], {str(i): mx.random.normal((1000, 1000)) for i in range(100)})
"""


def run(code: str, *arguments: str) -> tuple[dict[str, Any], float]:
    """What a fresh Python prints as JSON, and the wall time of the whole process."""
    began = time.perf_counter()
    ran = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    took = time.perf_counter() - began
    answer: dict[str, Any] = json.loads(ran.stdout) if ran.stdout else {}
    return answer, took


def slowest() -> list[tuple[str, float]]:
    """Modules and milliseconds, their own imports not counted."""
    command = [sys.executable, "-X", "importtime", "-c", "import moshi_mlx"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", told.stderr)
    return sorted(((name, int(time_) / 1e3) for time_, name in found), key=lambda pair: -pair[1])[:5]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks startup", description=__doc__)
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args(argv)
    about = machine()
    print(about)
    imports = [run(IMPORT)[0] for _ in range(args.times)]
    wall, cpu = min(one["wall"] for one in imports), min(one["cpu"] for one in imports)
    print(f"import moshi_mlx: {1e3 * wall:.0f} ms, of them processor {1e3 * cpu:.0f} ms")
    modules = slowest()
    print("slowest: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in modules))
    frames = [run(FIRST_FRAME) for _ in range(args.times)]
    stages = {name: round(1e3 * min(one[name] for one, _ in frames), 1) for name in frames[0][0]}
    whole = min(took for _, took in frames)
    print(f"command to the end of two frames: {1e3 * whole:.0f} ms; by stage: {stages}")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "weights.safetensors")
        run(WRITE, path)
        reading = {name: round(mb, 1) for name, mb in run(READ, path)[0].items()}
    print(f"a file of 400 MB, resident memory that it adds (MB): {reading}")
    rows = {
        "import_ms": {"wall": round(1e3 * wall, 1), "cpu": round(1e3 * cpu, 1)},
        "slowest_modules_ms": modules,
        "first_frame": {"whole_ms": round(1e3 * whole, 1), "ms": stages},
        "reading_400_mb": reading,
    }
    print(json.dumps({"benchmark": "startup", "machine": about, "rows": rows}))


if __name__ == "__main__":
    main()
