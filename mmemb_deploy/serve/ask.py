"""What is asked of a service, and what it tells of a single input while that is embedded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.results import Detail


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What one request wants of all of its inputs."""

    inputs: Sequence[Any]  # as `Embedder.encode` takes them
    options: EncodeOptions
    priority: int = 0  # lower first
    deadline: float | None = None  # seconds from now
    on_overload: str = "direct"  # embed without reasoning; or "reject"; or "wait"


@dataclass(frozen=True)
class Scored:
    """The fast path is through: the gate's score, NaN without a gate, and the direct embedding (D,), L2-normalised."""

    score: float
    threshold: float | None  # that "auto" holds scores against now, whatever this input asked for; None without a gate
    embedding: Floats
    seconds: float  # since the input was given, waiting included


@dataclass(frozen=True)
class Wrote:
    """More of the rationale: its next words."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The input is embedded: how, as what (D,), L2-normalised, and in how long."""

    detail: Detail
    embedding: Floats
    seconds: float  # since the input was given, waiting included


Event = Scored | Wrote | Ended
