"""What each part of the method is worth, on DigitChain: selection, control, reward, and dependence on the rationale.

Everything starts from one backbone and one assessed pool, and is measured on digits that no training saw. Each table
changes one thing and keeps the rest. Every model's threshold is calibrated by the same rule on the same held-out pairs,
so that "auto" is what a user of that model would get.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation.calibration import calibrate
from mmemb_deploy.evaluation.controls import compare_modes
from mmemb_deploy.evaluation.digitchain import FAMILIES, DigitChain
from mmemb_deploy.evaluation.pairs import Pair, held_out_pairs
from mmemb_deploy.evaluation.routes import Doubles, Outcome, Routes, measure_routes
from mmemb_deploy.files import claim, write_whole
from mmemb_deploy.routing.router import highest
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.nano.method import NanoRecipe, NanoRun, everything, gain_only, instance_level, pair_aware
from mmemb_training.recipes.settings import Groups, Rewards
from mmemb_training.runtime import UNCALIBRATED, torch_embedder
from mmemb_training.selection.assess import REPORT
from mmemb_training.stage import Watch

JOINT, CONTROL = "joint", "control"  # the folders of the models that the method itself makes
RULES = {
    "none (all candidates)": ("joint-none", everything),
    "instance-level correctness": ("joint-instance", instance_level),
    "gain only": ("joint-gain", gain_only),
    "gain and content": (JOINT, pair_aware),
}
COSTS = (0.0, 0.1, 2.0)  # the dial; the default recipe's is among them
REWARDS: dict[str, tuple[str, Rewards, Groups]] = {
    **{f"cost {cost}": (f"control-cost{cost}", replace(Rewards(), cost=cost), "paired") for cost in COSTS},
    f"cost {Rewards().cost}": (CONTROL, Rewards(), "paired"),
    "without paired groups": ("control-unpaired", Rewards(), "drawn"),
}
SEEDS = (101, 202, 303)
CALIBRATION_STEP = 2  # of the pairs that a bundle's gate is calibrated on, every second: 200 of each family
MIXED = "mixed"  # traffic of all families


class Ablation:
    """Runs and measures every row; what is finished in the folder is not run again."""

    def __init__(
        self, folder: Path, recipe: NanoRecipe, watch: Watch, report: Callable[[str], None], queries: int
    ) -> None:
        self._run = NanoRun(folder, recipe, watch)
        self._folder = folder / "measured"
        claim(self._folder, {"recipe": asdict(recipe), "queries": queries})
        self._report = report
        self._queries = queries
        # Several tables show the same pairs, models and measurements.
        self._pairs, self._embedder, self._modes = cache(self._draw), cache(self._calibrate), cache(self._measure)

    def tables(self) -> dict[str, Any]:
        """Return all tables."""
        measured = {
            "selection": self._once("selection", self._selection),
            "control": self._once("control", self._control),
            "reward": self._once("reward", self._reward),
            "dependence": self._once("dependence", self._dependence),
        }
        pool = json.loads((self._run.folder / "selection" / REPORT).read_text())
        return {"recipe": asdict(self._run.recipe), "queries": self._queries, "pool": pool, **measured}

    def _once(self, name: str, measure: Callable[[], Any]) -> Any:
        path = self._folder / f"{name}.json"
        if not path.exists():
            found = measure()
            write_whole(path, json.dumps(found, indent=1))
        return json.loads(path.read_text())

    def _selection(self) -> dict[str, Any]:
        """Return, by rule: hit@1 and tokens of never, always and auto on mixed traffic, auto's rate, and by family."""
        return {
            label: {
                **_summaries(self._modes(name, MIXED), ("never", "always", "auto")),
                "families": self._families(name, ("always", "auto")),
            }
            for label, (name, _) in RULES.items()
        }

    def _control(self) -> dict[str, Any]:
        """Return who decides on mixed traffic, all over the final model's embeddings and rationales."""
        modes, before = self._modes(CONTROL, MIXED), self._modes(JOINT, MIXED)
        routes = Routes(modes["never"], modes["always"])
        gates = {"GRPO decision": modes["never"].scores_Q, "stage-3 decision": before["never"].scores_Q}
        reasons = round(modes["auto"].reasoned_Q.sum())
        rows = modes | {"stage3_decision": _at_top(routes, gates["stage-3 decision"], reasons)}
        return {
            "rows": _summaries(rows, ("never", "always", "random_gate", "stage3_decision", "auto", "oracle_gate")),
            "families": self._families(CONTROL, ("never", "always", "auto", "oracle_gate")),
            "curve": _curve(routes, gates),
            "stage3_model": _summaries(before, ("never", "always", "auto", "oracle_gate")),
        }

    def _reward(self) -> dict[str, Any]:
        """Return, by reward: the policy's own decision (a score of 0.5), unaided by calibration, on mixed traffic."""
        models = {"stage 3 (no reinforcement)": JOINT} | {label: name for label, (name, *_) in REWARDS.items()}
        table = {}
        for label, name in models.items():
            self._report(f"measuring reward: {label}")
            routes = measure_routes(torch_embedder(self._checkpoint(name)), self._pairs(SEEDS[0])[MIXED])
            table[label] = {
                "never": routes.never.summary(),
                "always": routes.always.summary(),
                "auto": routes.gate(UNCALIBRATED.threshold).summary(),
                "oracle_gate": routes.oracle().summary(),
            }
        return table

    def _dependence(self) -> dict[str, Any]:
        """Return hit@1 of always with the rationale intact, shuffled and emptied, by seed of the test examples."""
        table: dict[str, dict[str, list[float]]] = {}
        for seed in SEEDS:
            for family in (MIXED, *FAMILIES):
                modes = self._modes(CONTROL, family, seed)
                for mode in ("always", "shuffled_rationale", "empty_rationale", "auto", "never"):
                    table.setdefault(family, {}).setdefault(mode, []).append(modes[mode].summary()["hit_at_1"])
        return table

    def _checkpoint(self, name: str) -> Checkpoint:
        """Return the model of a folder, trained if need be."""
        rules = dict(RULES.values())
        if name in rules:
            return self._run.joint(name, rules[name])
        rewards, groups = next(found[1:] for found in REWARDS.values() if found[0] == name)
        return self._run.control(name, self._checkpoint(JOINT), self._run.recipe.control(rewards, groups=groups))

    def _calibrate(self, name: str) -> Embedder:
        """Return a model with the threshold that a user of it would get."""
        self._report(f"calibrating {name}")
        checkpoint = self._checkpoint(name)
        return torch_embedder(checkpoint, calibrate(torch_embedder(checkpoint), self._held_out, "digitchain"))

    @cached_property
    def _held_out(self) -> list[Pair]:
        return held_out_pairs("digitchain")[::CALIBRATION_STEP]

    def _measure(self, name: str, family: str, seed: int = SEEDS[0]) -> dict[str, Outcome]:
        """Return what every mode of a model does with a family's pairs, or with the mixed traffic."""
        embedder, pairs = self._embedder(name), self._pairs(seed)[family]
        self._report(f"measuring {name}: {family}, seed {seed}")
        return compare_modes(embedder, pairs, seed)

    def _draw(self, seed: int) -> dict[str, list[Pair]]:
        """Return mixed traffic, and pairs of every family."""
        source, count = DigitChain("test", seed), max(1, self._queries // 5)
        drawn = {MIXED: DigitChain("test", seed).mixed(self._queries)}
        drawn |= {family: source.examples(family, count) for family in FAMILIES}
        return {family: [Pair.of(example) for example in examples] for family, examples in drawn.items()}

    def _families(self, name: str, modes: Sequence[str]) -> dict[str, dict[str, float]]:
        return {
            family: {mode: self._modes(name, family)[mode].summary()["hit_at_1"] for mode in modes}
            for family in FAMILIES
        }


def _summaries(modes: Mapping[str, Outcome], names: Sequence[str]) -> dict[str, dict[str, float]]:
    return {name: modes[name].summary() for name in names}


def _at_top(routes: Routes, scores_Q: Doubles, count: int) -> Outcome:
    """Return what follows where the `count` highest scores reason."""
    reasons_Q = np.zeros(len(scores_Q), bool)
    reasons_Q[highest(enumerate(scores_Q.tolist()), count)] = True
    return routes.at(reasons_Q)


def _curve(routes: Routes, gates: Mapping[str, Doubles]) -> dict[str, dict[str, float]]:
    """Return hit@1 at every twentieth of the reasoning rate, by who orders the inputs."""
    shares = [step / 20 for step in range(21)]
    curve = {"rate": {str(share): share for share in shares}}
    for name, scores_Q in gates.items():
        reasons = {share: round(share * len(scores_Q)) for share in shares}
        curve[name] = {str(share): float(_at_top(routes, scores_Q, reasons[share]).hits_Q.mean()) for share in shares}
    curve["random"] = {str(share): float(routes.random(share).hits_Q.mean()) for share in shares}
    return curve
