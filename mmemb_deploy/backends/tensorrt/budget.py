"""What a bundle's engines take of a GPU's memory, term by term: for a plan, after a build, and when they are loaded.

Weights lie there once for each engine. The profiles of one engine share them, and so do prompts and steps, which are
one engine where their precisions are equal; two engines never do, whatever tensors their graphs have in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmemb_deploy.backends.tensorrt.files import EngineSet
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.manifest import Manifest
from mmemb_deploy.figures import Figure


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes on a device. What the driver and the library take beside it is not counted."""

    weights: Mapping[str, int]  # by engine
    rows: int = 0  # of the KV cache; 0 where nothing follows a prompt
    slots: int = 0  # tokens that a row has room for
    token_bytes: int = 0  # keys and values of one token
    arena: int = 0  # activations of whichever engine runs
    buffers: int = 0  # what goes in and out of the engines
    features: int = 0  # of images that are remembered, at most

    @property
    def cache(self) -> int:
        """Return the bytes of keys and values."""
        return self.rows * self.slots * self.token_bytes

    @property
    def total(self) -> int:
        """Return the sum of all terms."""
        return sum(self.weights.values()) + self.cache + self.arena + self.buffers + self.features

    def figures(self) -> dict[str, Figure]:
        """Return the terms and their sum."""
        pool = f"{self.rows} rows x {self.slots} slots x {self.token_bytes} B of keys and values"
        once = "held once by its engine"
        terms = {f"weights of {name}": Figure(size, "B", once) for name, size in self.weights.items()}
        return terms | {
            "KV cache": Figure(self.cache, "B", pool),
            "activations": Figure(self.arena, "B", "one arena for all engines, which run in turns"),
            "inputs and outputs": Figure(self.buffers, "B", "of every engine, at its largest shapes"),
            "image features": Figure(self.features, "B", "of images that are remembered, at most"),
            "all": Figure(self.total, "B", "the sum"),
        }

    def lines(self) -> list[str]:
        """Return one line for each figure, for a terminal or a log."""
        figures = self.figures()
        wide, high = max(map(len, figures)), max(len(str(figure)) for figure in figures.values())
        return [f"{name:<{wide}}  {figure!s:>{high}}  {figure.basis}" for name, figure in figures.items()]


def budget_of(manifest: Manifest, engines: EngineSet, arena: int = 0) -> Budget:
    """Return what a set of engines takes; how large their arena is, is known once they are loaded."""
    weights = {name: built.resident for name, built in engines.engines.items()}
    features = manifest.batch.vision_bytes
    for name, graphs in engines.roles(manifest).items():
        if abi.GENERATOR in graphs:
            rows, slots = engines.engines[name].cache
            token = manifest.cache_token_bytes
            return Budget(weights=weights, rows=rows, slots=slots, token_bytes=token, arena=arena, features=features)
    return Budget(weights=weights, arena=arena, features=features)
