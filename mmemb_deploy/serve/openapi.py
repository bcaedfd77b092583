"""The description of the interface, OpenAPI 3.1, made of the contracts' own models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode, models_json_schema

import mmemb_deploy
from mmemb_deploy.serve.wire import openai, tei
from mmemb_deploy.serve.wire.common import Contract, Served

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/openapi.json"})  # answered without a key
JSON = dict[str, Any]
REFUSALS = {
    400: "The request is malformed, or an input cannot be embedded.",
    401: "The key is missing or wrong.",
    404: "There is no model of this name.",
    408: "The body did not arrive in time.",
    413: "The body or an image is too large.",
    415: "The body is not application/json.",
    500: "The engine failed.",
    503: "There is no room for the request now.",
    504: "The deadline passed before there was an answer.",
}
RETRY = {
    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}},
    "retry-after-ms": {"description": "Milliseconds.", "schema": {"type": "integer"}},
}


class Status(BaseModel):
    """All is well."""

    status: Literal["ok"]


class ServedModel(BaseModel):
    """A name by which requests may call the model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class Models(BaseModel):
    """What `GET /v1/models` answers."""

    object: Literal["list"]
    data: list[ServedModel]


def document(contracts: Sequence[Contract], served: Served, *, locked: bool) -> JSON:
    """Return the description; `locked` where a key is needed."""
    inputs = [each.request for each in contracts]
    outputs: list[type[BaseModel]] = [Status, Models, tei.TeiInfo, *(each.error for each in contracts)]
    outputs += [each.reply for each in contracts if isinstance(each.reply, type) and issubclass(each.reply, BaseModel)]
    modes: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in inputs]
    modes.extend((model, "serialization") for model in outputs)
    named, definitions = models_json_schema(modes, ref_template="#/components/schemas/{model}")
    refs = {model: schema for (model, _), schema in named.items()}
    for model in inputs:
        _narrow(definitions["$defs"][model.__name__]["properties"], served)
    paths: JSON = {each.path: {"post": _post(each, refs)} for each in contracts}
    paths |= {
        "/v1/models": _get("The models that are served.", refs[Models]),
        "/info": _get("Facts of the model and of the limits.", refs[tei.TeiInfo]),
        "/health": _get("Whether the engine lives.", refs[Status], refs[openai.OpenAIError]),
        "/ready": _get("Whether requests are accepted.", refs[Status], refs[openai.OpenAIError]),
        "/metrics": _get("Metrics for Prometheus.", {"type": "string"}, media_type="text/plain"),
        "/openapi.json": _get("This description.", {"type": "object"}),
    }
    described: JSON = {
        "openapi": "3.1.0",
        "info": {
            "title": f"mmemb serve: {served.names[0]}",
            "version": mmemb_deploy.__version__,
            "description": "Embeddings of text and images, reasoning only where it helps.",
        },
        "paths": paths,
        "components": {"schemas": definitions["$defs"]},
    }
    if locked:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in paths.items():
            for operation in methods.values() if path not in OPEN_PATHS else ():
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = _answer(REFUSALS[401], refs[openai.OpenAIError])
    return described


def _narrow(properties: JSON, served: Served) -> None:
    """List the values that this server's model takes, where a contract alone would take any."""
    dims = served.preparer.manifest.model.dims
    for name, values in {"model": served.names, "dimensions": dims, "output_dimension": dims}.items():
        if name in properties:
            properties[name]["anyOf"][0]["enum"] = list(values)


def _post(contract: Contract, refs: dict[Any, JSON]) -> JSON:
    reply = refs.get(contract.reply) or TypeAdapter(contract.reply).json_schema()
    responses = {"200": _answer("The embeddings.", reply)}
    for usual, says in REFUSALS.items():
        status = contract.status.get(usual, usual)
        answer = _answer(says, refs[contract.error])
        responses[str(status)] = answer | {"headers": RETRY} if status in (429, 503) else answer
    return {
        "operationId": f"embed_{contract.name}",
        "summary": (contract.request.__doc__ or "").strip(),
        "requestBody": {"required": True, "content": {"application/json": {"schema": refs[contract.request]}}},
        "responses": responses,
    }


def _get(says: str, schema: JSON, unready: JSON | None = None, media_type: str = "application/json") -> JSON:
    responses = {"200": _answer(says, schema, media_type)}
    if unready is not None:
        responses["503"] = _answer("It is not so.", unready)
    return {"get": {"summary": says, "responses": responses}}


def _answer(says: str, schema: JSON, media_type: str = "application/json") -> JSON:
    return {"description": says, "content": {media_type: {"schema": schema}}}
