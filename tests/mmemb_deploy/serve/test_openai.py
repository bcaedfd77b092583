"""OpenAI's contract, by the official client as it is."""

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from mmemb_deploy import Embedder

TEXTS = ["three plus four", "six minus eight times two", "seven"]


@pytest.fixture(scope="module")
def client(served: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none needed", max_retries=0) as client:
        yield client


def vectors_of(reply: Any) -> Any:
    assert [item.index for item in reply.data] == list(range(len(reply.data)))
    return np.array([item.embedding for item in reply.data], np.float32)


def chat(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def post(client: openai.OpenAI, **body: Any) -> Any:
    """Ask with a body that the client's own method does not make, as vLLM's users do."""
    return client.post("/embeddings", cast_to=openai.types.CreateEmbeddingResponse, body={"model": "nano", **body})


def test_the_client_gets_the_vectors_of_encode_by_base64_and_as_numbers(
    client: openai.OpenAI, embedder: Embedder
) -> None:
    expected = embedder.encode(TEXTS)
    forms: list[dict[str, Any]] = [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}]
    for options in forms:
        reply: Any = client.embeddings.create(input=TEXTS, model="nano", **options)
        found = [item.embedding for item in reply.data]
        if options.get("encoding_format") == "base64":
            found = [np.frombuffer(base64.b64decode(each), "<f4") for each in found]
        assert np.array_equal(np.array(found, np.float32), expected)
        assert reply.model == "nano"


def test_a_single_text_and_fewer_dimensions(client: openai.OpenAI, embedder: Embedder) -> None:
    reply = client.embeddings.create(input="seven", model="nano", dimensions=64)
    assert np.array_equal(vectors_of(reply), embedder.encode(["seven"], truncate_dim=64))


def test_token_ids_are_the_text_that_they_are_made_of(client: openai.OpenAI, embedder: Embedder) -> None:
    ids = [embedder.encoder.prompt.tokenize(each) for each in TEXTS]
    batch = client.embeddings.create(input=ids, model="nano")
    assert np.array_equal(vectors_of(batch), embedder.encode(TEXTS))
    assert np.array_equal(vectors_of(client.embeddings.create(input=ids[0], model="nano")), embedder.encode([TEXTS[0]]))


@pytest.mark.parametrize("ids", [[10**6], "markers", "split"])
def test_token_ids_that_no_text_becomes_are_refused(client: openai.OpenAI, embedder: Embedder, ids: Any) -> None:
    prompt = embedder.encoder.prompt
    if ids == "markers":
        ids = [prompt.ids["<|disc_emb|>"]]
    if ids == "split":
        ids = [token for letter in "seven" for token in prompt.tokenize(letter)]
        assert ids != prompt.tokenize("seven")
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(input=[ids], model="nano")
    assert caught.value.param == "input[0]"


def test_messages_of_text_and_images_make_one_vector(
    client: openai.OpenAI, embedder: Embedder, data_uri: str, picture: Image.Image
) -> None:
    messages = chat(image(data_uri), text("what is it?"))
    expected = embedder.encode([{"images": [picture], "text": "what is it?"}])
    assert np.array_equal(vectors_of(post(client, messages=messages)), expected)
    assert np.array_equal(vectors_of(post(client, input=messages)), expected)


def test_a_list_of_messages_is_a_batch(
    client: openai.OpenAI, embedder: Embedder, data_uri: str, picture: Image.Image
) -> None:
    batch = [chat(image(data_uri)), chat(text("three"), text("plus four")), [{"role": "user", "content": "seven"}]]
    expected = embedder.encode([{"image": picture}, "three\nplus four", "seven"])
    assert np.array_equal(vectors_of(post(client, messages=batch)), expected)
    assert np.array_equal(vectors_of(post(client, input=batch)), expected)


def test_a_system_message_is_the_instruction_as_in_vllm_s_example(client: openai.OpenAI, embedder: Embedder) -> None:
    messages = [
        {"role": "system", "content": [text("Find the sum.")]},
        {"role": "user", "content": [text("three plus four")]},
        {"role": "assistant", "content": [text("")]},
    ]
    reply = post(client, messages=messages, continue_final_message=True, add_special_tokens=True)
    expected = embedder.encode(["three plus four"], instruction="Find the sum.")
    assert np.array_equal(vectors_of(reply), expected)
    assert not np.allclose(expected, embedder.encode(["three plus four"]))


def test_documents_are_embedded_as_documents(client: openai.OpenAI, embedder: Embedder) -> None:
    reply = client.embeddings.create(input=TEXTS, model="nano", extra_body={"input_type": "document"})
    assert np.array_equal(vectors_of(reply), embedder.encode_document(TEXTS))
    assert not np.allclose(vectors_of(reply), embedder.encode(TEXTS))


def test_a_reply_says_how_each_input_was_embedded(client: openai.OpenAI, embedder: Embedder) -> None:
    reply: Any = client.embeddings.create(input=TEXTS, model="nano", extra_body={"return_rationale": True})
    result = embedder.encode_detailed(TEXTS)
    assert {detail.route for detail in result.details if detail} == {"fast", "reason"}
    for item, detail in zip(reply.data, result.details, strict=True):
        assert detail is not None
        assert item.mmemb["route"] == detail.route
        assert item.mmemb["gate_score"] == pytest.approx(detail.gate_score)
        assert item.mmemb["threshold_used"] == detail.threshold
        assert item.mmemb["degraded_by"] is None
        assert item.mmemb.get("rationale") == detail.rationale
    prompt = sum(detail.prompt_tokens for detail in result.details if detail)
    written = sum(detail.rationale_tokens for detail in result.details if detail)
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (prompt, prompt + written)
    quiet: Any = client.embeddings.create(input=TEXTS, model="nano")
    assert all("rationale" not in item.mmemb for item in quiet.data)


@pytest.mark.parametrize(
    ("wish", "routes"),
    [
        ({"reasoning": "never"}, ["fast"] * 3),
        ({"reasoning": "always"}, ["reason"] * 3),
        ({"threshold": 0.0}, ["reason"] * 3),
        ({"reasoning_rate": 0.0}, ["fast"] * 3),
    ],
)
def test_our_fields_turn_the_gate(client: openai.OpenAI, wish: dict[str, Any], routes: list[str]) -> None:
    reply: Any = client.embeddings.create(input=TEXTS, model="nano", extra_body=wish)
    assert [item.mmemb["route"] for item in reply.data] == routes


REFUSED: list[tuple[dict[str, Any], str | None, str]] = [
    ({"input": ""}, "input", "at least 1 character"),
    ({"input": []}, "input", "pass a text"),
    ({"input": ["a", ""]}, "input[1]", "at least 1 character"),
    ({"input": ["a", " "]}, "input[1]", "nothing to embed"),
    ({"input": ["a", 1]}, "input[1]", "valid string"),
    ({"input": [[1], ["a"]]}, "input[1][0]", "valid integer"),
    ({"input": [[1], []]}, "input[1]", "at least 1 item"),
    ({"input": 3}, "input", "pass a text"),
    ({}, None, "exactly one of 'input' and 'messages'"),
    ({"input": "a", "messages": chat(text("a"))}, None, "exactly one of 'input' and 'messages'"),
    ({"input": ["a"] * 2049}, "input", "pass 1 to 2048"),
    ({"input": "a", "dimensions": 100}, "dimensions", "trained for 128, 64"),
    ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
    ({"input": "a", "reasonning": "never"}, "reasonning", "did you mean 'reasoning'?"),
    ({"input": "a", "threshold": 2}, "threshold", "less than or equal to 1"),
    ({"input": "a", "threshold": 0.5, "reasoning_rate": 0.5}, "threshold", "pass one of them"),
    ({"input": "a", "reasoning": "never", "reasoning_rate": 0.5}, "reasoning_rate", "only works with"),
    ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "-1"),
    ({"input": "a", "request_id": "ü"}, "request_id", "should match pattern"),
    ({"input": "a", "deadline_ms": 0}, "deadline_ms", "greater than or equal to 1"),
    ({"messages": chat(image("data:image/png;base64,!"))}, "messages[0]", "no base64"),
    ({"messages": chat(image("data:image/png;base64,AAAA"))}, "messages[0]", "no image of a known format"),
    ({"messages": chat(image("data:image/png,AAAA"))}, "messages[0]", "not a data URI of base64"),
    ({"messages": chat(image("https://example.org/a.png"))}, "messages[0]", "this server fetches nothing"),
    ({"messages": chat(image("/etc/passwd"))}, "messages[0]", "this server fetches nothing"),
    ({"messages": chat({"type": "video_url", "video_url": {"url": "data:"}})}, "messages[0].content[0]", "video files"),
    ({"messages": chat({"type": "input_audio"})}, "messages[0].content[0]", "'text' or 'image_url'"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "'system', 'user' or 'assistant'"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "has the roles assistant"),
    ({"messages": [*chat(text("a")), {"role": "assistant", "content": "b"}]}, "messages", "words of the assistant"),
    ({"messages": [{"role": "system", "content": "a"}]}, "messages", "has the roles system"),
    ({"messages": [[{"role": "system", "content": "a"}, *chat(text("b"))], chat(text("c"))]}, "messages", "differ"),
]


