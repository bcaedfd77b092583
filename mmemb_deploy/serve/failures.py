"""What can be wrong with a request, as one value that every contract puts into its own envelope."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from mmemb_deploy.errors import DeadlineError, InputError, MmembError, OptionError, OverloadError

SHOWN_ERRORS = 10  # of a schema
SHOWN_CHARS = 100  # of a value or a name that a client sent
MESSAGE_CHARS = 2000
CLIENT_GONE = 499  # as nginx logs it; nobody reads that answer


@dataclass(eq=False)
class Refusal(Exception):  # noqa: N818 - what is said, not a fault of this program
    """An answer other than what was asked for, by OpenAI's status codes."""

    status: int
    code: str  # what a program may look at, also the label of metrics
    message: str
    param: str | None = None  # the field that is wrong
    headers: dict[str, str] = field(default_factory=dict[str, str])

    def __str__(self) -> str:
        return self.message


class ClientGoneError(Exception):
    """The client closed its connection before there was an answer."""


def refusal_of(error: Exception, inputs: str, fields: type[BaseModel]) -> Refusal:
    """Return what to answer to an error that a request met.

    `inputs` is the field that holds the request's inputs, `fields` its model: they name the field that is wrong.
    """
    match error:
        case Refusal():
            return error
        case InputError():
            place = None if error.index is None else f"{inputs}[{error.index}]"
            return Refusal(400, "invalid_input", shortened(str(error)), place)
        case OptionError():
            named = str(error).partition(" ")[0]  # they begin with the option's name
            known = named in fields.model_fields
            return Refusal(400, "invalid_option", shortened(str(error)), named if known else None)
        case OverloadError():
            wait = {
                "Retry-After": str(math.ceil(error.retry_after)),
                "retry-after-ms": f"{error.retry_after * 1e3:.0f}",
            }
            return Refusal(503, "overloaded", str(error), headers=wait)
        case DeadlineError():
            return Refusal(504, "deadline_exceeded", str(error), "deadline_ms")
        case MmembError():
            return Refusal(500, "backend_error", shortened(str(error)))
        case HTTPException(status_code=404):
            return Refusal(404, "not_found", "there is nothing at this path: /openapi.json lists what there is")
        case HTTPException():
            code = {405: "method_not_allowed"}.get(error.status_code, "http_error")
            return Refusal(error.status_code, code, error.detail, headers=dict(error.headers or {}))
        case _:
            return Refusal(500, "internal_error", "the server has a defect that its log describes")


def schema_refusal(error: ValidationError, model: type[BaseModel]) -> Refusal:
    """Say what is wrong with a body, naming the fields; at most SHOWN_ERRORS of them, and what it echoes shortened."""
    found = error.errors(include_url=False, include_context=False)
    said = [_said(each, model) for each in found[:SHOWN_ERRORS]]
    if len(found) > SHOWN_ERRORS:
        said.append(f"and {len(found) - SHOWN_ERRORS} more")
    return Refusal(400, "invalid_request", shortened("; ".join(said)), _place(found[0]["loc"]))


def shortened(text: str, limit: int = MESSAGE_CHARS) -> str:
    """Return a text, or its beginning where it is longer than the limit."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _said(error: Any, model: type[BaseModel]) -> str:
    where, value = _place(error["loc"]), error["input"]
    if error["type"] == "extra_forbidden":
        known = model.model_fields if len(error["loc"]) == 1 else ()
        nearest = difflib.get_close_matches(str(where), known, n=1)
        return f"{where} is not known here{f': did you mean {nearest[0]!r}?' if nearest else ', leave it out'}"
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error['msg']}"
    shown = f" is {shown_value(value)}" if isinstance(value, str | int | float | bool | None) else ""
    return f"{where or 'the body'}{shown}: {error['msg']}"


def shown_value(value: object) -> str:
    """Return a short form of a scalar for a message."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"  # Python refuses to print the largest
    return shortened(repr(value[: SHOWN_CHARS + 1] if isinstance(value, str) else value), SHOWN_CHARS)


def _place(loc: tuple[int | str, ...]) -> str | None:
    """Return `input[3].text` of ("input", "<texts>", 3, "text"): tags of unions, in angle brackets, are left out."""
    place = ""
    for part in loc:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not part.startswith("<"):
            place += f".{part}" if place else part
    return shortened(place, SHOWN_CHARS) or None
