"""What a server says of itself: metrics, logs without content, request ids, spans."""

import json
import logging
import sys
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from mmemb_deploy import Embedder, OverloadError
from mmemb_deploy.results import EncodeResult
from mmemb_deploy.serve.ask import Ask, Event
from mmemb_deploy.serve.logs import FIELDS, JsonLines
from mmemb_deploy.serve.page.gallery import open_gallery
from mmemb_deploy.serve.service import Service
from mmemb_deploy.serve.tracing import Traces

TEXTS = ["three plus four", "six minus eight times two"]
SECRET = "a text that nobody else should read"


def metrics_of(served: Any) -> dict[tuple[str, ...], float]:
    """Return the samples, by name and the values of their labels but the model's."""
    answer = served.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    assert {sample.labels["model_name"] for sample in samples} == {"nano"}
    return {
        (sample.name, *(value for name, value in sample.labels.items() if name != "model_name")): sample.value
        for sample in samples
    }


class Figured(Service):
    """Counts what a scheduler counts."""

    def figures(self) -> dict[str, float]:
        return {
            "num_requests_running": 3.0,
            "num_requests_waiting:prefill": 2.0,
            "num_requests_waiting:reason": 1.0,
            "kv_cache_usage_perc": 0.5,
            "engine_seconds:prefill": 1.5,
        }

    async def embed(self, ask: Ask) -> EncodeResult:
        if ask.on_overload == "reject":
            raise OverloadError("no room", reason="tokens", retry_after=1)
        return await super().embed(ask)


def test_metrics_count_what_was_answered(serve: Any, embedder: Embedder) -> None:
    details = [detail for detail in embedder.encode_detailed(TEXTS).details if detail]
    with serve(service=Figured.in_thread(embedder)) as served:
        served.post("/v1/embeddings", {"input": TEXTS})
        served.post("/embed", {"inputs": "one", "reasoning": "never"})
        voyage_s = {"inputs": [{"content": [{"type": "text", "text": "one"}]}], "reasoning": "never"}
        served.post("/v1/multimodalembeddings", voyage_s)
        served.post("/v1/embeddings", {"input": ""})
        served.post("/v1/embeddings", {"input": "a", "on_overload": "reject"})
        found = metrics_of(served)
    reasoned = [detail for detail in details if detail.route == "reason"]
    assert len(reasoned) == 2
    assert found["mmemb:request_success_total", "openai", "reason"] == 2
    assert found["mmemb:request_success_total", "tei", "fast"] == 1
    assert found["mmemb:request_success_total", "voyage", "fast"] == 1
    assert found["mmemb:e2e_request_latency_seconds_count", "openai", "reason"] == 1
    assert found["mmemb:request_failure_total", "openai", "invalid_request"] == 1
    assert found["mmemb:request_failure_total", "openai", "overloaded"] == 1
    assert found["mmemb:admission_rejections_total", "openai", "tokens"] == 1
    assert found["mmemb:generation_tokens_total", "openai"] == sum(detail.rationale_tokens for detail in details)
    assert found["mmemb:prompt_tokens_total", "openai"] == sum(detail.prompt_tokens for detail in details)
    assert found["mmemb:prompt_tokens_total", "tei"] > 0
    for name in ("mmemb:gate_score_count", "mmemb:request_prefill_time_seconds_count"):
        assert (found[name, "openai"], found[name, "tei"]) == (2, 1)
    assert found["mmemb:request_decode_time_seconds_count", "openai"] == 2
    assert found["mmemb:num_requests_running",] == 3
    assert found["mmemb:num_requests_waiting", "reason"] == 1
    assert found["mmemb:num_requests_waiting", "prefill"] == 2
    assert found["mmemb:engine_seconds_total", "prefill"] == 1.5


def test_two_servers_count_for_themselves(serve: Any) -> None:
    with serve() as first, serve() as second:
        first.post("/embed", {"inputs": "one", "reasoning": "never"})
        assert metrics_of(first)["mmemb:request_success_total", "tei", "fast"] == 1
        assert ("mmemb:request_success_total", "tei", "fast") not in metrics_of(second)


class Full(Service):
    """Has room for nobody who watches."""

    async def watch(self, ask: Ask) -> AsyncGenerator[Event]:
        del ask
        raise OverloadError("no room", reason="rows", retry_after=1)
        yield  # a generator


