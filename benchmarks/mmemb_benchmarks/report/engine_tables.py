"""The tables of engines: peers, and what TensorRT for RTX builds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmemb_benchmarks.report.table import Table, caption, read_json

CALLS = {"embed": "embed", "think and embed": "think, embed"}

PEERS = (  # label, the peers side by side in one row, the form of their ratios
    ("transformers, eager / compiled", ("transformers eager", "transformers compile"), ".2f"),
    ("transformers, bfloat16 / compiled", ("transformers bfloat16", "transformers bfloat16 compile"), ".1f"),
    ("sentence-transformers", ("sentence-transformers",), ".2f"),
    ("OpenVINO, 8-bit weights / GenAI's pipeline", ("OpenVINO 8-bit", "OpenVINO GenAI 8-bit"), ".1f"),
    ("vLLM for CPUs, bfloat16", ("vLLM for CPUs bfloat16",), ".1f"),
    ("llama.cpp, float32 / 8-bit", ("llama.cpp float32", "llama.cpp 8-bit"), ".1f"),
    ("fused float32", ("small-fp32",), ".1f"),
    ("**fused int8**", ("small-int8",), ".1f"),
)

BY_TOKEN = {  # what each call is called, and the form of the baseline's seconds
    "prefill x1": ("embed 1", ".2f"),
    "prefill x8": ("embed 8", ".2f"),
    "token x1": ("token, 1 row", ".3f"),
    "token x8": ("token, 8 rows", ".3f"),
}

BUNDLES = {"int8-int4": "fused int8, generator int4", "int8": "fused int8", "fp32": "fused float32"}  # by their endings

SIZES = {"small": "0.2B", "qwen3-vl-2b": "2B"}

QUANTISED = {"int8": "int8 Q/DQ", "fp8": "fp8 Q/DQ", "int4": "int4 blocks"}

TARGET = "sm89"

NUMBERS = "none", "one", "two", "three", "four", "five", "six"


def peers(path: Path) -> Table:
    """Put the runs with peers side by side: a figure of several runs is a range."""
    result = read_json(path)
    runs = [run for run in result["runs"] if "spread" in run]
    columns = {f"{call} x{rows}": f"{short} {rows}" for call, short in CALLS.items() for rows in (1, 8)}
    bases = [run["seconds"]["transformers"] for run in runs]

    def ratio(peer: str, what: str, form: str) -> str:
        seconds = [run["seconds"].get(peer, {}).get(what) for run in runs]
        return _range([base[what] / each for base, each in zip(bases, seconds, strict=True) if each], form, "x")

    first = (_range([base[what] for base in bases], ".2f" if bases[0][what] < 1 else ".1f") for what in columns)
    rows = [(f"{SIZES[runs[0]['shape']]}: transformers, seconds", *first)]
    for label, names, form in PEERS:
        cells = (" / ".join(filter(None, (ratio(name, what, form) for name in names))) for what in columns)
        rows.append((label, *(cell or "-" for cell in cells)))
    head = f"times faster than transformers (float32, SDPA), {runs[0]['threads']} cores", *columns.values()
    return Table(caption(result, *(run["command"] for run in runs)), head, rows)


def _range(figures: Sequence[float], form: str, unit: str = "") -> str:
    """Return the smallest and the largest of some figures, one where they look alike, nothing of none."""
    shown = [format(figure, form) + unit for figure in sorted(figures)]
    return " to ".join(dict.fromkeys((shown[0], shown[-1]))) if shown else ""


def peers_by_token(path: Path) -> Table:
    """Put what other engines take side by side, from the runs that timed each token."""
    result = read_json(path)
    runs = [run for run in result["runs"] if "spread" not in run]
    rows: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for run in runs:
        seconds, shape = run["seconds"], run["shape"]
        base = seconds["transformers"]
        again = ", another run" if shape in seen else ""
        seen.add(shape)
        shown = (format(base[what], form) for what, (_, form) in BY_TOKEN.items())
        rows.append((f"{SIZES[shape]}{again}: transformers, seconds", *shown))
        by_ending = {name.partition("-")[2]: found for name, found in seconds.items()}
        rows += [
            (label, *(f"{base[what] / by_ending[ending][what]:.1f}x" for what in BY_TOKEN))
            for ending, label in BUNDLES.items()
            if ending in by_ending
        ]
    head = "another run", *(label for label, _ in BY_TOKEN.values())
    return Table(caption(result, *(run["command"] for run in runs)), head, rows)


def tensorrt(path: Path) -> Table:
    """Say what every graph's build took, and for which GPUs it was built."""
    result = read_json(path)
    graphs: list[dict[str, Any]] = result["graphs"]
    names, bundles, targets = ({str(each[key]): None for each in graphs} for key in ("graph", "bundle", "target"))
    every = f"all {NUMBERS[len(targets)]}"

    def cell(name: str, bundle: str) -> str:
        (of,) = (each for each in graphs if (each["graph"], each["bundle"], each["target"]) == (name, bundle, TARGET))
        return f"{of['seconds']:.1f} / {of['size'] / 2**20:.1f}" if of["built"] else "-"

    def built(bundle: str) -> str:
        failed = {each["target"] for each in graphs if each["bundle"] == bundle and not each["built"]}
        return ", ".join(target for target in targets if target not in failed) if failed else every

    rows = [(name, *(cell(name, bundle) for bundle in bundles)) for name in names]
    rows.append(("parsed and built for", *map(built, bundles)))
    head = f"nano, seconds to build / MiB for {TARGET}", *(QUANTISED.get(bundle, bundle) for bundle in bundles)
    return Table(f"{caption(result)}; {result['library']}; {every}: {', '.join(targets)}", head, rows)
