"""The page at `/`: what its routes answer, and in a browser what a visitor sees of a try."""

import asyncio
import base64
import io
import json
import math
import re
import shutil
import threading
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the page is served by starlette")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from mmemb_deploy import Embedder, InputError, OptionError
from mmemb_deploy.evaluation.digitchain import NAMES
from mmemb_deploy.serve.app import create_app
from mmemb_deploy.serve.ask import Ask, Ended, Event, Scored, Wrote
from mmemb_deploy.serve.page.gallery import MOST_PICTURES, Gallery, Sample, open_gallery
from mmemb_deploy.serve.page.routes import NEAREST, page_routes
from mmemb_deploy.serve.service import Service
from mmemb_deploy.serve.settings import Settings

Told = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder.load()


@pytest.fixture(scope="module")
def gallery(embedder: Embedder) -> Gallery:
    return open_gallery(embedder, embedder.encode_document)


@pytest.fixture(scope="module")
def app(embedder: Embedder, gallery: Gallery) -> ASGIApp:
    return create_app(Service.in_thread(embedder), Settings(drain_seconds=5), gallery=gallery)


@pytest.fixture(scope="module")
def client(app: ASGIApp) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def tried(client: TestClient, **body: Any) -> Told:
    """Return the events of a try."""
    reply = client.post("/page/try", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = re.findall(r"event: (\w+)\ndata: (.*)\n\n", reply.text)
    return [(kind, json.loads(data)) for kind, data in events]


def of_sample(sample: Sample) -> dict[str, Any]:
    return {"text": sample.text, "images": sample.images, "instruction": sample.instruction}


def found(gallery: Gallery, event: dict[str, Any]) -> str:
    """Return the name of the nearest document."""
    return gallery.documents[int(event["nearest"][0]["document"])].name


def test_a_try_tells_the_score_then_the_rationale_then_what_embedding_finds(
    client: TestClient, embedder: Embedder, gallery: Gallery
) -> None:
    (kind, gate), *tokens, (last, done) = tried(client, text="three plus four")
    assert (kind, {kind for kind, _ in tokens}, last) == ("gate", {"token"}, "done")
    (detail,) = embedder.encode_detailed(["three plus four"]).details
    assert detail is not None
    assert gate["score"] == pytest.approx(detail.gate_score, abs=1e-6)
    assert (gate["threshold"], gate["route"], done["auto"]) == (0.8, "reason", "always")
    assert "".join(data["text"] for _, data in tokens) == detail.rationale == "3+4;3+4=7;"
    for event, reasoning in ((gate, "never"), (done, "always")):
        cosines = embedder.similarity(embedder.encode(["three plus four"], reasoning=reasoning), gallery.vectors_ND)[0]
        assert [near["document"] for near in event["nearest"]] == np.argsort(-cosines)[:NEAREST].tolist()
        assert [near["cosine"] for near in event["nearest"]] == pytest.approx(np.sort(cosines)[::-1][:NEAREST])
    assert found(gallery, done) == "seven"


def test_a_try_tells_what_each_mode_costs(client: TestClient) -> None:
    done = tried(client, text="three plus four")[-1][1]
    never, always = done["costs"]["never"], done["costs"]["always"]
    assert 0 < never["ms"] < always["ms"]
    assert (never["tokens"], always["tokens"]) == (0, 10)


def test_an_easy_input_goes_direct_and_its_thought_is_still_told(client: TestClient, gallery: Gallery) -> None:
    (_, gate), *tokens, (_, done) = tried(client, text="seven")
    assert (gate["route"], done["auto"], found(gallery, gate)) == ("fast", "never", "seven")
    assert tokens


def test_a_sample_shows_what_the_threshold_decides(client: TestClient, gallery: Gallery) -> None:
    (misread,) = [sample for sample in gallery.samples if "misread" in sample.name]
    events = tried(client, **of_sample(misread))
    gate, done = events[0][1], events[-1][1]
    assert gate["score"] < gate["threshold"]
    assert "three" not in found(gallery, gate)
    assert "three" in found(gallery, done)


def test_the_instruction_of_a_try_counts(client: TestClient, embedder: Embedder) -> None:
    gate = tried(client, text="seven", instruction="Find the same drawing.")[0][1]
    (detail,) = embedder.encode_detailed(["seven"], instruction="Find the same drawing.").details
    assert detail is not None
    assert gate["score"] == pytest.approx(detail.gate_score, abs=1e-6)


def test_the_gallery_finds_every_document_by_its_own_vector_and_has_a_picture_of_each_drawing(
    client: TestClient, embedder: Embedder, gallery: Gallery
) -> None:
    shown = client.get("/page/gallery").json()
    assert [document["name"] for document in shown["documents"][:10]] == list(NAMES)
    pictures = [document["image"] for document in shown["documents"] if document["image"]]
    assert len(pictures) == 30
    pixels = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in pictures]
    vectors = embedder.encode_document([*NAMES, *pixels])
    assert np.allclose(vectors, gallery.vectors_ND, atol=1e-5)
    assert [near for vector in vectors for near, _ in gallery.nearest(vector, 1)] == list(range(40))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text": "one", "images": ["http://localhost/secret.png"]}, "images.0"),
        ({"text": "one", "images": ["data:image/png;base64,@"]}, "images.0"),
        ({"text": "one", "images": ["data:text/html;base64,AAAA"]}, "images.0"),
        ({"text": 1}, "text"),
        ({"txt": "one"}, "txt"),
    ],
)
def test_a_body_that_is_no_try_is_refused_by_its_field(client: TestClient, body: dict[str, Any], param: str) -> None:
    reply = client.post("/page/try", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


def test_a_try_is_only_taken_as_json(client: TestClient) -> None:
    """A form of another site can send text/plain without asking, and no JSON."""
    headers = {"Content-Type": "text/plain"}
    assert client.post("/page/try", content='{"text": "one"}', headers=headers).status_code == 415
    assert client.post("/page/try", content="{", headers={"Content-Type": "application/json"}).status_code == 400


def test_an_input_that_cannot_be_embedded_ends_with_its_error(client: TestClient) -> None:
    ((kind, error),) = tried(client, images=["data:image/png;base64,AAAA"])
    assert kind == "error"
    assert error["message"].startswith("'images'[0] is no image of a known format")


class Scripted:
    """Tells events that were written before, and whether it was closed."""

    def __init__(self, embedder: Embedder, *events: Event, forever: bool = False) -> None:
        self.preparer, self._events, self._forever, self.closed = embedder, events, forever, False

    async def watch(self, ask: Ask) -> AsyncGenerator[Event]:
        del ask
        try:
            for event in self._events:
                yield event
            while self._forever:
                await asyncio.sleep(0)
                yield Wrote("more ")
        finally:
            self.closed = True


def test_a_thought_that_the_server_took_away_has_no_cost(embedder: Embedder, gallery: Gallery) -> None:
    result = embedder.encode_detailed(["three plus four"], reasoning="never")
    (detail,), vector = result.details, result.embeddings[0]
    assert detail is not None
    service = Scripted(embedder, Scored(0.9, 0.8, vector, 0.001), Ended(detail, vector, 0.002))
    with TestClient(Starlette(routes=page_routes(service, gallery))) as client:
        done = tried(client, text="three plus four")[-1][1]
    assert (done["costs"]["always"], done["auto"], done["route"]) == (None, "never", "fast")


def test_a_bundle_without_a_gate_has_no_score(embedder: Embedder, gallery: Gallery) -> None:
    vector = embedder.encode(["one"])[0]
    service = Scripted(embedder, Scored(math.nan, None, vector, 0.001))
    with TestClient(Starlette(routes=page_routes(service, gallery))) as client:
        ((_, gate),) = tried(client, text="one")
    assert (gate["score"], gate["threshold"], gate["route"]) == (None, None, "fast")


def test_a_client_that_leaves_ends_the_work(embedder: Embedder, gallery: Gallery) -> None:
    service = Scripted(embedder, forever=True)
    app = Starlette(routes=page_routes(service, gallery))
    left = asyncio.Event()
    body = b'{"text": "one"}'

    async def receive() -> dict[str, Any]:
        nonlocal body
        if body:
            sent, body = body, b""
            return {"type": "http.request", "body": sent}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if b"more" in message.get("body", b""):
            left.set()
        await asyncio.sleep(0)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/page/try", "headers": headers, "query_string": b""}

    async def visit() -> None:
        await asyncio.wait_for(app(scope, receive, send), 30)
        await asyncio.sleep(0)

    asyncio.run(visit())
    assert service.closed


def test_a_folder_of_pictures_is_a_gallery(embedder: Embedder, tmp_path: Path) -> None:
    for name, colour in (("dark", 40), ("light", 220)):
        Image.new("RGB", (300, 200), (colour, colour, colour)).save(tmp_path / f"{name}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    gallery = open_gallery(embedder, embedder.encode_document, tmp_path)
    assert [document.name for document in gallery.documents] == ["dark", "light"]
    assert np.allclose(
        gallery.vectors_ND,
        embedder.encode_document([{"image": tmp_path / "dark.png"}, {"image": tmp_path / "light.png"}]),
        atol=1e-5,
    )
    assert gallery.samples == ()


def test_a_folder_without_pictures_or_with_a_broken_one_is_refused(embedder: Embedder, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"0 pictures .* pass 1 to {MOST_PICTURES}"):
        open_gallery(embedder, embedder.encode_document, tmp_path)
    with pytest.raises(OptionError, match="no folder"):
        open_gallery(embedder, embedder.encode_document, tmp_path / "missing")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="broken"):
        open_gallery(embedder, embedder.encode_document, tmp_path)


def test_the_page_asks_nothing_of_others_and_runs_only_its_own_script(client: TestClient) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", page.text)


# ---- in a browser


@contextmanager
def serving(app: Any) -> Generator[str]:
    """Yield the address of a running server."""
    uvicorn = pytest.importorskip("uvicorn", reason="serves the page to a browser")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    socket = server.config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    socket.close()


@pytest.fixture(scope="module")
def address(app: ASGIApp) -> Iterator[str]:
    with serving(app) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="drives the browser (pip install playwright)")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A visitor's page, which may log nothing and reach nobody but its server."""
    context = browser.new_context(reduced_motion="reduce", viewport={"width": 360, "height": 740})
    page, problems = context.new_page(), list[str]()
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))

    def requested(request: Any) -> None:
        if not request.url.startswith((address, "data:")):
            problems.append(request.url)

    page.on("request", requested)
    page.goto(address)
    page.locator(".sample").first.wait_for()
    yield page
    context.close()
    assert problems == []


