"""What a server refuses, and what clients that misbehave cannot do to it or to one another."""

import asyncio
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import openai
import pytest

from mmemb_deploy import BackendError, DeadlineError, Embedder, OverloadError
from mmemb_deploy.results import EncodeResult
from mmemb_deploy.serve.ask import Ask
from mmemb_deploy.serve.media import MediaLimits, MediaReader
from mmemb_deploy.serve.service import Service
from mmemb_deploy.serve.thread import EngineThread
from mmemb_deploy.serve.worker import Limits, Worker

JSON = {"Content-Type": "application/json"}
WORDS = {"content": [{"type": "text", "text": "a"}]}  # an input of Voyage's


class Held(Service):
    """Holds every request until it is let go, or raises what it is told."""

    def __init__(self, embedder: Embedder, error: Exception | None = None) -> None:
        super().__init__(embedder, EngineThread(Worker(embedder, Limits())))
        self.error = error
        self.begun, self.cancelled, self.go = threading.Event(), threading.Event(), threading.Event()

    async def embed(self, ask: Ask) -> EncodeResult:
        if self.error is not None:
            raise self.error
        self.begun.set()
        try:
            while not self.go.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return await super().embed(ask)


def chunks(size: int, count: int) -> Iterator[bytes]:
    """Yield a body without declaring its length."""
    yield b'{"input": "'
    for _ in range(count):
        yield b"a" * size
    yield b'"}'


def test_a_body_above_the_limit_is_413_declared_or_not(serve: Any) -> None:
    with serve(max_body_bytes=10_000) as served:
        declared = [served.post("/v1/embeddings", {"input": "a" * size}) for size in (9_900, 10_000, 35_000)]
        chunked = [
            served.client.post("/v1/embeddings", content=chunks(100, count), headers=JSON) for count in (98, 100, 350)
        ]
        for answers in (declared, chunked):
            assert [answer.status_code for answer in answers] == [400, 413, 413]  # 400: too many tokens
            assert answers[1].json()["error"]["code"] == "body_too_large"
        assert served.post("/embed", {"inputs": "a" * 10_000}).json()["error_type"] == "Validation"
        with (
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="-", max_retries=0) as client,
            pytest.raises(openai.APIStatusError) as caught,
        ):
            client.embeddings.create(input="a" * 20_000, model="nano")
        assert caught.value.status_code == 413


def test_a_body_that_never_ends_is_cut_off(serve: Any) -> None:
    with serve(max_body_bytes=100_000) as served, served.connect() as client:
        client.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n")
        client.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            client.sendall((b"10000\r\n" + b"a" * 65536 + b"\r\n") * 1000)


def test_a_body_must_be_json_by_its_type(served: Any) -> None:
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}, {}):
        answer = served.client.post("/v1/embeddings", content=b'{"input": "a"}', headers=headers)
        assert answer.status_code == 415
    parameter = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert served.client.post("/v1/embeddings", content=b'{"input": "a"}', headers=parameter).status_code == 200


def test_more_inputs_than_the_setting_are_refused(serve: Any) -> None:
    with serve(max_inputs=2) as served:
        for path, body, status in (
            ("/v1/embeddings", {"input": ["a"] * 3}, 400),
            ("/v2/embed", {"input_type": "image", "texts": ["a"] * 3}, 400),
            ("/v1/multimodalembeddings", {"inputs": [WORDS] * 3}, 400),
            ("/embed", {"inputs": ["a"] * 3}, 422),
        ):
            answer = served.post(path, body)
            assert answer.status_code == status
            assert "pass 1 to 2" in answer.text


@pytest.fixture(scope="module")
def locked(serve: Any) -> Iterator[Any]:
    with serve(api_keys=["first", "second"], open_metrics=True) as running:
        yield running


@pytest.mark.parametrize("shown", [None, "Bearer", "Bearer wrong", "Basic first", "first", "Bearer ü", "bearer first"])
def test_without_a_key_there_is_no_answer(locked: Any, shown: str | None) -> None:
    good = shown == "bearer first"
    headers = {} if shown is None else {"Authorization": shown.encode("latin-1")}
    for path in ("/v1/embeddings", "/v2/embed", "/v1/multimodalembeddings", "/embed"):
        answer = locked.post(path, {"input": "a"}, headers=headers)
        assert (answer.status_code == 401) is not good
        assert answer.headers.get("WWW-Authenticate") == (None if good else "Bearer")
    for path in ("/v1/models", "/info", "/nothing"):
        assert (locked.get(path, headers=headers).status_code == 401) is not good
    for path in ("/health", "/ready", "/openapi.json", "/metrics"):
        assert locked.get(path, headers=headers).status_code == 200


