"""What `mmemb build` leaves in a bundle, and the checks that a runtime makes before it loads it.

bundle/engines/<library>-<device>-<version>/engines.json  <graph>-<key>.engine  timings

An engine's key is made of all that it depends on. A file is written whole and under its key, and `engines.json` last,
so that an interrupted build leaves the engines of before, and whatever it had finished for the next one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator

from pydantic import ValidationError

from mmemb_deploy.backends.device import Shape
from mmemb_deploy.bundle.certificate import Certificate, Part
from mmemb_deploy.bundle.folder import Bundle, file_hash
from mmemb_deploy.errors import BackendError
from mmemb_deploy.files import write_whole

ENGINES = "engines"
LISTING = "engines.json"
TIMINGS = "timings"
RECIPE = 2  # counts up when the same graph, library and profiles would give another engine

ProfileShapes = dict[str, tuple[Shape, Shape, Shape]]  # input -> min, opt and max shape


class Built(Part):
    """One engine: its file and that file's sha256, the graph's hash, and the profiles that it was built for."""

    key: str
    file: str
    sha256: str
    graph: str
    precision: str
    profiles: tuple[ProfileShapes, ...]
    seconds: float
    size: int


class EngineSet(Part):
    """The engines that one library built for one device. `certificate` is None until they were run and compared."""

    library: str
    version: str
    device: str
    target: str  # compute capability, as "sm90"
    engines: dict[str, Built]
    certificate: Certificate | None = None

    @property
    def folder(self) -> str:
        """Name of its folder inside `bundle/engines`."""
        device = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        return f"{self.library}-{device}-{self.version}"

    def key(self, graph: str, profiles: tuple[ProfileShapes, ...]) -> str:
        """Return the key of an engine of this set, of a graph's hash and the profiles to build it for."""
        depends = [RECIPE, self.library, self.version, self.device, self.target, graph, profiles]
        return hashlib.sha256(json.dumps(depends).encode()).hexdigest()


def graph_hash(bundle: Bundle, name: str) -> str:
    """Return a hash of a graph and of the weight files that it names."""
    hashes = bundle.manifest.files
    path = bundle.graph(name)
    content = path.read_bytes()
    weights = sorted(file for file in hashes if file.encode() in content and file != path.name)
    depends = [hashes[path.name], *(hashes[file] for file in weights)]
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
    """Return the engines that were built by `wanted`'s library and version for its device.

    Raises BackendError, naming what is there and what is wanted, where there are none, or none for a graph as it is.
    """
    build = f"run: mmemb build {bundle.folder} --library {wanted.library}"
    others = []
    for found in read_sets(bundle):
        if (found.library, found.version, found.device, found.target) == (
            wanted.library,
            wanted.version,
            wanted.device,
            wanted.target,
        ):
            return _current(bundle, found, build)
        others.append(_describe(found))
    there = f"its engines are for {', and for '.join(others)}" if others else "it has none"
    raise BackendError(f"{bundle.folder} has no engines for {_describe(wanted)}: {there}; {build}")


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


def _describe(engines: EngineSet) -> str:
    return f"{engines.device} ({engines.target}) with {engines.library} {engines.version}"


def _current(bundle: Bundle, found: EngineSet, build: str) -> EngineSet:
    for name, (graph, *_) in bundle.manifest.engines.items():
        if name not in found.engines:
            raise BackendError(f"{bundle.folder} has no engine of the graph {name} in {found.folder}: {build}")
        if found.engines[name].graph != graph_hash(bundle, graph):
            raise BackendError(f"{bundle.folder}: the graph {name} has changed since its engine was built: {build}")
    return found


def read_engine(bundle: Bundle, engines: EngineSet, name: str) -> bytes:
    """Read an engine. Raises BackendError where its file is missing or was changed."""
    built = engines.engines[name]
    path = bundle.folder / ENGINES / engines.folder / built.file
    if not path.is_file() or file_hash(path) != built.sha256:
        state = "was changed" if path.is_file() else "is missing"
        raise BackendError(f"{path} {state}: run mmemb build {bundle.folder} --library {engines.library}")
    return path.read_bytes()
