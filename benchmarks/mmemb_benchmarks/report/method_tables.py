"""The tables of quality: the gate, what each part of the method is worth, and precisions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from mmemb_benchmarks.report.table import MODES, Table, caption, read_json, side_by_side

CONTROLS = {
    "never": "never",
    "always": "always",
    "auto": "**auto**",
    "random_gate": "random gate",
    "oracle_gate": "oracle gate",
    "shuffled_rationale": "rationale shuffled",
    "empty_rationale": "rationale emptied",
}

FAMILIES = {
    "match": "match: the same drawing, among look-alikes",
    "name": "name: a digit's name, and back",
    "chain-2": "chain of 2 digits",
    "chain-3": "chain of 3",
    "chain-4": "chain of 4",
    "chain-5": "chain of 5",
    "text": "the same in words",
}

MIXED = {  # of the mixed traffic
    "hit_at_1": ("hit@1", ".3f"),
    "rationale_tokens": ("rationale tokens", ".1f"),
    "reasoning_rate": ("reasoning rate", ".2f"),
    "p50_ms": ("median ms, one query alone", ".1f"),
}

SELECTION = {
    "none (all candidates)": "none dropped (all candidates)",
    "instance-level correctness": "right in themselves (instance-level)",
    "gain only": "that help their pair (gain)",
    "gain and content": "**that help by what they say (gain and content)**",
}

DECISIONS = {
    "random_gate": "random, at auto's rate",
    "stage3_decision": "the stage-3 decision, at auto's rate",
    "auto": "the decision after GRPO (auto)",
    "oracle_gate": "oracle",
}

FINEST = 11  # decimals of a cosine; beyond them it is the rounding of sums


def digitchain(path: Path) -> Table:
    """Put never, always, auto and the controls side by side, by family and on mixed traffic."""
    result = read_json(path)
    runs = result["runs"]

    def row(label: str, form: str, figures: Sequence[dict[str, float]]) -> tuple[str, ...]:
        means = {mode: format(mean(each[mode] for each in figures), form) for mode in CONTROLS}
        return label, *(f"**{shown}**" if mode == "auto" else shown for mode, shown in means.items())

    rows = [row(label, ".3f", [run["families"][family] for run in runs]) for family, label in FAMILIES.items()]
    for key, (label, form) in MIXED.items():
        figures = [{mode: found[key] for mode, found in run["mixed"].items()} for run in runs]
        rows.append(row(f"mixed traffic: {label}", form, figures))
    seeds = ", ".join(str(run["seed"]) for run in runs)
    return Table(f"{caption(result)}; means of seeds {seeds}", ("", *CONTROLS.values()), rows)


def selection(path: Path) -> Table:
    """Say what each rule of selection came to."""
    result = read_json(path)
    rows: list[tuple[str, ...]] = []
    for key, label in SELECTION.items():
        found = result["selection"][key]
        hit, rate, tokens = _outcome([found["auto"]])
        others = (f"{found[mode]['hit_at_1']:.3f}" for mode in ("always", "never"))
        rows.append((label, f"**{hit}**" if label.startswith("**") else hit, tokens, rate, *others))
    return Table(caption(result), ("rationales learnt", "auto", "its tokens", "its rate", "always", "never"), rows)


def decision(path: Path) -> Table:
    """Say what each way to decide came to."""
    result = read_json(path)
    found = result["control"]["rows"]
    rows = [("never / always", *_outcome([found["never"], found["always"]], ".0f", ".3g"))]
    rows += [(label, *_outcome([found[key]])) for key, label in DECISIONS.items()]
    return Table(caption(result), ("who decides, over the controlled model", "hit@1", "rate", "tokens"), rows)


def reward(path: Path) -> Table:
    """Say what each reward came to."""
    result = read_json(path)
    found = {key: each["auto"] for key, each in result["reward"].items()}
    costs = {float(key.removeprefix("cost ")): each for key, each in found.items() if key.startswith("cost ")}
    rows = [
        ("stage 3, no reinforcement", *_outcome([found["stage 3 (no reinforcement)"]])),
        (f"cost {side_by_side(costs, 'g')}", *_outcome(list(costs.values()))),
        ("without paired groups", *_outcome([found["without paired groups"]])),
    ]
    return Table(caption(result), ("reward; the policy's own decision", "hit@1", "rate", "tokens"), rows)


def _outcome(found: Sequence[dict[str, float]], rate: str = ".2f", tokens: str = ".1f") -> tuple[str, str, str]:
    """Return hit@1, reasoning rate and rationale tokens, of several side by side."""
    forms = {"hit_at_1": ".3f", "reasoning_rate": rate, "rationale_tokens": tokens}
    hits, rates, written = (side_by_side((each[key] for each in found), form) for key, form in forms.items())
    return hits, rates, written


def precisions(path: Path) -> Table:
    """Put what each precision costs and keeps side by side."""
    result = read_json(path)
    rows: list[tuple[str, ...]] = []
    for name, bundle in result["bundles"].items():
        certificate = bundle["certificate"]
        direct = certificate["modalities"].values()
        cosines = min(each["min_cosine"] for each in direct), certificate["reasoned"]["min_cosine"]
        rows.append(
            (
                name,
                f"{bundle['onnx_bytes'] / 1e6:.1f}",
                " / ".join(map(_cosine, cosines)),
                _cosine(certificate["batch"]["min_cosine"]),
                f"{certificate['token_agreement']:.2%}",
                str(sum(each["gate_flips"] for each in direct)),
                "all" if name == "float32" else str(len({kept for graph in bundle["kept"].values() for kept in graph})),
                side_by_side((bundle["mixed"][mode]["hit_at_1"] for mode in MODES), ".3f"),
            )
        )
    head = "nano on DigitChain, fused", "ONNX, MB", "min cosine, direct / reasoned", "alone, in a batch"
    more = "tokens that agree", "gate flips", "layers in float32", f"mixed hit@1, {' / '.join(MODES)}"
    return Table(caption(result), (*head, *more), rows)


def _cosine(value: float) -> str:
    """Return a cosine in four decimals; one that they would round to 1 as what it falls short by, at most."""
    lost = 1 - value
    if lost >= 5e-5:
        return f"{value:.4f}"
    return f"1 - 1e-{FINEST if lost <= 0 else min(FINEST, -math.ceil(math.log10(lost)))}"
