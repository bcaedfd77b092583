"""What the suite runs on: a bundle on a backend, its inputs, and how a benchmark is timed. A pytest plugin.

The runtime's arrays are in host memory when a call returns, so that a call is complete then, on a GPU too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.stats import Stats

from mmemb_benchmarks.results import BundleFacts, Machine, command
from mmemb_benchmarks.timing import timed
from mmemb_benchmarks.workload import KINDS, Maker, assemble
from mmemb_deploy.backends.protocol import Engine
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.inputs.prompts import PAD
from mmemb_deploy.inputs.rows import Batch, collate
from mmemb_deploy.routing.vision import FeatureCache, VisionEncoder

WARM_UP = 1  # rounds
FEWEST, MOST = 6, 60  # rounds that count, of all passes


class Setting:
    """A bundle whose engine is loaded; `seconds` is the time that a benchmark's rounds should take together.

    The suite runs in `passes`, each with a share of every benchmark's rounds, which the results pool: what slows the
    machine for some seconds then shows in the spread of a benchmark, and does not pass for its time.
    """

    def __init__(self, bundle: Bundle, engine: Engine, seconds: float, passes: int) -> None:
        self.bundle, self.engine, self.passes, self._seconds = bundle, engine, passes, seconds
        self.times: dict[str, list[float]] = defaultdict(list)
        self.manifest = manifest = bundle.manifest
        self.embedder = assemble(bundle, engine)
        self.maker = Maker(self.embedder.encoder, manifest)
        self.vision = VisionEncoder(engine.vision, manifest.vision, FeatureCache(0))
        self._rng = np.random.default_rng(0)

    def content(self, kind: str) -> Any:
        """Return a new input of a kind."""
        return KINDS[kind](self.maker, self._rng)

    def batch(self, kind: str, rows: int) -> Batch:
        """Return new inputs of a kind, preprocessed and padded to the longest."""
        return collate([self.maker.row(self.content(kind)) for _ in range(rows)], self.manifest.markers[PAD])

    def measure(self, benchmark: Any, run: Callable[[Any], Any], make: Callable[[], Any], **facts: float) -> None:
        """Time `run` on what `make` gives anew for each round; `facts` are saved beside the times."""
        _, seconds = timed(run, make())
        rounds = np.clip(self._seconds / seconds, FEWEST, MOST)
        benchmark.extra_info.update(facts)
        benchmark.pedantic(
            run, setup=lambda: ((make(),), {}), rounds=math.ceil(rounds / self.passes), warmup_rounds=WARM_UP
        )

    @pytest.fixture
    def setting(self) -> Setting:
        """What the benchmarks run on."""
        return self

    @pytest.fixture
    def reasons(self) -> None:
        """Skip where there is no reasoning path."""
        if not self.embedder.reasons:
            pytest.skip("this bundle does not reason")

    def pytest_benchmark_update_machine_info(self, machine_info: dict[str, Any]) -> None:
        """Say what the results of all commands say of the machine."""
        machine_info.clear()
        machine_info.update(Machine.here().model_dump())

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        """Add the bundle, the command and each benchmark's 95th percentile; pool the rounds of the passes so far."""
        output_json |= {"bundle": BundleFacts.of(self.embedder).model_dump(), "command": command()}
        for benchmark in output_json["benchmarks"]:
            times = self.times[benchmark["fullname"]]
            times += benchmark["stats"]["data"]
            pooled = Stats()  # type: ignore[no-untyped-call]
            for seconds in times:
                pooled.update(seconds)  # type: ignore[no-untyped-call]
            benchmark["stats"] |= {field: getattr(pooled, field) for field in Stats.fields} | {"data": times}
            benchmark["extra_info"]["p95"] = float(np.percentile(times, 95))
