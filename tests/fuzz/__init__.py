"""Fuzzers: inputs made to do harm. Each has to be read, or refused with one of the program's own errors, soon and in
little memory.

::

    python -m tests.fuzz --seconds 1800                          # all of them; they share the time
    python -m tests.fuzz gguf archives --seconds 60 --seed 7     # two of them
    python -m tests.fuzz gguf --seed 7 --first 1234 --inputs 1   # one input again

A fuzzer is a function, named in :data:`FUZZERS` and marked by :func:`fuzzer`. It is called once, with an empty folder,
and returns what makes an attempt from random numbers: the input, to be kept if it does harm, and a call that gives it
to the program. Every input has random numbers of its own, drawn from the seed and its number, so that one can be made
again without those before it. The default tests run the same fuzzers with a fixed seed and few inputs: see
:func:`attack`.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moshi_mlx.errors import MoshiError
from tests.helpers.load_memory import peak_bytes, reset_peak

__all__ = ["FUZZERS", "Finding", "Fuzzer", "Outcome", "attack", "fuzzer", "load"]

ROOT = Path(__file__).resolve().parents[2]

# Where each fuzzer is: a module of this package.
FUZZERS = {
    "safetensors": "files",
    "gguf": "files",
    "torch": "files",
    "pickles": "files",
    "archives": "files",
    "checkpoints": "files",
    "tokenizers": "files",
    "speakers": "files",
    "hubs": "network",
    "paths": "paths",
    "recordings": "sound",
    "opus": "sound",
    "conversations": "live",
    "kills": "live",
    "messages": "server",
    "requests": "server",
    "events": "events",
    "texts": "configs",
    "configs": "configs",
    "codec-configs": "configs",
}

Attempt = tuple[bytes, Callable[[], object]]
"""An input, and the call that gives it to the program."""
Attack = Callable[[random.Random], Attempt]

_LONGEST_MESSAGE = 2000
_MOST_FINDINGS = 10
_DESCRIPTORS = 20  # that may be open at the end more than at the start


@dataclass(frozen=True)
class Fuzzer:
    """A fuzzer and its bounds.

    Attributes
    ----------
    prepare : callable
        Called with an empty folder; returns what makes an attempt.
    refusals : tuple of exception types
        What the program may raise.
    seconds : float
        Processor time that one input may take; the clock may go on twenty times as long before it counts as a hang.
    megabytes : float
        By how much the process may grow.
    """

    prepare: Callable[[Path], Attack]
    refusals: tuple[type[BaseException], ...] = (MoshiError,)
    seconds: float = 5.0
    megabytes: float = 200.0


@dataclass(frozen=True)
class Finding:
    """What an input did: ``index`` makes it again, ``kept`` holds it."""

    index: int
    what: str
    kept: str = ""


@dataclass
class Outcome:
    """What came of a fuzzer's run; ``megabytes`` is how far the process grew."""

    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    megabytes: float = 0.0
    findings: list[Finding] = field(default_factory=list)


def fuzzer(**bounds: Any) -> Callable[[Callable[[Path], Attack]], Fuzzer]:
    """Mark a function as a fuzzer with these bounds."""
    return lambda prepare: Fuzzer(prepare, **bounds)


def load(name: str) -> Fuzzer:
    """The fuzzer of this name, or at a place: ``package.module:name``."""
    module, _, attribute = name.rpartition(":")
    module = module or f"tests.fuzz.{FUZZERS[name]}"
    found: Fuzzer = getattr(importlib.import_module(module), attribute.replace("-", "_"))
    return found


