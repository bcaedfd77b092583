"""The description of the interface, and that the server holds to it whatever it is sent."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

POST = ("/v1/embeddings", "/v2/embed", "/v1/multimodalembeddings", "/embed")
SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much]  # to make up, on a machine that is busy
# Nearly all that is drawn for Voyage's contract holds an image, which is none: one body of words is sent beside it.
WORDS = {"/v1/multimodalembeddings": {"inputs": [{"content": [{"type": "text", "text": "seven"}]}]}}
GET = ("/v1/models", "/info", "/health", "/ready", "/metrics", "/openapi.json")


def no_defect(_: Any, response: Any, __: Any) -> None:
    assert response.status_code != 500  # 503 and 504 are answers of a server that is well


# A body that fits the schema may still be refused: a text of blanks, an address that nothing is fetched from.
CHECKS = [
    no_defect,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def description(served: Any) -> Any:
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", POST)
def test_whatever_is_sent_gets_an_answer_that_is_described(description: Any, path: str, mode: GenerationMode) -> None:
    found: set[int] = set()

    @seed(20261129)
    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=SLOW)
    @given(case=description[path]["POST"].as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        found.add(case.call_and_validate(checks=CHECKS, timeout=20).status_code)

    run()
    if mode is GenerationMode.POSITIVE and path in WORDS:
        case = description[path]["POST"].Case(body=WORDS[path], media_type="application/json")
        found.add(case.call_and_validate(checks=CHECKS, timeout=20).status_code)
    assert (200 in found) == (mode is GenerationMode.POSITIVE), found


@pytest.mark.parametrize("path", GET)
def test_what_can_be_looked_at_is_as_described(description: Any, path: str) -> None:
    case = description[path]["GET"].Case()
    assert case.call_and_validate(checks=CHECKS, timeout=20).status_code == 200


def test_it_lists_every_path_with_every_answer(served: Any) -> None:
    found = served.get("/openapi.json").json()
    assert set(found["paths"]) == {*POST, *GET}
    usual = {"200", "400", "401", "404", "408", "413", "415", "500", "503", "504"}
    for path in POST[:-1]:
        assert set(found["paths"][path]["post"]["responses"]) == usual
    of_tei = {"200", "401", "404", "408", "413", "415", "422", "424", "429", "504"}
    assert set(found["paths"]["/embed"]["post"]["responses"]) == of_tei


@pytest.mark.parametrize("path", [*POST, *GET])
def test_another_method_is_405_and_says_which_there_are(served: Any, path: str) -> None:
    answer = served.client.request("DELETE", path)
    assert answer.status_code == 405
    assert ("POST" if path in POST else "GET") in answer.headers["Allow"]
