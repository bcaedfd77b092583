"""The tables of documents, from a folder of results: `tables` gives those that the folder has figures for.

Results lie in files named DAY-NAME.json, of which the latest of a name counts. Those of digitchain, ablation,
strips, precisions, peers and tensorrt-rtx are several runs put together by hand; all others are as their commands write
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mmemb_benchmarks.report import engine_tables, job_tables, load_tables, method_tables, strips_tables
from mmemb_benchmarks.report.table import Table
from mmemb_deploy.errors import OptionError


def tables(folder: Path) -> dict[str, Table]:
    """Return the tables that a folder has results for, by name.

    Raises OptionError, naming the file, for a result that lacks a figure.
    """
    made: dict[str, Table] = {}
    for name, (files, make) in _TABLES.items():
        paths = [path for file in files if (path := _latest(folder, file))]
        if len(paths) == len(files):
            made[name] = _made(make, paths)
    return made


def headline(folder: Path) -> Table:
    """Return what never, auto and always give on nano, in few rows. Raises OptionError where nano was not measured."""
    files = "latency-nano-cpu", "load-nano-cpu"
    paths = [path for file in files if (path := _latest(folder, file))]
    if len(paths) < len(files):
        raise OptionError(f"{folder} does not hold {' and '.join(files)}: run `make bench`")
    return _made(load_tables.headline, paths)


def _made(make: Callable[..., Table], paths: Sequence[Path]) -> Table:
    try:
        return make(*paths)
    except OptionError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        names = ", ".join(path.name for path in paths)
        raise OptionError(f"{names}: not a whole result: {error!r} is missing or wrong") from error


def _latest(folder: Path, name: str) -> Path | None:
    return max(folder.glob(f"????-??-??-{name}.json"), default=None)


_TABLES: dict[str, tuple[tuple[str, ...], Callable[..., Table]]] = {  # the files of each, and what makes it of them
    "digitchain": (("digitchain-cpu",), method_tables.digitchain),
    "selection": (("ablation-cpu",), method_tables.selection),
    "decision": (("ablation-cpu",), method_tables.decision),
    "reward": (("ablation-cpu",), method_tables.reward),
    "strips-control": (("strips-cpu",), strips_tables.control),
    "strips-families": (("strips-cpu",), strips_tables.families),
    "strips-selection": (("strips-cpu",), strips_tables.selection),
    "strips-dial": (("strips-cpu",), strips_tables.dial),
    "reasoning": (("latency-nano-cpu", "load-nano-cpu", "latency-small-cpu", "load-small-cpu"), load_tables.reasoning),
    "loops": (("loops-nano-cpu",), load_tables.loops),
    "loops-tight": (("loops-tight-nano-cpu",), load_tables.loops),
    "loops-small": (("loops-small-cpu",), load_tables.loops),
    "servers": (("servers-small-cpu",), load_tables.loops),
    "overload": (("overload-nano-cpu",), load_tables.overload),
    "overlap": (("overlap-small-cpu",), job_tables.overlap),
    "memory": (("memory-cpu", "memory-nano-cpu"), job_tables.memory),
    "scale": (("scale-cpu", "scale-million-cpu"), job_tables.scale),
    "search": (("search-128-cpu", "search-1024-cpu"), job_tables.search),
    "precisions": (("precisions-cpu",), method_tables.precisions),
    "peers": (("peers-cpu",), engine_tables.peers),
    "peers-by-token": (("peers-cpu",), engine_tables.peers_by_token),
    "tensorrt-rtx": (("tensorrt-rtx",), engine_tables.tensorrt),
}
