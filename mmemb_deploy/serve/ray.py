"""The server as a Ray Serve application: one replica per device, as many replicas as the work needs.

`serve run mmemb_deploy.serve.ray:app bundle=/models/bundle`, or `serve deploy` with `examples/ray/serve.yaml`.
"""
# Ray reads the annotation of `app` as a class, so annotations are not postponed here.

import signal
import time
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import HTTPOptions
from ray.util.metrics import Gauge
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmemb_deploy.bundle.folder import NANO, Bundle
from mmemb_deploy.bundle.manifest import manifest_digest
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.ray_cluster import connect, takes_gpus
from mmemb_deploy.serve.app import create_app
from mmemb_deploy.serve.logs import log_json
from mmemb_deploy.serve.metrics import Metrics
from mmemb_deploy.serve.page.gallery import open_gallery
from mmemb_deploy.serve.scaling import BUSY, QUEUED, ScaleByWork
from mmemb_deploy.serve.service import Service
from mmemb_deploy.serve.settings import Settings, read_keys, settings_of
from mmemb_deploy.serve.tracing import Traces
from mmemb_deploy.serve.worker import Limits

NAME = "mmemb"
MARGIN = 5.0  # seconds for the last answers, after the drain


class Arguments(BaseModel):
    """What `serve run` and a YAML's `args` say of a replica; keys come from MMEMB_API_KEYS rather than from a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: Path | None = None
    """Bundle folder, by the same path on every node; None serves the embedded nano bundle."""

    backend: str = "auto"
    """The engine that runs it."""

    threads: int | None = None
    """Threads of one operator on a CPU, and the cores that a replica takes there; None is 1."""

    digest: str | None = None
    """What `mmemb inspect` prints of the bundle; any other bundle is refused."""

    page: bool = True
    """Whether there is a page at / to try the model by hand."""

    gallery: Path | None = None
    """Folder of pictures for the page to search."""

    settings: Settings = Settings()
    """The server's settings; its host, port and seconds for headers and idle connections are Ray's to keep."""


class Replica:
    """One engine and its scheduler, behind the contracts that `mmemb serve` has."""

    def __init__(self, arguments: Arguments) -> None:
        log_json(arguments.settings.log_level)
        opened = Bundle.open(arguments.bundle or NANO, arguments.digest)
        embedder = Embedder.of_bundle(opened, backend=arguments.backend, threads=arguments.threads)
        self._arguments, self._digest = arguments, manifest_digest(opened.folder)
        settings = arguments.settings
        self._embedder = embedder
        self._service = Service.in_thread(
            embedder, max_waiting_rows=settings.max_waiting_rows, limits=Limits(max_wait=settings.max_wait_seconds)
        )
        self._name = (settings.model_names or (embedder.manifest.model.name,))[0]
        labels = {"replica": serve.get_replica_context().replica_id.unique_id}
        self._metrics = Metrics(self._name, self._service.figures, labels)
        self._ray_metrics = RayMetrics(self._metrics.registry)
        self._told_at, self._ran = time.monotonic(), 0.0

    def __serve_build_asgi_app__(self) -> ASGIApp:
        arguments, settings, embedder = self._arguments, self._arguments.settings, self._embedder
        front = create_app(
            self._service,
            settings,
            digest=self._digest,
            gallery=open_gallery(embedder, embedder.encode_document, arguments.gallery) if arguments.page else None,
            traces=Traces(self._name, embedder.dim) if settings.otel else None,
            metrics=self._metrics,
        )
        return _named_by_proxy(front)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the seconds of work that wait here, and the share of the time since the last call that was worked."""
        now, ran = time.monotonic(), self._service.engine_seconds
        busy = (ran - self._ran) / max(now - self._told_at, 1e-9)
        self._told_at, self._ran = now, ran
        return {QUEUED: self._service.backlog_seconds, BUSY: busy}

    def check_health(self) -> None:
        """Raise where the engine has stopped by a defect, so that Ray replaces the replica; it asks every 10 s."""
        self._ray_metrics.publish()
        if not self._service.alive:
            raise RuntimeError("the engine has stopped by a defect")


class RayMetrics:
    """Shows a replica's metrics among Ray's own, which each node exports of all that runs on it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._gauges: dict[str, Gauge] = {}

    def publish(self) -> None:
        """Set a gauge to each sample: Ray's own counters and histograms can only be added to."""
        for family in self._registry.collect():
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                if sample.name not in self._gauges:
                    name = sample.name.replace(":", "_")  # Ray takes no colons
                    self._gauges[sample.name] = Gauge(name, family.documentation, tuple(sample.labels))
                self._gauges[sample.name].set(sample.value, sample.labels)


def _named_by_proxy(front: ASGIApp) -> ASGIApp:
    """Leave it to Ray's proxy to tell a client its request's id, which `front` has from there: once is enough."""

    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["X-Request-ID"]
            await send(message)

        await front(scope, receive, answer)

    return named


DEPLOYMENT: Deployment = serve.deployment(
    name=NAME,
    max_ongoing_requests=256,
    max_queued_requests=1024,
    backpressure_config={"status_code": 503, "retry_after_s": 1},
    autoscaling_config={
        "min_replicas": 1,
        "max_replicas": 8,
        "look_back_period_s": 20,
        "upscale_delay_s": 5,
        "downscale_delay_s": 120,
        "policy": {"policy_function": f"{ScaleByWork.__module__}:{ScaleByWork.__name__}"},
    },
    graceful_shutdown_wait_loop_s=0.5,
)(serve.ingress()(Replica))


def app(arguments: Arguments) -> Application:
    """Return the application: what `serve run` and `serve deploy` call with `args`.

    A replica takes a GPU where the cluster has one that the bundle can use, else `threads` cores.
    """
    manifest = Bundle.open(arguments.bundle or NANO, arguments.digest).manifest
    if takes_gpus(arguments.backend, manifest):
        resources: dict[str, Any] = {"num_gpus": 1}
    else:
        resources = {"num_cpus": arguments.threads or 1}
        arguments = arguments.model_copy(update={"threads": arguments.threads or 1})
    if not arguments.settings.api_keys:
        keys = arguments.settings.model_copy(update={"api_keys": settings_of(api_keys=read_keys(None)).api_keys})
        arguments = arguments.model_copy(update={"settings": keys})
    deployment = DEPLOYMENT.options(
        ray_actor_options=resources, graceful_shutdown_timeout_s=arguments.settings.drain_seconds + MARGIN
    )
    return deployment.bind(arguments)


def run_on_ray(arguments: Arguments) -> None:
    """Serve on the cluster that RAY_ADDRESS names, else on one of this machine, until SIGTERM or Ctrl-C, then drain."""
    connect()
    settings = arguments.settings
    serve.start(http_options=HTTPOptions(host=settings.host, port=settings.port))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        serve.run(app(arguments), name=NAME)
        signal.pause()
    except KeyboardInterrupt:
        serve.shutdown()
