"""What both trainers need of the operating system: memory, threads, stopping in good order."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from functools import cache
from types import FrameType
from typing import Any

# glibc hands big blocks back to the kernel at every free and asks for them again: kept, training is twice as fast.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


def keep_memory() -> None:
    """Start this program again with malloc told to keep its memory; only on Linux, only once."""
    if sys.platform == "linux" and not all(name in os.environ for name in _MALLOC):
        os.environ.update(_MALLOC)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@cache
def bfloat16_is_fast() -> bool:
    """Whether this processor multiplies matrices in bfloat16 faster than in float32: some do, others take ten times as
    long, and what PyTorch says about itself does not tell them apart. Measured, in a tenth of a second."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        a, taken = torch.ones(512, 512, dtype=dtype), []
        for _ in range(5):
            began = time.process_time()
            a @ a
            taken.append(time.process_time() - began)
        return min(taken)

    return seconds(torch.bfloat16) < seconds(torch.float32)


def half_precision() -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16 where that is faster."""
    import torch

    return torch.autocast("cpu", torch.bfloat16) if bfloat16_is_fast() else contextlib.nullcontext()


class Stop:
    """True once Ctrl-C or SIGTERM came; the trainer then finishes its step, saves and ends. A second Ctrl-C kills."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = True
        print("stopping after this step", flush=True)

    def __bool__(self) -> bool:
        return self.asked
