"""A tiny random model, digits to teach it, the pool that goes with them, and a real server to write it."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest

from mmemb_training.checkpoint import Checkpoint, load_checkpoint
from mmemb_training.joint import Lesson
from mmemb_training.nano.digits import Digits, digit_workers, draw_digits
from mmemb_training.pool.endpoint import EndpointWorker
from mmemb_training.pool.job import Candidate


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> Checkpoint:
    """A fresh copy of the tiny random checkpoint, for tests that change its weights."""
    return load_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="session")
def digits() -> Digits:
    """Samples of all families."""
    return draw_digits("train", 3, 48)


@pytest.fixture(scope="session")
def pool(digits: Digits) -> dict[str, list[Candidate]]:
    """What the four workers write for `digits`."""
    found: dict[str, list[Candidate]] = {}
    for worker in digit_workers(digits):
        questions = [sample.question for sample in digits.samples]
        for question, written in zip(questions, worker.write(questions), strict=True):
            candidates = (Candidate(worker.name, place, text) for place, text in enumerate(written.rationales))
            found.setdefault(question.key, []).extend(candidates)
    return found


@pytest.fixture(scope="session")
def lessons(digits: Digits, pool: dict[str, list[Candidate]]) -> list[Lesson]:
    """Every sample with one rationale, but for the matches: they are taught to stop."""
    return [
        Lesson(sample, None if sample.question.task == "match" else pool[sample.question.key][place % 6].rationale)
        for place, sample in enumerate(digits.samples)
    ]


Reply = Callable[[dict[str, Any]], tuple[int, Any]]  # a request's body -> status and body of the answer


def asked(body: dict[str, Any]) -> str:
    """Return the last text that a request shows."""
    text: str = body["messages"][-1]["content"][-1]["text"]
    return text


def answer(body: dict[str, Any], *messages: dict[str, Any]) -> tuple[int, Any]:
    """Answer with the messages, or with as many as were asked for, each saying what it was asked."""
    said = messages or tuple({"content": f"{place}: {asked(body)}"} for place in range(body["n"]))
    choices = [
        {"index": place, "finish_reason": "stop", "message": {"role": "assistant", **message}}
        for place, message in enumerate(said)
    ]
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices}


class Endpoint(ThreadingHTTPServer):
    """Speaks /v1/chat/completions as `reply` says, and remembers what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: Reply = answer
        self.answer, self.asked = answer, asked
        self.received: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()

    def worker(self, *, samples: int = 2, concurrency: int = 4, key: str | None = None) -> EndpointWorker:
        url = f"http://127.0.0.1:{self.server_port}/v1"
        return EndpointWorker(
            "served", base_url=url, model="a-model", samples=samples, concurrency=concurrency, api_key_variable=key,
            max_retries=3, max_frames=3, timeout=30,
        )  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """One request of an Endpoint."""

    def do_POST(self) -> None:
        endpoint = cast("Endpoint", self.server)
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        endpoint.received.append(body)
        endpoint.keys.add(self.headers["Authorization"])
        status, content = endpoint.reply(body)
        page = isinstance(content, str)
        payload = content.encode() if page else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if page else "application/json")
        self.send_header("Retry-After-Ms", "1")  # or the client waits half a second and more
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that http.server gives it
        """Say nothing."""


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
