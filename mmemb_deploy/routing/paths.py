"""A bundle's two paths, as a scheduler runs them."""

from __future__ import annotations

from dataclasses import dataclass

from mmemb_deploy.bundle.manifest import BatchLimits
from mmemb_deploy.routing.fast_path import FastPath
from mmemb_deploy.routing.generation import Generator
from mmemb_deploy.routing.items import RationaleWriter
from mmemb_deploy.routing.lane import Lane


@dataclass(frozen=True)
class Paths:
    """`token_bytes` are those of a token in the KV cache; without a `writer` the generator writes rationales itself.

    With a `lane`, prompts run there too.
    """

    fast_path: FastPath
    generator: Generator
    limits: BatchLimits
    token_bytes: int
    writer: RationaleWriter | None = None
    lane: Lane | None = None
