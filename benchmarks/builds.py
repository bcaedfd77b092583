"""Does a checkpoint build for TensorRT in every precision: seconds, engine bytes and peak memory, by TensorRT for RTX.

It needs no GPU, and no certificate: graphs are written in every precision, and built each in a process of its own,
which keeps no engine. Activations' scales are made up, since no build depends on their values. Run it with

    python benchmarks/builds.py CHECKPOINT GRAPHS --out RESULT.json
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from mmemb_benchmarks.results import stamp, write
from mmemb_benchmarks.timing import run_fresh
from mmemb_deploy.bundle.manifest import MANIFEST, write_manifest
from mmemb_deploy.errors import OptionError

PRECISIONS = {
    "bfloat16": None,
    "int8": "bfloat16",
    "fp8": "bfloat16",
    "int4": "bfloat16",
    "float16": None,
}  # computed in
LARGEST = 16.0  # of every layer's inputs, in place of what is measured on real ones
PROGRAM = """
import json, resource
from pathlib import Path
import sys
sys.path.insert(0, {here!r})
from builds import build_one
rows = build_one(Path({folder!r}), {target!r}, {rows}, {tokens})
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([rows, peak]))
"""


@dataclass(frozen=True)
class BuiltEngine:
    """One engine: its profiles, and the seconds and bytes that it took; `error` says why there is none."""

    engine: str
    profiles: int
    seconds: float
    nbytes: int
    error: str | None


@dataclass(frozen=True)
class PrecisionBuild:
    """All engines of a precision, and the most memory that building them took."""

    precision: str
    compute: str
    target: str
    peak_bytes: int
    engines: tuple[BuiltEngine, ...]


def write_graphs(
    checkpoint: Path, precisions: Sequence[tuple[str, str | None]], folder: Path, report: Callable[[str], None]
) -> list[Path]:
    """Write a checkpoint's portable graphs in every precision and compute type, unless they are there; return where.

    Raises OptionError for a precision that is not known, and for a checkpoint that cannot be read.
    """
    from mmemb_export.recipe import Recipe
    from mmemb_export.traced import Choices, TracedGraphs
    from mmemb_export.weights import CheckpointWeights
    from mmemb_training.checkpoint import outline_checkpoint
    from mmemb_training.runtime import manifest

    recipes = [Recipe(precision=precision, compute=compute) for precision, compute in precisions]
    if not checkpoint.is_dir():
        raise OptionError(f"{checkpoint} is no folder: pass a checkpoint")
    choices = Choices(ranges=defaultdict(lambda: LARGEST))
    traced: dict[str, TracedGraphs] = {}
    folders = [folder / f"{recipe.precision}-{recipe.floats}" for recipe in recipes]
    for recipe, target in zip(recipes, folders, strict=True):
        if (target / MANIFEST).is_file():
            continue
        outline = outline_checkpoint(checkpoint, dtype=recipe.floats)
        if recipe.floats not in traced:
            traced = {recipe.floats: TracedGraphs(outline, CheckpointWeights(checkpoint, outline), recipe, report)}
        target.mkdir(parents=True, exist_ok=True)
        graphs = traced[recipe.floats].write(target, choices, recipe)
        write_manifest(target, manifest(outline, checkpoint.name).model_copy(update={"graphs": graphs}))
    return folders


def measure_builds(
    folders: Sequence[Path], *, target: str, rows: int, tokens: int, report: Callable[[str], None]
) -> Iterator[PrecisionBuild]:
    """Yield what becomes of each folder of graphs, for batches of `rows` prompts of up to `tokens` tokens."""
    for folder in folders:
        report(f"building {folder.name}")
        asked = {"folder": str(folder), "target": target, "rows": rows, "tokens": tokens}
        engines, peak = run_fresh(PROGRAM.format(here=str(Path(__file__).parent), **asked))
        precision, _, compute = folder.name.partition("-")
        yield PrecisionBuild(precision, compute, target, peak, tuple(BuiltEngine(**engine) for engine in engines))


def build_one(folder: Path, target: str, rows: int, tokens: int) -> list[dict[str, object]]:
    """Build the graphs of a folder for a target; return the fields of each BuiltEngine."""

    from mmemb_deploy.backends.tensorrt.api import TENSORRT_RTX
    from mmemb_deploy.backends.tensorrt.options import BuildOptions
    from mmemb_deploy.bundle.folder import Bundle
    from mmemb_deploy.bundle.manifest import Manifest
    from mmemb_engines.build import device_sets
    from mmemb_engines.check import check_graphs
    from mmemb_engines.profiles import demand_of_limits, profiles
    from mmemb_engines.watch import Silent

    facts = Manifest.model_validate_json((folder / MANIFEST).read_text())
    bundle, options = Bundle(folder, facts), BuildOptions()
    demand = demand_of_limits(facts, rows, tokens=tokens)
    library, devices = device_sets(bundle, TENSORRT_RTX, (target,), options)
    found = []
    for row in check_graphs(bundle, library, devices, demand, options, lambda _: Silent()):
        boxes = len(profiles(row.graph, facts, demand))
        found.append(asdict(BuiltEngine(row.graph, boxes, row.seconds, row.size, row.error)))
    return found


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    graphs: Annotated[Path, typer.Argument(help="Folder for its graphs, which are written where they are not there.")],
    precision: Annotated[list[str] | None, typer.Option(help="Repeat for several; all by default.")] = None,
    target: Annotated[str, typer.Option(help="Compute capability to build for.")] = "sm89",
    batch: Annotated[int, typer.Option(min=1, help="Most prompts of a batch.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a prompt.")] = 1024,
    output: Annotated[Path | None, typer.Option("--out", help="Also write the JSON object to this file.")] = None,
) -> None:
    """Build a checkpoint's graphs in every precision; no GPU is needed, and none is used."""
    asked = [(each, PRECISIONS.get(each)) for each in precision or PRECISIONS]
    folders = write_graphs(checkpoint, asked, graphs, print)
    found = list(measure_builds(folders, target=target, rows=batch, tokens=tokens, report=print))
    for row in found:
        for engine in row.engines:
            size = engine.error or f"{engine.nbytes / 2**20:.0f} MiB"
            print(f"{row.precision} {engine.engine}: {engine.profiles} profiles, {engine.seconds:.1f} s, {size}")
        print(f"{row.precision}: {row.peak_bytes / 2**30:.1f} GiB at the peak")
    if output is not None:
        write(stamp("builds", found, None), output)


if __name__ == "__main__":
    typer.run(main)
