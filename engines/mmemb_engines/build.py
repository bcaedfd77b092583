"""Portable graphs to engines for one device: parsed, built, written atomically, and reused while nothing changed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mmemb_deploy.backends.cuda import Cuda, Gpu, probe
from mmemb_deploy.backends.tensorrt.api import LIBRARIES, TENSORRT, TENSORRT_RTX, Library, load_library
from mmemb_deploy.backends.tensorrt.backend import engines_for
from mmemb_deploy.backends.tensorrt.files import (
    AMPERE_PLUS,
    ENGINES,
    TIMINGS,
    Built,
    EngineSet,
    ProfileShapes,
    find_set,
    graph_hash,
    read_sets,
    write_set,
)
from mmemb_deploy.backends.tensorrt.network import Network, Watcher
from mmemb_deploy.backends.tensorrt.options import BuildOptions
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle, file_hash
from mmemb_deploy.bundle.manifest import GraphFacts
from mmemb_deploy.errors import BackendError, OptionError, check_known
from mmemb_deploy.files import write_whole
from mmemb_engines.graph import SLOTS, PreparedGraph, prepared
from mmemb_engines.profiles import Demand, profiles

Watch = Callable[[str], Watcher]  # a graph's name to what hears of its build


def check_portable(bundle: Bundle) -> None:
    """Raise BackendError for a bundle whose graphs are ONNX Runtime's own."""
    for name, graph in bundle.manifest.graphs.items():
        if graph.form == "fused":
            raise BackendError(
                f"the graph {name} of {bundle.folder} is fused for ONNX Runtime, and TensorRT cannot read it: "
                "export the checkpoint again with `mmemb export --form portable`"
            )


def without_direct(bundle: Bundle) -> Bundle:
    """Return a bundle whose graph for prompts that nothing follows is left out: the decoder's engine runs those too.

    Raises OptionError for one that has no other graph for prompts.
    """
    graphs = {name: graph for name, graph in bundle.manifest.graphs.items() if name != abi.DIRECT}
    if abi.EMBEDDER not in graphs:
        raise OptionError(f"--no-direct: {bundle.folder} does not reason, and has no other graph for prompts")
    return Bundle(bundle.folder, bundle.manifest.model_copy(update={"graphs": graphs}))


def device_sets(
    bundle: Bundle, name: str, targets: tuple[str, ...], options: BuildOptions, index: int = 0
) -> tuple[Library, list[EngineSet]]:
    """Load a library and return a set, still empty, for every device to build for: targets, or the GPU of an index.

    Raises OptionError for targets and options that the library does not have, MissingExtraError, and BackendError where
    a GPU is needed and there is none, the library does not build for it, or it has no room for the weights.
    """
    check_known("library", name, LIBRARIES)
    if name == TENSORRT and targets:
        raise OptionError("targets are for the library 'tensorrt-rtx': TensorRT builds for the GPU that it runs on")
    gpu = None if targets else probe(device=index)  # before the library is loaded, and before it can fail its own way
    library = load_library(name)
    library.check_options(options)
    if gpu is None:
        for target in targets:
            check_known("target", target, library.targets())
        return library, [_set_of(library, target, target) for target in targets]
    device = _device(library, gpu, options)
    weights = max((bundle.folder / file).stat().st_size for file in bundle.manifest.files)
    Cuda(index).check_memory(weights, f"building engines from {bundle.folder}")
    return library, [_set_of(library, device, gpu.target)]


def _set_of(library: Library, device: str, target: str) -> EngineSet:
    return EngineSet(library=library.name, version=library.version, device=device, target=target, engines={})


def _device(library: Library, gpu: Gpu, options: BuildOptions) -> str:
    """Return what runs the engines that are built on a GPU, as `EngineSet.device` says it."""
    if library.name == TENSORRT_RTX:
        if gpu.target not in (known := library.targets()):
            raise BackendError(
                f"TensorRT for RTX {library.version} builds for {', '.join(known)}, and {gpu.name} is {gpu.target}: "
                "use --library tensorrt"
            )
        return gpu.target
    return {"exact": gpu.name, "capability": gpu.target, "ampere+": AMPERE_PLUS}[options.hardware]


def built_here(bundle: Bundle, name: str, index: int = 0) -> EngineSet:
    """Return a library's engines that a bundle holds for the GPU of an index. Raises BackendError for none."""
    check_known("library", name, LIBRARIES)
    gpu = probe(device=index)
    return find_set(bundle, engines_for(load_library(name), gpu))


