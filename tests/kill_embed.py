"""Kills `mmemb embed` with SIGKILL at random moments, and checks that no row is lost or doubled.

    python tests/kill_embed.py --kills 50

A job is begun and killed, up to three times, until it ends; then the next one is begun. Every other kill is aimed at
the end, where the parts become the output. After each kill the output is whole or absent, and at the end of a job its
rows are those of a job that nobody killed, in order.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mmemb_deploy.jobs.source import CHUNK

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
KILLS = 3  # of one job
TOLERANCE = 1e-5  # rows run in other batches than those of the job that nobody killed


def begin(source: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start a job in a process of its own."""
    command = [sys.executable, "-m", "mmemb_deploy", "embed", str(source), str(output), "--reasoning", "never"]
    return subprocess.Popen([*command, "--json"], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a job that nobody kills."""
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def read(output: Path) -> dict[str, Any]:
    """Return the columns of an output."""
    if output.suffix == ".npz":
        return dict(np.load(output))
    from pyarrow import parquet

    table = parquet.read_table(output)
    return {name: np.array(values) for name, values in table.to_pydict().items()}


def check(output: Path, expected: dict[str, Any]) -> None:
    """Raise AssertionError unless an output has each row once, in order, with its own vector."""
    found = read(output)
    assert found["id"].tolist() == expected["id"].tolist(), f"{output}: rows are lost, doubled or in another order"
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(found["embedding"], expected["embedding"], atol=TOLERANCE)


def wait_for(parts: Path, chunks: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until all chunks are kept, or the job has ended."""
    while process.poll() is None and len(list(parts.glob("*.npz"))) < chunks:
        time.sleep(0.001)


def kill(process: subprocess.Popen[bytes], output: Path, chunks: int, rng: random.Random, seconds: float) -> str:
    """Kill a job at a random moment, and return at which stage it was; "ended" where it was faster."""
    parts = output.with_name(output.name + ".parts")
    if rng.random() < 0.5 and len(list(parts.glob("*.npz"))) < chunks:
        wait_for(parts, chunks, process)
        time.sleep(rng.uniform(0, 0.05))
    else:
        time.sleep(rng.uniform(0, seconds))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if process.returncode == 0:
        return "ended"
    kept = len(list(parts.glob("*.npz")))
    if output.exists():
        return "output there, parts not yet removed"
    return (
        "before the first chunk" if not kept else "between chunks" if kept < chunks else "all chunks there, no output"
    )


def run(kills: int, rows: int, suffix: str, seed: int, folder: Path) -> Counter[str]:
    """Kill jobs so many times, and return how often at which stage. Raises AssertionError where a row is wrong."""
    rng, stages = random.Random(seed), Counter[str]()
    source, whole = folder / "inputs.jsonl", folder / f"whole{suffix}"
    source.write_text("\n".join(json.dumps({"id": f"row {row}", "text": f"{row} plus 3"}) for row in range(rows)))
    chunks = -(-rows // CHUNK)
    began = time.perf_counter()
    end(begin(source, whole))
    seconds, expected = time.perf_counter() - began, read(whole)
    output = folder / f"killed{suffix}"
    while stages.total() < kills:
        output.unlink(missing_ok=True)
        shutil.rmtree(output.with_name(output.name + ".parts"), ignore_errors=True)
        for _ in range(min(KILLS, kills - stages.total())):
            if not output.exists():
                stages[kill(begin(source, output), output, chunks, rng, seconds)] += 1
        del stages["ended"]
        if not output.exists():
            end(begin(source, output))
        check(output, expected)
    return stages


def main() -> None:
    """Read the command line, and say at which stages jobs were killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--suffix", choices=(".npz", ".parquet"), default=".npz")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stages = run(given.kills, given.rows, given.suffix, given.seed, Path(folder))
    for stage, count in stages.most_common():
        print(f"{count:4} killed: {stage}")
    print("each row is there once, after every one of them")


if __name__ == "__main__":
    main()
