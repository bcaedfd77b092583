"""Which shapes an engine must take: explicit profiles of every graph, from a manifest's limits or from traffic.

A profile is a box of shapes, and its activations are sized for the box's far corner. Where rows and tokens are bounded
by their product, several boxes follow that bound: together they hold every shape within it, and no corner is more than
twice beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmemb_deploy.backends.kv_cache.pool import BUCKET
from mmemb_deploy.backends.kv_cache.slots import windows
from mmemb_deploy.backends.tensorrt.files import WINDOW, ProfileShapes
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import GraphFacts, Manifest
from mmemb_deploy.errors import InputError, OptionError
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.preprocess import MAX_ASPECT_RATIO, VisionSpec
from mmemb_deploy.inputs.prompts import PATH_MARKERS
from mmemb_deploy.inputs.rows import Row
from mmemb_deploy.jobs.source import read_source
from mmemb_deploy.preparer import row_encoder
from mmemb_engines.graph import SLOTS

OPT_TOKENS, OPT_PATCHES = 256, 1024  # of a prompt and an image, until traffic says otherwise
CHUNK = 64  # tokens of a given rationale that are embedded in one run; longer ones take several


@dataclass(frozen=True)
class Range:
    """Sizes of an axis: the smallest, the one to be fastest at, and the largest."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        assert 1 <= self.min <= self.opt <= self.max, self


Axes = dict[str, Range]  # an axis as the manifest names it


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What the engines of a bundle must take."""

    rows: int
    """Most inputs of a batch."""

    tokens: int
    """Most tokens of a prompt."""

    opt_tokens: int
    """Tokens of a prompt to be fastest at."""

    opt_visual_tokens: int
    """Visual tokens of a prompt to be fastest at."""

    patches: int
    """Most patches of an image."""

    opt_patches: int
    """Patches of an image to be fastest at."""

    chunk: int
    """Most tokens of a row that follow its prompt in one run."""

    cache_rows: int
    """Rows of the KV cache, and so of a step: where there is room, for one batch to be prefilled while one waits."""

    slots: int
    """Tokens that a row of the KV cache has room for: prompt, rationale, and a chunk that may run beyond them."""


def demand_of_limits(
    manifest: Manifest, rows: int, *, tokens: int | None = None, cache_bytes: int | None = None
) -> Demand:
    """Return what a manifest allows, in batches of up to `rows` inputs and, if it is given, of `tokens` tokens each.

    `cache_bytes` bounds the KV cache's rows, by what the manifest says where it is None. Raises OptionError for `rows`
    below 1 and for more tokens than the manifest allows.
    """
    after = manifest.model.max_rationale_tokens + PATH_MARKERS
    limit = manifest.batch.row_tokens - after
    if tokens is not None and not 1 <= tokens <= limit:
        raise OptionError(f"tokens is {tokens}: this bundle's prompts have 1 to {limit}")
    tokens = limit if tokens is None else tokens
    patches = most_patches(manifest.vision)
    opt_patches = _merged(min(patches, OPT_PATCHES), manifest.vision)
    opt_tokens = min(tokens, OPT_TOKENS)
    return _sized(
        manifest,
        cache_bytes,
        rows=_rows(manifest, rows),
        tokens=tokens,
        opt_tokens=opt_tokens,
        opt_visual_tokens=min(opt_tokens, opt_patches // manifest.vision.merge_size**2),
        patches=patches,
        opt_patches=opt_patches,
    )


def demand_of_traffic(
    manifest: Manifest, rows: int, sample: Sequence[Row], *, cache_bytes: int | None = None
) -> Demand:
    """Return what a sample of inputs needs: fastest at its medians, and nothing above its largest.

    Raises OptionError for an empty sample and for `rows` below 1.
    """
    if not sample:
        raise OptionError("the traffic sample is empty: pass the inputs of a usual hour, one a line")
    limits = demand_of_limits(manifest, rows)
    lengths = [row.length for row in sample]
    grids = [math.prod(visual.grid) for row in sample for visual in row.visuals] or [manifest.vision.merge_size**2]
    tokens = min(limits.tokens, max(lengths))
    return _sized(
        manifest,
        cache_bytes,
        rows=limits.rows,
        tokens=tokens,
        opt_tokens=min(tokens, _median(lengths)),
        opt_visual_tokens=_median([row.visual_tokens for row in sample]),
        patches=max(grids),
        opt_patches=_median(grids),
    )


def _sized(manifest: Manifest, cache_bytes: int | None, *, rows: int, tokens: int, **others: int) -> Demand:
    """Return a demand with the cache that its prompts need: two batches, or as many rows as the bytes hold."""
    after = manifest.model.max_rationale_tokens + PATH_MARKERS
    chunk = min(CHUNK, after)
    slots = -(-(tokens + after + chunk) // BUCKET) * BUCKET
    cache_bytes = manifest.batch.cache_bytes if cache_bytes is None else cache_bytes
    most = cache_bytes // (slots * manifest.cache_token_bytes)
    return Demand(rows=rows, tokens=tokens, chunk=chunk, slots=slots, cache_rows=max(1, min(2 * rows, most)), **others)


def read_traffic(bundle: Bundle, source: Path) -> list[Row]:
    """Read what `mmemb embed` reads. Raises OptionError for a source, InputError at the input that cannot be read."""
    manifest = bundle.manifest
    encoder = row_encoder(bundle)
    rows = []
    for index, content in enumerate(read_source(source, limits=manifest.limits).inputs()):
        try:
            rows.append(encoder.row(parse(content, manifest.limits, encoder.vision), manifest.prompt.query_instruction))
        except InputError as error:
            raise error.at(index) from error
    return rows


def profiles(engine: str, manifest: Manifest, demand: Demand) -> tuple[ProfileShapes, ...]:
    """Return the profiles of an engine (a key of `Manifest.engines`): those of all that its graphs do."""
    axes = {abi.VISION: _vision, abi.DIRECT: _direct, abi.EMBEDDER: _cached, abi.GATE: _gate, abi.GENERATOR: _steps}
    found = ((graph, each) for graph in manifest.engines[engine] for each in axes[graph](manifest, demand))
    return tuple(_shapes(manifest.graphs[graph], each) for graph, each in found)


def _vision(manifest: Manifest, demand: Demand) -> Iterator[Axes]:
    smallest = manifest.vision.merge_size**2
    for images, patches in boxes(demand.rows, demand.patches, manifest.batch.patches):
        largest = _merged(patches, manifest.vision)
        opt = min(demand.opt_patches, largest)
        frames = Range(1, 1, manifest.vision.temporal_patch_size)
        yield {"images": Range(1, images, images), "frames": frames, "patches": Range(smallest, opt, largest)}


def _direct(manifest: Manifest, demand: Demand) -> Iterator[Axes]:
    return _prompts(manifest, demand, demand.rows)


def _cached(manifest: Manifest, demand: Demand) -> Iterator[Axes]:
    return _prompts(manifest, demand, min(demand.rows, demand.cache_rows))


def _prompts(manifest: Manifest, demand: Demand, rows: int) -> Iterator[Axes]:
    """Yield the boxes of batches, and one of a single prompt, to be fastest at when it comes alone."""
    found = list(boxes(rows, demand.tokens, manifest.batch.tokens))
    if found[-1][0] > 1:
        found.append((1, demand.tokens))
    for rows, tokens in found:
        visual_tokens = 1 + min(rows * tokens, max(tokens, manifest.batch.tokens))
        opt = min(demand.opt_tokens, tokens)
        yield {
            "batch": Range(1, rows, rows),
            "tokens": Range(1, opt, tokens),
            "visual_tokens": Range(1, min(1 + rows * demand.opt_visual_tokens, visual_tokens), visual_tokens),
            SLOTS: _fixed(demand.slots),
            abi.WINDOW: _window(demand, opt),
        }


def _gate(_: Manifest, demand: Demand) -> Iterator[Axes]:
    yield {"batch": Range(1, demand.rows, demand.rows)}


def _steps(_: Manifest, demand: Demand) -> Iterator[Axes]:
    """Yield a profile of a step of every row, one of a step of a single row, and one of a rationale's chunk."""
    rows, one = Range(1, demand.cache_rows, demand.cache_rows), _fixed(1)
    kept = {SLOTS: _fixed(demand.slots), abi.WINDOW: _window(demand, demand.opt_tokens + demand.chunk)}
    for batch, tokens in ((rows, one), (one, one), (rows, Range(1, demand.chunk, demand.chunk))):
        yield {"batch": batch, "tokens": tokens, "visual_tokens": one, **kept}


