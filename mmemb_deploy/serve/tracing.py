"""OpenTelemetry: a span for each request for embeddings, by the conventions for generative AI."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mmemb_deploy.errors import MissingExtraError
from mmemb_deploy.results import Detail

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider


class Traces:
    """Makes spans. Raises MissingExtraError where OpenTelemetry is not installed.

    Without a provider, spans go by OTLP to where the environment's OTEL_EXPORTER_OTLP_ENDPOINT says.
    """

    def __init__(self, model: str, dim: int, provider: TracerProvider | None = None) -> None:
        try:
            from opentelemetry.trace import SpanKind
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError as error:
            raise MissingExtraError("opentelemetry-sdk", "otel") from error
        self._model, self._dim, self._kind = model, dim, SpanKind.SERVER
        self._context = TraceContextTextMapPropagator()
        self._tracer = (_exporting() if provider is None else provider).get_tracer("mmemb_deploy.serve")

    @contextmanager
    def request(self, headers: Mapping[str, str]) -> Generator[Span]:
        """Span a request, as a child of the span that its `traceparent` names."""
        attributes = {"gen_ai.operation.name": "embeddings", "gen_ai.request.model": self._model}
        with self._tracer.start_as_current_span(
            f"embeddings {self._model}",
            context=self._context.extract(headers),
            kind=self._kind,
            attributes=attributes,
            record_exception=False,  # its message may quote an input
        ) as span:
            yield span

    def answered(self, span: Span, details: list[Detail], dimensions: int | None) -> None:
        """Say of a span what was embedded."""
        span.set_attribute("gen_ai.embeddings.dimension.count", dimensions or self._dim)
        span.set_attribute("gen_ai.usage.input_tokens", sum(detail.prompt_tokens for detail in details))


def _exporting() -> TracerProvider:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise MissingExtraError("opentelemetry-exporter-otlp-proto-http", "otel") from error
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
