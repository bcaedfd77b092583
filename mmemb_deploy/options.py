"""The options of `Embedder.encode`, with their defaults and checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from mmemb_deploy.errors import OptionError, check_known

PRECISIONS = ("float32", "int8", "ubinary")


class EncodeOptions(TypedDict, total=False):
    """The keyword arguments of `encode`, as type checkers see them; `Options` says what each one means."""

    instruction: str | None
    reasoning: str
    threshold: float | None
    reasoning_rate: float | None
    rationales: Sequence[str | Sequence[int] | None] | None
    max_rationale_tokens: int | None
    batch_size: int
    truncate_dim: int | None
    precision: str
    show_progress_bar: bool


@dataclass(frozen=True, kw_only=True)
class Options:
    """Raises OptionError, naming the option, its value and what is accepted."""

    instruction: str | None = None
    """What to embed for; None takes the bundle's default."""

    reasoning: str = "auto"
    """ "auto" lets the gate decide input by input, "never" and "always" decide for all."""

    threshold: float | None = None
    """Gate score from which "auto" reasons; None takes the bundle's calibrated default."""

    reasoning_rate: float | None = None
    """Share of this call's inputs that reason under "auto", highest scores first, in place of a threshold."""

    rationales: Sequence[str | Sequence[int] | None] | None = None
    """Rationales written elsewhere, one per input, as words or token ids: an input that has one follows it, None leaves
    it to the gate."""

    max_rationale_tokens: int | None = None
    """Tokens after which a rationale is closed; None takes the bundle's limit."""

    batch_size: int = 32
    """Inputs that run together."""

    truncate_dim: int | None = None
    """Leading values to keep, normalised again; one of the sizes that the bundle lists."""

    precision: str = "float32"
    """ "float32"; "int8": round(127 * value); "ubinary": the signs, 8 to a byte, most significant bit first."""

    show_progress_bar: bool = False
    """Draw a progress bar on standard error."""

    def __post_init__(self) -> None:
        check_known("precision", self.precision, PRECISIONS)
        if self.batch_size < 1:
            raise OptionError(f"batch_size is {self.batch_size}: it must be at least 1")
        if self.max_rationale_tokens is not None and self.max_rationale_tokens < 0:
            raise OptionError(f"max_rationale_tokens is {self.max_rationale_tokens}: it must be at least 0")
        if self.threshold is not None and self.reasoning_rate is not None:
            raise OptionError("threshold and reasoning_rate both say which inputs reason: pass one of them")

    @classmethod
    def of(cls, given: dict[str, Any]) -> Options:
        """Build the options from keyword arguments, refusing unknown ones by name."""
        for name in given:
            check_known("option", name, [field.name for field in fields(cls)])
        return cls(**given)
