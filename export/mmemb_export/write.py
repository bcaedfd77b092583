"""Checkpoint to bundle: graphs, calibrated gate, certificate and manifest, renamed into place when all is well."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmemb_deploy import abi
from mmemb_deploy.bundle import TOKENIZER, Bundle, GraphFacts, Manifest, bundle_files, file_hash, write_manifest
from mmemb_deploy.calibration import calibrate
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import OptionError
from mmemb_deploy.evaluation import Pair
from mmemb_export.certify import FLOAT32_BOUNDS, certify
from mmemb_export.graphs import graphs
from mmemb_export.onnx_files import describe, save, to_onnx
from mmemb_export.probes import synthetic_probes
from mmemb_export.reference import Reference
from mmemb_training.checkpoint import Checkpoint, load_checkpoint
from mmemb_training.runtime import manifest as uncertified

SYNTHETIC_PROBES = 200
CERTIFIED_PAIRS = 1000  # about as many queries of the pairs are certified, evenly drawn
WEIGHT_FILES = {
    "vision.onnx.data": (abi.VISION,),
    "decoder.onnx.data": (abi.EMBEDDER, abi.GENERATOR),
    "gate.onnx.data": (abi.GATE,),
}

Report = Callable[[str], None]


def export_bundle(
    source: Path,
    target: Path,
    *,
    pairs: Sequence[Pair] = (),
    pairs_name: str = "none",
    overwrite: bool = False,
    report: Report = print,
) -> Manifest:
    """Export a checkpoint to a bundle; `report` hears what is being done.

    The gate is calibrated on `pairs`, which must be held out from training; the certificate is measured on some of
    their queries and on synthetic probes. Raises OptionError if the target exists or the source is not a checkpoint,
    and CertificateError if the bundle misses its bounds; nothing is left behind then.
    """
    if target.exists() and not overwrite:
        raise OptionError(f"{target} exists: choose another folder, or pass --overwrite")
    checkpoint = load_checkpoint(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir()
        facts = _write_graphs(checkpoint, folder, report)
        shutil.copy(source / TOKENIZER, folder / TOKENIZER)
        _write_pooling(checkpoint, folder)
        files = {name: file_hash(folder / name) for name in bundle_files(folder)}
        manifest = uncertified(checkpoint, target.name).model_copy(update={"graphs": facts, "files": files})
        embedder = Embedder.of_bundle(Bundle(folder, manifest))
        if pairs:
            report(f"calibrating the gate on {len(pairs)} pairs")
            gate = calibrate(embedder, pairs, pairs_name)
            manifest = manifest.model_copy(update={"gate": gate})
        probes = [*synthetic_probes(SYNTHETIC_PROBES), *pairs[:: len(pairs) // CERTIFIED_PAIRS + 1]]
        report(f"certifying on {len(probes)} inputs")
        certificate = certify(embedder, checkpoint, Reference(checkpoint), probes, FLOAT32_BOUNDS)
        certificate.check()
        manifest = manifest.model_copy(update={"certificate": certificate})
        write_manifest(folder, manifest)
        Bundle.open(folder)
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
    return manifest


def _write_graphs(checkpoint: Checkpoint, folder: Path, report: Report) -> dict[str, GraphFacts]:
    models = {}
    for graph in graphs(checkpoint):
        report(f"exporting {graph.name}")
        models[graph.name] = to_onnx(graph)
    facts = {name: describe(model, f"{name}.onnx", "float32") for name, model in models.items()}
    for weights, names in WEIGHT_FILES.items():
        save([models[name] for name in names], [folder / f"{name}.onnx" for name in names], folder / weights)
    return facts


def _write_pooling(checkpoint: Checkpoint, folder: Path) -> None:
    """Write what sentence-transformers' readers look for: the modules, last-token pooling, and the prompts."""
    prompt = checkpoint.facts.prompt
    modules = ["Transformer", "Pooling", "Normalize"]
    paths = ["", "1_Pooling", "2_Normalize"]
    documents: dict[str, Any] = {
        "modules.json": [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{module}"}
            for place, (module, path) in enumerate(zip(modules, paths, strict=True))
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": checkpoint.model.config.text_config.hidden_size,
            "pooling_mode_lasttoken": True,
            "include_prompt": True,
        },
        "config_sentence_transformers.json": {
            "prompts": {"query": prompt.query_instruction, "document": prompt.document_instruction},
            "similarity_fn_name": "cosine",
        },
    }
    for name, content in documents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
