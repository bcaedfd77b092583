"""Voyage's `/v1/multimodalembeddings`: inputs of texts and images, in one number format."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, Tag

from mmemb_deploy.results import EncodeResult
from mmemb_deploy.serve.ask import Ask
from mmemb_deploy.serve.failures import Refusal
from mmemb_deploy.serve.wire.cohere import in_format
from mmemb_deploy.serve.wire.common import (
    JSON,
    Contract,
    Served,
    Strict,
    TextPart,
    Wishes,
    by_type,
    details_of,
    input_of,
    still,
)
from mmemb_deploy.serve.wire.openai import Embedding, listed


class ImageUrlPart(Strict):
    """An image, by its address."""

    type: Literal["image_url"]
    image_url: str = Field(min_length=1, description="A data URI, or an address of a host that the server allows.")

    @property
    def url(self) -> str:
        """Return where the image is."""
        return self.image_url


class ImageBase64Part(Strict):
    """An image, as it is."""

    type: Literal["image_base64"]
    image_base64: str = Field(pattern="^data:", description="A data URI.")

    @property
    def url(self) -> str:
        """Return the image as its address."""
        return self.image_base64


VoyagePart = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImageUrlPart, Tag("<image_url>")]
    | Annotated[ImageBase64Part, Tag("<image_base64>")],
    by_type("text", "image_url", "image_base64"),
    BeforeValidator(still),
]


class VoyageInput(Strict):
    """One input of several parts."""

    content: list[VoyagePart] = Field(min_length=1, fail_fast=True)


class VoyageRequest(Wishes):
    """A body of `POST /v1/multimodalembeddings`."""

    inputs: list[VoyageInput] = Field(
        min_length=1,
        fail_fast=True,
        description="As many as the server's --max-inputs, which /info tells; Voyage's own service takes 1,000.",
    )
    model: str | None = Field(None, description="A name of /v1/models.")
    input_type: Literal["query", "document"] | None = Field(
        None, description="Which side of a search the inputs are; null is a query."
    )
    truncation: bool = Field(
        True, description="Inputs are never cut: one that is too long is refused whatever this says."
    )
    output_dimension: int | None = Field(None, ge=1, description="A size that the model was trained for.")
    output_dtype: Literal["float", "int8", "uint8", "binary", "ubinary"] | None = Field(
        None, description="As Cohere's formats of these names; null is float."
    )
    encoding_format: Literal["base64"] | None = Field(
        None, description="base64 is of the vector's bytes; the official client asks for it by itself."
    )


class VoyageUsage(BaseModel):
    """Tokens of the prompts and pixels of the images."""

    text_tokens: int
    image_pixels: int = Field(description="As the model reads the images: after resizing.")
    video_pixels: Literal[0]
    total_tokens: int = Field(description="Of texts, images and rationales: the model's own, not pixels by 560.")


class VoyageReply(BaseModel):
    """What `POST /v1/multimodalembeddings` answers."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: VoyageUsage


class VoyageError(BaseModel):
    """The envelope of an error."""

    detail: str


def ask(request: VoyageRequest, served: Served) -> Ask:
    """Return what a request asks of the service."""
    served.check_name(request.model)
    served.check_dimensions(request.output_dimension, "output_dimension")
    served.check_count(request.inputs, "inputs")
    inputs = [input_of(each.content) for each in request.inputs]
    document = request.input_type == "document"
    return request.ask(inputs, served, document=document, dimensions=request.output_dimension)


def answer(request: VoyageRequest, result: EncodeResult, served: Served) -> JSON:
    """Return the reply to a request."""
    details = details_of(result)
    rows: Any = in_format(result.embeddings, request.output_dtype or "float")
    visual = sum(detail.visual_tokens for detail in details)
    prompt = sum(detail.prompt_tokens for detail in details)
    return {
        "object": "list",
        "data": listed(rows, details, packed=request.encoding_format == "base64", rationale=request.return_rationale),
        "model": served.names[0],
        "usage": {
            "text_tokens": prompt - visual,
            "image_pixels": visual * served.preparer.manifest.vision.factor**2,
            "video_pixels": 0,
            "total_tokens": prompt + sum(detail.rationale_tokens for detail in details),
        },
    }


def refuse(refusal: Refusal) -> JSON:
    """Return the envelope of an error."""
    return {"detail": refusal.message}


CONTRACT = Contract(
    name="voyage",
    path="/v1/multimodalembeddings",
    request=VoyageRequest,
    reply=VoyageReply,
    error=VoyageError,
    field=lambda _: "inputs",
    ask=ask,
    answer=answer,
    refuse=refuse,
    status={},
)
