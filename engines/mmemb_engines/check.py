"""Does every graph parse and build for every target? A table that keeps no engine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmemb_deploy.backends.tensorrt.api import Library
from mmemb_deploy.backends.tensorrt.files import EngineSet, ProfileShapes
from mmemb_deploy.backends.tensorrt.network import Watcher
from mmemb_deploy.backends.tensorrt.options import BuildOptions
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.errors import BackendError
from mmemb_engines.build import Watch, parse
from mmemb_engines.profiles import Demand, profiles


@dataclass(frozen=True)
class Checked:
    """What became of an engine: seconds to parse and build it, its bytes, and why it failed, if it did.

    `graph` is what its graph's file is called. `decomposed` says that attention in half precision had no kernel of its
    own and was written out.
    """

    graph: str
    precision: str
    target: str
    parsed: bool
    built: bool
    decomposed: bool
    seconds: float
    size: int
    error: str | None


def check_graphs(
    bundle: Bundle, library: Library, devices: Sequence[EngineSet], demand: Demand, options: BuildOptions, watch: Watch
) -> Iterator[Checked]:
    """Parse and build every engine of a bundle for every device; yield each as it is done."""
    for device in devices:
        for name in bundle.manifest.engines:
            yield _check(bundle, library, device, name, profiles(name, bundle.manifest, demand), options, watch(name))


def _check(
    bundle: Bundle,
    library: Library,
    device: EngineSet,
    name: str,
    boxes: tuple[ProfileShapes, ...],
    options: BuildOptions,
    watcher: Watcher,
) -> Checked:
    facts = bundle.manifest.graphs[bundle.manifest.engines[name][0]]
    parsed, plan, problem = False, None, None
    began = time.perf_counter()
    try:
        network, _ = parse(bundle, library, name, boxes, options)
        parsed = True
        plan = network.build(boxes, options, target=device.target, timings=b"", watcher=watcher)
    except BackendError as error:
        problem = str(error)
    return Checked(
        graph=name,
        precision=facts.precision,
        target=device.target,
        parsed=parsed,
        built=plan is not None,
        decomposed=plan is not None and plan.decomposed,
        seconds=time.perf_counter() - began,
        size=0 if plan is None else plan.content.nbytes,
        error=problem,
    )
