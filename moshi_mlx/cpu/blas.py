"""How many threads numpy's matrix products use.

One conversation keeps two or three threads busy already, and a product of one row lasts microseconds: OpenBLAS'
threads, which wait for one another in a loop, cost more than they bring as soon as a core has anything else to do.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np

__all__ = ["one_blas_thread"]

_SETTERS = ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_", "scipy_openblas_set_num_threads",
            "openblas_set_num_threads")  # fmt: skip
_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


def one_blas_thread() -> bool:
    """Make the OpenBLAS of numpy's wheel use one thread in this process, unless the environment sets a number.

    Returns
    -------
    bool
        Whether it was set. False if numpy has another library (macOS: Accelerate), which is not changed.
    """
    if any(os.environ.get(name) for name in _VARIABLES):
        return False
    home = Path(np.__file__).parent
    for folder in (home.parent / "numpy.libs", home / ".libs", home / ".dylibs"):
        for path in sorted(folder.glob("lib*openblas*")):
            try:
                library = ctypes.CDLL(str(path))
            except OSError:
                continue
            for name in _SETTERS:
                setter = getattr(library, name, None)
                if setter is not None:
                    setter(ctypes.c_int(1))
                    return True
    return False
