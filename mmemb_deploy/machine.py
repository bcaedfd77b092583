"""What this machine is, as far as results depend on it."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib import import_module
from pathlib import Path

# Those that ONNX Runtime's kernels are chosen by, as Linux spells them.
FEATURES = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
CPUINFO = Path("/proc/cpuinfo")


@cache
def cpu_features() -> tuple[str, ...]:
    """Return the architecture and those of FEATURES that the CPU has, such as ("x86_64", "avx2").

    Linux tells; elsewhere numpy does, which knows fewer of them.
    """
    if CPUINFO.is_file():
        lines = CPUINFO.read_text(errors="replace").splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
        found = set(flags.partition(":")[2].split())
    else:
        known: dict[str, bool] = import_module("numpy._core._multiarray_umath").__cpu_features__
        found = {name.lower().replace("avx512vnni", "avx512_vnni") for name, there in known.items() if there}
    return (platform.machine(), *(name for name in FEATURES if name in found))


def cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
