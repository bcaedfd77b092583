"""The README's example is run, on the embedded bundle, and answers as it should."""

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs_and_finds_the_right_answers() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    similarity = names["embedder"].similarity(names["vectors"], names["documents"])
    assert similarity.argmax(axis=1).tolist() == [0, 1]  # seven; eight, which is 2 x 9 modulo 10
    (detail,) = names["result"].details
    assert detail.route == "reason"
    assert detail.rationale == "6-8x2;6-8=8;8x2=6;"
