"""What a simulation is told of a real bundle: its inputs, as they ran, and what runs of its engine took."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from mmemb_benchmarks.simulation.engine import SimulatedCosts, SimulatedInput
from mmemb_benchmarks.simulation.fleet import Traffic
from mmemb_benchmarks.simulation.real import request_seconds, scheduled
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation.pairs import Pair, encode_queries

LOADS = (0.2, 0.5, 0.8)  # of what full batches reach, at which runs are timed
SECONDS = 3.0  # of each
SPREAD = 50  # values that say how runs differ from what is fitted

Floats = NDArray[np.float64]


class CostTable(BaseModel, frozen=True):
    """Seconds on one device, fitted to all runs under mixed traffic."""

    prompt_run: float  # and more for each of its rows, and of their tokens, padding included
    prompt_row: float
    prompt_token: float
    step_run: float  # and more for each of its rows
    step_row: float
    prompt_spread: list[float]  # equally likely: runs over what is fitted
    step_spread: list[float]
    between: float  # two runs, of the scheduler itself
    request: float  # of a request that is alone, outside of both
    runs: int  # that were timed

    def costs(self, seed: int) -> SimulatedCosts:
        """Return what runs of a simulated engine take, as they differ, each with what lies between two."""
        draw = Random(seed)

        def prompts(rows: int, tokens: int) -> float:
            fitted = self.prompt_run + rows * (self.prompt_row + tokens * self.prompt_token)
            return fitted * draw.choice(self.prompt_spread) + self.between

        def step(rows: int) -> float:
            return (self.step_run + rows * self.step_row) * draw.choice(self.step_spread) + self.between

        return SimulatedCosts(prompts, step)


def measure_inputs(embedder: Embedder, pairs: Sequence[Pair]) -> list[SimulatedInput]:
    """Let every query reason, and return its tokens, its score, and how long its rationale was."""
    details = encode_queries(embedder, pairs, reasoning="always").details
    return [SimulatedInput(each.prompt_tokens, each.gate_score, each.rationale_tokens) for each in details]


def measure_costs(embedder: Embedder, pairs: Sequence[Pair], seed: int) -> CostTable:
    """Time the runs of the real scheduler and engine: all queries at once, then random arrivals at LOADS."""
    at_once = Traffic(times=[0.0] * len(pairs), numbers=range(len(pairs)))
    scheduled(embedder, pairs, at_once, gated=False)  # warms up
    requests, seen = scheduled(embedder, pairs, at_once, gated=False)
    most = len(pairs) / max(request.ended for request in requests)
    every = [seen]
    for part, load in enumerate(LOADS):
        traffic = Traffic.poisson([(load * most, SECONDS)], len(pairs), seed + 1 + part)
        every.append(scheduled(embedder, pairs, traffic)[1])
    prompts = np.array([run for each in every for run in each.prompt_runs])
    steps = np.array([run for each in every for run in each.step_runs])
    rows, tokens, seconds = prompts.T
    prompt, of_prompts = _fit(np.column_stack([np.ones_like(rows), rows, tokens]), seconds)
    step, of_steps = _fit(np.column_stack([np.ones(len(steps)), steps[:, 0]]), steps[:, 1])
    runs = len(prompts) + len(steps)
    between = sum(each.between for each in every) / runs
    return CostTable(
        prompt_run=prompt[0],
        prompt_row=prompt[1],
        prompt_token=prompt[2],
        step_run=step[0],
        step_row=step[1],
        prompt_spread=_spread(of_prompts),
        step_spread=_spread(of_steps),
        between=between,
        request=request_seconds(embedder, pairs, between),
        runs=runs,
    )


def _spread(ratios_R: Floats) -> list[float]:
    spread: list[float] = np.quantile(ratios_R, (np.arange(SPREAD) + 0.5) / SPREAD).tolist()
    return spread


def _fit(parts_RP: Floats, seconds_R: Floats) -> tuple[list[float], Floats]:
    """Return seconds of each part, none negative, by the least relative error, and every run over what is fitted."""
    left = list(range(parts_RP.shape[1]))
    scale_R = np.maximum(seconds_R, np.quantile(seconds_R, 0.01))  # a CPU's clock may stand still
    while True:
        found = np.linalg.lstsq(parts_RP[:, left] / scale_R[:, None], seconds_R / scale_R)[0]
        if (found >= 0).all():
            break
        del left[int(found.argmin())]
    seconds = np.zeros(parts_RP.shape[1])
    seconds[left] = found
    seconds *= seconds_R.sum() / (parts_RP @ seconds).sum()  # all of them together take what they took
    ratios: Floats = seconds_R / (parts_RP @ seconds)
    return seconds.tolist(), ratios / np.mean(ratios)
