"""The benchmark's tables: who decides, at what price; what selection is worth; how far the cost dial moves the rate.

Each seed's models are trained and measured once, into its folder, and a later call goes on. Thresholds of all arms are
chosen by one rule on the same held-out questions. Axes: Q questions, S seeds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from mmemb_deploy.evaluation.controls import compare_modes
from mmemb_deploy.evaluation.digitchain import Split
from mmemb_deploy.files import write_whole
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.recipes.settings import Rewards
from mmemb_training.runtime import torch_embedder
from mmemb_training.samples import query_row
from mmemb_training.selection.bank import embed_rows
from mmemb_training.strips.judge import auc
from mmemb_training.strips.measure import (
    Chosen,
    Doubles,
    Gate,
    Seen,
    best_threshold,
    by_decision,
    by_margin,
    threshold_of_tokens,
)
from mmemb_training.strips.method import MARGINS, RULES, SeedRun, Shared
from mmemb_training.strips.questions import FAMILIES, draw_pairs, draw_strips

TEST_SEED, HELD_OUT_SEED = 5, 6
RENDERINGS = 8  # of every test question, for the models that the arms compare
COMPARED = "joint", "rejection", "control-expected", "control"
REINFORCED = "reinforcement"
REWARDS = Rewards(cost=0.1, sigma=0.3)
SPLITS: tuple[Split, Split] = "calibration", "test"
PARTS = "pool", "control", "dependence", "selection", "dial"
DEPENDENCE = "always", "shuffled_rationale", "empty_rationale"  # modes of the reinforced model
DIAL = (0.0, 0.3, 1.0, 3.0, 10.0)  # costs, beside that of REWARDS


class SeedTables:
    """All that is measured of one seed."""

    def __init__(self, run: SeedRun, questions: int, report: Callable[[str], None]) -> None:
        self._run = run
        self._questions = questions
        self._report = report
        self._folder = run.shared.folder / f"seed-{run.seed}" / f"measured-{questions}"
        self._folder.mkdir(parents=True, exist_ok=True)

    def table(self, name: str) -> Any:
        """Return one of PARTS; what was measured is not measured again."""
        path = self._folder / f"{name}.json"
        if not path.exists():
            measure: dict[str, Callable[[], Any]] = {
                "pool": self._pool,
                "control": self._control,
                "dependence": self._dependence,
                "selection": self._selection,
                "dial": self._dial,
            }
            write_whole(path, json.dumps(measure[name]()))
        return json.loads(path.read_text())

    def _pool(self) -> dict[str, Any]:
        """Return how often the judge is right, and the share of questions in need that kept nothing."""
        true, judged = self._run.shared.assessed, self._run.judged
        keeps = self._run.keeps(RULES[0])
        needy = {one.question for one in true if one.gain > MARGINS.gain}
        kept = {one.question for one in judged if keeps(one)}
        return {"auc": auc(judged, true, MARGINS.gain), "needy_without": 1 - len(needy & kept) / max(1, len(needy))}

    def _control(self) -> dict[str, Any]:
        """Return, by arm: what its gate gives at its best threshold and at equal tokens, by question and by family."""
        arms: dict[str, tuple[str, Callable[[], Checkpoint], Gate]] = {
            "stage 3, threshold": ("joint", self._run.joint, by_decision),
            "stage 3, score structure": ("joint", self._run.joint, by_margin),
            "stage 3, gate on the gap": ("joint", self._run.joint, self._gap_gate),
            "rejection sampling": ("rejection", self._run.rejection, by_decision),
            "reinforcement, expected groups": (
                "control-expected",
                lambda: self._run.control(REWARDS, groups="expected"),
                by_decision,
            ),
            REINFORCED: ("control", lambda: self._run.control(REWARDS), by_decision),
        }
        budget = self._budget()
        return {"budget": budget, "arms": {name: self._arm(*arm, budget) for name, arm in arms.items()}}

    def _arm(self, model: str, train: Callable[[], Checkpoint], gate: Gate, budget: float) -> dict[str, Any]:
        held_out, test = self._seen(model, train, "calibration"), self._seen(model, train, "test")
        points = _points(held_out, test, gate, budget)
        reasons_LQ = np.ones(test.scores_LQ.shape, bool)
        ways = {"never": test.at(~reasons_LQ), "always": test.at(reasons_LQ)} | points
        return {
            **{name: _summary(test, way) | _headroom(test, way) for name, way in ways.items()},
            "families": {name: self._families(way.hits_Q) for name, way in ways.items()},
            **{f"hits_{name}": point.hits_Q.tolist() for name, point in points.items()},
        }

    def _dependence(self) -> dict[str, dict[str, float]]:
        """Return hit@1 by family with the rationale intact, another question's, and empty, on one rendering."""
        checkpoint = self._run.control(REWARDS)
        self._report(f"seed {self._run.seed}: measuring {REINFORCED} without its rationales")
        pairs = draw_pairs("test", TEST_SEED, self._questions)
        outcomes = compare_modes(torch_embedder(checkpoint), pairs, self._run.seed)
        return {mode: self._families(outcomes[mode].hits_Q) for mode in DEPENDENCE}

    def _selection(self) -> dict[str, Any]:
        """Return, by rule of selection: never, always, and its gate at its best threshold and at equal tokens."""
        table, budget = {}, self._budget()
        for rule in RULES:
            name = "joint" if rule == RULES[0] else f"joint-{RULES.index(rule)}"

            def train(rule: str = rule) -> Checkpoint:
                return self._run.joint(rule)

            held_out, test = (self._seen(name, train, split).rendering(0) for split in SPLITS)
            points = _points(held_out, test, by_decision, budget)
            table[rule] = {
                "never": float(test.never_LQ.mean()),
                "always": float(test.always_LQ.mean()),
                **{name: _summary(test, point) for name, point in points.items()},
                "families": self._families(points["best"].hits_Q),
                **{f"hits_{name}": point.hits_Q.tolist() for name, point in points.items()},
            }
        return table

    def _budget(self) -> float:
        """Return half of the tokens a question that stage 3's model writes where it always reasons."""
        return 0.5 * float(self._seen("joint", self._run.joint, "calibration").tokens_LQ.mean())

    def _dial(self) -> dict[str, Any]:
        """Return, by cost: what the policy decides by itself (a score of 0.5), for the first seed alone."""
        if self._run.seed:
            return {}  # one seed shows how far the rate moves
        table = {}
        for cost in sorted({*DIAL, REWARDS.cost}):
            rewards = Rewards(cost=cost, sigma=REWARDS.sigma)
            name = "control" if cost == REWARDS.cost else f"control-{cost}"

            def train(rewards: Rewards = rewards) -> Checkpoint:
                return self._run.control(rewards)

            test = self._seen(name, train, "test").rendering(0)
            table[str(cost)] = _summary(test, test.at(test.scores_LQ >= 0.5))
        return table

    def _families(self, hits_Q: Doubles) -> dict[str, float]:
        return {family: float(hits_Q[self._families_Q == family].mean()) for family in FAMILIES}

    @cached_property
    def _families_Q(self) -> Any:
        told = draw_strips("test", TEST_SEED, self._questions).told
        return np.array([strip.family for strip in told.values()])

    @cached_property
    def _gap_gate(self) -> Gate:
        """A gate regressed on the gap that stage 3's own rationales open (TWN, arXiv 2605.14448), from embeddings."""
        from sklearn.neural_network import MLPRegressor

        samples, checkpoint = self._run.shared.rendered("control", 0).samples, self._run.joint()
        rows = [query_row(one.question, checkpoint.rows) for one in samples]
        direct_QD = embed_rows(checkpoint, rows).astype(np.float64)
        gap_Q = np.array([np.mean(self._run.own.gaps[sample.question.key]) for sample in samples])
        regressor: Any = MLPRegressor(
            hidden_layer_sizes=(64,), early_stopping=True, max_iter=500, random_state=self._run.seed
        )
        regressor.fit(direct_QD, np.clip(gap_Q / REWARDS.sigma, -1, 1))

        def gate(seen: Seen) -> Doubles:
            shape = seen.direct_LQD.shape
            predicted: Doubles = regressor.predict(seen.direct_LQD.reshape(-1, shape[-1])).reshape(shape[:2])
            return predicted

        return gate

    def _seen(self, name: str, train: Callable[[], Checkpoint], split: Split) -> Seen:
        """Return both routes of the test or the held-out questions under a model, which is trained if need be."""
        path = self._folder / f"{name}-{split}.npz"
        if not path.exists():
            checkpoint = train()
            self._report(f"seed {self._run.seed}: measuring {name} on the {split} split")
            if split == "test":
                renderings = RENDERINGS if name in COMPARED else 1
                seen = Seen.of(checkpoint, split, TEST_SEED, self._questions, renderings)
            else:
                seen = Seen.of(checkpoint, split, HELD_OUT_SEED, max(20, self._questions // 2), 1)
            seen.save(path)
        return Seen.load(path)


def run_benchmark(shared: Shared, seeds: int, questions: int, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Train and measure all seeds, part by part; return the tables of each."""
    measured = [SeedTables(SeedRun(shared, seed), questions, report) for seed in range(seeds)]
    parts = {name: [one.table(name) for one in measured] for name in PARTS}
    return [{name: found[seed] for name, found in parts.items()} for seed in range(seeds)]


def _points(held_out: Seen, test: Seen, gate: Gate, tokens: float) -> dict[str, Chosen]:
    """Return what a gate does at the two thresholds that held-out questions choose: the best, and that of `tokens`."""
    thresholds = {"best": best_threshold(held_out, gate), "equal": threshold_of_tokens(held_out, gate, tokens)}
    scores_LQ = gate(test)
    return {name: test.at(scores_LQ >= threshold) for name, threshold in thresholds.items()}


def _summary(seen: Seen, chosen: Chosen) -> dict[str, float]:
    return {
        "hit_at_1": float(chosen.hits_Q.mean()),
        "rate": chosen.rate,
        "tokens": chosen.tokens,
        "random": seen.random(chosen.rate),
    }


def _headroom(seen: Seen, chosen: Chosen) -> dict[str, float]:
    """Return the oracle's hit@1 at the same rate, and the headroom captured: (auto - random) / (oracle - random).

    The latter is 0 where an oracle would gain nothing.
    """
    hit, random, oracle = float(chosen.hits_Q.mean()), seen.random(chosen.rate), seen.oracle(chosen.rate)
    return {"oracle": oracle, "headroom": (hit - random) / (oracle - random) if oracle > random else 0.0}
