"""The parity certificate of a bundle: what its runtime's answers were measured to agree with, and by how much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from mmemb_deploy.bundle.precision import PRECISIONS, coarsest
from mmemb_deploy.errors import CertificateError

Share = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """A part of a manifest: frozen, and nothing unknown in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Parity(Part):
    """Agreement of the runtime with the reference on inputs of one modality."""

    inputs: int
    min_cosine: float
    mean_cosine: float
    gate_flips: int


class BatchParity(Part):
    """Agreement of an input alone with the same input in a batch, by every route."""

    inputs: int
    min_cosine: float  # of direct embeddings, and of reasoned ones after equal rationales
    equal_rationales: Share  # that are the same to the token; 1 if there are none


class Bounds(Part):
    """What a certificate must reach."""

    min_cosine: float
    gate_flips: int
    token_agreement: float
    batch_cosine: float = 0.0

    @classmethod
    def of(cls, precisions: Iterable[str], inputs: int) -> Bounds:
        """Return the bounds of the coarsest precision, over so many inputs."""
        coarse = PRECISIONS[coarsest(precisions)]
        return cls(
            min_cosine=coarse.min_cosine,
            gate_flips=int(coarse.gate_flips * inputs),
            token_agreement=coarse.token_agreement,
            batch_cosine=coarse.batch_cosine,
        )


class Certificate(Part):
    """Measured agreement of a bundle, run by this runtime, with its reference."""

    reference: str
    runtime: str
    cpu: tuple[str, ...] = ()  # features of the CPU that ran it (`mmemb_deploy.machine`); empty where nobody noted them
    modalities: dict[str, Parity]
    reasoned: Parity | None  # embeddings after the runtime's own rationales, against one full forward pass over each
    token_agreement: Share  # share of rationale tokens that equal the reference's greedy choice; 1 if there are none
    retrieval_overlap: Share  # share of inputs whose nearest other input is one of the reference's nearest too
    batch: BatchParity | None = None
    bounds: Bounds

    @property
    def parities(self) -> dict[str, Parity]:
        """Return the agreement of direct embeddings by modality, and of reasoned ones where the bundle reasons."""
        return self.modalities if self.reasoned is None else {**self.modalities, "reasoned": self.reasoned}

    def check(self) -> None:
        """Raise CertificateError, naming the first figure that misses its bound."""
        where = f"measured on {self.runtime} against {self.reference}"
        for name, parity in self.parities.items():
            if not parity.min_cosine >= self.bounds.min_cosine:
                raise CertificateError(
                    f"certificate: min cosine of {name} is {parity.min_cosine}, below {self.bounds.min_cosine}, {where}"
                )
            if parity.gate_flips > self.bounds.gate_flips:
                raise CertificateError(
                    f"certificate: {parity.gate_flips} gate flips for {name}, above {self.bounds.gate_flips}, {where}"
                )
        if not self.token_agreement >= self.bounds.token_agreement:
            raise CertificateError(
                f"certificate: token agreement is {self.token_agreement}, below {self.bounds.token_agreement}, {where}"
            )
        if self.batch is not None and not self.batch.min_cosine >= self.bounds.batch_cosine:
            raise CertificateError(
                f"certificate: min cosine of an input alone and in a batch is {self.batch.min_cosine}, below "
                f"{self.bounds.batch_cosine}, {where}"
            )

    def lowered(self, precisions: Iterable[str]) -> Iterator[str]:
        """Yield what is easier to reach under the certificate's own bounds than under those of its precisions."""
        inputs = sum(parity.inputs for parity in self.modalities.values())
        due, own = Bounds.of(precisions, inputs), self.bounds
        if self.batch is None:  # a bundle from before it was measured
            due = due.model_copy(update={"batch_cosine": own.batch_cosine})
        for name in Bounds.model_fields:
            wanted, given = getattr(due, name), getattr(own, name)
            if (given > wanted) if name == "gate_flips" else (given < wanted):
                yield f"{name} {given} in place of {wanted}"