@pytest.mark.parametrize(("body", "param", "message"), REFUSED)
def test_what_cannot_be_embedded_is_refused_with_the_field(
    client: openai.OpenAI, body: dict[str, Any], param: str | None, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        post(client, **body)
    assert message in caught.value.message
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.code is not None


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(input="a", model="text-embedding-3-small")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    assert "nano" in caught.value.message


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("nano", "model")
    longest = "a " * 100_000
    with pytest.raises(openai.BadRequestError, match=f"above the limit of {model.max_model_len} ") as caught:  # type: ignore[attr-defined]
        client.embeddings.create(input=["b", longest[:150_000]], model="nano")
    assert caught.value.param == "input[1]"


def test_a_model_has_the_names_that_it_is_given(serve: Any) -> None:
    with (
        serve(model_names=("text-embedding-3-small", "other")) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="-", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == ["text-embedding-3-small", "other"]
        assert client.embeddings.create(input="a", model="other").model == "text-embedding-3-small"


def test_errors_echo_little_of_what_was_sent(served: Any) -> None:
    noise = "x" * 100_000
    answers = [
        served.post("/v1/embeddings", {"input": 1, **{f"{noise}{index}": noise for index in range(50)}}),
        served.post("/v1/embeddings", {"input": "a", "encoding_format": noise}),
        served.post("/v1/embeddings", {"input": "a", "model": noise}),
        served.post("/v1/embeddings", {"messages": chat(image(noise))}),
        served.post("/v1/embeddings", {"messages": [{"role": "user", "content": [{noise: noise}] * 50}]}),
    ]
    assert {answer.status_code for answer in answers} == {400, 404}
    assert all(len(answer.content) < 5000 for answer in answers)
    assert "and 41 more" in answers[0].json()["error"]["message"]


BROKEN = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"1",
    b'{"input": "\\ud800"}',
    b'{"input": "\xff"}',
    b'{"input": ' + b"1" * 5000 + b"}",
    b'{"input": "a", "priority": ' + b"1" * 5000 + b"}",
    b"[" * 100_000,
]


@pytest.mark.parametrize("body", BROKEN)
def test_a_body_that_is_no_request_is_refused(served: Any, body: bytes) -> None:
    answer = served.client.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
