"""Checkpoint to bundle: graphs, calibrated gate, certificate and manifest, renamed into place when all is well.

Weights pass through memory one tensor at a time; the reference, which needs them all, is loaded after the runtime that
it certifies has gone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmemb_deploy.backends.choose import CPU
from mmemb_deploy.bundle.folder import Bundle, bundle_files, file_hash
from mmemb_deploy.bundle.manifest import TOKENIZER, Manifest, write_manifest
from mmemb_deploy.bundle.precision import FLOATS
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import CertificateError, MissingExtraError, OptionError
from mmemb_deploy.evaluation.calibration import calibrate
from mmemb_deploy.evaluation.pairs import Pair
from mmemb_deploy.evaluation.parity import REFERENCE, answer, batch_parity
from mmemb_export.activations import ranges, sensitivity
from mmemb_export.certify import certify
from mmemb_export.probes import synthetic_probes
from mmemb_export.quantise import quantiser
from mmemb_export.recipe import Recipe
from mmemb_export.traced import Choices, TracedGraphs
from mmemb_export.weights import CheckpointWeights
from mmemb_training.checkpoint import Checkpoint, load_checkpoint, outline_checkpoint
from mmemb_training.runtime import MAX_BATCH_TOKENS, torch_embedder
from mmemb_training.runtime import manifest as uncertified

SYNTHETIC_PROBES = 200
RANKED_PROBES = 24
BATCH_TOKENS = {"portable": MAX_BATCH_TOKENS, "fused": 1024}  # of a padded batch: more leave a CPU's caches
CERTIFIED_PAIRS = 1000  # about as many queries of the pairs are certified, evenly drawn
Report = Callable[[str], None]


def export_bundle(
    source: Path,
    target: Path,
    *,
    recipe: Recipe | None = None,
    pairs: Sequence[Pair] = (),
    pairs_name: str = "none",
    probes: int = SYNTHETIC_PROBES,
    overwrite: bool = False,
    report: Report = print,
) -> Manifest:
    """Export a checkpoint to a bundle; `report` hears what is being done.

    The certificate is measured on `probes` synthetic inputs and on some queries of `pairs`, which must be held out from
    training, and on which the gate is calibrated; a quantised bundle is certified on the pairs alone where there are
    any, since noise is not what its scales are for. Where it misses its bounds, the layers that lose most keep the
    float type: one, then two, four, and so on up to half of them. Raises OptionError if the target exists or the source
    is not a checkpoint, and CertificateError if the bundle misses its bounds; nothing is left behind then.
    """
    if target.exists() and not overwrite:
        raise OptionError(f"{target} exists: choose another folder, or pass --overwrite")
    if probes < 4:
        raise OptionError(f"probes is {probes}: pass at least 4, one of each modality")
    recipe = Recipe() if recipe is None else recipe
    if find_spec("onnxruntime") is None:  # no part of this extra: it comes with `cpu` or `gpu`
        raise MissingExtraError("onnxruntime", "cpu")
    outline = outline_checkpoint(source, dtype=recipe.floats)
    if pairs and not outline.facts.prompt.reasons:
        raise OptionError(f"--calibrate is {pairs_name}: {source} does not reason, and has no gate to calibrate")
    target.parent.mkdir(parents=True, exist_ok=True)
    drawn = pairs[:: len(pairs) // CERTIFIED_PAIRS + 1]
    quantised = recipe.coarser not in FLOATS
    inputs = list(drawn) if quantised and drawn else [*synthetic_probes(probes), *drawn]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir()
        shutil.copy(source / TOKENIZER, folder / TOKENIZER)
        _write_pooling(outline, folder)
        manifest, load = _certified(source, outline, folder, target.name, recipe, inputs, report)
        if pairs:
            report(f"calibrating the gate on {len(pairs)} pairs")
            gate = calibrate(load(), pairs, pairs_name)
            manifest = manifest.model_copy(update={"gate": gate})
        write_manifest(folder, manifest)
        Bundle.open(folder)
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
    return manifest


def _certified(
    source: Path, outline: Checkpoint, folder: Path, name: str, recipe: Recipe, probes: Sequence[Pair], report: Report
) -> tuple[Manifest, Callable[[], Embedder]]:
    """Write the graphs, with as many layers in the float type as the certificate needs; return what runs them, too."""
    bounds, quantised = recipe.bounds(len(probes)), recipe.coarser not in FLOATS
    weights = CheckpointWeights(source, outline)
    graphs = TracedGraphs(outline, weights, recipe, report)
    with_twin = quantised and recipe.floats != "float32"
    twin = TracedGraphs(outline_checkpoint(source), weights, recipe) if with_twin else None
    choices, ranking = _measured(source, recipe, probes), list[str]()
    while True:
        facts = graphs.write(folder, choices)
        files = {file: file_hash(folder / file) for file in bundle_files(folder)}
        manifest = uncertified(outline, name, BATCH_TOKENS[recipe.form])
        manifest = manifest.model_copy(update={"graphs": facts, "files": files})
        load = _loader(source, folder, manifest, recipe, choices, twin)
        report(f"certifying on {len(probes)} inputs")
        embedder = load()
        answers, batch = answer(embedder, probes), batch_parity(embedder, probes)
        del embedder  # the reference needs all weights again
        certificate, reference = certify(probes, answers, batch, load_checkpoint(source), bounds)
        try:
            certificate.check()
        except CertificateError as error:
            if quantised and not ranking:
                coarser = quantiser(recipe.form, recipe.coarser, recipe.floats, choices.ranges)
                ranking = list(sensitivity(load_checkpoint(source), probes[:RANKED_PROBES], coarser))
            if 2 * len(choices.kept) >= len(ranking):
                raise
            choices = replace(choices, kept=tuple(ranking[: max(1, 2 * len(choices.kept))]))
            report(f"{error}; keeping {len(choices.kept)} of {len(ranking)} layers in {recipe.floats}")
        else:
            reference.sample().write(folder)
            files[REFERENCE] = file_hash(folder / REFERENCE)
            return manifest.model_copy(update={"certificate": certificate, "files": files}), load


def _measured(source: Path, recipe: Recipe, probes: Sequence[Pair]) -> Choices:
    """Measure what a recipe needs to know of a checkpoint's activations."""
    coarse = {recipe.precision, recipe.generator}.difference(FLOATS)
    measured = any(quantiser(recipe.form, precision, recipe.floats, {}).measured for precision in coarse)
    return Choices(ranges=ranges(load_checkpoint(source), probes) if measured else {})


