"""No request makes the server open a file or decode a video or a document, whichever field it names one in."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmemb_deploy.inputs import images
from mmemb_deploy.inputs.decoder import Decoders


def parts(*content: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def bodies(path: str) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    for given in ({"video": path}, {"document": path, "pages": [1]}, {"image": path}, {"images": [path]}):
        found += [
            ("/v1/embeddings", {"input": given}),
            ("/v1/embeddings", {"input": [given]}),
            ("/v1/embeddings", {"input": "a", **given}),
            ("/v1/embeddings", {"messages": parts(given)}),
            ("/v1/embeddings", {"messages": parts({"type": "text", "text": "a", **given})}),
            ("/v2/embed", {"input_type": "search_query", "inputs": [{"content": [given]}]}),
            ("/v2/embed", {"input_type": "search_query", "inputs": [given]}),
            ("/v1/multimodalembeddings", {"inputs": [{"content": [given]}]}),
            ("/embed", {"inputs": given}),
            ("/embed", {"inputs": [given]}),
        ]
    for kind in ("video_url", "video", "document", "file", "image_url", "image_base64"):
        voyages = {"type": kind, kind: path}, {"type": kind, kind: f"file://{path}"}
        found += [("/v1/multimodalembeddings", {"inputs": [{"content": [part]}]}) for part in voyages]
        for value in (path, {"url": path}, {"url": f"file://{path}"}):
            part = {"type": kind, kind: value}
            found.append(("/v1/embeddings", {"messages": parts(part)}))
            found.append(("/v2/embed", {"input_type": "search_query", "inputs": [{"content": [part]}]}))
    found.append(("/v2/embed", {"input_type": "image", "images": [path]}))
    return found


@pytest.mark.parametrize("name", ["photo.png", "paper.pdf", "clip.mp4"])
def test_a_path_in_a_request_is_refused_and_never_opened(
    served: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    Image.new("RGB", (8, 8)).save(path, "PNG")

    def opened(*arguments: Any, **_: Any) -> Any:
        raise AssertionError(f"the server opens a file: {arguments}")

    monkeypatch.setattr(images, "local_path", opened)
    monkeypatch.setattr(Decoders, "ask", opened)
    for route, body in bodies(str(path)):
        reply = served.post(route, body)
        assert reply.status_code in (400, 422), (route, body, reply.text)


def test_a_text_that_is_a_path_stays_a_text(served: Any, embedder: Any) -> None:
    (found,) = served.post("/embed", {"inputs": ["/etc/passwd"]}).json()
    assert found == pytest.approx(embedder.encode(["/etc/passwd"])[0].tolist(), abs=1e-6)