def test_the_page_s_tries_are_counted_apart(serve: Any, embedder: Embedder) -> None:
    gallery = open_gallery(embedder, embedder.encode_document)
    with serve(gallery=gallery) as served:
        tries = [{"text": "three plus four"}, {"text": " "}, {"txt": "seven"}]
        assert [served.post("/page/try", body).status_code for body in tries] == [200, 200, 400]
        assert served.get("/nothing").status_code == 404
        found = metrics_of(served)
    with serve(gallery=gallery, service=Full.in_thread(embedder)) as served:
        served.post("/page/try", {"text": "seven"})
        full = metrics_of(served)
    assert found["mmemb:request_success_total", "page", "reason"] == 1
    assert found["mmemb:gate_score_count", "page"] == 1
    failed = {tuple(labels): value for (name, *labels), value in found.items() if name == "mmemb:request_failure_total"}
    assert failed == {("page", "invalid_input"): 1, ("page", "invalid_request"): 1, ("none", "not_found"): 1}
    assert full["mmemb:admission_rejections_total", "page", "rows"] == 1
    assert full["mmemb:request_failure_total", "page", "overloaded"] == 1


def test_an_id_that_was_sent_is_sent_back_and_else_made(served: Any) -> None:
    assert served.get("/health", headers={"X-Request-ID": "my.id-1:2"}).headers["X-Request-ID"] == "my.id-1:2"
    answers = [served.get("/health", headers={"X-Request-ID": bad}) for bad in ("", "a b", "x" * 129)]
    made = {answer.headers["X-Request-ID"] for answer in answers}
    assert len(made) == 3
    assert all(len(each) == 32 for each in made)
    refused = served.post("/v1/embeddings", {"input": ""}, headers={"X-Request-ID": "bad"})
    assert refused.headers["X-Request-ID"] == "bad"
    body = served.post("/v1/embeddings", {"input": "a", "request_id": "of-the-body"})
    assert body.headers["X-Request-ID"] == "of-the-body"


def test_a_line_has_the_id_of_the_body_beside_that_of_the_header(
    served: Any, lines: Callable[[Any], list[dict[str, Any]]]
) -> None:
    headers = {"X-Request-ID": "of-a-proxy"}
    answer = served.post("/v1/embeddings", {"input": "a", "request_id": "of-the-body"}, headers=headers)
    other = served.post("/v1/embeddings", {"input": "a"}, headers={"X-Request-ID": "alone"})
    told, alone = lines([answer, other])
    assert (told["request_id"], told["client_request_id"]) == ("of-a-proxy", "of-the-body")
    assert alone["request_id"] == "alone"
    assert "client_request_id" not in alone


def test_a_request_is_one_line_without_what_it_said(
    served: Any, lines: Callable[[Any], list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="mmemb_deploy")
    bodies: list[dict[str, Any]] = [
        {"input": SECRET, "user": SECRET, "instruction": SECRET, "return_rationale": True},
        {"input": [SECRET], "dimensions": SECRET},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": SECRET}}]}]},
    ]
    answers = [served.post(f"/v1/embeddings?q={SECRET}", body, headers={"X-Secret": SECRET}) for body in bodies]
    assert [answer.status_code for answer in answers] == [200, 400, 400]
    logged = lines(answers)
    assert [(line["status"], line["rows"], line.get("error")) for line in logged] == [
        (200, 1, None),
        (400, 0, "invalid_request"),
        (400, 1, "invalid_input"),
    ]
    assert all((line["method"], line["path"]) == ("POST", "/v1/embeddings") for line in logged)
    assert logged[0]["tokens"] > 20
    formatter = JsonLines()
    assert SECRET not in "".join(formatter.format(record) for record in caplog.records if record.name != "httpx")


def test_a_line_is_one_json_object() -> None:
    record = logging.LogRecord("a.logger", logging.WARNING, "", 0, "two\nlines %s", ("%d",), None)
    setattr(record, FIELDS, {"status": 200})
    line = JsonLines().format(record)
    assert "\n" not in line
    read = json.loads(line)
    assert read.pop("time").endswith("+00:00")
    assert read == {"level": "warning", "logger": "a.logger", "message": "two\nlines %d", "status": 200}
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        record.exc_info = sys.exc_info()
    assert "ZeroDivisionError" in json.loads(JsonLines().format(record))["traceback"]


def test_a_request_is_a_span_of_the_caller_s_trace(serve: Any, embedder: Embedder) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    parent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    with serve(traces=Traces("nano", embedder.dim, provider)) as served:
        assert served.post("/v1/embeddings", {"input": TEXTS, "dimensions": 64}, headers=parent).status_code == 200
        assert served.post("/embed", {"inputs": ""}).status_code == 422
    answered, refused = exporter.get_finished_spans()
    assert answered.name == "embeddings nano"
    assert answered.context is not None
    assert f"{answered.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    tokens = sum(detail.prompt_tokens for detail in embedder.encode_detailed(TEXTS).details if detail)
    assert dict(answered.attributes or {}) == {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.request.model": "nano",
        "gen_ai.embeddings.dimension.count": 64,
        "gen_ai.usage.input_tokens": tokens,
    }
    assert (refused.status.is_ok, refused.events) == (False, ())
