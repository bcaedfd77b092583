"""Start-up time, measured in fresh processes after one that warms the file cache."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TIMED = "import time; began = time.perf_counter(); {code}; print(time.perf_counter() - began)"


def measure_startup(bundle: Path | None, runs: int) -> dict[str, float]:
    """Return median seconds of `import mmemb_deploy`, of the import of `Embedder`, and of `Embedder.load` after it."""
    load = f"Embedder.load({None if bundle is None else str(bundle)!r})"
    programs = {
        "import package": _TIMED.format(code="import mmemb_deploy"),
        "import Embedder": _TIMED.format(code="from mmemb_deploy import Embedder"),
        "Embedder.load": "from mmemb_deploy import Embedder; " + _TIMED.format(code=load),
    }
    return {name: _median_seconds(code, runs) for name, code in programs.items()}


def _median_seconds(code: str, runs: int) -> float:
    return statistics.median([float(run_fresh(code)) for _ in range(runs + 1)][1:])


def run_fresh(code: str) -> Any:
    """Run a program in a process of its own, and return what its last line says in JSON."""
    finished = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(finished.stdout.splitlines()[-1])


def timed(call: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, float]:
    """Call once; return the result and the seconds that it took."""
    began = time.perf_counter()
    result = call(*arguments, **options)
    return result, time.perf_counter() - began
