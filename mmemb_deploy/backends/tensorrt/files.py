"""What `mmemb build` leaves in a bundle, and the checks that a runtime makes before it loads it.

bundle/engines/<library>-<device>-<version>/engines.json  <graph>-<key>.engine  <graph>-<key>.json  timings

An engine's key is made of all that it depends on. A file is written whole and under its key, and `engines.json` last,
so that an interrupted build leaves the engines of before, and whatever it had finished for the next one. Beside an
engine may lie what the inspector told of its layers (.json), the graph that a stripped one is filled from (.onnx), and
kernels that TensorRT for RTX compiled for a GPU (.<gpu>.kernels).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from mmemb_deploy.backends.device import Shape
from mmemb_deploy.backends.tensorrt.options import BuildOptions
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.certificate import Certificate, Part
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import Manifest, TensorFacts
from mmemb_deploy.errors import BackendError
from mmemb_deploy.files import write_whole

ENGINES = "engines"
LISTING = "engines.json"
TIMINGS = "timings"
RECIPE = 3  # counts up when the same graph, library, options and profiles would give another engine
WINDOW = TensorFacts(name=abi.WINDOW, dtype="int64", shape=(abi.WINDOW,))  # that a build adds to a graph with slots
AMPERE_PLUS = "ampere+"  # a device: every GPU of compute capability 8.0 and above

ProfileShapes = dict[str, tuple[Shape, Shape, Shape]]  # input -> min, opt and max shape


class Built(Part):
    """One engine: its file and that file's sha256, the graph's hash, and what it was built for.

    `decomposed` says that attention in half precision had no kernel of its own and was written out, which is slower.
    `model` is the sha256 of the graph beside a stripped engine, which names its weights, and `filled` how many bytes of
    them it takes when it is loaded; `size` is what its file has.
    """

    key: str
    file: str
    sha256: str
    graph: str
    precision: str
    profiles: tuple[ProfileShapes, ...]
    options: BuildOptions
    decomposed: bool
    seconds: float
    size: int
    model: str | None = None
    filled: int = 0

    @property
    def resident(self) -> int:
        """Return how many bytes it takes of a device's memory."""
        return self.size + self.filled

    @property
    def cache(self) -> tuple[int, int]:
        """Return the rows and the slots of a row of the KV cache that a decoder's engine was built for."""
        rows, _, slots, _ = max(profile[next(abi.past_names(1))][2] for profile in self.profiles)
        return rows, slots


class EngineSet(Part):
    """The engines that one library built for one device. `certificate` is None until they were run and compared.

    `device` is what runs them: a GPU's name, all of a compute capability ("sm89"), or AMPERE_PLUS. TensorRT for RTX
    always builds for a capability.
    """

    library: str
    version: str
    device: str
    target: str  # compute capability that they were built for, as "sm90"
    engines: dict[str, Built]
    certificate: Certificate | None = None

    @property
    def folder(self) -> str:
        """Name of its folder inside `bundle/engines`."""
        return f"{self.library}-{_slug(self.device)}-{self.version}"

    @property
    def decomposed(self) -> list[str]:
        """Return the graphs whose attention was written out, in half precision."""
        return [name for name, built in self.engines.items() if built.decomposed]

    def roles(self, manifest: Manifest) -> dict[str, tuple[str, ...]]:
        """Return the graphs of each of its engines; that of `direct` may have been left out."""
        return {name: graphs for name, graphs in manifest.engines.items() if name in self.engines}

    def key(self, graph: str, profiles: tuple[ProfileShapes, ...], options: BuildOptions) -> str:
        """Return the key of an engine of this set, of a graph's hash and of what to build it for."""
        asked = sorted(vars(options).items())
        depends = [RECIPE, self.library, self.version, self.device, self.target, graph, profiles, asked]
        return hashlib.sha256(json.dumps(depends).encode()).hexdigest()

    def path(self, bundle: Bundle, name: str) -> Path:
        """Return where the engine of a graph lies."""
        return bundle.folder / ENGINES / self.folder / self.engines[name].file


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9+]+", "-", text.lower()).strip("-")


def graph_hash(bundle: Bundle, name: str) -> str:
    """Return a hash of a graph and of the weight files that it names."""
    known = bundle.manifest.engines_of
    if known is not None:
        return known[name]
    hashes = bundle.manifest.files
    depends = [hashes[file] for file in bundle.graph_files(name)]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()


def read_sets(bundle: Bundle) -> Iterator[EngineSet]:
    """Yield all sets of a bundle, in the order of their folders. Raises BackendError for one that cannot be read."""
    for path in sorted((bundle.folder / ENGINES).glob(f"*/{LISTING}")):
        try:
            yield EngineSet.model_validate_json(path.read_text())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise BackendError(f"{path}: {where}: {first['msg']}; delete {path.parent} and build it again") from error


