"""What the system tells of the processor."""

import platform
from pathlib import Path


CPUINFO = Path("/proc/cpuinfo")

AMX = "amx_bf16"


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    return _first("model name") or platform.machine()


def has_amx() -> bool:
    """Whether it multiplies matrices of bfloat16 by itself: Intel from Sapphire Rapids on.

    Others that know the type (`avx512_bf16`) gain less, and were not measured.
    """
    return AMX in _first("flags").split()


def _first(key: str) -> str:
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((_value(line) for line in lines if line.partition(":")[0].strip() == key), "")


def _value(line: str) -> str:
    return line.partition(":")[2].strip()
