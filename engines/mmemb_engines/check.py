"""Does every graph parse and build for every target? A table that keeps no engine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmemb_deploy.backends.tensorrt.api import TENSORRT, Library, Network
from mmemb_deploy.backends.tensorrt.files import EngineSet
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.errors import BackendError
from mmemb_engines.build import Watch
from mmemb_engines.profiles import Demand, profiles


@dataclass(frozen=True)
class Checked:
    """What became of one graph: seconds to parse and build it, the engine's bytes, and why it failed, if it did."""

    graph: str
    precision: str
    target: str
    parsed: bool
    built: bool
    seconds: float
    size: int
    error: str | None


def check_graphs(
    bundle: Bundle, library: Library, devices: Sequence[EngineSet], demand: Demand, watch: Watch
) -> Iterator[Checked]:
    """Parse and build every graph of a bundle for every device; yield each as it is done."""
    for device in devices:
        for name, (role, *_) in bundle.manifest.engines.items():
            parsed, size, problem = False, 0, None
            began = time.perf_counter()
            try:
                network = Network(library, bundle.graph(role))
                parsed = True
                target = None if device.library == TENSORRT else device.target
                boxes = profiles(name, bundle.manifest, demand)
                plan, _ = network.build(boxes, target=target, timings=b"", watcher=watch(name))
                size = plan.nbytes
            except BackendError as error:
                problem = str(error)
            yield Checked(
                graph=name,
                precision=bundle.manifest.graphs[role].precision,
                target=device.target,
                parsed=parsed,
                built=size > 0,
                seconds=time.perf_counter() - began,
                size=size,
                error=problem,
            )
