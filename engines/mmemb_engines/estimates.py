"""Memory and times of a bundle's engines, estimated from its graphs: what `plan` says of a device is computed here.

Memory is what the engines of a demand hold at once: their weights, the KV cache, one arena for activations, buffers.
Times are rooflines: the longer of a run's arithmetic at the published peaks and of reading weights and caches at the
published bandwidth. A run reaches a share of either; the shares are assumptions. Nothing is loaded but the graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmemb_deploy.backends.device import Shape, axis_sizes
from mmemb_deploy.backends.tensorrt.budget import Budget
from mmemb_deploy.backends.tensorrt.files import ProfileShapes
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import GraphFacts
from mmemb_deploy.bundle.precision import value_bytes
from mmemb_deploy.bundle.work import Operations, Work, graph_work
from mmemb_deploy.devices import BANDWIDTH_USE, Device
from mmemb_deploy.figures import Figure
from mmemb_engines.graph import SLOTS
from mmemb_engines.profiles import Demand, demand_of_limits, profiles

UTILISATION = {"int4": 0.07}
"""Share of the peak that a product reaches: int4 weights are unpacked on the way. The prefill times that TensorRT
Edge-LLM 0.4 publishes for int4 models of 4B and 8B on Jetson AGX Thor come to 0.05 to 0.1."""
USUAL_UTILISATION = 0.35  # of every other precision; assumed
CACHE = ("past.", "present.")
PROMPTS = {abi.DIRECT: "prompts alone", abi.EMBEDDER: "prompts that are kept"}  # for a rationale to follow
WIDTHS = 5
"""Values that a token holds at once, for each of the widest layer's. `peak_bytes` was between 25% below and 40% above
what TensorRT for RTX 1.7 allots a decoder and a vision encoder, in bfloat16 and float32, at 19 shapes of prompts,
chunks and images. A step of one token in bfloat16 takes more, 9 MiB for 32 rows in place of 1, which sizes no arena."""


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of a run: at the published peaks, and at the shares of them that are assumed; None: not known."""

    least: float | None
    expected: float | None
    bound: str  # what takes longer, "arithmetic" or "memory"

    def figure(self, basis: str) -> Figure:
        """Return what is expected, with what it stands on."""
        at_peak = Figure(self.least, "s", "")
        return Figure(self.expected, "s", f"{basis}; bound by {self.bound}, {at_peak} at the published peaks")


