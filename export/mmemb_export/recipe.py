"""What a bundle's graphs are made for: their form, their precisions, and what its certificate must reach."""

from __future__ import annotations

from dataclasses import dataclass

from mmemb_deploy.bundle.manifest import Bounds
from mmemb_deploy.errors import OptionError, check_known

FLOATS = ("float32", "float16", "bfloat16")
PRECISIONS = {  # of each form, finest first
    "portable": (*FLOATS, "int8", "fp8", "int4"),
    "fused": ("float32", "int8", "int4"),
}
MIN_COSINE = {"float32": 0.9999, "float16": 0.999, "bfloat16": 0.995, "int8": 0.999, "fp8": 0.98, "int4": 0.98}
TOKEN_AGREEMENT = {"float32": 0.995, "float16": 0.97, "bfloat16": 0.9, "int8": 0.97, "fp8": 0.9, "int4": 0.9}
FLIPS = {"float32": 0.0, "float16": 0.01, "bfloat16": 0.02, "int8": 0.01, "fp8": 0.05, "int4": 0.05}  # share of inputs


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
        check_known("form", self.form, PRECISIONS)
        if self.compute is not None:
            check_known("compute", self.compute, FLOATS)
        for precision in (self.precision, self.generator, self.floats):
            check_known("precision", precision, PRECISIONS["portable"])
            if precision not in PRECISIONS[self.form]:
                raise OptionError(
                    f"precision {precision!r} needs form='portable': {self.form} graphs take "
                    f"{', '.join(PRECISIONS[self.form])}"
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
        return max(self.precision, self.generator, key=PRECISIONS[self.form].index)

    def bounds(self, inputs: int) -> Bounds:
        """Return what a certificate over so many inputs must reach: the bounds of the coarser precision."""
        coarser = self.coarser
        flips = FLIPS[coarser] if self.max_flips is None else self.max_flips
        agreement = self.min_token_agreement
        return Bounds(
            min_cosine=MIN_COSINE[coarser] if self.min_cosine is None else self.min_cosine,
            gate_flips=int(flips * inputs),
            token_agreement=TOKEN_AGREEMENT[coarser] if agreement is None else agreement,
        )
