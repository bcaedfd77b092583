"""The gate's threshold: the default, a user's targets, and `mmemb calibrate`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmemb_deploy import OptionError
from mmemb_deploy.bundle.folder import NANO
from mmemb_deploy.bundle.manifest import CurvePoint, read_manifest
from mmemb_deploy.evaluation.calibration import (
    Budget,
    Measured,
    Target,
    default_threshold,
    meet,
    reference_quality,
    wilson_interval,
)
from mmemb_deploy.evaluation.routes import Outcome, Routes


def curve(*points: tuple[float, float]) -> list[CurvePoint]:
    """A curve at thresholds 0.1, 0.5 and 0.9 of the given qualities and worst groups."""
    zeros: dict[str, Any] = {"reasoning_rate": 0, "rationale_tokens": 0, "latency_ms": 0, "quality_interval": (0, 1)}
    return [
        CurvePoint(threshold=threshold, quality=quality, worst_group=worst, **zeros)
        for threshold, (quality, worst) in zip((0.1, 0.5, 0.9), points, strict=True)
    ]


@pytest.mark.parametrize(
    ("points", "threshold"),
    [
        (((0.950, 0.0), (0.946, 0.0), (0.944, 0.0)), 0.5),  # the largest within half a point of the best
        (((0.950, 0.0), (0.949, 0.0), (0.949, -0.01)), 0.5),  # 0.9 spoils a group
        (((0.950, -0.02), (0.949, -0.01), (0.949, -0.01)), 0.9),  # all do: the one that spoils it least
    ],
)
def test_the_default_threshold_keeps_quality_overall_and_in_every_group(
    points: tuple[tuple[float, float], ...], threshold: float
) -> None:
    assert default_threshold(curve(*points)) == threshold


def routes(never_hits: Any, always_hits: Any, scores: Any = 0.0) -> Routes:
    """Pairs with these hits and scores; one takes 1 ms without and 5 ms with reasoning, which writes 7 tokens."""

    def outcome(hits: Any, reasoned: float, tokens: float, seconds: float) -> Outcome:
        hits_Q = np.asarray(hits, float)
        reasoned_Q, tokens_Q, seconds_Q = (np.full(len(hits_Q), value) for value in (reasoned, tokens, seconds))
        return Outcome(hits_Q, reasoned_Q, tokens_Q, np.zeros(len(hits_Q)) + scores, seconds_Q)

    return Routes(outcome(never_hits, 0, 0, 0.001), outcome(always_hits, 1, 7, 0.005))


def reference(never_hits: Any, always_hits: Any, groups: int) -> float:
    return reference_quality(routes(never_hits, always_hits), np.ones(len(never_hits), bool), groups)


def test_reasoning_has_to_earn_its_place_as_a_reference() -> None:
    never = np.array([True] * 50 + [False] * 50)
    much_better, by_chance = np.array([True] * 100), np.array([True] * 51 + [False] * 49)
    assert reference(never, much_better, 1) == 1.0
    assert reference(never, by_chance, 1) == 0.5
    assert reference(much_better, never, 1) == 1.0


def test_one_of_many_groups_has_to_earn_it_more_clearly() -> None:
    never, better = np.zeros(100, bool), np.arange(100) < 6  # 2.5 standard errors
    assert reference(never, better, 1) == 0.06
    assert reference(never, better, 7) == 0.0


def measured(scores: list[float]) -> Measured:
    """Pairs that reasoning answers and the fast path does not."""
    count = len(scores)
    return Measured(routes(np.zeros(count), np.ones(count), np.array(scores)), np.array(["all"] * count))


@pytest.mark.parametrize(
    ("budget", "value", "rate"),
    [
        ("reasoning_rate", 0.5, 0.5),
        ("reasoning_rate", 0.49, 0.25),
        ("reasoning_rate", 0.0, 0.0),
        ("latency_ms", 3.0, 0.5),
        ("latency_ms", 5.0, 1.0),
        ("quality", 0.6, 0.75),
        ("quality", 0.0, 0.0),
    ],
)
def test_a_target_spends_its_budget_and_no_more(budget: Budget, value: float, rate: float) -> None:
    point = meet(Target(budget, value), measured([0.9, 0.2, 0.6, 0.4]))
    assert point.reasoning_rate == rate
    assert point.rationale_tokens == 7 * rate


def test_a_target_out_of_reach_says_what_is_in_reach() -> None:
    with pytest.raises(OptionError, match=r"latency_ms 0\.5 is not reached.*the least is 1$"):
        meet(Target("latency_ms", 0.5), measured([0.1, 0.2]))
    with pytest.raises(OptionError, match=r"quality 1\.1 is not reached.*the best on these pairs is 1\.0000"):
        meet(Target("quality", 1.1), measured([0.1, 0.2]))


def test_an_interval_holds_the_share_it_is_of_and_narrows_with_more_pairs() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson 1927, by hand
    low, high = wilson_interval(800, 1000)
    assert 0.7 < low < 0.8 < high < 0.85
    assert wilson_interval(10, 10)[1] == 1.0


def test_mmemb_calibrate_rewrites_the_gate_alone(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(NANO, tmp_path / "bundle"))
    pairs = [
        {"query": {"text": text}, "candidates": ["seven", "one"], "relevant": [True, False], "instruction": "Find it."}
        for text in ("three plus four", "seven", "two times six minus five", "eight minus one")
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = [sys.executable, "-m", "mmemb_deploy", "calibrate", str(bundle), "--json"]
    run = subprocess.run(
        [*command, "--data", str(tmp_path / "pairs.jsonl"), "--reasoning-rate", "0.5"],
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = read_manifest(NANO), read_manifest(bundle)
    assert after.model_copy(update={"gate": before.gate}) == before
    assert after.gate is not None
    assert json.loads(run.stdout) == json.loads(after.gate.model_dump_json())
    (chosen,) = (point for point in after.gate.curve if point.threshold == after.gate.threshold)
    assert chosen.reasoning_rate == 0.5
