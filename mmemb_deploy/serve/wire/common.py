"""What the contracts share: the parts of an input, our own fields, and what a result says of its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from mmemb_deploy.errors import InputError
from mmemb_deploy.inputs.prompts import PATH_MARKERS
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.preparer import Preparer
from mmemb_deploy.results import Detail, EncodeResult
from mmemb_deploy.serve.ask import Ask
from mmemb_deploy.serve.failures import Refusal
from mmemb_deploy.serve.media import Link

Input = str | dict[str, Any]  # a text, or its "text" and its "images" as Links
JSON = dict[str, Any]


class Strict(BaseModel):
    """A part of a request: a field that is not known, or of another type, is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True, kw_only=True)
class Served:
    """The model that is served, as the contracts describe it."""

    preparer: Preparer
    names: tuple[str, ...]  # by which requests may call it
    max_inputs: int  # of one request
    max_waiting_rows: int
    digest: str | None  # of the bundle

    @property
    def max_input_tokens(self) -> int:
        """Tokens of the longest input, beside a rationale."""
        manifest = self.preparer.manifest
        return manifest.batch.row_tokens - manifest.model.max_rationale_tokens - PATH_MARKERS

    def check_name(self, model: str | None) -> None:
        """Raise Refusal (404) unless the model that a request names is served here."""
        if model is not None and model not in self.names:
            message = f"there is no model of this name: this server has {', '.join(self.names)}"
            raise Refusal(404, "model_not_found", message, "model")

    def check_count(self, inputs: Sequence[object], field: str) -> None:
        """Raise Refusal unless there is an input, and not more of them than one request may hold."""
        if not 0 < len(inputs) <= self.max_inputs:
            message = f"{field} has {len(inputs)} inputs: pass 1 to {self.max_inputs}, this server's --max-inputs"
            raise Refusal(400, "invalid_request", message, field)

    def check_dimensions(self, dimensions: int | None, field: str) -> None:
        """Raise Refusal unless embeddings can be had in this size."""
        dims = self.preparer.manifest.model.dims
        if dimensions is not None and dimensions not in dims:
            message = f"{field} is {dimensions}: this model was trained for {', '.join(map(str, dims))}"
            raise Refusal(400, "invalid_request", message, field)

    def text_of(self, ids: Sequence[int], index: int) -> str:
        """Return the text that the tokenizer turns into just these ids. Raises InputError where there is none."""
        prompt = self.preparer.encoder.prompt
        known = prompt.tokenizer.get_vocab_size()
        for token in ids:
            if not 0 <= token < known:
                raise InputError(f"{token} is no token id: they lie in 0..{known - 1}", index=index)
        text = prompt.decode(ids)
        if prompt.tokenize(text) != list(ids):
            raise InputError(
                "no text becomes just these token ids (markers among them, or another model's): send the text",
                index=index,
            )
        return text


def exactly_one(*fields: str) -> ConfigDict:
    """Describe in a model's schema that one of these fields is given, and the others are absent or null."""
    absent: JSON = {"type": "null"}
    forms: list[Any] = [
        {"required": [name], "properties": {each: {"not": absent} if each == name else absent for each in fields}}
        for name in fields
    ]
    return ConfigDict(json_schema_extra={"oneOf": forms})


class Wishes(Strict):
    """Fields of ours, which every contract takes beside its own."""

    reasoning: Literal["auto", "never", "always"] | None = Field(
        None, description='Whether inputs reason; "auto" lets the gate decide. For documents the default is "never".'
    )
    threshold: float | None = Field(None, ge=0, le=1, description="Gate score from which an input reasons.")
    reasoning_rate: float | None = Field(
        None, ge=0, le=1, description="Share of this request's inputs that reason, in place of a threshold."
    )
    max_rationale_tokens: int | None = Field(None, ge=0, le=2**31, description="Tokens after which one is closed.")
    instruction: str | None = Field(None, description="What to embed for; the bundle's own by default.")
    priority: int = Field(0, ge=-(2**31), le=2**31, description="Lower is served first.")
    deadline_ms: float | None = Field(
        None, ge=1, le=3.6e6, allow_inf_nan=False, description="Answer within so many milliseconds, or 504."
    )
    on_overload: Literal["direct", "reject", "wait"] = Field(
        "direct", description='Under load: embed without reasoning ("direct"), refuse, or wait.'
    )
    return_rationale: bool = Field(False, description="Whether the reply holds the rationales.")

    def ask(
        self,
        inputs: Sequence[Input],
        served: Served,
        *,
        document: bool,
        dimensions: int | None,
        instruction: str | None = None,
    ) -> Ask:
        """Return what is asked of the service for these inputs, embedded as queries or as documents."""
        options: EncodeOptions = {}
        if document:
            options |= served.preparer.document_options
        own = {name: getattr(self, name) for name in ("reasoning", "threshold", "reasoning_rate")}
        own |= {"max_rationale_tokens": self.max_rationale_tokens, "truncate_dim": dimensions}
        own |= {"instruction": self.instruction if instruction is None else instruction}
        options |= cast("EncodeOptions", {name: value for name, value in own.items() if value is not None})
        return Ask(
            inputs=inputs,
            options=options,
            priority=self.priority,
            deadline=None if self.deadline_ms is None else self.deadline_ms / 1000,
            on_overload=self.on_overload,
        )


