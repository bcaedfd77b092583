"""Cohere's contract, by the official client as it is."""

import base64
from collections.abc import Iterator
from typing import Any

import cohere
import numpy as np
import pytest
from cohere.core.api_error import ApiError
from PIL import Image

from mmemb_deploy import Embedder

TEXTS = ["three plus four", "six minus eight times two", "seven"]


@pytest.fixture(scope="module")
def client(served: Any) -> Iterator[cohere.ClientV2]:
    with cohere.ClientV2("a key", base_url=served.url, timeout=30) as client:
        yield client


def floats(reply: Any) -> Any:
    return np.array(reply.embeddings.float_, np.float32)


def test_queries_and_documents_are_those_of_encode(client: cohere.ClientV2, embedder: Embedder) -> None:
    queries, documents = embedder.encode(TEXTS), embedder.encode_document(TEXTS)
    assert not np.allclose(queries, documents)
    for input_type in ("search_query", "classification"):
        assert np.array_equal(floats(client.embed(model="nano", input_type=input_type, texts=TEXTS)), queries)
    for input_type in ("search_document", "clustering", "image"):
        assert np.array_equal(floats(client.embed(model="nano", input_type=input_type, texts=TEXTS)), documents)


def test_a_reply_has_the_contract_s_fields(client: cohere.ClientV2, embedder: Embedder) -> None:
    reply: Any = client.embed(model="nano", input_type="search_query", texts=TEXTS)
    details = embedder.encode_detailed(TEXTS).details
    assert reply.response_type == "embeddings_by_type"
    assert reply.texts == TEXTS
    assert reply.meta.api_version.version == "2"
    assert reply.meta.billed_units.input_tokens == sum(detail.prompt_tokens for detail in details if detail)
    assert [each["route"] for each in reply.mmemb] == [detail.route for detail in details if detail]
    assert reply.embeddings.int8 is None


def test_every_format_is_what_the_floats_say(client: cohere.ClientV2, embedder: Embedder) -> None:
    formats: Any = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    found: Any = client.embed(
        model="nano", input_type="search_query", texts=TEXTS, embedding_types=formats, output_dimension=64
    ).embeddings
    rows = embedder.encode(TEXTS, truncate_dim=64)
    assert np.array_equal(np.array(found.float_, np.float32), rows)
    int8 = embedder.encode(TEXTS, truncate_dim=64, precision="int8")
    ubinary = embedder.encode(TEXTS, truncate_dim=64, precision="ubinary")
    assert np.array_equal(found.int8, int8)
    assert np.array_equal(found.uint8, int8.astype(int) + 128)
    assert np.array_equal(found.ubinary, ubinary)
    assert np.array_equal(found.binary, ubinary.astype(int) - 128)
    assert found.ubinary[0][0] >> 7 == int(rows[0, 0] > 0)
    assert np.array_equal([np.frombuffer(base64.b64decode(row), "<f4") for row in found.base64], rows)


def test_images_alone_and_with_text(
    client: cohere.ClientV2, embedder: Embedder, data_uri: str, picture: Image.Image
) -> None:
    reply: Any = client.embed(model="nano", input_type="image", images=[data_uri])
    assert np.array_equal(floats(reply), embedder.encode_document([{"image": picture}]))
    assert (reply.texts, reply.meta.billed_units.images) == (None, 1)
    content: Any = [
        {"content": [{"type": "image_url", "image_url": {"url": data_uri}}, {"type": "text", "text": "what is it?"}]},
        {"content": [{"type": "text", "text": "seven"}]},
    ]
    reply = client.embed(model="nano", input_type="search_query", inputs=content)
    assert np.array_equal(floats(reply), embedder.encode([{"image": picture, "text": "what is it?"}, "seven"]))


def test_inputs_that_fit_are_embedded_whatever_truncate_says(client: cohere.ClientV2, embedder: Embedder) -> None:
    expected = embedder.encode(["seven"])
    for truncate in ("NONE", "START", "END"):
        reply = client.embed(model="nano", input_type="search_query", texts=["seven"], truncate=truncate)
        assert np.array_equal(floats(reply), expected)
        with pytest.raises(cohere.BadRequestError, match="above the limit"):
            client.embed(model="nano", input_type="search_query", texts=["a " * 50_000], truncate=truncate)


def test_more_than_cohere_takes_are_embedded_up_to_the_server_s_own_limit(client: cohere.ClientV2, serve: Any) -> None:
    texts = ["seven"] * 97
    for asked in ({"texts": texts}, {"inputs": [{"content": [{"type": "text", "text": text}]} for text in texts]}):
        given: Any = asked
        assert floats(client.embed(model="nano", input_type="search_document", **given)).shape == (97, 128)
    with (
        serve(max_inputs=96) as small,
        cohere.ClientV2("a key", base_url=small.url) as other,
        pytest.raises(cohere.BadRequestError, match="texts has 97 inputs: pass 1 to 96, this server's --max-inputs"),
    ):
        other.embed(model="nano", input_type="search_document", texts=texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": None}, "exactly one of 'texts', 'images' and 'inputs'"),
        ({"images": ["data:image/png;base64,AAAA"]}, "exactly one of"),
        ({"texts": []}, "at least 1 item"),
        ({"texts": ["a", ""]}, "texts[1] is ''"),
        ({"input_type": "query"}, "'search_document', 'search_query'"),
        ({"output_dimension": 100}, "trained for 128, 64"),
        ({"embedding_types": ["float16"]}, "embedding_types[0]"),
        ({"embedding_types": []}, "at least 1 item"),
        ({"texts": None, "images": ["https://example.org/a.png"]}, "this server fetches nothing"),
    ],
)
def test_what_cannot_be_embedded_is_refused(client: cohere.ClientV2, change: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"model": "nano", "input_type": "search_query", "texts": ["seven"], **change}
    with pytest.raises(cohere.BadRequestError) as caught:
        client.embed(**{name: value for name, value in asked.items() if value is not None})
    assert message in str(caught.value.body)
    assert caught.value.body.keys() == {"message"}


def test_another_model_is_not_found(client: cohere.ClientV2) -> None:
    with pytest.raises(ApiError) as caught:
        client.embed(model="embed-v4.0", input_type="search_query", texts=["a"])
    assert caught.value.status_code == 404
