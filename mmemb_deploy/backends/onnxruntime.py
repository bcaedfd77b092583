"""ONNX Runtime on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.backends.device import Shape, axis_sizes, sized
from mmemb_deploy.backends.host_device import HostDevice
from mmemb_deploy.backends.host_vision import HostVision
from mmemb_deploy.backends.kv_cache.slots import Places, SlotDecoder
from mmemb_deploy.backends.protocol import Engine, PromptGraphs
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import GraphFacts, Manifest
from mmemb_deploy.errors import BackendError, MissingExtraError, OptionError
from mmemb_deploy.machine import cores

try:
    import onnxruntime
except ModuleNotFoundError as error:
    raise MissingExtraError("onnxruntime", "cpu") from error

PROVIDER = "CPUExecutionProvider"
HOST = "cpu", 0
PROMPTS = abi.DIRECT, abi.EMBEDDER
BINDINGS = 256  # that a graph on the CPU keeps
SPIN = 50  # microseconds that an idle thread waits awake; by default so long that it takes a core from all others
LONG_SPIN = 1000  # of a large graph, which takes a tenth longer where threads sleep between its operators
LARGE = 2**26  # bytes of a graph and its weights; a smaller one's operators are too little work to be shared out
HOST_TYPES = {name: np.dtype(name) for name in ("uint8", "int64", "float32")}


class OnnxRuntime:
    """Loads bundles on the CPU; `threads` is the number of threads of one operator, None for a process's every core.

    ONNX Runtime by itself takes the machine's, those too that the process may not run on, and binds a thread to each.

    Where all graphs are small, each runs on half of the threads, and a second set of them, for prompts, on the others.
    On two cores nano runs 1.4 to 1.6 times as many prompts a second, in batches of 2 to 8, by two sets of one thread as
    by one of two threads, and writes as many tokens by one thread as by two.
    """

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise OptionError(f"threads is {threads}: it must be at least 1, or None for all cores")
        self.name = f"onnxruntime {onnxruntime.__version__} CPU"
        self._threads = threads

    def load(self, bundle: Bundle) -> Engine:
        """Load every graph; raises BackendError for a float type that a CPU lacks, or if ONNX Runtime refuses one."""
        manifest, graphs = bundle.manifest, bundle.manifest.graphs
        if manifest.compute != "float32":
            raise BackendError(
                f"{bundle.folder} computes in {manifest.compute}, which ONNX Runtime does not on a CPU: run it on an "
                "NVIDIA GPU, or export the checkpoint again with --form fused"
            )
        threads = self._threads or cores()
        halves = threads > 1 and not any(_is_large(bundle, name) for name in graphs)
        every = 0 if not self._threads and threads == os.cpu_count() else threads
        sessions = _Sessions(bundle, threads // 2 if halves else every)
        return Engine(
            self.name,
            sessions.vision(),
            _decoder(manifest, sessions.graphs(*PROMPTS, abi.GENERATOR)),
            OrtSession(graphs[abi.GATE].file, sessions[abi.GATE]) if abi.GATE in graphs else None,
            beside=_beside(bundle, sessions, threads // 2) if halves else None,
        )


def _beside(bundle: Bundle, sessions: _Sessions, threads: int) -> PromptGraphs:
    if threads > 1:  # else who calls is the thread, and two may
        sessions = _Sessions(bundle, threads)
    return PromptGraphs(sessions.vision(), _decoder(bundle.manifest, sessions.graphs(*PROMPTS), part=True))


class _Sessions:
    """A bundle's graphs in ONNX Runtime by so many threads, 0 for all of the machine's; a file is opened once."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._bundle, self._threads = bundle, threads
        self._opened: dict[str, onnxruntime.InferenceSession] = {}

    def __getitem__(self, name: str) -> onnxruntime.InferenceSession:
        """Return a graph's."""
        file = self._bundle.manifest.graphs[name].file
        if file not in self._opened:
            self._opened[file] = open_graph(self._bundle.graph(name), self._threads, _spin(self._bundle, name))
        return self._opened[file]

    def vision(self) -> HostVision:
        """Open the vision graph."""
        manifest = self._bundle.manifest
        return HostVision(OrtSession(manifest.graphs[abi.VISION].file, self[abi.VISION]), manifest)

    def graphs(self, *names: str) -> dict[str, OrtGraph]:
        """Open those of some graphs that the bundle has."""
        facts = self._bundle.manifest.graphs
        return {name: OrtGraph(self[name], facts[name]) for name in names if name in facts}


