"""What /metrics shows: Prometheus metrics of one server, in a registry of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mmemb_deploy.results import Detail

PREFIX = "mmemb:"
MODEL = "model_name"
CONTRACT = "contract"  # by which a request came, "page" for a try of the page, "none" for a path of neither
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SCORES = tuple(step / 20 for step in range(1, 21))


class Figure(NamedTuple):
    """A metric that the service counts itself."""

    says: str
    label: str | None = None
    counts: bool = False  # up only


FIGURES: Mapping[str, Figure] = {
    "num_requests_running": Figure("Inputs that an engine is working on."),
    "num_requests_waiting": Figure("Inputs that wait, by the queue they are in.", "queue"),
    "kv_cache_usage_perc": Figure("Share of the KV cache in use, 1 is all."),
    "gate_threshold": Figure("Gate score from which an input reasons now."),
    "mm_cache_queries": Figure("Images looked up among those that were encoded before.", counts=True),
    "mm_cache_hits": Figure("Images found there.", counts=True),
    "engine_seconds": Figure("Seconds that the engine ran, by what it did.", "op", counts=True),
}
"""Names that `Service.figures` may hold: "NAME", or "NAME:VALUE" for a value of the label."""


class Metrics:
    """Counts what one server answers, by contract. Success is counted by input, latency and failure by request."""

    def __init__(
        self, model: str, figures: Callable[[], Mapping[str, float]], labels: Mapping[str, str] | None = None
    ) -> None:
        """`figures` are the service's own; every sample has these labels beside the model's name."""
        self.registry = CollectorRegistry()
        own = {MODEL: model, **(labels or {})}
        self._own = tuple(own.values())

        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, says, [*own, CONTRACT, *labels], registry=self.registry)

        def histogram(name: str, says: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(PREFIX + name, says, [*own, CONTRACT, *labels], registry=self.registry, buckets=buckets)

        self._success = counter("request_success", "Inputs answered, by the route that they took.", "route")
        self._failure = counter("request_failure", "Requests not answered as asked, by why.", "error")
        self._rejections = counter("admission_rejections", "Requests that found no room, by the limit met.", "reason")
        self._degraded = counter("degraded", "Inputs that were to reason and did not, by why.", "reason")
        self._prompt = counter("prompt_tokens", "Tokens of the inputs' prompts.")
        self._generation = counter("generation_tokens", "Tokens of rationales.")
        self._latency = histogram(
            "e2e_request_latency_seconds", "Seconds from request to answer, by the longest route in it.", "route"
        )
        self._queue = histogram("request_queue_time_seconds", "Seconds that an input waited, by queue.", "queue")
        self._preprocess = histogram("request_preprocess_time_seconds", "Seconds of reading an input.")
        self._prefill = histogram("request_prefill_time_seconds", "Seconds of the batch it was read in.")
        self._decode = histogram("request_decode_time_seconds", "Seconds in which it reasoned.")
        self._token = histogram("time_per_output_token_seconds", "Seconds a token of a rationale.")
        self._score = histogram("gate_score", "Gate scores of inputs.", buckets=SCORES)
        self.registry.register(_Figures(own, figures))

    def answered(self, contract: str, details: list[Detail], seconds: float) -> None:
        """Count a request that was answered."""
        own = (*self._own, contract)
        prompt, preprocess = self._prompt.labels(*own), self._preprocess.labels(*own)
        prefill, score = self._prefill.labels(*own), self._score.labels(*own)
        for detail in details:
            self._success.labels(*own, detail.route).inc()
            prompt.inc(detail.prompt_tokens)
            preprocess.observe(detail.timings.preprocess)
            prefill.observe(detail.timings.fast_path)
            self._queue.labels(*own, "prompt").observe(detail.timings.queued)
            if not math.isnan(detail.gate_score):
                score.observe(detail.gate_score)
            if detail.rationale_tokens:
                self._generation.labels(*own).inc(detail.rationale_tokens)
                self._decode.labels(*own).observe(detail.timings.generation)
                self._queue.labels(*own, "reasoning").observe(detail.timings.held)
                self._token.labels(*own).observe(detail.timings.generation / detail.rationale_tokens)
            if detail.degraded_by is not None:
                self._degraded.labels(*own, detail.degraded_by).inc()
        route = max((detail.route for detail in details), key=lambda route: route.value)  # "reason" after "fast"
        self._latency.labels(*own, route).observe(seconds)

    def failed(self, contract: str, error: str) -> None:
        """Count a request that was not answered as asked."""
        self._failure.labels(*self._own, contract, error).inc()

    def rejected(self, contract: str, reason: str) -> None:
        """Count a request for which there was no room."""
        self._rejections.labels(*self._own, contract, reason).inc()

    def page(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Figures(Collector):
    """Reads the service's own figures when they are asked for."""

    def __init__(self, own: Mapping[str, str], figures: Callable[[], Mapping[str, float]]) -> None:
        self._own, self._figures = own, figures

    def collect(self) -> Iterator[Metric]:
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for key, value in self._figures().items():
            name, _, label = key.partition(":")
            figure = FIGURES[name]
            if name not in families:
                family = CounterMetricFamily if figure.counts else GaugeMetricFamily
                labels = [*self._own] if figure.label is None else [*self._own, figure.label]
                families[name] = family(PREFIX + name, figure.says, labels=labels)
            own = self._own.values()
            families[name].add_metric([*own] if figure.label is None else [*own, label], value)
        yield from families.values()
