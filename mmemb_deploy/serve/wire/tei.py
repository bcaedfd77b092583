"""The `/embed` and `/info` of text-embeddings-inference: texts in, bare vectors out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

import mmemb_deploy
from mmemb_deploy.results import EncodeResult
from mmemb_deploy.serve.ask import Ask
from mmemb_deploy.serve.failures import Refusal
from mmemb_deploy.serve.wire.common import JSON, Contract, Input, Served, Wishes, details_of
from mmemb_deploy.serve.wire.openai import FORMS, Text, TokenIds, kind_of

Texts = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag("<token lists>")],
    Discriminator(kind_of, custom_error_type="input_form", custom_error_message=FORMS.partition(", messages")[0]),
]
STATUS = {400: 422, 500: 424, 503: 429}
KINDS = {424: "Backend", 429: "Overloaded", 504: "Overloaded"}


class TeiRequest(Wishes):
    """A body of `POST /embed`."""

    inputs: Texts
    truncate: bool | None = Field(None, description="Inputs are never cut: one that is too long is refused.")
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = Field(None, description="As truncate.")
    prompt_name: Literal["query", "document"] = Field("query", description="Which side of a search the inputs are.")
    normalize: Literal[True] = Field(True, description="Vectors always have length 1.")
    dimensions: int | None = Field(None, ge=1, description="A size that the model was trained for.")


class TeiError(BaseModel):
    """The envelope of an error."""

    error: str
    error_type: Literal["Validation", "Backend", "Overloaded"]


class Pooling(BaseModel):
    """Of the model's states, the last token's is the embedding."""

    pooling: Literal["last_token"]


class ModelType(BaseModel):
    """What the model does."""

    embedding: Pooling


class TeiInfo(BaseModel):
    """What `GET /info` answers."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: ModelType
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    backend: str


def ask(request: TeiRequest, served: Served) -> Ask:
    """Return what a request asks of the service."""
    served.check_dimensions(request.dimensions, "dimensions")
    given: Any = request.inputs
    batch: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    served.check_count(batch, "inputs")
    inputs: list[Input] = [
        each if isinstance(each, str) else served.text_of(each, index) for index, each in enumerate(batch)
    ]
    document = request.prompt_name == "document"
    return request.ask(inputs, served, document=document, dimensions=request.dimensions)


def answer(request: TeiRequest, result: EncodeResult, served: Served) -> list[Any]:  # noqa: ARG001 - as every contract
    """Return the vectors."""
    return list(result.embeddings)


def headers(result: EncodeResult, seconds: float) -> dict[str, str]:
    """Return what `/embed` says of its work, in milliseconds; rows that ran together count once."""
    details = details_of(result)
    tokens = sum(detail.prompt_tokens + detail.rationale_tokens for detail in details)
    prepared = sum(detail.timings.preprocess for detail in details)
    ran = max(detail.timings.fast_path + detail.timings.generation for detail in details)
    times = {
        "x-total-time": seconds,
        "x-tokenization-time": prepared,
        "x-queue-time": max(seconds - prepared - ran, 0.0),
        "x-inference-time": ran,
    }
    return {"x-compute-tokens": str(tokens)} | {name: f"{1e3 * value:.0f}" for name, value in times.items()}


def refuse(refusal: Refusal) -> JSON:
    """Return the envelope of an error."""
    status = STATUS.get(refusal.status, refusal.status)
    return {"error": refusal.message, "error_type": KINDS.get(status, "Validation")}


def info(served: Served) -> JSON:
    """Return an TeiInfo."""
    manifest = served.preparer.manifest
    return {
        "model_id": manifest.model.name,
        "model_sha": served.digest,
        "model_dtype": manifest.compute,
        "served_model_name": served.names[0],
        "model_type": {"embedding": {"pooling": "last_token"}},
        "max_concurrent_requests": served.max_waiting_rows,
        "max_input_length": served.max_input_tokens,
        "max_batch_tokens": manifest.batch.tokens,
        "max_batch_requests": None,
        "max_client_batch_size": served.max_inputs,
        "auto_truncate": False,
        "tokenization_workers": 1,
        "version": mmemb_deploy.__version__,
        "backend": served.preparer.backend,
    }


CONTRACT = Contract(
    name="tei",
    path="/embed",
    request=TeiRequest,
    reply=list[list[float]],
    error=TeiError,
    field=lambda _: "inputs",
    ask=ask,
    answer=answer,
    refuse=refuse,
    status=STATUS,
    headers=headers,
)
