"""The tables of latency and load: with and without reasoning, loops and servers side by side, overload."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmemb_benchmarks.measure.latency import LatencyResult
from mmemb_benchmarks.measure.load import LoadResult, ModeLoad
from mmemb_benchmarks.measure.overload import Level
from mmemb_benchmarks.report.table import MODES, Table, caption_of, side_by_side
from mmemb_benchmarks.results import Stamped, read_result

MODELS = {"small-int8": "0.2B int8"}


def reasoning(*paths: Path) -> Table:
    """Put never, auto and always side by side; the files are of latency and load, in pairs."""
    results = [read_result(path) for path in paths]
    pairs = zip(results[::2], results[1::2], strict=True)
    rows = [row for latency, load in pairs for row in _reasoning_rows(latency, load.result)]
    head = f"{results[0].machine.cores} CPU cores, one query alone", *MODES, "auto against always"
    return Table(caption_of(results), head, rows)


def _reasoning_rows(stamped: Stamped[LatencyResult], load: LoadResult) -> list[tuple[str, ...]]:
    latency = stamped.result
    name = "a bundle" if stamped.bundle is None else MODELS.get(stamped.bundle.name, stamped.bundle.name)
    never, auto, always = modes = [latency.modes[mode] for mode in MODES]
    form = ".0f" if never.p50_ms >= 100 else ".1f" if never.p50_ms >= 10 else ".2f"
    batched = [mode.throughput_per_s for mode in modes]
    sustained = [load.modes[mode].sustainable_per_s for mode in MODES]
    hits = [mode.hit_at_1 for mode in modes if mode.hit_at_1 is not None]
    percentiles = (side_by_side((mode.p50_ms, mode.p95_ms, mode.p99_ms), form) for mode in modes)
    stages = (side_by_side((mode.stages_ms["prefill"], mode.stages_ms["decode"]), form) for mode in modes)
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


def loops(path: Path) -> Table:
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
    return Table(caption_of([stamped]), head, rows)


def _of_the_highest(found: ModeLoad) -> tuple[str, str]:
    """Return p50 and hit@1 of the highest rate that held."""
    held = found.highest
    if held is None:
        return "-", "-"
    return f"{held.p50_ms:.0f}", "-" if held.hit_at_1 is None else f"{held.hit_at_1:.3f}"


def _over(load: LoadResult, loop: str, mode: str) -> str:
    ratio = load.ratio.get(f"{mode} over {mode} of {loop}")
    return "" if ratio is None else f"{ratio:.2f}x"


def overload(path: Path) -> Table:
    """Say what load did to the threshold, the routes and the hits, level by level."""
    stamped = read_result(path)
    head = "times what auto sustains", "a second", "threshold", "reasoning rate", "hit@1", "random gate", "oracle gate"
    rows = [_overload_row(level) for level in stamped.result.levels]
    return Table(caption_of([stamped]), (*head, "never / auto without load", "p50 / p95, ms", "refused"), rows)


def _overload_row(level: Level) -> tuple[str, ...]:
    trial = level.trial
    hits = trial.hit_at_1, level.random, level.oracle
    without = "-" if level.never is None or level.auto is None else side_by_side((level.never, level.auto), ".3f")
    return (
        f"{level.load:g}",
        f"{trial.rate_per_s:.0f}",
        "-" if trial.threshold is None else f"{trial.threshold:.2f}",
        "-" if trial.reasoned is None else f"{trial.reasoned:.2f}",
        *("-" if hit is None else f"{hit:.3f}" for hit in hits),
        without,
        side_by_side((trial.p50_ms, trial.p95_ms), ".0f"),
        f"{trial.refused:.1%}",
    )


def headline(*paths: Path) -> Table:
    """Return what never, auto and always give on nano, from its latency and its load."""
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
    return Table(caption_of(results), ("nano", *MODES), rows)
