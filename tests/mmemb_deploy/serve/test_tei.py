"""The contract of text-embeddings-inference."""

from typing import Any

import numpy as np
import pytest

import mmemb_deploy
from mmemb_deploy import Embedder

TEXTS = ["three plus four", "six minus eight times two"]


def test_embed_answers_the_bare_vectors_of_encode(served: Any, embedder: Embedder) -> None:
    answer = served.post("/embed", {"inputs": TEXTS})
    assert np.array_equal(np.array(answer.json(), np.float32), embedder.encode(TEXTS))
    one = served.post("/embed", {"inputs": TEXTS[0], "dimensions": 64, "truncate": True, "normalize": True})
    assert np.array_equal(np.array(one.json(), np.float32), embedder.encode(TEXTS[:1], truncate_dim=64))
    document = served.post("/embed", {"inputs": TEXTS, "prompt_name": "document"})
    assert np.array_equal(np.array(document.json(), np.float32), embedder.encode_document(TEXTS))
    ids = [embedder.encoder.prompt.tokenize(each) for each in TEXTS]
    assert served.post("/embed", {"inputs": ids}).json() == answer.json()


def test_headers_say_what_it_took(served: Any, embedder: Embedder) -> None:
    headers = served.post("/embed", {"inputs": TEXTS}).headers
    details = [detail for detail in embedder.encode_detailed(TEXTS).details if detail]
    assert int(headers["x-compute-tokens"]) == sum(each.prompt_tokens + each.rationale_tokens for each in details)
    times = {name: int(headers[f"x-{name}-time"]) for name in ("total", "tokenization", "queue", "inference")}
    parts = times["tokenization"] + times["queue"] + times["inference"]
    assert abs(times["total"] - parts) <= 2, times  # each is rounded to milliseconds


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": ""}, "at least 1 character"),
        ({"inputs": ["a", " "]}, "input 1: there is nothing to embed"),
        ({"inputs": "a", "normalize": False}, "normalize"),
        ({"inputs": "a", "prompt_name": "passage"}, "'query' or 'document'"),
        ({"inputs": "a", "dimensions": 3}, "trained for 128, 64"),
        ({"inputs": [{"text": "a"}]}, "pass a text"),
        ({}, "Field required"),
    ],
)
def test_what_cannot_be_embedded_is_422(served: Any, body: dict[str, Any], message: str) -> None:
    answer = served.post("/embed", body)
    assert answer.status_code == 422
    assert message in answer.json()["error"]
    assert answer.json()["error_type"] == "Validation"


def test_info_says_what_is_served_and_its_limits(served: Any, embedder: Embedder) -> None:
    info = served.get("/info").json()
    assert (info["model_id"], info["model_sha"], info["version"]) == ("nano", "a digest", mmemb_deploy.__version__)
    assert (info["model_dtype"], info["backend"]) == ("float32", embedder.backend)
    assert (info["max_client_batch_size"], info["auto_truncate"]) == (2048, False)
    too_long = served.post("/embed", {"inputs": "a " * (2 * info["max_input_length"])}).json()
    assert f"above the limit of {info['max_input_length']} " in too_long["error"]
