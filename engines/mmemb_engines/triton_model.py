"""What Triton's Python backend runs: an Embedder that answers the requests which Triton's queue gathered, in one call.

A request holds N inputs: TEXT and IMAGE (encoded bytes), (N, 1) each. Either may be left out; so may one of a row, by
no bytes. Triton only gathers requests that name the same tensors, so clients which mix texts and images send both.
Its parameters are PARAMETERS. The answer holds EMBEDDING (N, D), float32, ROUTE, GATE_SCORE and RATIONALE, (N, 1) each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import InputError, MmembError, OptionError, check_known
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.results import EncodeResult

TEXT, IMAGE = "TEXT", "IMAGE"
EMBEDDING, ROUTE, GATE_SCORE, RATIONALE = "EMBEDDING", "ROUTE", "GATE_SCORE", "RATIONALE"
PARAMETERS: Final = ("document", "reasoning", "threshold")  # whether to embed as what is searched; as of `encode`
BUNDLE: Final = "bundle"  # its folder, beside model.py


@dataclass(frozen=True)
class Asked:
    """A request, read: `request` is its place in the batch."""

    request: int
    inputs: list[dict[str, Any]]
    options: EncodeOptions


class TritonPythonModel:
    """Made, asked and ended by Triton, which knows it by this name."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle, and run what it will be asked for; Triton calls the model ready after that."""
        self._triton: Any = import_module("triton_python_backend_utils")
        device = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else 0
        config = json.loads(args["model_config"])
        self._rows: int = config["max_batch_size"]
        bundle = Path(args["model_repository"], args["model_version"], BUNDLE)
        backend: str = config["parameters"]["backend"]["string_value"]
        self._embedder = Embedder.load(bundle, backend=backend, device=device)
        for reasoning in ("never", "always") if self._embedder.reasons else ("never",):
            self._embedder.encode(["ready"], reasoning=reasoning)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests in their order: one call for all of the same options, and an error where it belongs."""
        answers: dict[int, Any] = {}
        gathered: dict[str, list[Asked]] = {}
        for place, request in enumerate(requests):
            try:
                asked = Asked(place, _inputs(self._triton, request), self._options(json.loads(request.parameters())))
            except (InputError, OptionError) as error:
                answers[place] = self._refused(error)
            else:
                gathered.setdefault(repr(sorted(asked.options.items())), []).append(asked)
        for group in gathered.values():
            try:
                answers |= self._answers(group)
            except MmembError as error:  # an option that the bundle does not know, or an engine that failed
                answers |= {asked.request: self._refused(error) for asked in group}
        return [answers[place] for place in range(len(requests))]

    def finalize(self) -> None:
        """Let go of the engines."""
        del self._embedder

    def _options(self, parameters: Mapping[str, Any]) -> EncodeOptions:
        for name in parameters:
            check_known("parameter", name, PARAMETERS)
        document, threshold = parameters.get("document", False), parameters.get("threshold")
        if not isinstance(document, bool):
            raise OptionError(f"document is {document!r}: pass true or false")
        if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, int | float)):
            raise OptionError(f"threshold is {threshold!r}: pass a number")
        options: EncodeOptions = {"batch_size": self._rows}
        if document:
            options = {**options, **self._embedder.document_options}
        if "reasoning" in parameters:
            options["reasoning"] = str(parameters["reasoning"])
        if threshold is not None:
            options["threshold"] = float(threshold)
        return options

    def _answers(self, group: Sequence[Asked]) -> dict[int, Any]:
        inputs = [content for asked in group for content in asked.inputs]
        result = self._embedder.encode_detailed(inputs, errors="return", **group[0].options)
        failed = {error.index: error for error in result.errors}
        answers: dict[int, Any] = {}
        start = 0
        for asked in group:
            rows = range(start, start + len(asked.inputs))
            start = rows.stop
            wrong = [failed[row].at(row - rows.start) for row in rows if row in failed]
            if wrong:
                answers[asked.request] = self._refused(*wrong)
            else:
                tensors = [self._triton.Tensor(name, array) for name, array in _outputs(result, rows).items()]
                answers[asked.request] = self._triton.InferenceResponse(output_tensors=tensors)
        return answers

    def _refused(self, *errors: MmembError) -> Any:
        triton = self._triton
        asked_wrongly = isinstance(errors[0], InputError | OptionError)
        code = triton.TritonError.INVALID_ARG if asked_wrongly else triton.TritonError.INTERNAL
        return triton.InferenceResponse(error=triton.TritonError("; ".join(map(str, errors)), code))


def _inputs(triton: Any, request: Any) -> list[dict[str, Any]]:
    """Return a request's rows as `encode` takes them. Raises InputError for a text that is not UTF-8, or no tensor."""
    found = {name: triton.get_input_tensor_by_name(request, name) for name in (TEXT, IMAGE)}
    columns = {name: tensor.as_numpy().ravel().tolist() for name, tensor in found.items() if tensor is not None}
    if not columns:
        raise InputError(f"there is nothing to embed: pass {TEXT}, {IMAGE} or both")
    texts, images = columns.get(TEXT), columns.get(IMAGE)
    rows = len(texts if texts is not None else columns[IMAGE])
    return [
        {
            **({"text": _text(texts[row], row)} if texts and texts[row] else {}),
            **({"image": images[row]} if images and images[row] else {}),
        }
        for row in range(rows)
    ]


def _text(content: bytes, row: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{TEXT} is not UTF-8 ({error}): encode the text so", index=row) from error


def _outputs(result: EncodeResult, rows: range) -> dict[str, NDArray[Any]]:
    details = [detail for detail in result.details[rows.start : rows.stop] if detail is not None]

    def column(values: Sequence[Any], dtype: Any) -> NDArray[Any]:
        return np.array(values, dtype).reshape(-1, 1)

    return {
        EMBEDDING: result.embeddings[rows.start : rows.stop],
        ROUTE: column([str(detail.route).encode() for detail in details], object),
        GATE_SCORE: column([detail.gate_score for detail in details], np.float32),
        RATIONALE: column([(detail.rationale or "").encode() for detail in details], object),
    }