def test_metrics_need_a_key_unless_the_settings_open_them(serve: Any) -> None:
    with serve(api_keys=["first"]) as served:
        assert served.get("/metrics").status_code == 401


def test_each_key_opens_and_the_clients_raise_their_own_error(locked: Any) -> None:
    for key in ("first", "second"):
        with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key) as client:
            assert len(client.embeddings.create(input="a", model="nano").data) == 1
    with (
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key="third") as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.embeddings.create(input="a", model="nano")
    assert caught.value.code == "invalid_api_key"


OVERLOAD = OverloadError("no room", reason="rows", retry_after=1.25)


@pytest.mark.parametrize(
    ("error", "status", "of_tei"),
    [(OVERLOAD, 503, 429), (DeadlineError("too late"), 504, 504), (BackendError("the engine broke"), 500, 424)],
)
def test_what_a_service_raises_has_its_status(
    serve: Any, embedder: Embedder, error: Exception, status: int, of_tei: int
) -> None:
    with serve(service=Held(embedder, error)) as served:
        openai_s = served.post("/v1/embeddings", {"input": "a"})
        cohere_s = served.post("/v2/embed", {"input_type": "image", "texts": ["a"]})
        voyage_s = served.post("/v1/multimodalembeddings", {"inputs": [WORDS]})
        tei_s = served.post("/embed", {"inputs": "a"})
    answers = openai_s, cohere_s, voyage_s, tei_s
    assert [each.status_code for each in answers] == [status, status, status, of_tei]
    assert openai_s.json()["error"]["message"] == cohere_s.json()["message"] == str(error)
    assert voyage_s.json()["detail"] == tei_s.json()["error"] == str(error)
    for answer in answers:
        waits = answer.headers.get("retry-after"), answer.headers.get("retry-after-ms")
        assert waits == (("2", "1250") if error is OVERLOAD else (None, None))


def test_a_defect_is_500_with_an_envelope_and_no_details(serve: Any, embedder: Embedder) -> None:
    with serve(service=Held(embedder, ZeroDivisionError("a secret"))) as served:
        answer = served.post("/v1/embeddings", {"input": "a"})
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert "secret" not in answer.text
        assert "X-Request-ID" in answer.headers


def test_requests_above_what_may_wait_are_refused_and_the_others_answered(serve: Any, embedder: Embedder) -> None:
    with serve(service=Service.in_thread(embedder, max_waiting_rows=3)) as served:
        assert served.post("/v1/embeddings", {"input": ["a"] * 3}).status_code == 200
        refused = served.post("/v1/embeddings", {"input": ["a"] * 4})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert served.post("/v1/embeddings", {"input": ["a"] * 3}).status_code == 200


class Slow(MediaReader):
    """Never has an image."""

    async def read(self, inputs: Sequence[Any]) -> Sequence[Any]:
        if isinstance(inputs[0], dict):
            await asyncio.sleep(60)
        return inputs


def test_a_deadline_that_passes_while_images_are_read_is_504(serve: Any, data_uri: str) -> None:
    limits = MediaLimits(image_bytes=1, total_bytes=1, hosts=frozenset(), seconds=60)
    with serve(reader=Slow(limits)) as served:
        body = {"input_type": "image", "images": [data_uri], "deadline_ms": 20}
        answer = served.post("/v2/embed", body)
        assert (answer.status_code, answer.json()["message"]) == (
            504,
            "the deadline of 20 ms passed before it was read",
        )
        assert served.post("/v1/embeddings", {"input": "a", "deadline_ms": 60_000}).status_code == 200


def test_a_client_that_leaves_cancels_its_work_and_no_other(serve: Any, embedder: Embedder) -> None:
    held = Held(embedder)
    with serve(service=held) as served:
        body = json.dumps({"input": "a"}).encode()
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        answers: list[httpx.Response] = []
        stays = threading.Thread(target=lambda: answers.append(served.post("/v1/embeddings", {"input": "seven"})))
        stays.start()
        with served.connect() as leaves:
            leaves.sendall(head.encode() + b"\r\n\r\n" + body)
            assert held.begun.wait(10)
            time.sleep(0.05)
        assert held.cancelled.wait(10)
        held.go.set()
        stays.join()
    (answer,) = answers
    assert answer.status_code == 200


