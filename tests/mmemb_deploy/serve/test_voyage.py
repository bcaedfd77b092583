"""Voyage's contract, as its official client asks and reads."""

import base64
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmemb_deploy import Embedder

ROUTE = "/v1/multimodalembeddings"
TEXTS = ["three plus four", "seven"]
ABSENT = {"input_type": None, "truncation": True, "output_dtype": None, "output_dimension": None}


def words(text: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text}]}


def asked(served: Any, inputs: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    answer = served.post(ROUTE, {"inputs": inputs, "model": "nano", **ABSENT, **options})
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


def vectors(reply: dict[str, Any], dtype: str | None = None) -> Any:
    """Return the vectors, of the bytes of this type where they are packed."""
    rows = [entry["embedding"] for entry in reply["data"]]
    return (
        np.array(rows, np.float32) if dtype is None else [np.frombuffer(base64.b64decode(row), dtype) for row in rows]
    )


def test_queries_and_documents_are_those_of_encode(served: Any, embedder: Embedder) -> None:
    inputs = [words(text) for text in TEXTS]
    for input_type in (None, "query"):
        assert np.array_equal(vectors(asked(served, inputs, input_type=input_type)), embedder.encode(TEXTS))
    documents = embedder.encode_document(TEXTS)
    assert np.array_equal(vectors(asked(served, inputs, input_type="document")), documents)


def test_a_reply_has_the_contract_s_fields(served: Any, embedder: Embedder) -> None:
    reply = asked(served, [words(text) for text in TEXTS])
    details = [detail for detail in embedder.encode_detailed(TEXTS).details if detail]
    prompt = sum(detail.prompt_tokens for detail in details)
    total = prompt + sum(detail.rationale_tokens for detail in details)
    assert total > prompt
    assert (reply["object"], reply["model"]) == ("list", "nano")
    assert [(each["object"], each["index"]) for each in reply["data"]] == [("embedding", 0), ("embedding", 1)]
    assert [each["mmemb"]["route"] for each in reply["data"]] == [detail.route for detail in details]
    assert reply["usage"] == {"text_tokens": prompt, "image_pixels": 0, "video_pixels": 0, "total_tokens": total}


def test_images_by_both_forms_alone_and_with_text(
    served: Any, embedder: Embedder, data_uri: str, picture: Image.Image
) -> None:
    inputs = [
        {"content": [{"type": "image_base64", "image_base64": data_uri}]},
        {"content": [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": data_uri}]},
        words("seven"),
    ]
    reply = asked(served, inputs, input_type="document")
    expected = embedder.encode_document([{"image": picture}, {"image": picture, "text": "what is it?"}, "seven"])
    assert np.array_equal(vectors(reply), expected)
    rows = [embedder.encode_detailed([{"image": picture}], reasoning="never").details[0]]
    (row,) = [detail for detail in rows if detail]
    side = embedder.manifest.vision.factor
    assert row.visual_tokens > 0
    assert reply["usage"]["image_pixels"] == 2 * row.visual_tokens * side * side
    assert reply["usage"]["text_tokens"] + 2 * row.visual_tokens == reply["usage"]["total_tokens"]


@pytest.mark.parametrize("dtype", ["float", "int8", "uint8", "binary", "ubinary"])
def test_every_type_is_what_the_floats_say_packed_or_not(served: Any, embedder: Embedder, dtype: str) -> None:
    inputs = [words(text) for text in TEXTS]
    plain = asked(served, inputs, output_dtype=dtype, output_dimension=64)
    packed = asked(served, inputs, output_dtype=dtype, output_dimension=64, encoding_format="base64")
    precision: Any = {"float": "float32", "uint8": "int8", "binary": "ubinary"}.get(dtype, dtype)
    rows = embedder.encode(TEXTS, truncate_dim=64, precision=precision)
    shift = {"uint8": 128, "binary": -128}.get(dtype)
    expected = rows if shift is None else rows.astype(int) + shift
    assert np.array_equal(vectors(plain), expected)
    read = {"float": "<f4", "binary": "i1", "ubinary": "u1"}.get(dtype, dtype)
    assert np.array_equal(vectors(packed, read), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": []}, "at least 1 item"),
        ({"inputs": [{"content": []}]}, "inputs[0].content"),
        ({"inputs": [words("a"), words(" ")]}, "input 1: there is nothing to embed"),
        ({"inputs": ["a"]}, "inputs[0]"),
        ({"inputs": [{"content": [{"type": "image", "image": "a"}]}]}, "'text' or 'image_url' or 'image_base64'"),
        ({"inputs": [{"content": [{"type": "video_base64", "video_base64": "a"}]}]}, "send frames"),
        ({"inputs": [{"content": [{"type": "image_base64", "image_base64": "http://a/b.png"}]}]}, "^data:"),
        ({"inputs": [{"content": [{"type": "image_url", "image_url": "http://a/b.png"}]}]}, "fetches nothing"),
        ({"inputs": [words("a " * 50_000)]}, "above the limit"),
        ({"input_type": "passage"}, "'query' or 'document'"),
        ({"output_dimension": 100}, "trained for 128, 64"),
        ({"output_dtype": "float16"}, "output_dtype"),
        ({"encoding_format": "float"}, "encoding_format"),
        ({"output_type": "int8"}, "did you mean 'output_dtype'"),
    ],
)
def test_what_cannot_be_embedded_is_refused(served: Any, change: dict[str, Any], message: str) -> None:
    answer = served.post(ROUTE, {"inputs": [words("seven")], "model": "nano", **change})
    assert answer.status_code == 400
    assert answer.json().keys() == {"detail"}
    assert message in answer.json()["detail"]


def test_another_model_is_not_found(served: Any) -> None:
    answer = served.post(ROUTE, {"inputs": [words("seven")], "model": "voyage-multimodal-3"})
    assert (answer.status_code, answer.json().keys()) == (404, {"detail"})