def build_engines(
    bundle: Bundle, library: Library, wanted: EngineSet, demand: Demand, options: BuildOptions, watch: Watch
) -> EngineSet:
    """Build every graph for the device of `wanted` into the bundle; engines whose key has not changed are kept.

    Raises BackendError where a graph cannot be built or written; the engines of before then stay as they were.
    """
    folder = bundle.folder / ENGINES / wanted.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = next((found for found in read_sets(bundle) if found.folder == wanted.folder), wanted)
        engines = {name: built for name, built in before.engines.items() if name in bundle.manifest.engines}
        current = before
        if engines != before.engines:
            current = wanted.model_copy(update={"engines": dict(engines)})
            write_set(bundle, current)
        for name, (graph, *_) in bundle.manifest.engines.items():
            boxes = profiles(name, bundle.manifest, demand)
            graph_sha = graph_hash(bundle, graph)
            key = wanted.key(graph_sha, boxes, options)
            if _kept(folder, engines.get(name), key):
                continue
            engines[name] = _build(bundle, library, wanted, name, boxes, options, (key, graph_sha), watch(name))
            current = wanted.model_copy(update={"engines": engines})  # without a certificate: it was of other engines
            write_set(bundle, current)
        _drop_others(folder, current)
    except OSError as error:
        raise BackendError(f"cannot write engines into {folder}: {error}") from error
    return current


def parse(
    bundle: Bundle, library: Library, engine: str, boxes: Sequence[ProfileShapes], options: BuildOptions
) -> tuple[Network, PreparedGraph | None]:
    """Parse the graph of an engine (a key of `Manifest.engines`); return how it was prepared, if it was, too.

    Raises BackendError.
    """
    graph = bundle.manifest.engines[engine][0]
    path, slots = bundle.graph(graph), slots_of(bundle.manifest.graphs[graph], boxes)
    if slots is None:
        return Network(library, path), None
    ready = prepared(path, slots, lengths=options.attention == "lengths")
    return Network(library, path, ready.model, lengths=ready.lengths), ready


def slots_of(graph: GraphFacts, boxes: Sequence[ProfileShapes]) -> int | None:
    """Return how many slots a row has in a graph's profiles; None for one without a cache."""
    found = {
        size
        for box in boxes
        for tensor in graph.inputs
        if SLOTS in tensor.shape
        for size in (shape[tensor.shape.index(SLOTS)] for shape in box[tensor.name])
    }
    assert len(found) <= 1, f"the profiles of {graph.file} differ in slots: {found}"  # TensorRT takes but one number
    return next(iter(found), None)


def _kept(folder: Path, built: Built | None, key: str) -> bool:
    if built is None or built.key != key:
        return False
    path = folder / built.file
    hashes = {path: built.sha256}
    if built.model is not None:
        hashes[path.with_suffix(".onnx")] = built.model
    return all(file.is_file() and file_hash(file) == sha256 for file, sha256 in hashes.items())


def _build(
    bundle: Bundle,
    library: Library,
    wanted: EngineSet,
    name: str,
    boxes: tuple[ProfileShapes, ...],
    options: BuildOptions,
    hashes: tuple[str, str],
    watcher: Watcher,
) -> Built:
    """Build an engine whose key, and whose graph's hash, are `hashes`."""
    folder = bundle.folder / ENGINES / wanted.folder
    timings, role = folder / TIMINGS, bundle.manifest.engines[name][0]
    key, graph = hashes
    began = time.perf_counter()
    network, ready = parse(bundle, library, name, boxes, options)
    plan = network.build(
        boxes,
        options,
        target=wanted.target,
        timings=timings.read_bytes() if timings.is_file() else b"",
        watcher=watcher,
    )
    seconds = time.perf_counter() - began
    path = folder / f"{name}-{key[:16]}.engine"
    write_whole(path, plan.content)
    model, filled = None, 0
    if options.strip:
        model = bundle.graph(role).read_bytes() if ready is None else ready.model
        write_whole(path.with_suffix(".onnx"), model)
        filled = sum((bundle.folder / file).stat().st_size for file in bundle.graph_files(role))
    if plan.timings:
        write_whole(timings, plan.timings)
    return Built(
        key=key,
        file=path.name,
        sha256=hashlib.sha256(plan.content).hexdigest(),
        graph=graph,
        precision=bundle.manifest.graphs[role].precision,
        profiles=boxes,
        options=options,
        decomposed=plan.decomposed,
        seconds=seconds,
        size=plan.content.nbytes,
        model=None if model is None else hashlib.sha256(model).hexdigest(),
        filled=filled,
    )


def _drop_others(folder: Path, current: EngineSet) -> None:
    """Delete engines that the listing no longer names, and what lies beside them."""
    named = {built.file.removesuffix(".engine") for built in current.engines.values()}
    for kind in ("engine", "json", "onnx", "kernels"):
        for path in folder.glob(f"*-*.{kind}"):
            if path.name.partition(".")[0] not in named:
                path.unlink()
