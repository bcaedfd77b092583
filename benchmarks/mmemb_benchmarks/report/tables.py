"""The tables of documents, from a folder of results: `tables` gives those that the folder has figures for.

Results lie in files named DAY-NAME.json, of which the latest of a name counts. Those of digitchain, ablation,
precisions, peers and tensorrt-rtx are several runs put together by hand; all others are as `mmemb bench` writes them.
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
from mmemb_benchmarks.measure.load import LoadResult, ModeLoad
from mmemb_benchmarks.measure.memory import Memory
from mmemb_benchmarks.measure.overlap import OverlapResult
from mmemb_benchmarks.measure.overload import Level
from mmemb_benchmarks.measure.search import SearchResult
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
MODELS = {"small-int8": "0.2B int8"}
CALLS = {"embed": "embed", "think and embed": "think, embed"}
PEERS = (  # label, the peers side by side in one row, the form of their ratios
    ("transformers, eager / compiled", ("transformers eager", "transformers compile"), ".2f"),
    ("transformers, bfloat16 / compiled", ("transformers bfloat16", "transformers bfloat16 compile"), ".1f"),
    ("sentence-transformers", ("sentence-transformers",), ".2f"),
    ("OpenVINO, 8-bit weights / GenAI's pipeline", ("OpenVINO 8-bit", "OpenVINO GenAI 8-bit"), ".1f"),
    ("vLLM for CPUs, bfloat16", ("vLLM for CPUs bfloat16",), ".1f"),
    ("llama.cpp, float32 / 8-bit", ("llama.cpp float32", "llama.cpp 8-bit"), ".1f"),
    ("fused float32", ("small-fp32",), ".1f"),
    ("**fused int8**", ("small-int8",), ".1f"),
)
BY_TOKEN = {  # what each call is called, and the form of the baseline's seconds
    "prefill x1": ("embed 1", ".2f"),
    "prefill x8": ("embed 8", ".2f"),
    "token x1": ("token, 1 row", ".3f"),
    "token x8": ("token, 8 rows", ".3f"),
}
BUNDLES = {"int8-int4": "fused int8, generator int4", "int8": "fused int8", "fp32": "fused float32"}  # by their endings
SIZES = {"small": "0.2B", "qwen3-vl-2b": "2B"}
QUANTISED = {"int8": "int8 Q/DQ", "fp8": "fp8 Q/DQ", "int4": "int4 blocks"}
TARGET = "sm89"
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


def _side_by_side(figures: Iterable[float], form: str) -> str:
    return " / ".join(format(figure, form) for figure in figures)


def _digitchain(path: Path) -> Table:
    result = _read(path)
    runs = result["runs"]

    def row(label: str, form: str, figures: Sequence[dict[str, float]]) -> tuple[str, ...]:
        means = {mode: format(mean(each[mode] for each in figures), form) for mode in CONTROLS}
        return label, *(f"**{shown}**" if mode == "auto" else shown for mode, shown in means.items())

    rows = [row(label, ".3f", [run["families"][family] for run in runs]) for family, label in FAMILIES.items()]
    for key, (label, form) in MIXED.items():
        figures = [{mode: found[key] for mode, found in run["mixed"].items()} for run in runs]
        rows.append(row(f"mixed traffic: {label}", form, figures))
    seeds = ", ".join(str(run["seed"]) for run in runs)
    return Table(f"{_caption(result)}; means of seeds {seeds}", ("", *CONTROLS.values()), rows)


def _selection(path: Path) -> Table:
    result = _read(path)
    rows: list[tuple[str, ...]] = []
    for key, label in SELECTION.items():
        found = result["selection"][key]
        hit, rate, tokens = _outcome([found["auto"]])
        others = (f"{found[mode]['hit_at_1']:.3f}" for mode in ("always", "never"))
        rows.append((label, f"**{hit}**" if label.startswith("**") else hit, tokens, rate, *others))
    return Table(_caption(result), ("rationales learnt", "auto", "its tokens", "its rate", "always", "never"), rows)


def _decision(path: Path) -> Table:
    result = _read(path)
    found = result["control"]["rows"]
    rows = [("never / always", *_outcome([found["never"], found["always"]], ".0f", ".3g"))]
    rows += [(label, *_outcome([found[key]])) for key, label in DECISIONS.items()]
    return Table(_caption(result), ("who decides, over the controlled model", "hit@1", "rate", "tokens"), rows)


def _reward(path: Path) -> Table:
    result = _read(path)
    found = {key: each["auto"] for key, each in result["reward"].items()}
    costs = {float(key.removeprefix("cost ")): each for key, each in found.items() if key.startswith("cost ")}
    rows = [
        ("stage 3, no reinforcement", *_outcome([found["stage 3 (no reinforcement)"]])),
        (f"cost {_side_by_side(costs, 'g')}", *_outcome(list(costs.values()))),
        ("without paired groups", *_outcome([found["without paired groups"]])),
    ]
    return Table(_caption(result), ("reward; the policy's own decision", "hit@1", "rate", "tokens"), rows)


def _outcome(found: Sequence[dict[str, float]], rate: str = ".2f", tokens: str = ".1f") -> tuple[str, str, str]:
    """Return hit@1, reasoning rate and rationale tokens, of several side by side."""
    forms = {"hit_at_1": ".3f", "reasoning_rate": rate, "rationale_tokens": tokens}
    hits, rates, written = (_side_by_side((each[key] for each in found), form) for key, form in forms.items())
    return hits, rates, written


def _reasoning(*paths: Path) -> Table:
    results = [read_result(path) for path in paths]
    pairs = zip(results[::2], results[1::2], strict=True)
    rows = [row for latency, load in pairs for row in _reasoning_rows(latency, load.result)]
    head = f"{results[0].machine.cores} CPU cores, one query alone", *MODES, "auto against always"
    return Table(_caption_of(results), head, rows)


def _reasoning_rows(stamped: Stamped[LatencyResult], load: LoadResult) -> list[tuple[str, ...]]:
    latency = stamped.result
    name = "a bundle" if stamped.bundle is None else MODELS.get(stamped.bundle.name, stamped.bundle.name)
    never, auto, always = modes = [latency.modes[mode] for mode in MODES]
    form = ".0f" if never.p50_ms >= 100 else ".1f" if never.p50_ms >= 10 else ".2f"
    batched = [mode.throughput_per_s for mode in modes]
    sustained = [load.modes[mode].sustainable_per_s for mode in MODES]
    hits = [mode.hit_at_1 for mode in modes if mode.hit_at_1 is not None]
    percentiles = (_side_by_side((mode.p50_ms, mode.p95_ms, mode.p99_ms), form) for mode in modes)
    stages = (_side_by_side((mode.stages_ms["prefill"], mode.stages_ms["decode"]), form) for mode in modes)
    done = (f"{mode.reasoning_rate:.2f} / {mode.rationale_tokens:.1f}" for mode in modes)
    means = (format(mode.mean_ms, form) for mode in modes)
    rows = [("hit@1", *(f"{hit:.3f}" for hit in hits), f"{hits[1] - hits[2]:.3f}")] if hits else []
    rows += [
        ("reasoning rate / rationale tokens", *done, ""),
        ("p50 / p95 / p99, ms", *percentiles, f"{auto.p50_ms / always.p50_ms:.2f}x at p50"),
        ("mean, ms", *means, f"{auto.mean_ms / always.mean_ms:.2f}x"),
        ("of it prefill / decode", *stages, ""),
        (f"a second, in batches of {latency.batch_size}", *_rates(batched)),
        (f"a second of random arrivals, p95 below {load.target_p95_ms:.0f} ms", *_rates(sustained)),
    ]
    return [(f"{name}: {label}", *cells) for label, *cells in rows]


def _rates(figures: Sequence[float]) -> list[str]:
    """Return what the modes do in a second, and auto over always."""
    ratio = f"{figures[1] / figures[2]:.2f}x" if figures[2] else "-"
    return [*map(_rate, figures), ratio]


def _rate(figure: float) -> str:
    return format(figure, ".0f" if figure >= 100 else ".1f")


def _loops(path: Path) -> Table:
    """Put the loops side by side, the first over each of the others."""
    stamped = read_result(path)
    load: LoadResult = stamped.result
    rows = [
        (f"{loop}: {mode}", _rate(found.sustainable_per_s), *_of_the_highest(found), _over(load, loop, mode))
        for loop, modes in load.targets.items()
        for mode, found in modes.items()
    ]
    first = f"random arrivals, p95 below {load.target_p95_ms:.0f} ms"
    head = first, "a second", "p50 there, ms", "hit@1", f"{load.target} is"
    return Table(_caption_of([stamped]), head, rows)


def _of_the_highest(found: ModeLoad) -> tuple[str, str]:
    """Return p50 and hit@1 of the highest rate that held."""
    held = found.highest
    if held is None:
        return "-", "-"
    return f"{held.p50_ms:.0f}", "-" if held.hit_at_1 is None else f"{held.hit_at_1:.3f}"


def _over(load: LoadResult, loop: str, mode: str) -> str:
    ratio = load.ratio.get(f"{mode} over {mode} of {loop}")
    return "" if ratio is None else f"{ratio:.2f}x"


def _overload(path: Path) -> Table:
    stamped = read_result(path)
    head = "times what auto sustains", "a second", "threshold", "reasoning rate", "hit@1", "random gate", "oracle gate"
    rows = [_overload_row(level) for level in stamped.result.levels]
    return Table(_caption_of([stamped]), (*head, "never / auto without load", "p50 / p95, ms", "refused"), rows)


def _overload_row(level: Level) -> tuple[str, ...]:
    trial = level.trial
    hits = trial.hit_at_1, level.random, level.oracle
    without = "-" if level.never is None or level.auto is None else _side_by_side((level.never, level.auto), ".3f")
    return (
        f"{level.load:g}",
        f"{trial.rate_per_s:.0f}",
        "-" if trial.threshold is None else f"{trial.threshold:.2f}",
        "-" if trial.reasoned is None else f"{trial.reasoned:.2f}",
        *("-" if hit is None else f"{hit:.3f}" for hit in hits),
        without,
        _side_by_side((trial.p50_ms, trial.p95_ms), ".0f"),
        f"{trial.refused:.1%}",
    )


def _headline(*paths: Path) -> Table:
    results = [read_result(path) for path in paths]
    found, load = results[0].result, results[1].result
    modes = [found.modes[mode] for mode in MODES]
    batched = _rates([mode.throughput_per_s for mode in modes])
    sustained = _rates([load.modes[mode].sustainable_per_s for mode in MODES])
    rows = [
        ("hit@1", *("-" if mode.hit_at_1 is None else f"{mode.hit_at_1:.3f}" for mode in modes)),
        ("reasoning rate", *(f"{mode.reasoning_rate:.2f}" for mode in modes)),
        ("rationale tokens", *(f"{mode.rationale_tokens:.1f}" for mode in modes)),
        ("mean ms alone", *(f"{mode.mean_ms:.2f}" for mode in modes)),
        (f"requests a second, in batches of {found.batch_size}", *batched[:3]),
        (f"random arrivals a second, p95 below {load.target_p95_ms:.0f} ms", *sustained[:3]),
    ]
    return Table(_caption_of(results), ("nano", *MODES), rows)


def _caption_of(results: Sequence[Stamped[Any]]) -> str:
    dates = ", ".join(sorted({result.date for result in results}))
    devices = ", ".join(sorted({result.machine.device for result in results}))
    return _caption({"date": dates, "device": devices}, *(result.command for result in results))


def _overlap(path: Path) -> Table:
    stamped = Stamped[OverlapResult].model_validate(_read(path))
    found = stamped.result
    base, *_ = (way.rows_per_s for way in found.ways.values())
    rows = [
        (name, f"{way.rows_per_s:.2f}", f"{way.rows_per_s / base:.2f}x", f"{way.idle_share:.0%}")
        for name, way in found.ways.items()
    ]
    head = f"{found.photos} JPEGs of {found.megapixels:.0f} megapixels", "a second", "", "of the time no graph runs"
    return Table(_caption_of([stamped]), head, rows)


def _memory(*paths: Path) -> Table:
    stamped = [Stamped[list[Memory]].model_validate(_read(path)) for path in paths]
    rows = [
        (
            f"{each.rows:,}, {'embedded by nano' if each.has_engine else 'a stand-in for the engine'}",
            *(f"{size / 1e6:.0f}" for size in (each.before_bytes, each.peak_bytes, each.output_bytes)),
        )
        for of in stamped
        for each in of.result
    ]
    return Table(
        _caption_of(stamped), ("rows of a job", "MB with the bundle loaded", "at the peak", "of the output"), rows
    )


def _search(*paths: Path) -> Table:
    """Put the ways to search in rows: recall and how many times faster than the first, whose milliseconds stand."""
    stamped = [Stamped[SearchResult].model_validate(_read(path)) for path in paths]
    settings = [setting for of in stamped for setting in of.result.settings]
    first, *others = settings[0].ways
    rows = [(f"{first}: ms, a query alone", *(f"{setting.ways[first].alone_ms:.2f}" for setting in settings))]
    for name in others:
        found = [setting.ways[name] for setting in settings]
        rows.append((name, *(f"{way.recall_at_10:.3f}, {way.times_numpy:.1f}x" for way in found)))
    rows.append(("building the index, s", *(f"{setting.index_seconds:.0f}" for setting in settings)))
    head = "recall@10, times faster", *(f"{setting.rows:,} x {setting.dim}" for setting in settings)
    return Table(_caption_of(stamped), head, rows)


def _precisions(path: Path) -> Table:
    result = _read(path)
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
                _side_by_side((bundle["mixed"][mode]["hit_at_1"] for mode in MODES), ".3f"),
            )
        )
    head = "nano on DigitChain, fused", "ONNX, MB", "min cosine, direct / reasoned", "alone, in a batch"
    more = "tokens that agree", "gate flips", "layers in float32", f"mixed hit@1, {' / '.join(MODES)}"
    return Table(_caption(result), (*head, *more), rows)


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
    columns = {f"{call} x{rows}": f"{short} {rows}" for call, short in CALLS.items() for rows in (1, 8)}
    bases = [run["seconds"]["transformers"] for run in runs]

    def ratio(peer: str, what: str, form: str) -> str:
        seconds = [run["seconds"].get(peer, {}).get(what) for run in runs]
        return _range([base[what] / each for base, each in zip(bases, seconds, strict=True) if each], form, "x")

    first = (_range([base[what] for base in bases], ".2f" if bases[0][what] < 1 else ".1f") for what in columns)
    rows = [(f"{SIZES[runs[0]['shape']]}: transformers, seconds", *first)]
    for label, names, form in PEERS:
        cells = (" / ".join(filter(None, (ratio(name, what, form) for name in names))) for what in columns)
        rows.append((label, *(cell or "-" for cell in cells)))
    head = f"times faster than transformers (float32, SDPA), {runs[0]['threads']} cores", *columns.values()
    return Table(_caption(result, *(run["command"] for run in runs)), head, rows)


def _range(figures: Sequence[float], form: str, unit: str = "") -> str:
    """Return the smallest and the largest of some figures, one where they look alike, nothing of none."""
    shown = [format(figure, form) + unit for figure in sorted(figures)]
    return " to ".join(dict.fromkeys((shown[0], shown[-1]))) if shown else ""


def _peers_by_token(path: Path) -> Table:
    result = _read(path)
    runs = [run for run in result["runs"] if "spread" not in run]
    rows: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for run in runs:
        seconds, shape = run["seconds"], run["shape"]
        base = seconds["transformers"]
        again = ", another run" if shape in seen else ""
        seen.add(shape)
        shown = (format(base[what], form) for what, (_, form) in BY_TOKEN.items())
        rows.append((f"{SIZES[shape]}{again}: transformers, seconds", *shown))
        by_ending = {name.partition("-")[2]: found for name, found in seconds.items()}
        rows += [
            (label, *(f"{base[what] / by_ending[ending][what]:.1f}x" for what in BY_TOKEN))
            for ending, label in BUNDLES.items()
            if ending in by_ending
        ]
    head = "another run", *(label for label, _ in BY_TOKEN.values())
    return Table(_caption(result, *(run["command"] for run in runs)), head, rows)


def _tensorrt(path: Path) -> Table:
    result = _read(path)
    graphs: list[dict[str, Any]] = result["graphs"]
    names, bundles, targets = ({str(each[key]): None for each in graphs} for key in ("graph", "bundle", "target"))
    every = f"all {NUMBERS[len(targets)]}"

    def cell(name: str, bundle: str) -> str:
        (of,) = (each for each in graphs if (each["graph"], each["bundle"], each["target"]) == (name, bundle, TARGET))
        return f"{of['seconds']:.1f} / {of['size'] / 2**20:.1f}" if of["built"] else "-"

    def built(bundle: str) -> str:
        failed = {each["target"] for each in graphs if each["bundle"] == bundle and not each["built"]}
        return ", ".join(target for target in targets if target not in failed) if failed else every

    rows = [(name, *(cell(name, bundle) for bundle in bundles)) for name in names]
    rows.append(("parsed and built for", *map(built, bundles)))
    head = f"nano, seconds to build / MiB for {TARGET}", *(QUANTISED.get(bundle, bundle) for bundle in bundles)
    return Table(f"{_caption(result)}; {result['library']}; {every}: {', '.join(targets)}", head, rows)


_TABLES: dict[str, tuple[tuple[str, ...], Callable[..., Table]]] = {  # the files of each, and what makes it of them
    "digitchain": (("digitchain-cpu",), _digitchain),
    "selection": (("ablation-cpu",), _selection),
    "decision": (("ablation-cpu",), _decision),
    "reward": (("ablation-cpu",), _reward),
    "reasoning": (("latency-nano-cpu", "load-nano-cpu", "latency-small-cpu", "load-small-cpu"), _reasoning),
    "loops": (("loops-nano-cpu",), _loops),
    "loops-small": (("loops-small-cpu",), _loops),
    "servers": (("servers-small-cpu",), _loops),
    "overload": (("overload-nano-cpu",), _overload),
    "overlap": (("overlap-small-cpu",), _overlap),
    "memory": (("memory-cpu", "memory-nano-cpu"), _memory),
    "search": (("search-128-cpu", "search-1024-cpu"), _search),
    "precisions": (("precisions-cpu",), _precisions),
    "peers": (("peers-cpu",), _peers),
    "peers-by-token": (("peers-cpu",), _peers_by_token),
    "tensorrt-rtx": (("tensorrt-rtx",), _tensorrt),
}
