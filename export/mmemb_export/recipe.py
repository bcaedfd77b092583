"""What a bundle's graphs are made for: their form, their precisions, and what its certificate must reach."""

from __future__ import annotations

from dataclasses import dataclass

from mmemb_deploy.bundle.certificate import Bounds
from mmemb_deploy.bundle.precision import FLOATS, PRECISIONS, coarsest
from mmemb_deploy.errors import OptionError, check_known

FORMS = {  # and the precisions of each, the finest first
    "portable": tuple(PRECISIONS),
    "fused": tuple(name for name, precision in PRECISIONS.items() if precision.fused),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Raises OptionError for a value that is not known, and for a precision that the form does not have."""

    form: str = "portable"
    """ "portable": standard ONNX, for every engine; "fused": in ONNX Runtime's own operators, for the CPU."""

    precision: str = "float32"
    """Of vision and embedder."""

    generator_precision: str | None = None
    """Of the generator; None takes `precision`, and then both paths of a fused bundle run one decoder graph."""

    compute: str | None = None
    """Float type of activations and KV cache; None takes the precision if that is one, else float32 in a fused bundle
    and bfloat16 in a portable one."""

    min_cosine: float | None = None
    """What the certificate must reach; None takes the bound of the coarser precision, as in the next two."""

    max_flips: float | None = None
    """Share of inputs that the gate may route otherwise than the reference does."""

    min_token_agreement: float | None = None
    """Share of the rationales' tokens that must be the reference's own choice."""

    def __post_init__(self) -> None:
        check_known("form", self.form, FORMS)
        if self.compute is not None:
            check_known("compute", self.compute, FLOATS)
        for precision in (self.precision, self.generator, self.floats):
            check_known("precision", precision, PRECISIONS)
            if precision not in FORMS[self.form]:
                raise OptionError(
                    f"precision {precision!r} needs form='portable': {self.form} graphs take "
                    f"{', '.join(FORMS[self.form])}"
                )
            if precision in FLOATS and precision != self.floats:
                raise OptionError(
                    f"precision {precision!r} beside compute {self.floats!r}: both paths share one KV cache, so that "
                    "their float type must be the same"
                )

    @property
    def floats(self) -> str:
        """Float type of activations and KV cache."""
        if self.compute is not None:
            return self.compute
        if self.precision in FLOATS:
            return self.precision
        return "float32" if self.form == "fused" else "bfloat16"

    @property
    def generator(self) -> str:
        """Precision of the generator."""
        return self.precision if self.generator_precision is None else self.generator_precision

    @property
    def coarser(self) -> str:
        """The coarser of the two precisions."""
        return coarsest((self.precision, self.generator))

    def bounds(self, inputs: int) -> Bounds:
        """Return what a certificate over so many inputs must reach: the bounds of the coarser precision."""
        given = {
            "min_cosine": self.min_cosine,
            "gate_flips": None if self.max_flips is None else int(self.max_flips * inputs),
            "token_agreement": self.min_token_agreement,
        }
        due = Bounds.of({self.precision, self.generator}, inputs)
        return due.model_copy(update={name: value for name, value in given.items() if value is not None})
