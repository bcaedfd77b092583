"""The tables of documents, from a folder of results: `tables` gives those that the folder has figures for.

Results lie in files named DAY-NAME.json, of which the latest of a name counts. Those of digitchain, ablation,
precisions, peers and tensorrt-rtx are several runs put together by hand; those of latency and load are as `mmemb bench`
writes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from mmemb_benchmarks.measure.latency import LatencyResult
from mmemb_benchmarks.measure.load import LoadResult
from mmemb_benchmarks.results import Stamped, read_result
from mmemb_deploy.errors import OptionError

MODES = "never", "auto", "always"
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
MIXED = {  # figures of the mixed traffic, and their decimals
    "hit_at_1": ("hit@1", 3),
    "rationale_tokens": ("rationale tokens", 1),
    "reasoning_rate": ("reasoning rate", 2),
    "p50_ms": ("median ms, one query alone", 1),
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
SHOWN_BUNDLES = {"small-int8": "0.2B int8"}
PEERS = (  # label, the peers side by side in one row, the decimals of their ratios
    ("transformers, eager / compiled", ("transformers eager", "transformers compile"), 2),
    ("transformers, bfloat16 / compiled", ("transformers bfloat16", "transformers bfloat16 compile"), 1),
    ("sentence-transformers", ("sentence-transformers",), 2),
    ("OpenVINO, 8-bit weights / GenAI's pipeline", ("OpenVINO 8-bit", "OpenVINO GenAI 8-bit"), 1),
    ("vLLM for CPUs, bfloat16", ("vLLM for CPUs bfloat16",), 1),
    ("llama.cpp, float32 / 8-bit", ("llama.cpp float32", "llama.cpp 8-bit"), 1),
    ("fused float32", ("small-fp32",), 1),
    ("**fused int8**", ("small-int8",), 1),
)
BUNDLES = {"int8-int4": "fused int8, generator int4", "int8": "fused int8", "fp32": "fused float32"}  # by their endings
SIZES = {"small": "0.2B", "qwen3-vl-2b": "2B"}
QUANTISED = {"int8": "int8 Q/DQ", "fp8": "fp8 Q/DQ", "int4": "int4 blocks"}
SHOWN_TARGET = "sm89"
NUMBERS = "none", "one", "two", "three", "four", "five", "six"
FINEST = 11  # decimals of a cosine; beyond them it is the rounding of sums


@dataclass(frozen=True)
class Table:
    """Some figures; `caption` says when they were measured, on what, and by which command."""

    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    @property
    def markdown(self) -> str:
        """The table in Markdown, without its caption."""
        head, *rows = (f"| {' | '.join(row)} |\n" for row in (self.head, *self.rows))
        return "".join([head, "|---" * len(self.head), "|\n", *rows])


def tables(folder: Path) -> dict[str, Table]:
    """Return the tables that a folder has results for, by name.

    Raises OptionError, naming the file, for a result that lacks a figure.
    """
    made: dict[str, Table] = {}
    for name, (files, make) in _TABLES.items():
        paths = [path for file in files if (path := _latest(folder, file))]
        if len(paths) == len(files):
            made[name] = _made(make, paths)
    return made


def headline(folder: Path) -> Table:
    """Return what never, auto and always give on nano, in few rows. Raises OptionError where nano was not measured."""
    files = "latency-nano-cpu", "load-nano-cpu"
    paths = [path for file in files if (path := _latest(folder, file))]
    if len(paths) < len(files):
        raise OptionError(f"{folder} does not hold {' and '.join(files)}: run `make bench`")
    return _made(_headline, paths)


def _made(make: Callable[..., Table], paths: Sequence[Path]) -> Table:
    try:
        return make(*paths)
    except OptionError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        names = ", ".join(path.name for path in paths)
        raise OptionError(f"{names}: not a whole result: {error!r} is missing or wrong") from error


def _latest(folder: Path, name: str) -> Path | None:
    return max(folder.glob(f"????-??-??-{name}.json"), default=None)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _caption(result: dict[str, Any], *commands: str) -> str:
    told = (f"`{command}`" for command in commands or (result["command"],))
    return "; ".join([result["date"], result["device"], *told])


def _digitchain(path: Path) -> Table:
    result = _read(path)
    runs = result["runs"]

    def cell(mode: str, figures: Sequence[float], decimals: int) -> str:
        shown = f"{mean(figures):.{decimals}f}"
        return f"**{shown}**" if mode == "auto" else shown

    rows = [
        (label, *(cell(mode, [run["families"][family][mode] for run in runs], 3) for mode in CONTROLS))
        for family, label in FAMILIES.items()
    ]
    rows += [
        (
            f"mixed traffic: {label}",
            *(cell(mode, [run["mixed"][mode][key] for run in runs], decimals) for mode in CONTROLS),
        )
        for key, (label, decimals) in MIXED.items()
    ]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    return Table(f"{_caption(result)}; means of seeds {seeds}", ("", *CONTROLS.values()), rows)


def _selection(path: Path) -> Table:
    result = _read(path)
    head = "rationales learnt", "auto", "its tokens", "its rate", "always", "never"
    rows: list[tuple[str, ...]] = []
    for key, label in SELECTION.items():
        found = result["selection"][key]
        auto, always, never = (f"{found[mode]['hit_at_1']:.3f}" for mode in ("auto", "always", "never"))
        chosen = f"**{auto}**" if label.startswith("**") else auto
        tokens, rate = found["auto"]["rationale_tokens"], found["auto"]["reasoning_rate"]
        rows.append((label, chosen, f"{tokens:.1f}", f"{rate:.2f}", always, never))
    return Table(_caption(result), head, rows)


def _decision(path: Path) -> Table:
    result = _read(path)
    found = result["control"]["rows"]
    both = [found["never"], found["always"]]
    rows = [
        (
            "never / always",
            " / ".join(f"{each['hit_at_1']:.3f}" for each in both),
            " / ".join(f"{each['reasoning_rate']:.0f}" for each in both),
            " / ".join(f"{each['rationale_tokens']:.3g}" for each in both),
        )
    ]
    rows += [(label, *_outcome([found[key]])) for key, label in DECISIONS.items()]
    return Table(_caption(result), ("who decides, over the controlled model", "hit@1", "rate", "tokens"), rows)


def _reward(path: Path) -> Table:
    result = _read(path)
    found = {key: each["auto"] for key, each in result["reward"].items()}
    costs = [key for key in found if key.startswith("cost ")]
    rows = [
        ("stage 3, no reinforcement", *_outcome([found["stage 3 (no reinforcement)"]])),
        (
            "cost " + " / ".join(f"{float(key.removeprefix('cost ')):g}" for key in costs),
            *_outcome([found[key] for key in costs]),
        ),
        ("without paired groups", *_outcome([found["without paired groups"]])),
    ]
    return Table(_caption(result), ("reward; the policy's own decision", "hit@1", "rate", "tokens"), rows)


def _outcome(found: Sequence[dict[str, float]]) -> tuple[str, str, str]:
    """Return hit@1, reasoning rate and rationale tokens, of several side by side."""
    return (
        " / ".join(f"{each['hit_at_1']:.3f}" for each in found),
        " / ".join(f"{each['reasoning_rate']:.2f}" for each in found),
        " / ".join(f"{each['rationale_tokens']:.1f}" for each in found),
    )


def _reasoning(*paths: Path) -> Table:
    results = [read_result(path) for path in paths]
    rows = [
        row
        for latency, load in zip(results[::2], results[1::2], strict=True)
        for row in _reasoning_rows(latency, load.result)
    ]
    head = f"{results[0].machine.cores} CPU cores, one query alone", *MODES, "auto against always"
    return Table(_caption_of(results), head, rows)


def _caption_of(results: Sequence[Stamped[Any]]) -> str:
    dates = ", ".join(sorted({result.date for result in results}))
    devices = ", ".join(sorted({result.machine.device for result in results}))
    return _caption({"date": dates, "device": devices}, *(result.command for result in results))


def _reasoning_rows(stamped: Stamped[LatencyResult], load: LoadResult) -> list[tuple[str, ...]]:
    latency = stamped.result
    name = stamped.bundle.name if stamped.bundle else "a bundle"
    name = SHOWN_BUNDLES.get(name, name)
    never, auto, always = modes = [latency.modes[mode] for mode in MODES]
    decimals = 0 if never.p50_ms >= 100 else 1 if never.p50_ms >= 10 else 2
    throughputs = [mode.throughput_per_s for mode in modes]
    sustained = [load.modes[mode].sustainable_per_s for mode in MODES]

    def side_by_side(figures: Iterable[float]) -> str:
        return " / ".join(f"{figure:.{decimals}f}" for figure in figures)

    rows: list[tuple[str, ...]] = []
    if never.hit_at_1 is not None and auto.hit_at_1 is not None and always.hit_at_1 is not None:
        hits = never.hit_at_1, auto.hit_at_1, always.hit_at_1
        rows.append(("hit@1", *(f"{hit:.3f}" for hit in hits), f"{auto.hit_at_1 - always.hit_at_1:.3f}"))
    rows += [
        (
            "reasoning rate / rationale tokens",
            *(f"{mode.reasoning_rate:.2f} / {mode.rationale_tokens:.1f}" for mode in modes),
            "",
        ),
        (
            "p50 / p95 / p99, ms",
            *(side_by_side((mode.p50_ms, mode.p95_ms, mode.p99_ms)) for mode in modes),
            f"{auto.p50_ms / always.p50_ms:.2f}x at p50",
        ),
        ("mean, ms", *(side_by_side([mode.mean_ms]) for mode in modes), f"{auto.mean_ms / always.mean_ms:.2f}x"),
        (
            "of it prefill / decode",
            *(side_by_side((mode.stages_ms["prefill"], mode.stages_ms["decode"])) for mode in modes),
            "",
        ),
        (f"a second, in batches of {latency.batch_size}", *_rates(throughputs), _ratio(throughputs)),
        (f"a second of random arrivals, p95 below {load.target_p95_ms:.0f} ms", *_rates(sustained), _ratio(sustained)),
    ]
    return [(f"{name}: {row[0]}", *row[1:]) for row in rows]


def _rates(figures: Sequence[float]) -> list[str]:
    return [f"{figure:.{0 if figure >= 100 else 1}f}" for figure in figures]


def _ratio(figures: Sequence[float]) -> str:
    """Return auto over always."""
    return f"{figures[1] / figures[2]:.2f}x" if figures[2] else "-"


def _headline(*paths: Path) -> Table:
    results = [read_result(path) for path in paths]
    found: LatencyResult = results[0].result
    load: LoadResult = results[1].result
    modes = [found.modes[mode] for mode in MODES]
    rows = [
        ("hit@1", *("-" if mode.hit_at_1 is None else f"{mode.hit_at_1:.3f}" for mode in modes)),
        ("reasoning rate", *(f"{mode.reasoning_rate:.2f}" for mode in modes)),
        ("rationale tokens", *(f"{mode.rationale_tokens:.1f}" for mode in modes)),
        ("mean ms alone", *(f"{mode.mean_ms:.2f}" for mode in modes)),
        ("median ms alone", *(f"{mode.p50_ms:.2f}" for mode in modes)),
        (f"requests a second, in batches of {found.batch_size}", *_rates([mode.throughput_per_s for mode in modes])),
        (
            f"random arrivals a second, p95 below {load.target_p95_ms:.0f} ms",
            *_rates([load.modes[mode].sustainable_per_s for mode in MODES]),
        ),
    ]
    return Table(_caption_of(results), ("nano", *MODES), rows)


def _precisions(path: Path) -> Table:
    result = _read(path)
    head = (
        "nano on DigitChain, fused",
        "ONNX, MB",
        "min cosine, direct / reasoned",
        "rationale tokens that agree",
        "gate flips",
        f"mixed hit@1, {' / '.join(MODES)}",
    )
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
                f"{certificate['token_agreement']:.2%}",
                str(sum(each["gate_flips"] for each in direct)),
                " / ".join(f"{bundle['mixed'][mode]['hit_at_1']:.3f}" for mode in MODES),
            )
        )
    return Table(_caption(result), head, rows)


def _cosine(value: float) -> str:
    """Return a cosine in four decimals; one that they would round to 1 as what it falls short by, at most."""
    lost = 1 - value
    if lost >= 5e-5:
        return f"{value:.4f}"
    return f"1 - 1e-{FINEST if lost <= 0 else min(FINEST, -math.ceil(math.log10(lost)))}"


def _peers(path: Path) -> Table:
    """Put the runs with peers side by side: a figure of several runs is a range."""
    result = _read(path)
    runs = [run for run in result["runs"] if "spread" in run]
    columns = {
        "embed x1": "embed 1",
        "embed x8": "embed 8",
        "think and embed x1": "think, embed 1",
        "think and embed x8": "think, embed 8",
    }

    def ratios(peer: str, what: str, decimals: int) -> str:
        found = [
            run["seconds"]["transformers"][what] / run["seconds"][peer][what]
            for run in runs
            if what in run["seconds"].get(peer, ())
        ]
        return _range([f"{ratio:.{decimals}f}x" for ratio in sorted(found)])

    size = SIZES[runs[0]["shape"]]
    seconds = {what: sorted(run["seconds"]["transformers"][what] for run in runs) for what in columns}
    base = (_range([f"{each:.{2 if each < 1 else 1}f}" for each in seconds[what]]) for what in columns)
    rows = [(f"{size}: transformers, seconds", *base)]
    for label, names, decimals in PEERS:
        cells = ([ratios(name, what, decimals) for name in names] for what in columns)
        rows.append((label, *("-" if set(each) == {"-"} else " / ".join(each) for each in cells)))
    head = f"times faster than transformers (float32, SDPA), {runs[0]['threads']} cores", *columns.values()
    return Table(_caption(result, *(run["command"] for run in runs)), head, rows)


def _range(shown: Sequence[str]) -> str:
    """Return figures, the smallest first, as one or as a range."""
    if not shown:
        return "-"
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"


def _peers_by_token(path: Path) -> Table:
    result = _read(path)
    runs = [run for run in result["runs"] if "spread" not in run]
    columns = {
        "prefill x1": ("embed 1", 2),
        "prefill x8": ("embed 8", 2),
        "token x1": ("token, 1 row", 3),
        "token x8": ("token, 8 rows", 3),
    }
    rows: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for run in runs:
        seconds, shape = run["seconds"], run["shape"]
        base = seconds["transformers"]
        again = ", another run" if shape in seen else ""
        seen.add(shape)
        figures = (f"{base[what]:.{decimals}f}" for what, (_, decimals) in columns.items())
        rows.append((f"{SIZES[shape]}{again}: transformers, seconds", *figures))
        for ending, label in BUNDLES.items():
            name = next((peer for peer in seconds if peer.partition("-")[2] == ending), None)
            if name is not None:
                rows.append((label, *(f"{base[what] / seconds[name][what]:.1f}x" for what in columns)))
    head = "another run", *(label for label, _ in columns.values())
    return Table(_caption(result, *(run["command"] for run in runs)), head, rows)


def _tensorrt(path: Path) -> Table:
    result = _read(path)
    graphs: list[dict[str, Any]] = result["graphs"]
    names, bundles, targets = (
        list(dict.fromkeys(each[key] for each in graphs)) for key in ("graph", "bundle", "target")
    )
    every = f"all {NUMBERS[len(targets)]}"
    at = {(each["graph"], each["bundle"]): each for each in graphs if each["target"] == SHOWN_TARGET}

    def cell(found: dict[str, Any]) -> str:
        return f"{found['seconds']:.1f} / {found['size'] / 2**20:.1f}" if found["built"] else "-"

    def built(bundle: str) -> str:
        failed = {each["target"] for each in graphs if each["bundle"] == bundle and not each["built"]}
        return ", ".join(target for target in targets if target not in failed) if failed else every

    rows = [(name, *(cell(at[name, bundle]) for bundle in bundles)) for name in names]
    rows.append(("parsed and built for", *map(built, bundles)))
    head = f"nano, seconds to build / MiB for {SHOWN_TARGET}", *(QUANTISED.get(bundle, bundle) for bundle in bundles)
    return Table(f"{_caption(result)}; {result['library']}; {every}: {', '.join(targets)}", head, rows)


_TABLES: dict[str, tuple[tuple[str, ...], Callable[..., Table]]] = {  # the files of each, and what makes it of them
    "digitchain": (("digitchain-cpu",), _digitchain),
    "selection": (("ablation-cpu",), _selection),
    "decision": (("ablation-cpu",), _decision),
    "reward": (("ablation-cpu",), _reward),
    "reasoning": (("latency-nano-cpu", "load-nano-cpu", "latency-small-cpu", "load-small-cpu"), _reasoning),
    "precisions": (("precisions-cpu",), _precisions),
    "peers": (("peers-cpu",), _peers),
    "peers-by-token": (("peers-cpu",), _peers_by_token),
    "tensorrt-rtx": (("tensorrt-rtx",), _tensorrt),
}