def ended(page: Any) -> str:
    """Wait for the end of a try; return what is told to a screen reader."""
    told = page.locator("#hearing:not(:empty)")
    told.wait_for(state="attached")
    return str(told.text_content())


@pytest.mark.slow
def test_a_visitor_types_a_question_and_sees_it_thought_about(page: Any) -> None:
    page.get_by_label("Text to embed").fill("three plus four")
    page.keyboard.press("Enter")
    assert "It wrote: 3+4;3+4=7;" in ended(page)
    assert page.locator("#verdict").text_content() == "Yes: it thinks first"
    assert page.locator("#rationale span").all_text_contents() == list("3+4;3+4=7;")
    assert page.locator("#list .name").first.text_content() == "seven"
    assert "10 tokens" in page.locator("#prices dt:text('auto') + dd").text_content()
    assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.slow
def test_a_visitor_clicks_drawn_digits_and_moves_the_threshold(page: Any) -> None:
    page.get_by_role("button", name="Try a drawing that is easily misread").click()
    ended(page)
    assert page.locator("#verdict").text_content() == "No: one look is enough"
    assert "three" not in page.locator("#list .name").first.text_content()
    threshold = page.get_by_role("slider", name="Threshold from which it thinks")
    for _ in range(5):
        threshold.press("PageDown")
    assert threshold.get_attribute("aria-valuenow") == "0.3"
    assert page.locator("#verdict").text_content() == "With 0.30 it would have thought"
    assert "three" in page.locator("#list .name").first.text_content()
    page.get_by_role("button", name="Back to 0.80").click()
    assert page.locator("#verdict").text_content() == "No: one look is enough"