def attack(
    name: str, seed: int, *, inputs: int = 2**31, seconds: float = 3600.0, first: int = 0, keep: Path | None = None
) -> Outcome:
    """Run a fuzzer in a process of its own, whose memory is its own as well, and which may crash.

    Parameters
    ----------
    name : str
    seed : int
    inputs, seconds
        It ends with whichever comes first.
    first : int
        Number of the first input.
    keep : Path, optional
        Where the inputs that did harm are put.
    """
    arguments = {"name": name, "seed": seed, "inputs": inputs, "seconds": seconds, "first": first}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        arguments |= {"folder": folder, "keep": None if keep is None else str(keep)}
        code = "import sys, json; from tests.fuzz import _child; _child(**json.loads(sys.argv[1]))"
        run = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-c", code, json.dumps(arguments)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
            capture_output=True,
            text=True,
            errors="replace",
        )
        results = [line for line in run.stdout.splitlines() if line.startswith('{"inputs"')]
        if results:
            data = json.loads(results[-1])
            return Outcome(**data | {"findings": [Finding(**finding) for finding in data["findings"]]})
        number, _, last = _last(Path(folder)).partition(b"\n")
        finding = _kept(
            name, seed, int(number or first), last, f"it ended with {run.returncode}: {run.stderr[-3000:]}", keep
        )
        return Outcome(int(number or first) - first + 1, findings=[finding])


def _child(name: str, seed: int, inputs: int, seconds: float, first: int, folder: str, keep: str | None) -> None:
    """Runs in the process of :func:`attack`; its last line of output is the outcome."""
    found = load(name)
    (Path(folder) / "work").mkdir()
    make = found.prepare(Path(folder) / "work")
    outcome, began = Outcome(), time.monotonic()
    descriptors, base = len(os.listdir("/dev/fd")), peak_bytes()
    for index in range(first, first + inputs):
        if time.monotonic() - began >= seconds or len(outcome.findings) >= _MOST_FINDINGS:
            break
        data, call = make(random.Random(f"{name} {seed} {index}"))
        _last(Path(folder), b"%d\n" % index + data)
        told = []
        reset_peak()
        before = peak_bytes()
        faulthandler.dump_traceback_later(20 * found.seconds, exit=True)
        start = time.process_time()
        try:
            call()
        except found.refusals as error:
            outcome.refused += 1
            if not 0 < len(str(error)) <= _LONGEST_MESSAGE:
                told.append(f"its message has {len(str(error))} letters: {str(error)[:200]!r}")
        except Exception:
            told.append(traceback.format_exc(limit=-8))
        took, grown = time.process_time() - start, (peak_bytes() - before) / 1e6
        faulthandler.cancel_dump_traceback_later()
        if took > found.seconds:
            told.append(f"it took {took:.1f} s of processor time")
        if grown > found.megabytes:
            told.append(f"the process grew by {grown:.0f} MB")
        outcome.megabytes = max(outcome.megabytes, grown)
        outcome.inputs += 1
        outcome.findings += [_kept(name, seed, index, data, what, keep and Path(keep)) for what in told]
    reset_peak()
    kept_back = (peak_bytes() - base) / 1e6
    if kept_back > found.megabytes:
        outcome.findings.append(Finding(first, f"{kept_back:.0f} MB more are held at the end"))
    more = len(os.listdir("/dev/fd")) - descriptors
    if more > _DESCRIPTORS:
        outcome.findings.append(Finding(first, f"{more} more descriptors are open at the end"))
    outcome.seconds = time.monotonic() - began
    print("\n" + json.dumps(asdict(outcome)), flush=True)
    os._exit(0)  # threads that wait for a hostile server are not waited for


def _last(folder: Path, data: bytes | None = None) -> bytes:
    """The input that is being tried, with its number in front: what a crash leaves."""
    path = folder / "last"
    if data is not None:
        path.write_bytes(data)
    return path.read_bytes() if path.exists() else b""


def _kept(name: str, seed: int, index: int, data: bytes, what: str, keep: Path | None) -> Finding:
    if keep is None:
        return Finding(index, what)
    keep.mkdir(parents=True, exist_ok=True)
    path = keep / f"{name.rpartition(':')[2]}-{seed}-{index}"
    path.write_bytes(data)
    path.with_name(f"{path.name}.txt").write_text(
        f"python -m tests.fuzz {name} --seed {seed} --first {index} --inputs 1\n\n{what}\n"
    )
    return Finding(index, what, str(path))
