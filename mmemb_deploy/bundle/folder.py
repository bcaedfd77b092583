"""A bundle on disk, and the checks that a runtime makes before it trusts one.

bundle/manifest.json  tokenizer.json  vision.onnx  embedder.onnx  gate.onnx  generator.onnx  *.onnx.data

A bundle of an embedding model that does not reason has neither gate nor generator. One that was made to run on its
TensorRT engines alone has no ONNX file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from logging import INFO, WARNING
from pathlib import Path, PurePosixPath

from mmemb_deploy.bundle.manifest import MANIFEST, Manifest, manifest_digest, read_manifest
from mmemb_deploy.bundle.precision import PRECISIONS, coarsest
from mmemb_deploy.errors import BackendError, CertificateError, IntegrityError
from mmemb_deploy.machine import cpu_features

NANO = Path(__file__).parents[1] / "assets" / "nano"  # the bundle that ships with this package


class Bundle:
    """A folder that passed every check: `folder` and `manifest`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    def graph(self, name: str) -> Path:
        """Return the path of a graph's ONNX file. Raises BackendError in a bundle that holds engines alone."""
        if self.manifest.engines_of is not None:
            raise BackendError(
                f"{self.folder} holds TensorRT engines without the graph {name}: it runs on them alone, and neither "
                "ONNX Runtime nor `mmemb build` can use it; take the bundle that it was made of"
            )
        return self.folder / self.manifest.graphs[name].file

    def graph_files(self, name: str) -> list[str]:
        """Return a graph's file and the weight files that it names, of those in the manifest. Raises as `graph`."""
        path = self.graph(name)
        content = path.read_bytes()
        weights = sorted(file for file in self.manifest.files if file.encode() in content and file != path.name)
        return [path.name, *weights]

    @classmethod
    def open(cls, folder: Path, digest: str | None = None) -> Bundle:
        """Read a bundle and check its schema, its files' hashes and its certificate.

        `digest` is what the manifest's own must be (`manifest_digest`); None takes the manifest at its word. Raises
        BundleError if there is none at `folder`, and its subclasses for what is wrong with it.
        """
        if digest is not None and digest != (found := manifest_digest(folder)):
            raise IntegrityError(
                f"{folder / MANIFEST} has the digest {found}, not {digest}: it was changed, or is another bundle's"
            )
        bundle = cls(folder, read_manifest(folder))
        check_files(folder, bundle.manifest.files)
        if bundle.manifest.certificate is None:
            raise CertificateError(f"{folder} has no certificate: export it again")
        bundle.manifest.certificate.check()
        return bundle

    def notes(self) -> Iterator[tuple[int, str]]:
        """Yield what to know of the certificate before relying on it here, each with a level of `logging`."""
        certificate, precisions = self.manifest.certificate, self.manifest.precisions
        if certificate is None:  # export is still measuring it
            return
        for lowered in certificate.lowered(precisions):
            yield (
                WARNING,
                f"the certificate of {self.folder} was given an easier bound than its precision has: {lowered}",
            )
        here, measure = cpu_features(), "`mmemb verify --measure` measures it on this machine"
        if not certificate.cpu:
            yield WARNING, f"the certificate of {self.folder} does not say on which CPU it was measured: {measure}"
        elif certificate.cpu != here:
            level = WARNING if PRECISIONS[coarsest(precisions)].kernels_differ else INFO
            there = " ".join(certificate.cpu)
            yield (
                level,
                f"the certificate of {self.folder} was measured on {there}, this is {' '.join(here)}: {measure}",
            )


def check_files(folder: Path, hashes: dict[str, str]) -> None:
    """Raise IntegrityError for the first file that is missing, changed, or outside the folder."""
    for name, expected in hashes.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise IntegrityError(f"{folder / MANIFEST}: the path {name!r} leaves the bundle; refuse this bundle")
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{path} is missing; copy the bundle again, whole")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise IntegrityError(f"{path} is a link that leaves the bundle; copy the file itself")
        if file_hash(path) != expected:
            raise IntegrityError(f"{path} was changed: its sha256 differs from the manifest's; copy the bundle again")


def file_hash(path: Path) -> str:
    """Return a file's sha256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bundle_files(folder: Path) -> Iterator[str]:
    """Yield the paths, inside a bundle's folder, of the files that its manifest hashes."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            yield path.relative_to(folder).as_posix()
