"""Does a checkpoint build for TensorRT in every precision: seconds, engine bytes and peak memory, by TensorRT for RTX.

It needs no GPU, and no certificate: graphs are written in every precision, built each in a process of its own, and
thrown away. Activations' scales are made up, since no build depends on their values.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mmemb_benchmarks.timing import run_fresh
from mmemb_deploy.bundle.manifest import MANIFEST, write_manifest
from mmemb_deploy.errors import OptionError

LARGEST = 16.0  # of every layer's inputs, in place of what is measured on real ones
PROGRAM = """
import json, resource
from pathlib import Path
from mmemb_benchmarks.measure.builds import build_one
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
    """All engines of a precision; `write_seconds` are those of the graphs and weights, `peak_bytes` the build's."""

    precision: str
    compute: str
    target: str
    write_seconds: float
    peak_bytes: int
    engines: tuple[BuiltEngine, ...]


def measure_builds(
    checkpoint: Path,
    precisions: Sequence[tuple[str, str | None]],
    *,
    target: str,
    rows: int,
    tokens: int,
    report: Callable[[str], None],
) -> Iterator[PrecisionBuild]:
    """Yield what becomes of each precision and its compute type, for batches of `rows` prompts of up to `tokens`.

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
    traced: dict[str, TracedGraphs] = {}
    choices = Choices(ranges=defaultdict(lambda: LARGEST))
    for recipe in recipes:
        outline = outline_checkpoint(checkpoint, dtype=recipe.floats)
        weights = CheckpointWeights(checkpoint, outline)
        if recipe.floats not in traced:
            traced.clear()  # the precisions of one float type follow each other
            traced[recipe.floats] = TracedGraphs(outline, weights, recipe, report)
        with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=".builds.") as scratch:
            began = time.perf_counter()
            graphs = traced[recipe.floats].write(Path(scratch), choices, recipe)
            seconds = time.perf_counter() - began
            facts = manifest(outline, checkpoint.name).model_copy(update={"graphs": graphs})
            write_manifest(Path(scratch), facts)
            report(f"building {recipe.precision}")
            engines, peak = run_fresh(PROGRAM.format(folder=scratch, target=target, rows=rows, tokens=tokens))
        made = tuple(BuiltEngine(**engine) for engine in engines)
        yield PrecisionBuild(recipe.precision, recipe.floats, target, seconds, peak, made)


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