def read_all(client: socket.socket) -> bytes:
    """Read until the server closes."""
    found = b""
    while chunk := client.recv(65536):
        found += chunk
    return found


def test_a_body_that_does_not_come_is_408(serve: Any) -> None:
    with serve(body_seconds=0.05) as served, served.connect() as client:
        client.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: 100\r\n\r\n{")
        answer = read_all(client)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"request_timeout"' in answer


@pytest.mark.parametrize("sent", [b"", b"POST", b"GET / HTTP/1.1\r\nX-A", b"GET /health HTTP/1.1\r\n\r\nGET /hea"])
def test_headers_that_do_not_come_end_the_connection(serve: Any, sent: bytes) -> None:
    with serve(header_seconds=0.1) as served, served.connect() as client:
        client.sendall(sent)
        answer = read_all(client)
        assert answer.count(b"HTTP/1.1 200 ") == sent.count(b"\r\n\r\n")


def test_a_client_that_sends_its_headers_in_time_may_take_its_time_between_requests(serve: Any) -> None:
    with serve(header_seconds=0.1) as served, httpx.Client() as client:
        for _ in range(3):
            assert client.get(f"{served.url}/health").status_code == 200
            time.sleep(0.15)
        with served.connect() as slow:
            for piece in (b"GET /health", b" HTTP/1.1\r\n", b"Connection: close\r\n\r\n"):
                slow.sendall(piece)
            assert read_all(slow).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_does_not_read_keeps_nobody_waiting(serve: Any) -> None:
    body = json.dumps({"input": ["seven"] * 500, "reasoning": "never"}).encode()  # of which the answer is 1 MB
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with serve() as served, served.connect() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        slow.sendall(head.encode() + b"\r\nConnection: close\r\n\r\n" + body)
        for _ in range(3):
            assert served.post("/v1/embeddings", {"input": "seven", "reasoning": "always"}).status_code == 200
        answer = read_all(slow)
        assert len(json.loads(answer.partition(b"\r\n\r\n")[2])["data"]) == 500


def test_headers_without_end_are_not_kept(served: Any) -> None:
    with served.connect() as client:
        client.sendall(b"GET /health HTTP/1.1\r\nX: ")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            client.sendall(b"a" * 50_000_000)


def test_another_spelling_of_a_path_is_not_found(served: Any) -> None:
    for path in ("/health/", "/v1/embeddings/", "//v1/embeddings", "/V1/embeddings"):
        assert served.get(path).status_code == 404


GARBAGE = [
    b"\x00" * 1000,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),  # TLS where there is none
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET \xff\xfe HTTP/1.1\r\n\r\n",
    b"GET http://[::1 HTTP/1.1\r\n\r\n",
    b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST /embed HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /embed HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"POST /embed HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
    b"GET /health HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"GET /health HTTP/1.1\r\nX-Request-ID: \xff\xfe\r\n\r\n",
]


def test_garbage_harms_nobody_else(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    with serve(header_seconds=1) as served:
        for garbage in GARBAGE:
            with served.connect() as client:
                try:
                    client.sendall(garbage)
                    client.shutdown(socket.SHUT_WR)
                    answer = client.recv(1000)
                except OSError:  # it is cut off already
                    answer = b""
                assert not answer or b" 4" in answer[:12] or b" 200 " in answer[:13], (garbage[:50], answer)
            assert served.get("/health").status_code == 200
        assert served.post("/v1/embeddings", {"input": "seven"}).status_code == 200
    assert "Traceback" not in caplog.text


def test_a_thousand_idle_connections_leave_room_for_others(served: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:  # client and server are one process here
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    idle = [served.connect() for _ in range(1000)]
    try:
        for client in idle[:500]:
            client.sendall(b"POST /v1/embeddings HTTP/1.1\r\n")
        answer = served.post("/v1/embeddings", {"input": "seven"})
        assert answer.status_code == 200
    finally:
        for client in idle:
            client.close()


def test_requests_in_parallel_get_their_own_answers(served: Any, embedder: Embedder) -> None:
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    answers: dict[str, list[float]] = {}

    def ask(number: str) -> None:
        for _ in range(3):
            body = {"input": number, "reasoning": "never"}
            answers[number] = served.post("/v1/embeddings", body).json()["data"][0]["embedding"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in numbers:
        assert answers[number] == pytest.approx(embedder.encode([number], reasoning="never")[0].tolist(), abs=1e-6)
