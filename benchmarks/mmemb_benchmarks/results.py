"""What every result carries: its kind, the date, the command, the machine and the bundle."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.files import write_whole

PACKAGES = {
    "mmemb-deploy",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "torch",
    "transformers",
}


def stamp(kind: str, result: Mapping[str, Any], embedder: Embedder | None) -> dict[str, Any]:
    """Return a result in the envelope that all share; `embedder` is None where it is not about one bundle."""
    return {
        "kind": kind,
        "date": datetime.now(UTC).date().isoformat(),
        "command": command(),
        "machine": machine(),
        "bundle": None if embedder is None else bundle_facts(embedder),
        "result": dict(result),
    }


def machine() -> dict[str, Any]:
    """Return the device, its cores and bytes of memory, and the versions of what computes."""
    found = {package.name.lower(): package.version for package in distributions()}
    return {
        "device": f"{_processor()}, {cores()} cores",
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": {"python": platform.python_version()}
        | {name: found[name] for name in sorted(PACKAGES & found.keys())},
    }


def cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bundle_facts(embedder: Embedder) -> dict[str, Any]:
    """Return a bundle's name, the precision of its decoder, the hash of its manifest, and what runs it."""
    manifest = embedder.manifest
    return {
        "name": manifest.model.name,
        "precision": "/".join(dict.fromkeys(graph.precision for graph in manifest.graphs.values())),
        "hash": hashlib.sha256(manifest.model_dump_json().encode()).hexdigest(),
        "backend": embedder.backend,
    }


def command() -> str:
    """Return the command line, without the folders of its arguments."""
    arguments = (f"'{word}'" if " " in word else word for word in map(_short, sys.argv[1:]))
    return " ".join(["mmemb", *arguments])


def write(stamped: Mapping[str, Any], output: Path) -> None:
    """Write a result as one JSON file, whole or not at all."""
    write_whole(output, json.dumps(stamped, indent=1) + "\n")


def _short(word: str) -> str:
    return Path(word).name if os.sep in word else word


def _processor() -> str:
    """Return the processor's name as Linux tells it, or as the platform does."""
    lines = Path("/proc/cpuinfo")
    if lines.is_file():
        for line in lines.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