def find_set(bundle: Bundle, wanted: EngineSet) -> EngineSet:
    """Return engines that `wanted`'s library and version run on its device, which is a GPU's name.

    Those built for this very GPU and version come first. Raises BackendError, naming what is there and what is wanted,
    where there are none, or none for a graph as it is.
    """
    build = _remedy(bundle, wanted.library)
    there = list(read_sets(bundle))
    fitting = [found for found in there if _runs(found, wanted)]
    if fitting:
        exact = [wanted.device, wanted.target, AMPERE_PLUS]
        best = min(fitting, key=lambda found: (exact.index(found.device), found.version != wanted.version))
        return _current(bundle, best, build)
    others = ", and for ".join(map(_describe, there))
    what = f"its engines are for {others}" if others else "it has none"
    raise BackendError(f"{bundle.folder} has no engines for {_describe(wanted)}: {what}; {build}")


def _runs(found: EngineSet, wanted: EngineSet) -> bool:
    """Return whether the library and version of `wanted` can run engines on its GPU."""
    if found.library != wanted.library:
        return False
    if found.version != wanted.version:
        ours, theirs = _release(wanted.version), _release(found.version)
        lasting = all(built.options.version_compatible for built in found.engines.values())
        if not lasting or ours[0] != theirs[0] or ours < theirs:
            return False
    if found.device == AMPERE_PLUS:
        return int(wanted.target.removeprefix("sm")) >= 80
    return found.device in (wanted.device, wanted.target)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def verified_set(bundle: Bundle, wanted: EngineSet) -> EngineSet:
    """Return what `find_set` finds; raises BackendError for engines that were never run and compared too."""
    found = find_set(bundle, wanted)
    if found.certificate is None:
        raise BackendError(
            f"the engines in {bundle.folder} were never checked on this GPU: run mmemb build {bundle.folder} --library "
            f"{wanted.library}"
        )
    return found


def write_set(bundle: Bundle, engines: EngineSet) -> None:
    """Write the listing of a set, replacing an older one in a single step; its engines are there already."""
    write_whole(bundle.folder / ENGINES / engines.folder / LISTING, engines.model_dump_json(indent=1) + "\n")


def _remedy(bundle: Bundle, library: str) -> str:
    if bundle.manifest.engines_of is None:
        return f"run: mmemb build {bundle.folder} --library {library}"
    return "build and copy engines again from the bundle that this one was made of, which has the graphs"


def _describe(engines: EngineSet) -> str:
    kind = "" if engines.device in (engines.target, AMPERE_PLUS) else f" ({engines.target})"
    return f"{engines.device}{kind} with {engines.library} {engines.version}"


def _current(bundle: Bundle, found: EngineSet, build: str) -> EngineSet:
    spare = abi.EMBEDDER in bundle.manifest.graphs  # which runs what `direct` does, and more
    for name, (graph, *_) in bundle.manifest.engines.items():
        if name not in found.engines:
            if graph == abi.DIRECT and spare:
                continue
            raise BackendError(f"{bundle.folder} has no engine of the graph {name} in {found.folder}: {build}")
        if found.engines[name].graph != graph_hash(bundle, graph):
            raise BackendError(f"{bundle.folder}: the graph {name} has changed since its engine was built: {build}")
    return found


def read_engine(bundle: Bundle, engines: EngineSet, name: str) -> memoryview:
    """Map an engine's file into memory, after one pass over it. Raises BackendError where it is missing or was changed.

    The file must not be overwritten while the view is used; a build writes another one in its place.
    """
    return _mapped(engines.path(bundle, name), engines.engines[name].sha256, bundle, engines)


def read_model(bundle: Bundle, engines: EngineSet, name: str) -> bytes | None:
    """Return the graph that a stripped engine is filled from, else None. Raises BackendError as `read_engine` does."""
    path, expected = engines.path(bundle, name).with_suffix(".onnx"), engines.engines[name].model
    return None if expected is None else bytes(_mapped(path, expected, bundle, engines))


def _mapped(path: Path, expected: str, bundle: Bundle, engines: EngineSet) -> memoryview:
    """Return a file's content where its sha256 is the expected one."""
    remedy = _remedy(bundle, engines.library)
    if not path.is_file():
        raise BackendError(f"{path} is missing: {remedy}")
    with path.open("rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b"")
    if hashlib.sha256(content).hexdigest() != expected:
        raise BackendError(f"{path} was changed: {remedy}")
    return content


def kernels_path(bundle: Bundle, engines: EngineSet, name: str, gpu: str) -> Path:
    """Return where the kernels lie that TensorRT for RTX compiled of an engine on a GPU; the file may be missing."""
    return engines.path(bundle, name).with_suffix(f".{_slug(gpu)}.kernels")
