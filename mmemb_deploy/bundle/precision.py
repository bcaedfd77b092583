"""Every precision that weights can be in: what is known of it, and what a bundle in it must reach."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One precision; the bounds are those of a certificate whose coarser path is in it."""

    bits: int  # of a weight
    is_float: bool = False  # activations and the KV cache can be in it too
    fused: bool = False  # graphs in ONNX Runtime's own operators, for the CPU, can be in it
    product: Literal["float32", "int8"] = "float32"  # the type that a CPU multiplies such weights in
    min_cosine: float  # of an embedding with the reference's
    token_agreement: float  # share of a rationale's tokens that are the reference's choice
    gate_flips: float  # share of inputs that the gate may route otherwise
    batch_cosine: float  # of an input alone with the same input in any batch

    @property
    def kernels_differ(self) -> bool:
        """Whether results differ from CPU to CPU by more than the last digits.

        Activations are rounded to 8 bits between kernels that sum in an order of their own for every CPU and number of
        rows: what differs in the last digit before may differ by a whole step after.
        """
        return self.product == "int8"


PRECISIONS = {  # the finest first
    "float32": Precision(
        bits=32,
        is_float=True,
        fused=True,
        min_cosine=0.9999,
        token_agreement=0.995,
        gate_flips=0.0,
        batch_cosine=0.99999,
    ),
    "float16": Precision(
        bits=16, is_float=True, min_cosine=0.999, token_agreement=0.97, gate_flips=0.01, batch_cosine=0.999
    ),
    "bfloat16": Precision(
        bits=16, is_float=True, min_cosine=0.995, token_agreement=0.9, gate_flips=0.02, batch_cosine=0.99
    ),
    "int8": Precision(
        bits=8,
        fused=True,
        product="int8",
        min_cosine=0.999,
        token_agreement=0.97,
        gate_flips=0.01,
        batch_cosine=0.99999,
    ),
    "fp8": Precision(bits=8, min_cosine=0.98, token_agreement=0.9, gate_flips=0.05, batch_cosine=0.99),
    "int4": Precision(
        bits=4, fused=True, product="int8", min_cosine=0.98, token_agreement=0.9, gate_flips=0.05, batch_cosine=0.999
    ),
}
FLOATS = tuple(name for name, precision in PRECISIONS.items() if precision.is_float)


def coarsest(names: Iterable[str]) -> str:
    """Return the coarsest of some precisions."""
    return max(names, key=list(PRECISIONS).index)


def value_bytes(dtype: str) -> int:
    """Return the size of a number of a float type."""
    return PRECISIONS[dtype].bits // 8
