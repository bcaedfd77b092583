"""A bundle that runs on its engines alone: for devices that have no use, and no room, for the graphs' weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mmemb_deploy.backends.tensorrt.files import ENGINES, LISTING, EngineSet, graph_hash
from mmemb_deploy.backends.tensorrt.options import BuildOptions
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import write_manifest
from mmemb_deploy.errors import OptionError

WEIGHTS = ".onnx.data"  # of a graph; one whose weights are all in its own file names none


def check_engines_only(target: Path, options: BuildOptions) -> None:
    """Raise OptionError for a target that exists, and for engines that are to be stripped of the weights they need."""
    if target.exists():
        raise OptionError(f"--engines-only is {target}, which exists: choose another folder")
    if options.strip:
        raise OptionError(f"--engines-only is {target}: stripped engines need the bundle's weights; leave --strip out")


def write_engines_only(bundle: Bundle, sets: Sequence[EngineSet], target: Path) -> Bundle:
    """Write a bundle of some engines, and of all of `bundle` but its ONNX graphs and their weights; return it, open.

    It keeps the reference, so that `mmemb build` can check the engines where they run. Raises OptionError as
    `check_engines_only` does, for engines that were built before too.
    """
    for engines in sets:
        for built in engines.engines.values():
            check_engines_only(target, built.options)
    manifest = bundle.manifest
    named = {file for name in manifest.graphs for file in bundle.graph_files(name)}
    kept = {file: sha256 for file, sha256 in manifest.files.items() if not file.endswith(WEIGHTS) and file not in named}
    hashes = {name: graph_hash(bundle, name) for name in manifest.graphs}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        folder = Path(scratch) / "bundle"
        listings = [f"{ENGINES}/{engines.folder}/{LISTING}" for engines in sets]
        plans = [engines.path(bundle, name) for engines in sets for name in engines.engines]
        for file in (*kept, *listings, *(str(path.relative_to(bundle.folder)) for path in plans)):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.folder / file, folder / file)
        write_manifest(folder, manifest.model_copy(update={"files": kept, "engines_of": hashes}))
        opened = Bundle.open(folder)
        folder.rename(target)
    return Bundle(target, opened.manifest)
