"""OpenAI's `/v1/embeddings`, with vLLM's messages for inputs of text and images."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from numpy.typing import NDArray
from pydantic import BaseModel, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from mmemb_deploy.results import Detail, EncodeResult
from mmemb_deploy.serve.ask import Ask
from mmemb_deploy.serve.failures import Refusal
from mmemb_deploy.serve.middleware import REQUEST_ID
from mmemb_deploy.serve.wire.common import (
    JSON,
    Contract,
    ImagePart,
    Input,
    Mmemb,
    Parts,
    Served,
    Strict,
    TextPart,
    Wishes,
    described,
    details_of,
    exactly_one,
    input_of,
)

Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


class Message(Strict):
    """One turn: "system" is the instruction, "user" what is embedded, "assistant" may only close, with no words."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("<words>")] | Annotated[Parts, Tag("<parts>")],
        Discriminator(lambda content: "<words>" if isinstance(content, str) else "<parts>"),
    ]


Conversation = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


def kind_of(value: Any) -> str | None:
    """Return which of the forms a value would have, by its first element."""
    if isinstance(value, str):
        return "<text>"
    first: object = value[0] if isinstance(value, list) and value else None
    if isinstance(first, list):
        return "<conversations>" if first and isinstance(first[0], dict) else "<token lists>"
    if isinstance(first, str):
        return "<texts>"
    if isinstance(first, dict):
        return "<conversation>"
    return "<tokens>" if isinstance(first, int) else None


FORMS = "pass a text, a list of texts, token ids, a list of token ids, messages, or a list of messages"
Inputs = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag("<token lists>")]
    | Annotated[Conversation, Tag("<conversation>")]
    | Annotated[list[Conversation], Field(min_length=1, fail_fast=True), Tag("<conversations>")],
    Discriminator(kind_of, custom_error_type="input_form", custom_error_message=FORMS),
]
Messages = Annotated[
    Annotated[Conversation, Tag("<conversation>")]
    | Annotated[list[Conversation], Field(min_length=1, fail_fast=True), Tag("<conversations>")],
    Discriminator(kind_of, custom_error_type="input_form", custom_error_message="pass messages, or a list of messages"),
]


class OpenAIRequest(Wishes):
    """A body of `POST /v1/embeddings`; exactly one of `input` and `messages`."""

    model_config = exactly_one("input", "messages")

    input: Inputs | None = Field(None, description="Texts, token ids of this model, or messages.")
    messages: Messages | None = Field(None, description="One conversation makes one vector; a list of them, a batch.")
    model: str | None = Field(None, description="A name of /v1/models.")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64 is of little-endian float32; the official client asks for it by itself."
    )
    dimensions: int | None = Field(None, ge=1, description="Leading values to keep: a size the model was trained for.")
    input_type: Literal["query", "document"] = Field("query", description="Which side of a search the inputs are.")
    user: str | None = Field(None, description="Has no effect, and is not kept.")
    truncate_prompt_tokens: Literal[-1] | None = Field(
        None, description="-1 or nothing: inputs are never cut, one that is too long is refused."
    )
    request_id: str | None = Field(
        None, pattern=REQUEST_ID.pattern, description="The answer's X-Request-ID, and in the log."
    )
    add_special_tokens: Literal[True] | None = Field(None, description="The bundle's own layout always has them.")
    continue_final_message: Literal[True] | None = Field(None, description="The bundle's own layout always does.")

    @model_validator(mode="after")
    def _one_of_both(self) -> OpenAIRequest:
        if (self.input is None) == (self.messages is None):
            raise PydanticCustomError("one_of", "pass exactly one of 'input' and 'messages'")
        return self


class Usage(BaseModel):
    """Tokens of the prompts, and those of the rationales with them."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """One vector, and how it came about."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    mmemb: Mmemb


