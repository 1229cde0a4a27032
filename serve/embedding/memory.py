"""How much memory this process holds, as the kernel counts it.

The difference over a load is what a model is said to take on a CPU: its weights, what its runtime
keeps beside them, what its first passes left behind, and whatever else the process did meanwhile. Of
a file that is mapped (the word table of a graph) only what was touched counts.
"""

import ctypes
import gc
import resource
from pathlib import Path


STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Pages in memory, files that are mapped included; 0 where the kernel does not say (not Linux)."""
    try:
        return int(STATM.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def give_back() -> None:
    """Return to the kernel what was freed.

    The allocator keeps freed pages for the next load, which would then seem to take nothing.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
