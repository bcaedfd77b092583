"""Images by address: what may be fetched, and that nothing of the server's own network can be."""

import asyncio
import base64
import http.server
import struct
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import httpx
import pytest

from mmemb_deploy import InputError
from mmemb_deploy.serve.failures import Refusal
from mmemb_deploy.serve.media import Link, MediaLimits, MediaReader

PUBLIC = "93.184.215.14"
HOSTS = {"images.example": [PUBLIC], "other.example": ["8.8.8.8"]}
ALLOWED = frozenset({"images.example", "images.example:8443", "local.example", "192.168.1.1", "[::1]"})

Answer = Callable[[httpx.Request], httpx.Response | Coroutine[Any, Any, httpx.Response]]


def image(content: bytes, **headers: str) -> httpx.Response:
    return httpx.Response(200, stream=httpx.ByteStream(content), headers=headers)


class Web:
    """Stands for the network: what was looked up, what was connected to, and what that answers."""

    def __init__(self, answer: Answer | None = None, names: dict[str, list[str]] | None = None) -> None:
        self.names = HOSTS | (names or {})
        self.looked_up: list[str] = []
        self.requests: list[httpx.Request] = []
        self._answer = answer or (lambda _: image(b"an image"))

    async def resolve(self, host: str, port: int) -> list[str]:
        self.looked_up.append(f"{host}:{port}")
        if host not in self.names:
            return [host]  # as getaddrinfo does with a number
        return self.names[host]

    async def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self._answer(request)
        return answer if isinstance(answer, httpx.Response) else await answer

    def read(self, *urls: str, **limits: Any) -> list[bytes]:
        """Read images, each as an input of its own."""
        given: dict[str, Any] = {"image_bytes": 1000, "total_bytes": 5000, "hosts": ALLOWED, "seconds": 5.0, **limits}

        async def reading() -> list[bytes]:
            transport = httpx.MockTransport(self.handle)
            reader = MediaReader(MediaLimits(**given), resolve=self.resolve, transport=transport)
            try:
                found = await reader.read(["a text", *({"text": "", "images": [Link(url)]} for url in urls)])
            finally:
                await reader.aclose()
            assert found[0] == "a text"
            return [each["images"][0] for each in found[1:]]

        return asyncio.run(reading())


def redirecting(*places: str) -> Answer:
    """Answer by leading to these places, one after the other, then with an image."""
    left = list(places)

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(302, headers={"Location": left.pop(0)}) if left else image(b"there")

    return answer


def test_the_connection_goes_to_the_address_that_was_checked_and_asks_for_the_name() -> None:
    web = Web()
    assert web.read("https://images.example/a.png?size=1") == [b"an image"]
    (request,) = web.requests
    assert request.url == f"https://{PUBLIC}/a.png?size=1"
    assert request.headers["host"] == "images.example"
    assert request.extensions["sni_hostname"] == "images.example"
    assert web.looked_up == ["images.example:443"]


def test_another_port_must_be_allowed_with_the_host() -> None:
    web = Web()
    web.read("https://images.example:8443/a", "http://images.example:80/a")
    assert [request.headers["host"] for request in web.requests] == ["images.example:8443", "images.example"]
    with pytest.raises(InputError, match=r"not fetched from the host 'images\.example:22'"):
        web.read("https://images.example:22/a")


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example/a",
        "https://images.example.evil.example/a",
        "https://evil.example/images.example",
        "https://evil.example#@images.example/a",
        "https://evil.example\\@images.example/a",
        "https://images.example./a",
        "http://127.0.0.1/a",
        "http://2130706433/a",
        "http://0x7f.1/a",
        "http://[::ffff:127.0.0.1]/a",
        "http://localhost/a",
        "https://images.example@evil.example/a",
        "https://user:password@images.example/a",
        "file:///etc/passwd",
        "ftp://images.example/a",
        "gopher://images.example/a",
        "//images.example/a",
        "images.example/a",
        "https://",
        "https:///a",
        "http://[::1/a",
        "http://[",
        "http://images.example:port/a",
        "http://images.example:99999/a",
        "http://\x00images.example/a",
        "javascript:alert(1)",
        "unix:/var/run/docker.sock",
    ],
)
def test_what_is_not_an_allowed_host_is_never_looked_up(url: str) -> None:
    web = Web()
    with pytest.raises(InputError) as caught:
        web.read(url)
    assert caught.value.index == 1
    assert web.looked_up == []
    assert web.requests == []


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fd00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:0:0:0:0:80ff:fffe",
    ],
)
def test_a_name_that_leads_inside_is_refused(address: str) -> None:
    for found in ([address], [PUBLIC, address]):
        web = Web(names={"local.example": found})
        with pytest.raises(InputError, match="not global"):
            web.read("http://local.example/a")
        assert web.requests == []


@pytest.mark.parametrize("url", ["http://192.168.1.1/a", "http://[::1]/a"])
def test_an_allowed_number_that_is_inside_is_refused(url: str) -> None:
    web = Web()
    with pytest.raises(InputError, match="not global"):
        web.read(url)
    assert web.requests == []


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:4700::6810:84e5", "::ffff:8.8.8.8"])
def test_a_public_address_is_fetched(address: str) -> None:
    web = Web(names={"images.example": [address]})
    assert web.read("http://images.example/a") == [b"an image"]
    (request,) = web.requests
    assert request.url.host == address