def _loader(
    source: Path, folder: Path, manifest: Manifest, recipe: Recipe, choices: Choices, twin: TracedGraphs | None
) -> Callable[[], Embedder]:
    """Return what loads an embedder that computes what the bundle says, on this machine's CPU.

    ONNX Runtime runs float32 there. A bundle in another float type is run by torch in that type, or, if it is
    quantised, as its twin, which computes in float32 with the same weights, integers and scales; `mmemb build` verifies
    the engine itself.
    """
    if recipe.floats == "float32":
        return lambda: Embedder.of_bundle(Bundle(folder, manifest), backend=CPU)
    if twin is None:
        return lambda: torch_embedder(load_checkpoint(source, dtype=recipe.floats))
    other = folder.parent / "twin"
    other.mkdir(exist_ok=True)
    shutil.copy(source / TOKENIZER, other)
    facts = twin.write(other, choices)
    made = Bundle(other, manifest.model_copy(update={"graphs": facts}))
    return lambda: Embedder.of_bundle(made, backend=CPU)


def _write_pooling(checkpoint: Checkpoint, folder: Path) -> None:
    """Write what sentence-transformers' readers look for: the modules, last-token pooling, and the prompts."""
    prompt = checkpoint.facts.prompt
    modules = ["Transformer", "Pooling", "Normalize"]
    paths = ["", "1_Pooling", "2_Normalize"]
    documents: dict[str, Any] = {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{module}"}
            for index, (module, path) in enumerate(zip(modules, paths, strict=True))
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
