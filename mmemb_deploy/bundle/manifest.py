"""What `manifest.json` says of a bundle: model, graphs, gate, certificate, and the hash of every file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmemb_deploy.bundle import abi
from mmemb_deploy.errors import BundleError, CertificateError, SchemaError
from mmemb_deploy.files import write_whole
from mmemb_deploy.inputs.parse import Limits
from mmemb_deploy.inputs.preprocess import VisionSpec
from mmemb_deploy.inputs.prompts import PromptFormat

NANO = Path(__file__).parent / "assets" / "nano"  # the bundle that ships with this package
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SCHEMA_VERSION = 1

Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelFacts(_Part):
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


class BatchLimits(_Part):
    """What bounds the memory of a call; more inputs than fit are processed in more batches."""

    row_tokens: int  # of one prompt and its rationale; a longer input is refused
    tokens: int  # of a padded batch
    patches: int  # in one run of the vision graph
    cache_bytes: int  # of the KV caches that `reasoning_rate` holds back until all scores are known
    vision_bytes: int = 256 * 2**20  # of the images' features that are remembered, so that an image is encoded once


class TensorFacts(_Part):
    """One input or output of a graph; a string in `shape` names an axis that varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class GraphFacts(_Part):
    """One graph: its file, the precision of its weights, and its tensors."""

    file: str
    precision: str
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    kept: tuple[str, ...] = ()  # weights in the float type although `precision` is coarser: not taken, or losing most

    @property
    def fused(self) -> bool:
        """Whether it is in ONNX Runtime's own operators, whose attention reads the rows' lengths and not a mask."""
        return any(tensor.name == abi.LENGTHS for tensor in self.inputs)


class CurvePoint(_Part):
    """What one gate threshold gives on the calibration pairs."""

    threshold: float
    reasoning_rate: Share
    quality: Share  # hit@1 over all pairs
    quality_interval: tuple[Share, Share]  # of 95% confidence
    worst_group: float  # the smallest, over groups of pairs, of quality minus what the group must reach
    rationale_tokens: float  # mean per input
    latency_ms: float  # expected per input, from the mean of each route on the machine that calibrated


class GateFacts(_Part):
    """The gate's default threshold (a score at or above it reasons) and where it comes from."""

    threshold: float
    calibration: str  # what the curve was measured on; "none" where it was not
    curve: tuple[CurvePoint, ...]


class Parity(_Part):
    """Agreement of the runtime with the reference on inputs of one modality."""

    inputs: int
    min_cosine: float
    mean_cosine: float
    gate_flips: int


class Bounds(_Part):
    """What a certificate must reach."""

    min_cosine: float
    gate_flips: int
    token_agreement: float


class Certificate(_Part):
    """Measured agreement of this bundle, run by this runtime, with the checkpoint, run by transformers."""

    reference: str
    runtime: str
    modalities: dict[str, Parity]
    reasoned: Parity | None  # embeddings after the runtime's own rationales, against one full forward pass over each
    token_agreement: Share  # share of rationale tokens that equal the reference's greedy choice; 1 if there are none
    retrieval_overlap: Share  # share of inputs whose nearest other input is the reference's too
    bounds: Bounds

    @property
    def parities(self) -> dict[str, Parity]:
        """Return the agreement of direct embeddings by modality, and of reasoned ones where the bundle reasons."""
        return self.modalities if self.reasoned is None else {**self.modalities, "reasoned": self.reasoned}

    def check(self) -> None:
        """Raise CertificateError, naming the first figure that misses its bound."""
        for name, parity in self.parities.items():
            if not parity.min_cosine >= self.bounds.min_cosine:
                raise CertificateError(
                    f"certificate: min cosine of {name} is {parity.min_cosine}, below {self.bounds.min_cosine}"
                )
            if parity.gate_flips > self.bounds.gate_flips:
                raise CertificateError(
                    f"certificate: {parity.gate_flips} gate flips for {name}, above {self.bounds.gate_flips}"
                )
        if not self.token_agreement >= self.bounds.token_agreement:
            raise CertificateError(
                f"certificate: token agreement is {self.token_agreement}, below {self.bounds.token_agreement}"
            )


class Manifest(_Part):
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


def read_manifest(folder: Path) -> Manifest:
    """Read and validate a manifest; raises BundleError where there is none, SchemaError where it cannot be read."""
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}")
    text = path.read_text()
    try:
        header = _Header.model_validate_json(text)
        if header.schema_version > SCHEMA_VERSION:
            raise SchemaError(
                f"{path} has schema {header.schema_version}, this version reads {SCHEMA_VERSION}: "
                f"install mmemb-deploy {header.written_by} or newer"
            )
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SchemaError(f"{path}: {where}: {first['msg']}; export the bundle again") from error
    needed = abi.GRAPHS if manifest.prompt.reasons else abi.FAST_GRAPHS
    missing = [name for name in needed if name not in manifest.graphs]
    if missing:
        raise SchemaError(f"{path} describes no graph {missing[0]!r}; export the bundle again")
    unhashed = {facts.file for facts in manifest.graphs.values()} | {TOKENIZER}
    if unlisted := sorted(unhashed - manifest.files.keys()):
        raise SchemaError(f"{path} lists no hash of {unlisted[0]}; export the bundle again")
    return manifest


class _Header(BaseModel):
    schema_version: int
    written_by: str


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, replacing an older one in a single step."""
    write_whole(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