class OpenAIReply(BaseModel):
    """What `POST /v1/embeddings` answers."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class ErrorBody(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """The envelope of an error."""

    error: ErrorBody


def field_of(request: OpenAIRequest) -> str:
    """Return the field that holds the inputs."""
    return "input" if request.messages is None else "messages"


def ask(request: OpenAIRequest, served: Served) -> Ask:
    """Return what a request asks of the service."""
    served.check_name(request.model)
    served.check_dimensions(request.dimensions, "dimensions")
    given: Any = request.input if request.messages is None else request.messages
    inputs, instruction = _inputs(given, request.instruction, served, field_of(request))
    document = request.input_type == "document"
    return request.ask(inputs, served, document=document, dimensions=request.dimensions, instruction=instruction)


def _inputs(given: Any, instruction: str | None, served: Served, field: str) -> tuple[Sequence[Input], str | None]:
    batch: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int | Message) else given
    served.check_count(batch, field)
    first = batch[0]
    if isinstance(first, str):
        return batch, instruction
    if isinstance(first[0], int):
        return [served.text_of(ids, index) for index, ids in enumerate(batch)], instruction
    asked = [_conversation(messages, field) for messages in batch]
    said = {system for _, system in asked}
    if len(said) > 1:
        raise Refusal(400, "invalid_request", "the system messages of one request differ: send one request each", field)
    (system,) = said
    if system is not None and instruction is not None:
        raise Refusal(
            400, "invalid_request", "instruction and a system message are both given: keep one", "instruction"
        )
    return [each for each, _ in asked], instruction if system is None else system


def _conversation(messages: Sequence[Message], field: str) -> tuple[Input, str | None]:
    """Return the input of one conversation and its instruction. Raises Refusal for one of another shape."""
    roles = [message.role for message in messages]
    system = messages[0] if roles[0] == "system" else None
    rest = messages[1:] if system is not None else messages
    if [message.role for message in rest] not in (["user"], ["user", "assistant"]):
        message = f"{field} has the roles {', '.join(roles[:5])}: pass a system message or none, then one of the user"
        raise Refusal(400, "invalid_request", message, field)
    if any(not isinstance(part, TextPart) or part.text for part in _parts(rest[1:])):
        raise Refusal(400, "invalid_request", f"{field} ends with words of the assistant: leave them out", field)
    if any(isinstance(part, ImagePart) for part in _parts([] if system is None else [system])):
        raise Refusal(
            400, "invalid_request", f"{field} has an image in a system message: put it into the user's", field
        )
    return input_of(_parts(rest[:1])), None if system is None else str(input_of(_parts([system])))


def _parts(messages: Sequence[Message]) -> list[TextPart | ImagePart]:
    return [
        part
        for message in messages
        for part in (
            [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        )
    ]


def answer(request: OpenAIRequest, result: EncodeResult, served: Served) -> JSON:
    """Return the reply to a request."""
    details = details_of(result)
    prompt = sum(detail.prompt_tokens for detail in details)
    return {
        "object": "list",
        "data": listed(
            result.embeddings, details, packed=request.encoding_format == "base64", rationale=request.return_rationale
        ),
        "model": served.names[0],
        "usage": {"prompt_tokens": prompt, "total_tokens": prompt + sum(each.rationale_tokens for each in details)},
    }


def listed(rows: NDArray[Any], details: Sequence[Detail], *, packed: bool, rationale: bool) -> list[JSON]:
    """Return vectors (rows, dim) as Embeddings in JSON, `packed` in base64."""
    return [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64_of(row) if packed else row,
            "mmemb": described(detail, rationale=rationale),
        }
        for index, (row, detail) in enumerate(zip(rows, details, strict=True))
    ]


def base64_of(row: NDArray[Any]) -> str:
    """Return a vector's bytes, little-endian, in base64."""
    return base64.b64encode(row.astype(row.dtype.newbyteorder("<"), copy=False).tobytes()).decode("ascii")


def refuse(refusal: Refusal) -> JSON:
    """Return the envelope of an error."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}


CONTRACT = Contract(
    name="openai",
    path="/v1/embeddings",
    request=OpenAIRequest,
    reply=OpenAIReply,
    error=OpenAIError,
    field=field_of,
    ask=ask,
    answer=answer,
    refuse=refuse,
    status={},
)