def test_a_name_is_looked_up_once_so_that_it_cannot_change_meanwhile() -> None:
    web = Web()

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"] if web.looked_up else await Web.resolve(web, host, port)

    web.resolve = resolve  # type: ignore[method-assign]
    assert web.read("https://images.example/a") == [b"an image"]
    assert [request.url.host for request in web.requests] == [PUBLIC]


def test_redirects_are_followed_within_what_is_allowed() -> None:
    web = Web(redirecting("/b", "https://images.example:8443/c", "https://images.example/d"))
    assert web.read("https://images.example/a") == [b"there"]
    assert [request.url.path for request in web.requests] == ["/a", "/b", "/c", "/d"]
    assert len(web.looked_up) == 4


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["http://169.254.169.254/latest/meta-data"], "not fetched from the host"),
        (["http://local.example/"], "not global"),
        (["//local.example/"], "not global"),
        (["https://other.example/"], "not fetched from the host"),
        (["file:///etc/passwd"], "scheme"),
        (["http://[::1"], "cannot be fetched"),
        (["/1", "/2", "/3", "/4"], "redirects more than 3 times"),
    ],
)
def test_a_redirect_is_checked_as_the_first_address_was(places: list[str], message: str) -> None:
    web = Web(redirecting(*places), names={"local.example": ["127.0.0.1"]})
    with pytest.raises(InputError, match=message):
        web.read("https://images.example/a")
    assert all(request.url.host == PUBLIC for request in web.requests)


def test_an_image_above_its_limit_is_not_read_to_its_end() -> None:
    sent = []

    async def endless() -> AsyncIterator[bytes]:
        while True:
            sent.append(1)
            yield b"x" * 100

    with pytest.raises(Refusal, match="more than the 1000 bytes") as caught:
        Web(lambda _: httpx.Response(200, content=endless())).read("https://images.example/a")
    assert caught.value.status == 413
    assert len(sent) == 11


def test_the_images_of_a_request_are_limited_together() -> None:
    web = Web(lambda _: image(b"x" * 900))
    assert len(web.read(*["https://images.example/a"] * 5)) == 5
    with pytest.raises(Refusal, match="too large together") as caught:
        web.read(*["https://images.example/a"] * 6)
    assert caught.value.status == 413


def test_what_is_compressed_is_not_unpacked() -> None:
    web = Web(lambda _: image(b"\x1f\x8b...", **{"Content-Encoding": "gzip"}))
    assert web.read("https://images.example/a") == [b"\x1f\x8b..."]
    assert web.requests[0].headers["accept-encoding"] == "identity"


def test_a_host_that_does_not_answer_is_given_up() -> None:
    async def silent(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60)
        raise AssertionError("it was awaited")

    with pytest.raises(InputError, match=r"not fetched within 0\.05 s"):
        Web(silent).read("https://images.example/a", seconds=0.05)


def test_failures_of_the_network_are_the_input_s() -> None:
    def broken(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("a secret of the network")

    with pytest.raises(InputError, match="ConnectError") as caught:
        Web(broken).read("https://images.example/a")
    assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match="answers with status 404"):
        Web(lambda _: httpx.Response(404)).read("https://images.example/a")


def test_a_name_without_an_address_is_the_input_s_failure() -> None:
    async def unknown(host: str, port: int) -> list[str]:  # noqa: ARG001 - as the reader calls it
        raise OSError("Name or service not known")

    web = Web()
    web.resolve = unknown  # type: ignore[method-assign]
    with pytest.raises(InputError, match="has no address"):
        web.read("https://images.example/a")


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert Web().read("https://images.example/a") == [b"an image"]


class Inside(http.server.BaseHTTPRequestHandler):
    """What nobody outside may reach."""

    reached: list[str] = []  # noqa: RUF012 - of the class: each request has an object of its own

    def do_GET(self) -> None:
        self.reached.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that http.server gives it
        """Say nothing."""


@pytest.fixture
def inside() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), Inside) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_real_server_does_not_reach_its_own_network(serve: Any, inside: int) -> None:
    with serve(media_hosts=[f"localhost:{inside}", f"127.0.0.1:{inside}"]) as served:
        for host in ("localhost", "127.0.0.1"):
            answer = served.post(
                "/v2/embed", {"input_type": "image", "images": [f"http://{host}:{inside}/secret"], "model": "nano"}
            )
            assert answer.status_code == 400
            assert "not global" in answer.json()["message"]
    assert Inside.reached == []


@pytest.mark.parametrize(("count", "status"), [(1000, 400), (1001, 413)])
def test_a_data_uri_is_measured_before_it_is_decoded(serve: Any, count: int, status: int) -> None:
    with serve(max_media_bytes=1000) as served:
        uri = f"data:image/png;base64,{base64.b64encode(bytes(count)).decode()}"
        answer = served.post("/v2/embed", {"input_type": "image", "images": [uri]})
        assert answer.status_code == status


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(served: Any) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    uri = f"data:image/png;base64,{base64.b64encode(bomb).decode()}"
    answer = served.post("/v2/embed", {"input_type": "image", "images": [uri]})
    assert answer.status_code == 400
    assert "max_image_pixels" in answer.json()["message"]