def open_graph(graph: Path, threads: int, spin: int) -> onnxruntime.InferenceSession:
    """Load a graph by so many threads, which wait awake for `spin` microseconds where they are idle.

    Raises BackendError where ONNX Runtime refuses it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; they are raised as well
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin))
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=[PROVIDER])
    except Exception as error:  # ONNX Runtime's errors share no base class of their own
        raise BackendError(f"ONNX Runtime cannot load {graph}: {error}") from error


def _decoder(manifest: Manifest, graphs: Mapping[str, OrtGraph], *, part: bool = False) -> SlotDecoder:
    # GroupQueryAttention goes on with several tokens in one row only
    places = Places(continues=not manifest.fused, part=part)
    return SlotDecoder(HostDevice(), graphs, manifest, places)


def _is_large(bundle: Bundle, name: str) -> bool:
    return sum((bundle.folder / file).stat().st_size for file in bundle.graph_files(name)) >= LARGE


def _spin(bundle: Bundle, name: str) -> int:
    """Return the microseconds for which a graph's idle threads wait awake."""
    return LONG_SPIN if _is_large(bundle, name) else SPIN


class OrtSession:
    """One graph in ONNX Runtime, arrays in and out."""

    def __init__(self, name: str, session: onnxruntime.InferenceSession) -> None:
        self._name = name
        self._session = session
        self._inputs = {tensor.name for tensor in session.get_inputs()}
        self._outputs = [tensor.name for tensor in session.get_outputs()]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once, on the inputs it declares."""
        try:
            values: Any = self._session.run(None, {name: inputs[name] for name in self._inputs})
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {self._name}: {error}") from error
        return dict(zip(self._outputs, values, strict=True))


class OrtGraph:
    """One graph in ONNX Runtime as a `device.DeviceEngine`.

    `place` is ONNX Runtime's name of where the addresses are, `types` its name of every type, `options` those of a run.
    """

    def __init__(
        self,
        session: Any,
        facts: GraphFacts,
        place: tuple[str, int] = HOST,
        types: Mapping[str, Any] = HOST_TYPES,
        options: Any = None,
    ) -> None:
        self.facts = facts
        bind = partial(_bound, session, facts, place, types, options)
        # To bind takes as long as some layers of a small model. On a GPU, ONNX Runtime may copy inputs as it does so.
        self._bind: Callable[..., Callable[[], None]] = lru_cache(BINDINGS)(bind) if place == HOST else bind

    def takes(self, shapes: Mapping[str, Shape]) -> bool:
        """Return True: ONNX Runtime makes room for what comes."""
        del shapes
        return True

    def bind(
        self, shapes: Mapping[str, Shape], addresses: Mapping[str, int], *, again: bool = False
    ) -> Callable[[], None]:
        """Return what runs the graph over these shapes and addresses."""
        del again
        return self._bind(tuple(shapes.items()), tuple(addresses.items()))


def _bound(
    session: Any,
    facts: GraphFacts,
    place: tuple[str, int],
    types: Mapping[str, Any],
    options: Any,
    inputs: Iterable[tuple[str, Shape]],
    addresses: Iterable[tuple[str, int]],
) -> Callable[[], None]:
    """Return what runs a graph over inputs of these shapes, and tensors at these addresses."""
    binding, shapes, at = session.io_binding(), dict(inputs), dict(addresses)
    sizes = axis_sizes(facts, shapes)
    for tensor in facts.inputs:
        binding.bind_input(tensor.name, *place, types[tensor.dtype], shapes[tensor.name], at[tensor.name])
    for tensor in facts.outputs:
        binding.bind_output(tensor.name, *place, types[tensor.dtype], sized(tensor.shape, sizes), at[tensor.name])

    def run() -> None:
        try:
            session.run_with_iobinding(binding, options)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {facts.file}: {error}") from error

    return run
