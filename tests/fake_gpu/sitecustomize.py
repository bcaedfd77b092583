"""Gives every Python process that finds this folder on PYTHONPATH a fake GPU, and fails it where it broke a rule.

FAKE_GPU_REPORT names a file that a line of JSON is added to at the end: arguments, counts, misuses. With
FAKE_GPU_STAGED, copies from pageable memory read it at once, which NVIDIA promises of some GPUs only.
"""

import atexit
import json
import os
import sys
from pathlib import Path

from fakegpu import plugged_in
from fakegpu.machine import Machine

gpu = Machine()
plug = plugged_in(gpu)
plug.__enter__()


@atexit.register
def report() -> None:
    if path := os.environ.get("FAKE_GPU_REPORT"):
        line = {"arguments": sys.argv, "counts": gpu.counts, "misuses": gpu.misuses}
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")
    if gpu.misuses:
        sys.stderr.write("the fake GPU saw:\n" + "\n".join(gpu.misuses) + "\n")
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(70)