def _window(demand: Demand, slots: int) -> Range:
    """Return the windows on a row's slots, fastest at the smallest that shows so many."""
    sizes = windows(demand.slots)
    return Range(sizes[0], next(size for size in sizes if size >= slots), sizes[-1])


def _fixed(size: int) -> Range:
    return Range(size, size, size)


def boxes(rows: int, length: int, area: int) -> Iterator[tuple[int, int]]:
    """Yield the most rows and the largest length of boxes that hold every shape within `rows`, `length` and `area`.

    A single row may have any length. Boxes of many rows come first; each has half the rows of the one before.
    """
    while True:
        fewest = rows // 2 + 1  # with fewer rows, the next box serves
        reach = max(area // fewest, 1) if rows > 1 else length
        yield rows, min(length, reach)
        if reach >= length:
            return
        rows //= 2


def most_patches(spec: VisionSpec) -> int:
    """Return a bound on the patches of one image or frame after resizing, whatever its aspect ratio.

    Both sides are rounded up to whole visual tokens at most, which costs most where one side is shortest.
    """
    pixels = max(spec.max_pixels, spec.frame_max_pixels)
    sides = math.sqrt(pixels / MAX_ASPECT_RATIO), math.sqrt(pixels * MAX_ASPECT_RATIO)
    bound = (sides[0] + spec.factor) * (sides[1] + spec.factor)
    return _merged(int(bound) // spec.patch_size**2, spec)


def _shapes(graph: GraphFacts, axes: Axes) -> ProfileShapes:
    shapes: ProfileShapes = {}
    added = (WINDOW,) if any(SLOTS in tensor.shape for tensor in graph.inputs) else ()
    for tensor in (*graph.inputs, *added):
        sizes = [Range(size, size, size) if isinstance(size, int) else axes[size] for size in tensor.shape]
        shapes[tensor.name] = (
            tuple(size.min for size in sizes),
            tuple(size.opt for size in sizes),
            tuple(size.max for size in sizes),
        )
    return shapes


def _rows(manifest: Manifest, rows: int) -> int:
    if rows < 1:
        raise OptionError(f"batch is {rows}: it must be at least 1")
    if rows > manifest.batch.tokens:
        raise OptionError(f"batch is {rows}: the bundle's batches hold at most {manifest.batch.tokens} tokens")
    return rows


def _merged(patches: int, spec: VisionSpec) -> int:
    """Round down to whole visual tokens."""
    return patches // spec.merge_size**2 * spec.merge_size**2


def _median(values: Sequence[int]) -> int:
    """Return the upper median."""
    return sorted(values)[len(values) // 2]
