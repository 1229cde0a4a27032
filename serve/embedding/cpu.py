"""What the system tells of the processor."""

import platform
from pathlib import Path


CPUINFO = Path("/proc/cpuinfo")

BFLOAT16 = frozenset({"amx_bf16", "avx512_bf16"})
"""Intel from Sapphire Rapids on, AMD from Zen 4 on."""


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    return _first("model name") or platform.machine()


def has_bfloat16() -> bool:
    """Whether it multiplies bfloat16 by itself: three times as fast as float32 with AMX, twice with
    AVX-512.
    """
    return not BFLOAT16.isdisjoint(_first("flags").split())


def _first(key: str) -> str:
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((_value(line) for line in lines if line.partition(":")[0].strip() == key), "")


def _value(line: str) -> str:
    return line.partition(":")[2].strip()
