"""Fails unless an emulated aarch64 CPU answers as this machine does: `compare.py PYTHON`, the one of `prepare.sh`.

The embedded bundle, and one with its weights in int8, embed texts, images and a video here and there. Vectors must be
as close as the bundle's certificate asks of the runtime's and the reference's; routes and rationales must be the same.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.certificate import Bounds
from mmemb_deploy.bundle.folder import NANO, Bundle, bundle_files, file_hash
from mmemb_deploy.bundle.manifest import write_manifest
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.evaluation.parity import ReferenceSet, measure
from mmemb_export.integers import quantise_tables
from mmemb_export.quantise import quantise, quantiser
from mmemb_export.weights import save


@dataclass(frozen=True)
class Answers:
    """What `answers.py` wrote: the vectors (R, D), and what else came of each row's input."""

    embeddings_RD: NDArray[np.float64]
    rows: list[dict[str, Any]]
    least_cosine: float
    cpu: list[str]
    package: str
    notes: list[str]

    @classmethod
    def read(cls, file: Path) -> Answers:
        """Read its file."""
        with np.load(file, allow_pickle=False) as archive:
            return cls(archive["embeddings"].astype(np.float64), **json.loads(archive["facts"].item()))


def main(emulated: Path) -> None:
    """Ask both, print how far apart they are, exit with 1 where that is too far."""
    folder, pythons = emulated.parent, {"here": Path(sys.executable), "there": emulated}
    running = [ask(python, folder / f"float32-{place}.npz") for place, python in pythons.items()]
    write_int8(folder / "int8")
    running += [ask(python, folder / f"int8-{place}.npz", folder / "int8") for place, python in pythons.items()]
    if failed := [process.args for process in running if process.wait()]:
        raise SystemExit(f"no answers, see above, from {failed}")
    wrong = list[str]()
    for name in ("float32", "int8"):
        here, there = (Answers.read(folder / f"{name}-{place}.npz") for place in pythons)
        print(f"{name} on {' '.join(there.cpu)}, against {' '.join(here.cpu)}; {there.notes[0]}")
        if there.cpu[0] != "aarch64" or not Path(there.package).is_relative_to(folder):
            wrong.append(f"{name}: {there.package} on {there.cpu[0]} is not this tree's wheel on aarch64")
        wrong += [f"{name}, {difference}" for difference in differences(here, there)]
    if wrong:
        raise SystemExit("\n".join(["the machines differ:", *wrong]))


def ask(python: Path, file: Path, *bundle: Path) -> subprocess.Popen[bytes]:
    """Let a Python write the answers of a bundle, or of the one inside its package."""
    return subprocess.Popen([python, Path(__file__).with_name("answers.py"), file, *bundle])


def differences(here: Answers, there: Answers) -> Iterator[str]:
    """Print a summary of each mode; yield what is wrong with a row."""
    left_RD, right_RD = here.embeddings_RD, there.embeddings_RD
    cosine_R = (left_RD * right_RD).sum(axis=1) / np.linalg.norm(left_RD, axis=1) / np.linalg.norm(right_RD, axis=1)
    pairs = list(zip(here.rows, there.rows, strict=True))
    score_R = np.array([abs(ours["score"] - theirs["score"]) for ours, theirs in pairs])
    for mode in dict.fromkeys(row["mode"] for row in here.rows):
        rows = [index for index, row in enumerate(here.rows) if row["mode"] == mode]
        tokens = sum(len(here.rows[index]["rationale_ids"]) for index in rows)
        print(
            f"  {mode:<6} {len(rows)} inputs, {tokens} tokens of rationales; furthest apart: cosine 1 - "
            f"{1 - cosine_R[rows].min():.1e} (at least {here.least_cosine}), gate score {score_R[rows].max():.1e}"
        )
    for (ours, theirs), cosine, score in zip(pairs, cosine_R, score_R, strict=True):
        where = f"{ours['mode']}, {ours['input']} (cosine {cosine:.9f}, gate scores {score:.1e} apart)"
        if not cosine >= here.least_cosine:
            yield f"{where}: the cosine must be {here.least_cosine} at least"
        for key in ("route", "rationale_ids"):
            if ours[key] != theirs[key]:
                yield f"{where}: {key} is {ours[key]} here and {theirs[key]} there"


def write_int8(target: Path) -> None:
    """Write the embedded bundle with its weights in int8, certified on the inputs that it keeps."""
    nano = Bundle.open(NANO)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(NANO, target)
    graphs = {
        name: facts if name == abi.GATE else facts.model_copy(update={"precision": "int8"})
        for name, facts in nano.manifest.graphs.items()
    }
    for file in {facts.file for facts in graphs.values() if facts.precision == "int8"}:
        model = quantise(quantise_tables(ir.load(NANO / file)), quantiser("fused", "int8", "float32", {}))
        save([model], [target / file], target / f"{file}.data")
    files = {file: file_hash(target / file) for file in bundle_files(target)}
    manifest = nano.manifest.model_copy(update={"graphs": graphs, "files": files})
    embedder = Embedder.of_bundle(Bundle(target, manifest))
    certificate = measure(embedder, ReferenceSet.of(nano), lambda inputs: Bounds.of({"int8"}, inputs))
    certificate.check()
    write_manifest(target, manifest.model_copy(update={"certificate": certificate}))


main(Path(sys.argv[1]).resolve())
