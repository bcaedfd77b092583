"""The tables of jobs, searches, and training data by its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmemb_benchmarks.measure.memory import Memory
from mmemb_benchmarks.measure.overlap import OverlapResult
from mmemb_benchmarks.measure.search import SearchResult
from mmemb_benchmarks.report.table import Table, caption_of, read_json
from mmemb_benchmarks.results import Stamped


def overlap(path: Path) -> Table:
    """Say how long the engine waited for photos, by the way that they were prepared."""
    stamped = Stamped[OverlapResult].model_validate(read_json(path))
    found = stamped.result
    base, *_ = (way.rows_per_s for way in found.ways.values())
    rows = [
        (name, f"{way.rows_per_s:.2f}", f"{way.rows_per_s / base:.2f}x", f"{way.idle_share:.0%}")
        for name, way in found.ways.items()
    ]
    head = f"{found.photos} JPEGs of {found.megapixels:.0f} megapixels", "a second", "", "of the time no graph runs"
    return Table(caption_of([stamped]), head, rows)


def memory(*paths: Path) -> Table:
    """Say what memory jobs of so many rows took."""
    stamped = [Stamped[list[Memory]].model_validate(read_json(path)) for path in paths]
    rows = [
        (
            f"{each.rows:,}, {'embedded by nano' if each.has_engine else 'a stand-in for the engine'}",
            *(f"{size / 1e6:.0f}" for size in (each.before_bytes, each.peak_bytes, each.output_bytes)),
        )
        for of in stamped
        for each in of.result
    ]
    return Table(
        caption_of(stamped), ("rows of a job", "MB with the bundle loaded", "at the peak", "of the output"), rows
    )


def search(*paths: Path) -> Table:
    """Put the ways to search in rows: recall and how many times faster than the first, whose milliseconds stand."""
    stamped = [Stamped[SearchResult].model_validate(read_json(path)) for path in paths]
    settings = [setting for of in stamped for setting in of.result.settings]
    first, *others = settings[0].ways
    rows = [(f"{first}: ms, a query alone", *(f"{setting.ways[first].alone_ms:.2f}" for setting in settings))]
    for name in others:
        found = [setting.ways[name] for setting in settings]
        rows.append((name, *(f"{way.recall_at_10:.3f}, {way.times_numpy:.1f}x" for way in found)))
    rows.append(("building the index, s", *(f"{setting.index_seconds:.0f}" for setting in settings)))
    head = "recall@10, times faster", *(f"{setting.rows:,} x {setting.dim}" for setting in settings)
    return Table(caption_of(stamped), head, rows)


def scale(*paths: Path) -> Table:
    """Say what training data takes by its rows: samples, their targets, and mining among as many vectors."""
    stamped = [Stamped[dict[str, list[dict[str, Any]]]].model_validate(read_json(path)) for path in paths]

    def of(name: str, **asked: Any) -> list[dict[str, Any]]:
        found = [each for one in stamped for each in one.result[name]]
        return [each for each in found if asked.items() <= each.items()]

    mapped, listed, targets, mining = (
        of("samples", mapped=True),
        of("samples", mapped=False),
        of("targets"),
        of("mining"),
    )
    figures = [
        ("samples: written / drawn, a second", mapped, ("written_per_second", "drawn_per_second"), 1, ",.0f"),
        ("samples: MB on disk", mapped, ("file_bytes",), 1e6, ",.0f"),
        ("samples: MB of memory, mapped", mapped, ("own_bytes",), 1e6, ",.1f"),
        ("samples: MB of memory, as a list", listed, ("own_bytes",), 1e6, ",.0f"),
        ("their targets: indexed, a second", targets, ("targets_per_second",), 1, ",.0f"),
        ("their targets: MB of memory, without embeddings", targets, ("own_bytes",), 1e6, ",.0f"),
        ("mining: seconds to build the index", mining, ("built_seconds",), 1, ",.0f"),
        (
            "mining: queries a second / comparing all",
            mining,
            ("queries_per_second", "queries_per_second_comparing_all"),
            1,
            ",.0f",
        ),
        ("mining: recall of the 8 nearest", mining, ("recall",), 1, ".3f"),
    ]
    rows = [
        (label, *(" / ".join(format(each[key] / unit, form) for key in keys) for each in found))
        for label, found, keys, unit, form in figures
    ]
    head = f"rows; vectors of {mining[0]['width']}", *(f"{each['rows']:,}" for each in mapped)
    return Table(caption_of(stamped), head, rows)
