"""Whole calls of `encode`, by workload and by who reasons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mmemb_benchmarks.suite.setting import Setting
from mmemb_benchmarks.workload import KINDS
from mmemb_deploy.options import EncodeOptions

RATIONALE = 16  # tokens, at most
BATCH = 8
ROUTES: dict[str, EncodeOptions] = {
    "fast only": {"reasoning": "never"},
    "mixed": {"reasoning_rate": 0.25, "max_rationale_tokens": RATIONALE},
    "reason only": {"reasoning": "always", "max_rationale_tokens": RATIONALE},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ["fast only", "reason only"])
def bench_one(benchmark: Any, setting: Setting, kind: str, route: str) -> None:
    """Embed one input."""
    measure(benchmark, setting, [kind], route)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def bench_batch(benchmark: Any, setting: Setting, kind: str, route: str) -> None:
    """Embed several inputs of one kind in one call; of mixed ones, a quarter reasons."""
    measure(benchmark, setting, [kind] * BATCH, route)


@pytest.mark.parametrize("route", ROUTES)
def bench_traffic(benchmark: Any, setting: Setting, route: str) -> None:
    """Embed inputs of all kinds in one call."""
    measure(benchmark, setting, [*KINDS, "short text", "long text"], route)


def measure(benchmark: Any, setting: Setting, kinds: Sequence[str], route: str) -> None:
    """Time one call of `encode`, and save its tokens."""
    if route != "fast only" and not setting.embedder.reasons:
        pytest.skip("this bundle does not reason")
    written: list[int] = []

    def encode(contents: list[Any]) -> None:
        result = setting.embedder.encode_detailed(contents, **ROUTES[route])
        written.append(sum(detail.rationale_tokens for detail in result.details if detail is not None))

    rows = [setting.maker.row(setting.content(kind)) for kind in kinds]
    setting.measure(
        benchmark,
        encode,
        lambda: [setting.content(kind) for kind in kinds],
        inputs=len(rows),
        tokens=sum(row.length for row in rows),
        visual_tokens=sum(row.visual_tokens for row in rows),
    )
    benchmark.extra_info["rationale_tokens"] = float(np.mean(written))