def still(part: Any) -> Any:
    """Return a part as it is. Raises PydanticCustomError for one of a video."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("video_url", "video", "video_base64"):
        raise PydanticCustomError("video", "video files are not read here: send frames as image_url parts")
    return part


class Address(Strict):
    """Where an image is."""

    url: str = Field(min_length=1, description="A data URI, or an address of a host that the server allows.")
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Has no effect: images keep their size.")


class TextPart(Strict):
    """Words."""

    type: Literal["text"]
    text: str


class ImagePart(Strict):
    """An image."""

    type: Literal["image_url"]
    image_url: Address

    @property
    def url(self) -> str:
        """Return where the image is."""
        return self.image_url.url


def by_type(*kinds: str) -> Discriminator:
    """Choose among the parts tagged with these kinds, in angle brackets, by a part's `type`."""

    def tag(part: Any) -> str | None:
        kind = part.get("type") if isinstance(part, dict) else None
        return f"<{kind}>" if kind in kinds else None

    message = f"a part is an object of the type {' or '.join(map(repr, kinds))}"
    return Discriminator(tag, custom_error_type="part", custom_error_message=message)


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    by_type("text", "image_url"),
    BeforeValidator(still),
]
Parts = Annotated[list[Part], Field(min_length=1, fail_fast=True)]


class Picture(Protocol):
    """A part that is an image, in whichever contract's form."""

    @property
    def url(self) -> str:
        """Return where it is: a data URI, or an address of the web."""
        ...


def input_of(parts: Sequence[TextPart | Picture]) -> Input:
    """Return the input that parts make: its images in their order, and its texts as lines of one text."""
    text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
    images = [Link(part.url) for part in parts if not isinstance(part, TextPart)]
    return {"text": text, "images": images} if images else text


def details_of(result: EncodeResult) -> list[Detail]:
    """Return what is known of every row: one that failed would have raised."""
    return [detail for detail in result.details if detail is not None]


class Mmemb(BaseModel):
    """How an input was embedded: a field of ours in every contract's reply."""

    route: Literal["fast", "reason"]
    gate_score: float | None = Field(description="Probability that reasoning pays; null in a bundle without a gate.")
    threshold_used: float | None = Field(description="What the score was held against; null where nothing was.")
    degraded_by: Literal["load", "deadline", "memory"] | None = Field(description="What took reasoning away from it.")
    rationale: str | None = Field(None, description="Where return_rationale asked for it, and the input reasoned.")


def described(detail: Detail, *, rationale: bool) -> JSON:
    """Return an Mmemb as JSON."""
    said: JSON = {
        "route": detail.route.value,
        "gate_score": None if math.isnan(detail.gate_score) else detail.gate_score,
        "threshold_used": detail.threshold,
        "degraded_by": detail.degraded_by,
    }
    return said | {"rationale": detail.rationale} if rationale and detail.rationale is not None else said


@dataclass(frozen=True, kw_only=True)
class Contract:
    """One way to ask for embeddings: models for the description, and pure functions for the work."""

    name: str
    path: str
    request: type[BaseModel]
    reply: Any  # the type of the reply
    error: type[BaseModel]  # the envelope of an error
    field: Callable[[Any], str]  # of a request: the one that holds its inputs
    ask: Callable[[Any, Served], Ask]
    answer: Callable[[Any, EncodeResult, Served], Any]  # JSON, whose rows may be numpy arrays
    refuse: Callable[[Refusal], JSON]
    status: Mapping[int, int]  # where its status codes are not OpenAI's
    headers: Callable[[EncodeResult, float], dict[str, str]] = lambda _, __: {}  # of a reply, by its seconds