@pytest.mark.slow
def test_a_visitor_adds_a_picture_of_their_own_and_is_told_what_is_wrong_with_another(
    page: Any, gallery: Gallery
) -> None:
    (drawn,) = [sample for sample in gallery.samples if sample.name == "a drawn digit"]
    picture = base64.b64decode(drawn.images[0].partition(",")[2])
    page.locator("#files").set_input_files([{"name": "nine.png", "mimeType": "image/png", "buffer": picture}])
    page.get_by_role("button", name="Embed", exact=True).click()
    assert "Nearest" in ended(page)
    page.get_by_role("button", name="Remove picture 1").click()
    page.locator("#files").set_input_files([{"name": "a.png", "mimeType": "image/png", "buffer": b"<b>no</b>"}])
    page.get_by_role("button", name="Embed", exact=True).click()
    page.locator("#error:visible").wait_for()
    assert "no image of a known format" in page.locator("#error").text_content()


@pytest.mark.slow
def test_a_visitor_drags_the_threshold(page: Any) -> None:
    gauge = page.locator("#gauge").bounding_box()
    knob = page.locator("#knob").bounding_box()
    page.mouse.move(knob["x"] + knob["width"] / 2, knob["y"] + knob["height"] / 2)
    page.mouse.down()
    page.mouse.move(gauge["x"] + gauge["width"] / 2, gauge["y"], steps=5)
    page.mouse.up()
    assert page.locator("#limit").text_content() == "0.50"


