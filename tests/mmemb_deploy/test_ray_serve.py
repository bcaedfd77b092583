"""The server on a Ray cluster of this machine: it answers as `mmemb serve`, drains, and comes back after a death."""

import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from mmemb_deploy import Embedder

ray = pytest.importorskip("ray", reason="needs the extra ray")
yaml = pytest.importorskip("yaml", reason="comes with ray")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray uses what pydantic deprecates
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    from mmemb_deploy.serve.ray import DEPLOYMENT, NAME, Arguments, app
    from mmemb_deploy.serve.scaling import BUSY, QUEUED, ScaleByWork
    from mmemb_deploy.serve.settings import Settings

# Ray warns of itself, and leaves sockets to the collector
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]

YAML = Path(__file__).parents[2] / "examples" / "ray" / "serve.yaml"
with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as free_too:
    PORT, METRICS_PORT = (each.getsockname()[1] for each in (free, free_too))
ADDRESS = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Start a cluster of two cores with Serve's proxy, and stop it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of its workers
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        fast: Any = {"_system_config": {"metrics_report_interval_ms": 500}, "_metrics_export_port": METRICS_PORT}
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, **fast)
        serve.start(http_options={"port": PORT})
        yield
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
def served(cluster: None) -> Iterator[None]:
    """Run the application, and delete it unless the test did."""
    del cluster
    serve.run(app(Arguments(page=False, settings=Settings(log_level="error"))), name=NAME)
    yield
    serve.delete(NAME)


def embed(texts: list[str], reasoning: str = "never") -> httpx.Response:
    asked = {"model": "nano", "input": texts, "reasoning": reasoning}
    return httpx.post(f"{ADDRESS}/v1/embeddings", json=asked, timeout=60)


def samples(address: str) -> list[Sample]:
    """Return what is exported there."""
    text = httpx.get(address, timeout=60).text
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def replica() -> Any:
    """Return the one replica's actor."""
    (name,) = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if "mmemb#" in each["name"]]
    return ray.get_actor(name, namespace="serve")


@pytest.mark.usefixtures("served")
def test_it_answers_as_the_server_does_and_comes_back_when_a_replica_dies() -> None:
    answer = embed(["one", "two plus three"])
    assert answer.status_code == 200
    vectors = np.array([entry["embedding"] for entry in answer.json()["data"]])
    expected = Embedder.load().encode(["one", "two plus three"], reasoning="never")
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    ready = httpx.get(f"{ADDRESS}/ready", headers={"X-Request-ID": "mine"})
    assert (ready.status_code, ready.headers.get_list("X-Request-ID")) == (200, ["mine"])
    told = serve.get_app_handle(NAME).record_autoscaling_stats.remote().result()
    assert told.keys() == {QUEUED, BUSY}

    ray.kill(replica(), no_restart=True)
    until = time.monotonic() + 60
    while (status := embed(["one"]).status_code) != 200:
        assert time.monotonic() < until, f"still {status}"
        time.sleep(0.1)


@pytest.mark.usefixtures("cluster")
def test_ray_exports_the_metrics_of_all_replicas_where_metrics_has_those_of_one() -> None:
    two: Any = {"num_replicas": 2, "autoscaling_config": None, "ray_actor_options": {"num_cpus": 1}}
    quiet = Settings(log_level="error")
    serve.run(DEPLOYMENT.options(**two).bind(Arguments(page=False, threads=1, settings=quiet)), name=NAME)
    try:
        for _ in range(4):
            assert embed(["one", "two plus three"]).status_code == 200
        own = {sample.labels["replica"] for sample in samples(f"{ADDRESS}/metrics")}
        until = time.monotonic() + 90
        while True:
            exported = samples(f"http://127.0.0.1:{METRICS_PORT}/metrics")
            answered = [each for each in exported if each.name == "ray_mmemb_request_success_total"]
            if sum(each.value for each in answered) == 8:
                break
            assert time.monotonic() < until, answered
            time.sleep(0.5)
    finally:
        serve.delete(NAME)
    waiting = {each.labels["replica"] for each in exported if each.name == "ray_mmemb_num_requests_waiting"}
    assert (len(own), len(waiting)) == (1, 2)
    assert own < waiting
    assert {each.labels["contract"] for each in answered} == {"openai"}
    assert any(each.name == "ray_mmemb_e2e_request_latency_seconds_bucket" for each in exported)


@pytest.mark.usefixtures("served")
def test_requests_on_a_replica_that_dies_end_with_an_error_and_the_next_are_answered() -> None:
    handle = serve.get_app_handle(NAME)
    with ThreadPoolExecutor() as threads:
        answers = [threads.submit(embed, [f"{place} plus 3"] * 200, "always") for place in range(4)]
        while not handle.record_autoscaling_stats.remote().result()[QUEUED]:
            assert not all(answer.done() for answer in answers), "they were done before they were seen to wait"
        ray.kill(replica(), no_restart=True)
        ended = [answer.result(60) for answer in answers]
        after = embed(["one"])
    statuses = {answer.status_code for answer in ended}
    assert 500 in statuses
    assert statuses <= {200, 500}  # those that the proxy had not handed over yet
    failed = [answer for answer in ended if answer.status_code == 500]
    assert {(answer.text, answer.headers["content-type"].partition(";")[0]) for answer in failed} == {
        ("Internal Server Error", "text/plain")
    }
    assert after.status_code == 200


@pytest.mark.usefixtures("served")
def test_what_was_accepted_is_answered_before_a_replica_ends() -> None:
    handle = serve.get_app_handle(NAME)
    with ThreadPoolExecutor() as threads:
        answers = [threads.submit(embed, [f"{place} plus 3"] * 200, "always") for place in range(4)]
        while not handle.record_autoscaling_stats.remote().result()[QUEUED]:
            assert not all(answer.done() for answer in answers), "they were done before they were seen to wait"
        serve.delete(NAME)
        assert [answer.result().status_code for answer in answers] == [200] * 4


@pytest.mark.parametrize(
    ("told", "replicas"),
    [
        ({QUEUED: {"a": 3.0, "b": 2.0}, BUSY: {"a": 1.0, "b": 1.0}}, 5.0),  # seconds of work wait
        ({QUEUED: {"a": 0.0, "b": 0.0}, BUSY: {"a": 0.85, "b": 0.9}}, 2.5),  # none do, since fewer inputs reason
        ({QUEUED: {"a": 0.1, "b": 0.0}, BUSY: {"a": 0.2, "b": 0.15}}, 0.5),
        ({}, 2.0),  # nothing is known yet
    ],
)
def test_replicas_follow_the_work_that_waits_and_the_time_that_engines_run(
    told: dict[str, dict[str, float]], replicas: float
) -> None:
    context: Any = SimpleNamespace(aggregated_metrics=told, target_num_replicas=2)
    assert ScaleByWork(queued_seconds=1.0, busy=0.7)(context)[0] == pytest.approx(replicas)


@pytest.mark.usefixtures("cluster")
def test_the_example_configuration_is_what_ray_and_the_application_take() -> None:
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(YAML.read_text())).applications
    arguments = Arguments.model_validate(application.args)
    (deployment,) = application.deployments
    assert application.import_path == f"{app.__module__}:{app.__name__}"
    assert deployment.name == NAME
    assert deployment.graceful_shutdown_timeout_s > arguments.settings.drain_seconds
    assert app(arguments) is not None
