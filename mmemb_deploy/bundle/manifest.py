"""What `manifest.json` says of a bundle: model, graphs, gate, certificate, and the hash of every file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.certificate import Certificate, Part, Share
from mmemb_deploy.bundle.precision import PRECISIONS, value_bytes
from mmemb_deploy.errors import BundleError, SchemaError
from mmemb_deploy.files import write_whole
from mmemb_deploy.inputs.limits import Limits
from mmemb_deploy.inputs.preprocess import VisionSpec
from mmemb_deploy.inputs.prompts import PromptFormat

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SCHEMA_VERSION = 3


class ModelFacts(Part):
    """Sizes of the model that the runtime needs to hold its tensors."""

    name: str
    hidden_size: int
    layers: int
    kv_heads: int
    head_dim: int
    vocabulary_size: int
    deepstack_levels: int
    max_rationale_tokens: int
    dims: tuple[int, ...]  # embedding sizes that training supports, largest first


class BatchLimits(Part):
    """What bounds the memory of a call; more inputs than fit are processed in more batches."""

    row_tokens: int  # of one prompt and its rationale; a longer input is refused
    tokens: int  # of a padded batch
    patches: int  # in one run of the vision graph
    cache_bytes: int  # of the KV caches that `reasoning_rate` holds back until all scores are known
    vision_bytes: int = 256 * 2**20  # of the images' features that are remembered, so that an image is encoded once


class TensorFacts(Part):
    """One input or output of a graph; a string in `shape` names an axis that varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class GraphFacts(Part):
    """One graph: its file, the precision of its weights, and its tensors."""

    file: str
    precision: str
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    form: Literal["portable", "fused"]  # standard ONNX, or ONNX Runtime's own operators
    compute: str  # float type of its activations, and of keys and values
    kept: tuple[str, ...] = ()  # weights in the float type although `precision` is coarser: not taken, or losing most


class CurvePoint(Part):
    """What one gate threshold gives on the calibration pairs."""

    threshold: float
    reasoning_rate: Share
    quality: Share  # hit@1 over all pairs
    quality_interval: tuple[Share, Share]  # of 95% confidence
    worst_group: float  # the smallest, over groups of pairs, of quality minus what the group must reach
    rationale_tokens: float  # mean per input
    latency_ms: float  # expected per input, from the mean of each route on the machine that calibrated


class GateFacts(Part):
    """The gate's default threshold (a score at or above it reasons) and where it comes from."""

    threshold: float
    calibration: str  # what the curve was measured on; "none" where it was not
    curve: tuple[CurvePoint, ...]


class Manifest(Part):
    """What `manifest.json` holds."""

    schema_version: int
    written_by: str  # the version of mmemb-deploy that wrote it, and so can read it
    model: ModelFacts
    vision: VisionSpec
    prompt: PromptFormat
    markers: dict[str, int]
    limits: Limits
    batch: BatchLimits
    gate: GateFacts | None  # None in a bundle that does not reason
    graphs: dict[str, GraphFacts]
    files: dict[str, str]  # path inside the bundle -> sha256
    certificate: Certificate | None  # None only while export is still measuring it
    provenance: dict[str, Any]
    engines_of: dict[str, str] | None = None  # hashes of the graphs, in a bundle that holds their engines without them

    @property
    def precisions(self) -> list[str]:
        """Return the precisions of its graphs, the finest first."""
        found = {graph.precision for graph in self.graphs.values()}
        return [name for name in PRECISIONS if name in found]

    @property
    def engines(self) -> dict[str, tuple[str, ...]]:
        """Return the graphs of each file, by the file's name without its suffix: what is built and loaded once."""
        found: dict[str, tuple[str, ...]] = {}
        for name, graph in self.graphs.items():
            stem = Path(graph.file).stem
            found[stem] = (*found.get(stem, ()), name)
        return found

    @property
    def identity(self) -> str:
        """Return the sha256 of its files' hashes, in hexadecimal: two bundles that share it make the same vectors."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    @property
    def decoder(self) -> GraphFacts:
        """Return its decoder for prompts: the one that keeps a cache, where there is one."""
        return self.graphs[abi.EMBEDDER if abi.EMBEDDER in self.graphs else abi.DIRECT]

    @property
    def compute(self) -> str:
        """Return the float type that its decoder computes in, and keeps keys and values in."""
        return self.decoder.compute if self.graphs else "float32"

    @property
    def cache_token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        model = self.model
        return 2 * model.layers * model.kv_heads * model.head_dim * value_bytes(self.compute)

    @property
    def fused(self) -> bool:
        """Whether its decoder is in ONNX Runtime's own operators, for the CPU."""
        return self.decoder.form == "fused"


def read_manifest(folder: Path) -> Manifest:
    """Read and validate a manifest; raises BundleError where there is none, SchemaError where it cannot be read."""
    path, text = folder / MANIFEST, manifest_bytes(folder)
    try:
        header = _Header.model_validate_json(text)
        if header.schema_version != SCHEMA_VERSION:
            newer = header.schema_version > SCHEMA_VERSION
            fix = f"install mmemb-deploy {header.written_by} or newer" if newer else "export the checkpoint again"
            raise SchemaError(f"{path} has schema {header.schema_version}, this version reads {SCHEMA_VERSION}: {fix}")
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SchemaError(f"{path}: {where}: {first['msg']}; export the bundle again") from error
    graphs = manifest.graphs
    reasoning = (abi.EMBEDDER, abi.GATE, abi.GENERATOR)
    decoder = reasoning if manifest.prompt.reasons else (abi.EMBEDDER if abi.DIRECT not in graphs else abi.DIRECT,)
    missing = [name for name in (abi.VISION, *decoder) if name not in graphs]
    if missing:
        raise SchemaError(f"{path} describes no graph {missing[0]!r}; export the bundle again")
    held = graphs.values() if manifest.engines_of is None else ()
    unhashed = {facts.file for facts in held} | {TOKENIZER}
    if unlisted := sorted(unhashed - manifest.files.keys()):
        raise SchemaError(f"{path} lists no hash of {unlisted[0]}; export the bundle again")
    return manifest


def manifest_bytes(folder: Path) -> bytes:
    """Return a manifest as it is; raises BundleError where there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}")
    return path.read_bytes()


def manifest_digest(folder: Path) -> str:
    """Return the sha256 of a manifest, in hexadecimal: since it holds every file's hash, it stands for the bundle."""
    return hashlib.sha256(manifest_bytes(folder)).hexdigest()


class _Header(BaseModel):
    schema_version: int
    written_by: str


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, replacing an older one in a single step."""
    write_whole(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
