"""What each part of the method is worth, on DigitChain: selection, control, reward, and dependence on the rationale.

Everything starts from one backbone and one judged pool, and is measured on digits that no training saw. Each table
changes one thing and keeps the rest. Every model's threshold is calibrated by the same rule on the same held-out pairs,
so that "auto" is what a user of that model would get.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation.calibration import calibrate
from mmemb_deploy.evaluation.controls import compare_modes
from mmemb_deploy.evaluation.digitchain import FAMILIES, DigitChain
from mmemb_deploy.evaluation.pairs import Pair, encode_queries, held_out_pairs
from mmemb_deploy.evaluation.routes import Outcome, Routes
from mmemb_deploy.files import write_whole
from mmemb_deploy.routing.router import highest
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.nano.stages import NanoRecipe, NanoRun, everything, gain_only, instance_level, pair_aware
from mmemb_training.recipes.settings import Rewards
from mmemb_training.runtime import torch_embedder
from mmemb_training.selection.job import REPORT
from mmemb_training.stage import Watch

RULES = {
    "none (all candidates)": ("joint-none", everything),
    "instance-level correctness": ("joint-instance", instance_level),
    "gain only": ("joint-gain", gain_only),
    "gain and content": ("joint", pair_aware),
}
COSTS = (0.0, 0.1, 2.0)  # the dial; the default recipe's is among them
SEEDS = (101, 202, 303)
CALIBRATION_STEP = 2  # of the pairs that a bundle's gate is calibrated on, every second: 200 of each family


class Ablation:
    """Runs and measures every row; what is finished in the folder is not run again."""

    def __init__(
        self, folder: Path, recipe: NanoRecipe, watch: Watch, report: Callable[[str], None], queries: int
    ) -> None:
        self._run = NanoRun(folder, recipe, watch)
        self._folder = folder / "measured"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._report = report
        self._queries = queries
        self._held_out = held_out_pairs("digitchain")[::CALIBRATION_STEP]

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
        table = {}
        for name, (folder, keeps) in RULES.items():
            embedder = self._calibrated(self._run.joint(folder, keeps))
            self._report(f"measuring selection: {name}")
            mixed = compare_modes(embedder, self._mixed(SEEDS[0]), SEEDS[0])
            table[name] = {
                **{mode: mixed[mode].summary() for mode in ("never", "always", "auto")},
                "families": self._families(embedder, ("always", "auto")),
            }
        return table

    def _control(self) -> dict[str, Any]:
        """Return who decides on mixed traffic, all over the final model's embeddings and rationales."""
        final, before = self._final(), torch_embedder(self._joint())
        self._report("measuring control")
        pairs = self._mixed(SEEDS[0])
        modes = compare_modes(final, pairs, SEEDS[0])
        never, always, auto = modes["never"], modes["always"], modes["auto"]
        earlier = encode_queries(before, pairs, reasoning="never")
        reasons_Q = _top([detail.gate_score for detail in earlier.details], int(auto.reasoned_Q.sum()))
        modes["stage3_decision"] = Routes(never, always).at(reasons_Q)
        rows = ("never", "always", "random_gate", "stage3_decision", "auto", "oracle_gate")
        stage3 = compare_modes(self._calibrated(self._joint()), pairs, SEEDS[0])
        return {
            "rows": {mode: modes[mode].summary() for mode in rows},
            "families": self._families(final, ("never", "always", "auto", "oracle_gate")),
            "curve": _curve(never, always, [("GRPO decision", never.scores_Q), ("stage-3 decision", _scores(earlier))]),
            "stage3_model": {mode: stage3[mode].summary() for mode in ("never", "always", "auto", "oracle_gate")},
        }

    def _reward(self) -> dict[str, Any]:
        """Return, by reward: the policy's own decision (a score of 0.5), unaided by calibration, on mixed traffic."""
        models = {"stage 3 (no reinforcement)": self._joint()}
        models |= {f"cost {cost}": self._controlled(cost) for cost in COSTS}
        models["without paired groups"] = self._controlled(Rewards().cost, paired=False)
        table = {}
        for name, checkpoint in models.items():
            self._report(f"measuring reward: {name}")
            modes = compare_modes(torch_embedder(checkpoint), self._mixed(SEEDS[0]), SEEDS[0])
            table[name] = {mode: modes[mode].summary() for mode in ("never", "always", "auto", "oracle_gate")}
        return table

    def _dependence(self) -> dict[str, Any]:
        """Return hit@1 of always with the rationale intact, shuffled and emptied, by seed of the test examples."""
        final = self._final()
        table: dict[str, dict[str, list[float]]] = {}
        for seed in SEEDS:
            self._report(f"measuring dependence: seed {seed}")
            for family, pairs in {"mixed": self._mixed(seed), **self._by_family(seed)}.items():
                modes = compare_modes(final, pairs, seed)
                for mode in ("always", "shuffled_rationale", "empty_rationale", "auto", "never"):
                    table.setdefault(family, {}).setdefault(mode, []).append(modes[mode].summary()["hit_at_1"])
        return table

    def _final(self) -> Embedder:
        return self._calibrated(self._controlled(Rewards().cost))

    def _joint(self) -> Checkpoint:
        folder, keeps = RULES["gain and content"]
        return self._run.joint(folder, keeps)

    def _controlled(self, cost: float, *, paired: bool = True) -> Checkpoint:
        rewards = replace(Rewards(), cost=cost)
        name = "control" if rewards == Rewards() and paired else f"control-cost{cost}" if paired else "control-unpaired"
        return self._run.control(name, self._joint(), self._run.recipe.control(rewards, paired=paired))

    def _calibrated(self, checkpoint: Checkpoint) -> Embedder:
        gate = calibrate(torch_embedder(checkpoint), self._held_out, "digitchain")
        return torch_embedder(checkpoint, gate)

    def _mixed(self, seed: int) -> list[Pair]:
        return [Pair.of(example) for example in DigitChain("test", seed).mixed(self._queries)]

    def _by_family(self, seed: int) -> dict[str, list[Pair]]:
        source = DigitChain("test", seed)
        count = max(1, self._queries // 5)
        return {family: [Pair.of(example) for example in source.examples(family, count)] for family in FAMILIES}

    def _families(self, embedder: Embedder, modes: Sequence[str]) -> dict[str, dict[str, float]]:
        measured = {
            family: compare_modes(embedder, pairs, SEEDS[0]) for family, pairs in self._by_family(SEEDS[0]).items()
        }
        return {
            family: {mode: found[mode].summary()["hit_at_1"] for mode in modes} for family, found in measured.items()
        }


def _top(scores: Sequence[float], count: int) -> NDArray[np.bool_]:
    """Return who is among the `count` highest scores."""
    chosen = np.zeros(len(scores), bool)
    chosen[highest(enumerate(scores), count)] = True
    return chosen


def _scores(encoded: Any) -> NDArray[np.float64]:
    return np.array([detail.gate_score for detail in encoded.details])


def _curve(
    never: Outcome, always: Outcome, gates: Sequence[tuple[str, NDArray[np.float64]]]
) -> dict[str, dict[str, float]]:
    """Return hit@1 at every twentieth of the reasoning rate, by who orders the inputs."""
    shares = [place / 20 for place in range(21)]
    curve = {"rate": dict(zip(map(str, shares), shares, strict=True))}
    for name, scores_Q in gates:
        curve[name] = {}
        for share in shares:
            reasons_Q = _top(scores_Q.tolist(), round(share * len(scores_Q)))
            curve[name][str(share)] = float(np.where(reasons_Q, always.hits_Q, never.hits_Q).mean())
    ends = float(never.hits_Q.mean()), float(always.hits_Q.mean())
    curve["random"] = {str(share): ends[0] + share * (ends[1] - ends[0]) for share in shares}
    return curve