@pytest.mark.slow
def test_a_visitor_draws_two_digits_and_asks_for_their_sum(page: Any) -> None:
    page.get_by_role("button", name="Draw", exact=True).click()
    paper = page.locator("#canvas").bounding_box()
    three = ((0.25, 0.15), (0.5, 0.1), (0.7, 0.2), (0.45, 0.48), (0.7, 0.58), (0.72, 0.78), (0.5, 0.9), (0.25, 0.85))
    four = ((0.6, 0.92), (0.6, 0.1), (0.2, 0.6), (0.8, 0.6))
    for points in (three, four):
        for x, y in points:
            page.mouse.move(paper["x"] + x * paper["width"], paper["y"] + y * paper["height"], steps=4)
            page.mouse.down()
        page.mouse.up()
        page.get_by_role("button", name="Add digit").click()
        paper = page.locator("#canvas").bounding_box()
    page.get_by_label("Text to embed").fill("a + b")
    page.get_by_role("button", name="Embed", exact=True).click()
    assert "It wrote: 3+4;3+4=7;" in ended(page)


@pytest.mark.slow
def test_a_visitor_is_asked_for_the_key_that_the_server_wants(browser: Any, app: ASGIApp) -> None:
    async def locked(scope: Any, receive: Any, send: Any) -> None:
        wanted = scope["path"].startswith("/page/") and (b"authorization", b"Bearer secret") not in scope["headers"]
        answer = JSONResponse({"error": {"message": "the key is missing"}}, 401) if wanted else app
        await answer(scope, receive, send)

    with serving(locked) as address:
        page = browser.new_page()
        page.goto(address)
        key = page.get_by_label("This server wants a key")
        key.wait_for()
        assert page.locator("#error").text_content() == "the key is missing"
        key.fill("secret")
        page.get_by_label("Text to embed").fill("seven")
        page.keyboard.press("Enter")
        assert "Nearest: seven" in ended(page)
        page.close()
