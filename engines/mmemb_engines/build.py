"""Portable graphs to engines for one device: parsed, built, written atomically, and reused while nothing changed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from mmemb_deploy.backends.cuda import Cuda, probe
from mmemb_deploy.backends.tensorrt.api import LIBRARIES, TENSORRT, Library, Network, Watcher, load_library
from mmemb_deploy.backends.tensorrt.backend import engines_for
from mmemb_deploy.backends.tensorrt.files import (
    ENGINES,
    TIMINGS,
    Built,
    EngineSet,
    ProfileShapes,
    graph_hash,
    read_sets,
    write_set,
)
from mmemb_deploy.bundle.folder import Bundle, file_hash
from mmemb_deploy.errors import BackendError, OptionError, check_known
from mmemb_deploy.files import write_whole
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


def device_sets(bundle: Bundle, name: str, targets: tuple[str, ...]) -> tuple[Library, list[EngineSet]]:
    """Load a library and return a set, still empty, for every device to build for: targets, or the GPU at hand.

    Raises OptionError for targets that the library cannot build for, MissingExtraError, and BackendError where a GPU is
    needed and there is none, or it has no room for the weights.
    """
    check_known("library", name, LIBRARIES)
    if name == TENSORRT and targets:
        raise OptionError("targets are for the library 'tensorrt-rtx': TensorRT builds for the GPU that it runs on")
    if not targets:
        gpu = probe()  # before the library is loaded, and before it can fail its own way
        library = load_library(name)
        weights = max((bundle.folder / file).stat().st_size for file in bundle.manifest.files)
        Cuda().check_memory(weights, f"building engines from {bundle.folder}")
        return library, [engines_for(library, gpu)]
    library = load_library(name)
    for target in targets:
        check_known("target", target, library.targets())
    return library, [
        EngineSet(library=name, version=library.version, device=target, target=target, engines={}) for target in targets
    ]


def build_engines(bundle: Bundle, library: Library, wanted: EngineSet, demand: Demand, watch: Watch) -> EngineSet:
    """Build every graph for the device of `wanted` into the bundle; engines whose key has not changed are kept.

    Raises BackendError where a graph cannot be built or written; the engines of before then stay as they were.
    """
    folder = bundle.folder / ENGINES / wanted.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = next((found for found in read_sets(bundle) if found.folder == wanted.folder), wanted)
        engines = dict(before.engines)
        current = before
        for name, (role, *_) in bundle.manifest.engines.items():
            boxes = profiles(name, bundle.manifest, demand)
            graph = graph_hash(bundle, role)
            if _kept(folder, engines.get(name), wanted.key(graph, boxes)):
                continue
            engines[name] = _build(bundle, library, wanted, name, role, boxes, graph, watch(name))
            current = wanted.model_copy(update={"engines": engines})  # without a certificate: it was of other engines
            write_set(bundle, current)
        _drop_others(folder, current)
    except OSError as error:
        raise BackendError(f"cannot write engines into {folder}: {error}") from error
    return current


def _kept(folder: Path, built: Built | None, key: str) -> bool:
    if built is None or built.key != key:
        return False
    path = folder / built.file
    return path.is_file() and file_hash(path) == built.sha256


def _build(
    bundle: Bundle,
    library: Library,
    wanted: EngineSet,
    name: str,
    role: str,
    boxes: tuple[ProfileShapes, ...],
    graph: str,
    watcher: Watcher,
) -> Built:
    folder = bundle.folder / ENGINES / wanted.folder
    timings = folder / TIMINGS
    key = wanted.key(graph, boxes)
    began = time.perf_counter()
    plan, learned = Network(library, bundle.graph(role)).build(
        boxes,
        target=wanted.target if wanted.library != TENSORRT else None,
        timings=timings.read_bytes() if timings.is_file() else b"",
        watcher=watcher,
    )
    seconds = time.perf_counter() - began
    file = f"{name}-{key[:16]}.engine"
    write_whole(folder / file, plan)
    if learned:
        write_whole(timings, learned)
    return Built(
        key=key,
        file=file,
        sha256=hashlib.sha256(plan).hexdigest(),
        graph=graph,
        precision=bundle.manifest.graphs[role].precision,
        profiles=boxes,
        seconds=seconds,
        size=plan.nbytes,
    )


def _drop_others(folder: Path, current: EngineSet) -> None:
    """Delete engines that the listing no longer names."""
    named = {built.file for built in current.engines.values()}
    for path in folder.glob("*.engine"):
        if path.name not in named:
            path.unlink()
