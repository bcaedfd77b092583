"""`mmemb serve` as a process: its options, and that a signal to stop loses nothing that was accepted."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mmemb_deploy import OptionError
from mmemb_deploy.cli.main import main
from mmemb_deploy.serve import command
from mmemb_deploy.serve.settings import KEYS_VARIABLE, read_keys

ROOT = Path(__file__).parents[3]
RUNNING = "Uvicorn running on "
ROWS = 300  # of a request that is still being answered when the next has come


class Process:
    """`mmemb serve` on a free port; `lines` are what it logged."""

    def __init__(self, *options: str) -> None:
        command = [
            sys.executable,
            "-m",
            "mmemb_deploy",
            "serve",
            "--port",
            "0",
            "--threads",
            "1",
            "--no-page",
            *options,
        ]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.lines: list[dict[str, Any]] = []
        self._started = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self._started.wait(60)
        (line,) = [line["message"] for line in self.lines if RUNNING in line["message"]]
        self.url = line.removeprefix(RUNNING).partition(" ")[0]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(json.loads(line))  # whatever it says is JSON
            if RUNNING in line:
                self._started.set()
        self._started.set()

    def ended(self) -> int:
        """Wait for its end; return its exit code."""
        status = self.process.wait(60)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status


def accepted(client: httpx.Client) -> float:
    """Return how many inputs a server has taken and not finished."""
    samples = [
        sample
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name in ("mmemb:num_requests_running", "mmemb:num_requests_waiting")
    ]
    return sum(sample.value for sample in samples)


@contextmanager
def serving(*options: str) -> Generator[Process]:
    server = Process(*options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.ended()


def test_sigterm_answers_what_was_accepted_refuses_what_is_new_and_exits_with_0() -> None:
    answers: list[httpx.Response] = []

    def ask(url: str) -> None:
        body = {"input": ["six minus eight times two"] * ROWS, "reasoning": "always"}
        answers.append(httpx.post(f"{url}/v1/embeddings", json=body, timeout=60))

    with serving() as server:
        threads = [threading.Thread(target=ask, args=(server.url,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while accepted(client) <= 2 * ROWS:  # not yet of all three
                assert not answers, "the requests are too small for this test"
            server.process.send_signal(signal.SIGTERM)
            while client.get("/ready").status_code == 200:
                assert not answers, "the requests are too small for this test"
            assert client.get("/health").status_code == 200
            refused = client.post("/v1/embeddings", json={"input": "seven"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert refused.headers["Retry-After"] == "1"
        for thread in threads:
            thread.join()
        assert server.ended() == 0
    assert [answer.status_code for answer in answers] == [200] * 3
    assert all(len(answer.json()["data"]) == ROWS for answer in answers)


def engine_of(server: Process) -> int:
    """Return the id of the process that a server has started for its engine."""
    pid = server.process.pid
    (engine,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(engine)


def test_where_its_engine_dies_all_who_wait_hear_of_it_and_it_ends_with_1() -> None:
    body = {"input": ["six minus eight times two"] * ROWS, "reasoning": "always"}
    with serving() as server, httpx.Client(base_url=server.url, timeout=60) as client:
        answers: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60))
        )
        thread.start()
        while not accepted(client):
            assert not answers, "the request is too small for this test"
        os.kill(engine_of(server), signal.SIGKILL)
        thread.join()
        assert server.ended() == 1
    (answer,) = answers
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "backend_error")
    assert "signal SIGKILL" in answer.json()["error"]["message"]
    (said,) = [line["message"] for line in server.lines if line["level"] == "critical"]
    assert said.startswith("the engine's process has ended with signal SIGKILL")


def test_its_engine_does_not_outlive_it() -> None:
    with serving() as server:
        os.kill(engine_of(server), 0)
        server.process.kill()
        assert server.ended() == -signal.SIGKILL  # it waits until nobody writes to the log, the engine neither


def test_what_takes_longer_than_the_drain_is_given_up() -> None:
    body = {"input": ["six minus eight times two"] * 300, "reasoning": "always"}
    with serving("--drain-seconds", "0.2") as server:
        answers: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60))
        )
        thread.start()
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not accepted(client):
                assert not answers, "the request is too small for this test"
        server.process.send_signal(signal.SIGTERM)
        thread.join()
        assert server.ended() == 0
    (answer,) = answers
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes spans by OTLP."""

    taken: list[tuple[str, bytes]] = []  # noqa: RUF012 - of the class: each request has an object of its own

    def do_POST(self) -> None:
        self.taken.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that http.server gives it
        """Say nothing."""


def test_spans_have_arrived_where_the_environment_says_when_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        with serving("--otel") as server:
            assert httpx.post(f"{server.url}/embed", json={"inputs": "seven"}).status_code == 200
            server.process.send_signal(signal.SIGTERM)
            assert server.ended() == 0
        collector.shutdown()
        thread.join()
    ((path, spans),) = Collector.taken
    assert path == "/v1/traces"
    assert b"embeddings nano" in spans
    assert b"gen_ai.usage.input_tokens" in spans


def test_it_serves_what_its_options_say(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of the shop\nfirst\n\nsecond # until May\n")
    options = ("--served-model-name", "ours", "--api-keys", str(keys), "--max-inputs", "2", "--max-body-bytes", "1000")
    with serving(*options) as server:
        with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer second"}, timeout=60) as client:
            assert client.post("/v1/embeddings", json={"input": "seven", "model": "ours"}).status_code == 200
            assert client.post("/v1/embeddings", json={"input": ["a"] * 3}).status_code == 400
            assert client.post("/v1/embeddings", json={"input": "a" * 1000}).status_code == 413
            info = client.get("/info").json()
            assert (info["served_model_name"], info["max_client_batch_size"]) == ("ours", 2)
            assert len(info["model_sha"]) == 64
        assert httpx.get(f"{server.url}/info").status_code == 401
        server.process.send_signal(signal.SIGINT)
        assert server.ended() == 0
    requests = [line for line in server.lines if line["message"] == "request"]
    assert [line["status"] for line in requests] == [200, 400, 413, 200, 401]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "port is 70000: Input should be less than or equal to 65535"),
        (["--log-level", "loud"], "log_level is 'loud': Input should be 'debug', 'info', 'warning' or 'error'"),
        (["--max-body-bytes", "0"], "max_body_bytes is 0: Input should be greater than or equal to 1"),
        (["--drain-seconds", "nan"], "drain_seconds is nan"),
        (["--api-keys", "absent"], "api_keys is absent, which cannot be read: No such file or directory"),
        (["absent"], "absent is not a bundle"),
    ],
)
def test_a_wrong_option_is_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_keys_come_from_one_place_and_are_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("first\n")
    assert read_keys(None) == []
    assert read_keys(file) == ["first"]
    monkeypatch.setenv(KEYS_VARIABLE, "second, third")
    assert read_keys(None) == ["second", "third"]
    with pytest.raises(OptionError, match="keep one of them"):
        read_keys(file)
    monkeypatch.setenv(KEYS_VARIABLE, " ,")
    with pytest.raises(OptionError, match="holds no key"):
        read_keys(None)
    monkeypatch.delenv(KEYS_VARIABLE)
    file.write_text("# nothing\n")
    with pytest.raises(OptionError, match="holds no key"):
        read_keys(file)


def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(SystemExit) as ended:
        main(["serve"])
    assert ended.value.code == 2
    assert "pip install 'mmemb-deploy[serve]'" in capsys.readouterr().err
