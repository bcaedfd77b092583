"""Cohere's `/v2/embed`: texts, images or both, in several number formats at once."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from mmemb_deploy.results import EncodeResult
from mmemb_deploy.serve.ask import Ask
from mmemb_deploy.serve.failures import Refusal
from mmemb_deploy.serve.media import Link
from mmemb_deploy.serve.wire.common import (
    JSON,
    Contract,
    ImagePart,
    Input,
    Mmemb,
    Parts,
    Served,
    Strict,
    Wishes,
    described,
    details_of,
    exactly_one,
    input_of,
)
from mmemb_deploy.serve.wire.openai import Text, base64_of

Format = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
MOST = "As many as the server's --max-inputs, which /info tells; Cohere's own service takes 96."
DOCUMENTS = ("search_document", "clustering", "image")  # compared with one another: never by a gate that load moves


class Content(Strict):
    """One input of several parts."""

    content: Parts


class CohereRequest(Wishes):
    """A body of `POST /v2/embed`; exactly one of `texts`, `images` and `inputs`."""

    model_config = exactly_one("texts", "images", "inputs")

    model: str | None = Field(None, description="A name of /v1/models.")
    input_type: Literal["search_document", "search_query", "classification", "clustering", "image"] = Field(
        description="search_query and classification embed as queries, the others as documents."
    )
    texts: list[Text] | None = Field(None, min_length=1, fail_fast=True, description=MOST)
    images: list[Text] | None = Field(
        None, min_length=1, fail_fast=True, description=f"Data URIs, one input each. {MOST}"
    )
    inputs: list[Content] | None = Field(None, min_length=1, fail_fast=True, description=MOST)
    output_dimension: int | None = Field(None, ge=1, description="A size that the model was trained for.")
    embedding_types: list[Format] = Field(
        ["float"],
        min_length=1,
        max_length=6,
        description="int8 is round(127 * value), uint8 is int8 + 128, ubinary the signs, most significant bit first, "
        "binary is ubinary - 128, base64 is of little-endian float32.",
    )
    truncate: Literal["NONE", "START", "END"] = Field(
        "NONE", description="Inputs are never cut: one that is too long is refused whatever this says."
    )

    @model_validator(mode="after")
    def _one_of_three(self) -> CohereRequest:
        if sum(each is not None for each in (self.texts, self.images, self.inputs)) != 1:
            raise PydanticCustomError("one_of", "pass exactly one of 'texts', 'images' and 'inputs'")
        return self


class Embeddings(BaseModel):
    """The vectors, in each format that was asked for."""

    float_: list[list[float]] | None = Field(None, alias="float")
    int8: list[list[int]] | None = None
    uint8: list[list[int]] | None = None
    binary: list[list[int]] | None = None
    ubinary: list[list[int]] | None = None
    base64: list[str] | None = None


class ApiVersion(BaseModel):
    """Always 2."""

    version: Literal["2"]


class BilledUnits(BaseModel):
    """What was embedded."""

    input_tokens: int
    images: int


class Meta(BaseModel):
    """Facts of the reply."""

    api_version: ApiVersion
    billed_units: BilledUnits


class CohereReply(BaseModel):
    """What `POST /v2/embed` answers."""

    id: str
    response_type: Literal["embeddings_by_type"]
    embeddings: Embeddings
    texts: list[str] | None = None
    meta: Meta
    mmemb: list[Mmemb]


class CohereError(BaseModel):
    """The envelope of an error."""

    message: str


def field_of(request: CohereRequest) -> str:
    """Return the field that holds the inputs."""
    return next(name for name in ("texts", "images", "inputs") if getattr(request, name) is not None)


def ask(request: CohereRequest, served: Served) -> Ask:
    """Return what a request asks of the service."""
    served.check_name(request.model)
    served.check_dimensions(request.output_dimension, "output_dimension")
    inputs = _inputs(request)
    served.check_count(inputs, field_of(request))
    document = request.input_type in DOCUMENTS
    return request.ask(inputs, served, document=document, dimensions=request.output_dimension)


def _inputs(request: CohereRequest) -> Sequence[Input]:
    if request.texts is not None:
        return request.texts
    if request.images is not None:
        return [{"images": [Link(url)]} for url in request.images]
    return [input_of(each.content) for each in request.inputs or []]


def answer(request: CohereRequest, result: EncodeResult, served: Served) -> JSON:  # noqa: ARG001 - as every contract
    """Return the reply to a request."""
    details = details_of(result)
    reply = {
        "id": str(uuid.uuid4()),
        "response_type": "embeddings_by_type",
        "embeddings": {name: in_format(result.embeddings, name) for name in request.embedding_types},
        "meta": {
            "api_version": {"version": "2"},
            "billed_units": {
                "input_tokens": sum(detail.prompt_tokens for detail in details),
                "images": _images(request),
            },
        },
        "mmemb": [described(detail, rationale=request.return_rationale) for detail in details],
    }
    return reply | {"texts": request.texts} if request.texts is not None else reply


def in_format(rows: NDArray[Any], name: Format) -> NDArray[Any] | list[str]:
    """Return float32 vectors (rows, dim) of length 1 in one of Cohere's formats."""
    match name:
        case "float":
            return rows
        case "int8":
            return _int8(rows)
        case "uint8":
            return (_int8(rows).astype(np.int16) + 128).astype(np.uint8)
        case "ubinary":
            return np.packbits(rows > 0, axis=1)
        case "binary":
            return (np.packbits(rows > 0, axis=1).astype(np.int16) - 128).astype(np.int8)
        case "base64":
            return [base64_of(row) for row in rows]


def _int8(rows: NDArray[Any]) -> NDArray[np.int8]:
    rounded: NDArray[Any] = np.rint(rows * 127)
    return rounded.astype(np.int8)


def _images(request: CohereRequest) -> int:
    parts = [part for each in request.inputs or [] for part in each.content]
    return len(request.images or []) + sum(isinstance(part, ImagePart) for part in parts)


def refuse(refusal: Refusal) -> JSON:
    """Return the envelope of an error."""
    return {"message": refusal.message}


CONTRACT = Contract(
    name="cohere",
    path="/v2/embed",
    request=CohereRequest,
    reply=CohereReply,
    error=CohereError,
    field=field_of,
    ask=ask,
    answer=answer,
    refuse=refuse,
    status={},
)
