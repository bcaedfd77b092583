"""The README's examples are run, on the embedded bundle, and answer as they should."""

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"


def examples() -> list[str]:
    """Return the Python of the README, block by block."""
    found: list[str] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(found) == 2
    return found


def run(code: str) -> dict[str, Any]:
    """Run an example; return the names that it leaves."""
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_the_example_runs_and_finds_the_right_answers() -> None:
    names = run(examples()[0])
    similarity = names["embedder"].similarity(names["vectors"], names["documents"])
    assert similarity.argmax(axis=1).tolist() == [0, 1]  # seven; eight, which is 2 x 9 modulo 10
    (detail,) = names["result"].details
    assert detail.route == "reason"
    assert detail.rationale == "6-8x2;6-8=8;8x2=6;"


def test_the_example_of_a_reasoner_follows_what_the_server_writes_or_says_that_it_failed(endpoint: Any) -> None:
    code = examples()[1].replace("http://localhost:8000/v1", endpoint.url)
    endpoint.reply = lambda body: endpoint.answer(body, {"content": "6-8x2;6-8=8;8x2=6;"})
    (detail,) = run(code)["result"].details
    assert (detail.rationale, detail.rationale_source) == ("6-8x2;6-8=8;8x2=6;", f"policy at {endpoint.url}")
    endpoint.reply = lambda _: (400, {"error": {"message": "no"}})
    (detail,) = run(code)["result"].details
    assert (detail.route, detail.fallback is None) == ("fast", False)