class Estimator:
    """A bundle's graphs, counted once, on a device."""

    def __init__(self, bundle: Bundle, device: Device) -> None:
        self._manifest, self._device = bundle.manifest, device
        self._works = {name: graph_work(bundle, roles[0]) for name, roles in self._manifest.engines.items()}
        self._of_graph = {role: self._works[name] for name, roles in self._manifest.engines.items() for role in roles}

    @property
    def most_rows(self) -> int:
        """Most inputs at once: each has a token and, in the vision engine, an image of one visual token."""
        batch = self._manifest.batch
        return min(batch.tokens, batch.patches // self._manifest.vision.merge_size**2)

    def demand(self, rows: int, tokens: int | None = None) -> Demand:
        """Return what engines must take, in batches of up to `rows` prompts; None takes the longest prompts."""
        return demand_of_limits(self._manifest, rows, tokens=tokens)

    def fits(self, rows: int, tokens: int) -> bool:
        """Whether the device has the memory."""
        return self.budget(self.demand(rows, tokens)).total <= self._device.usable_bytes

    def budget(self, demand: Demand) -> Budget:
        """Return what is held at once."""
        manifest = self._manifest
        boxes = {name: profiles(name, manifest, demand) for name in manifest.engines}
        facts = {name: manifest.graphs[roles[0]] for name, roles in manifest.engines.items()}
        reasons = abi.GENERATOR in manifest.graphs
        return Budget(
            weights={name: round(work.weight_bytes) for name, work in self._works.items()},
            rows=demand.cache_rows if reasons else 0,
            slots=demand.slots if reasons else 0,
            token_bytes=manifest.cache_token_bytes,
            arena=max(
                peak_bytes(self._works[name], facts[name], box) for name, found in boxes.items() for box in found
            ),
            buffers=sum(max(_buffer_bytes(facts[name], box) for box in found) for name, found in boxes.items()),
            features=manifest.batch.vision_bytes,
        )

    def runs(self, role: str, demand: Demand) -> int:
        """Return in how many runs a graph reads the prompts of a batch."""
        together = max(1, self._manifest.batch.tokens // demand.tokens)
        return -(-demand.rows // min(together, demand.cache_rows if role == abi.EMBEDDER else together))

    def times(self, demand: Demand) -> dict[str, Time]:
        """Return the times of a batch of prompts, of a step of all its rows, and of one image."""
        rows, tokens, graphs = demand.rows, demand.tokens, self._manifest.graphs
        cached = self._manifest.cache_token_bytes
        found = dict[str, Time]()
        for role in (each for each in PROMPTS if each in graphs):
            kept = role == abi.EMBEDDER
            work = self._of_graph[role]
            pairs = tokens * demand.slots if kept else tokens * (tokens + 1) / 2
            found[role] = self._time(
                graphs[role],
                _sum((rows * tokens, work.token), (rows, work.row)),
                work.pair * pairs * rows,
                self.runs(role, demand) * work.read_bytes + (rows * tokens * cached if kept else 0),
            )
        if abi.GENERATOR in graphs:
            step, together = self._of_graph[abi.GENERATOR], min(rows, demand.cache_rows)
            found["step"] = self._time(
                graphs[abi.GENERATOR],
                _sum((together, step.token), (together, step.row)),
                step.pair * demand.slots * together,
                step.read_bytes + together * demand.slots * cached,
            )
        vision = self._of_graph[abi.VISION]
        patches = demand.opt_patches
        merged = patches // self._manifest.vision.merge_size**2
        found["image"] = self._time(
            graphs[abi.VISION],
            _sum((patches, vision.token), (merged, vision.merged)),
            vision.pair * patches**2,
            vision.read_bytes,
        )
        return found

    def _time(self, graph: GraphFacts, linear: Operations, attention: float, nbytes: float) -> Time:
        """Return the time of operations, which attention does in the graph's float type, and of bytes read."""
        device = self._device
        peaks = {name: device.tflops.get(graph.compute if name == "int4" else name) for name in linear}
        peaks[graph.compute] = device.tflops.get(graph.compute)
        operations = {**linear, graph.compute: linear.get(graph.compute, 0.0) + attention}
        memory = nbytes / (device.bandwidth * 1e9)
        if None in peaks.values():
            return Time(least=None, expected=None, bound="arithmetic whose peak is not known")
        ideal = {name: count / ((peaks[name] or 0) * 1e12) for name, count in operations.items()}
        arithmetic = sum(ideal.values())
        slower = sum(seconds / UTILISATION.get(name, USUAL_UTILISATION) for name, seconds in ideal.items())
        return Time(
            least=max(arithmetic, memory),
            expected=max(slower, memory / BANDWIDTH_USE),
            bound="arithmetic" if slower > memory / BANDWIDTH_USE else "memory",
        )


def peak_bytes(work: Work, facts: GraphFacts, box: ProfileShapes) -> int:
    """Estimate the activations of a run at the far corner of a profile.

    A token holds WIDTHS values for each of the widest layer's. In half precision, attention over slots reads a mask,
    and keys and values that are repeated for every query head; in float32 it has no kernel of its own, and its scores
    are written out, twice.
    """
    corner: dict[str, Shape] = {name: largest for name, (_, _, largest) in box.items()}
    sizes = axis_sizes(facts, corner)
    rows, tokens = sizes.get("batch", sizes.get("images", 1)), sizes.get("tokens", sizes.get("patches", 1))
    seen, width = sizes.get(SLOTS, tokens), value_bytes(facts.compute)
    peak = WIDTHS * work.widest * width * rows * tokens
    if facts.compute == "float32":
        return peak + 2 * width * work.heads * rows * tokens * seen
    if SLOTS in sizes and tokens > 1:
        return peak + rows * seen * (tokens + 2 * work.heads * work.head_size * width)
    return peak


def _buffer_bytes(facts: GraphFacts, box: ProfileShapes) -> int:
    """Return the bytes of a graph's inputs and outputs at the far corner of a profile, but for the cache."""
    corner: dict[str, Shape] = {name: largest for name, (_, _, largest) in box.items()}
    sizes = axis_sizes(facts, corner)
    widest = max(sizes.values(), default=1)  # bounds an axis that is computed from others
    total = 0
    for tensor in (*facts.inputs, *facts.outputs):
        if not tensor.name.startswith(CACHE):
            shape = [sizes.get(axis, widest) if isinstance(axis, str) else axis for axis in tensor.shape]
            total += np.dtype(tensor.dtype).itemsize * int(np.prod(shape))
    return total


def _sum(*counted: tuple[float, Operations]) -> dict[str, float]:
    """Add operations up, each so many times."""
    found: dict[str, float] = {}
    for times, operations in counted:
        for name, count in operations.items():
            found[name] = found.get(name, 0.0) + times * count
    return found
