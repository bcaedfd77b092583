"""Every stage alone: preprocess, vision, prefill, gate, decode."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mmemb_benchmarks.suite.setting import MOST, WARM_UP, Setting
from mmemb_deploy.bundle import abi

ROWS = pytest.mark.parametrize("rows", [1, 8])
TEXT_OR_IMAGE = pytest.mark.parametrize("kind", ["long text", "image"])


@pytest.mark.parametrize("kind", ["long text", "image", "video"])
def bench_preprocess(benchmark: Any, setting: Setting, kind: str) -> None:
    """Check, decode, resize and tokenise one input."""
    setting.measure(
        benchmark, setting.maker.row, lambda: setting.content(kind), tokens=int(setting.batch(kind, 1).mask_BT.sum())
    )


@ROWS
def bench_vision(benchmark: Any, setting: Setting, rows: int) -> None:
    """Cut images into patches and encode them."""
    setting.measure(
        benchmark,
        setting.vision.encode,
        lambda: setting.batch("image", rows).visuals,
        visual_tokens=sum(visual.tokens for visual in setting.batch("image", rows).visuals),
    )


@ROWS
@TEXT_OR_IMAGE
def bench_prefill(benchmark: Any, setting: Setting, kind: str, rows: int) -> None:
    """Prefill prompts whose images are encoded."""

    def make() -> Any:
        batch = setting.batch(kind, rows)
        return batch, setting.vision.encode(batch.visuals)

    setting.measure(
        benchmark,
        lambda given: setting.engine.decoder.prefill(*given),
        make,
        tokens=int(setting.batch(kind, rows).mask_BT.sum()),
    )


@ROWS
@pytest.mark.usefixtures("reasons")
def bench_gate(benchmark: Any, setting: Setting, rows: int) -> None:
    """Score the states of prompts."""
    gate, width = setting.engine.gate, setting.manifest.model.hidden_size
    assert gate is not None
    rng = np.random.default_rng(0)
    setting.measure(benchmark, gate.run, lambda: {abi.STATE: rng.standard_normal((rows, width)).astype(np.float32)})


@ROWS
@pytest.mark.usefixtures("reasons")
def bench_decode(benchmark: Any, setting: Setting, rows: int) -> None:
    """Decode one more token of every row, after a long text."""
    batch = setting.batch("long text", rows)
    decoder = setting.engine.decoder
    prefilled = decoder.prefill(batch, setting.vision.encode(()))
    rng, single = np.random.default_rng(0), np.ones(rows, np.int64)
    with decoder.stack([prefilled.cache], MOST + WARM_UP + 1) as stacked:
        cache = stacked

        def extend(token_ids_BT: Any) -> None:
            nonlocal cache
            cache = decoder.extend(cache, token_ids_BT, single, []).cache

        setting.measure(
            benchmark,
            extend,
            lambda: rng.integers(setting.manifest.model.vocabulary_size, size=(rows, 1)),
            tokens=int(batch.mask_BT.sum()),
        )
