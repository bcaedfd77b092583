"""Every script of examples/ is run, says in its docstring how, and shows what it promises to show."""

import ast
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmemb_deploy import BackendError, Embedder
from mmemb_deploy.bundle.folder import NANO
from mmemb_deploy.bundle.manifest import read_manifest, write_manifest

FOLDER = Path(__file__).parents[1] / "examples"
RUN_BELOW = {
    "embed_documents",
    "embed_images",
    "embed_text",
    "gate_budget",
    "mteb_model",
    "remote_vllm",
    "search_folder",
    "tensorrt_engine",
}

Run = Callable[..., list[str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example as its reader does; return the lines that it prints."""

    def run(name: str, *arguments: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in FOLDER.iterdir() if path.suffix == ".py"} == RUN_BELOW


@pytest.mark.parametrize("name", sorted(RUN_BELOW))
def test_an_example_says_what_it_shows_and_how_to_run_it(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    described = ast.get_docstring(ast.parse(text)) or ""
    assert described.partition("\n")[0].endswith(".")
    assert f"python examples/{name}.py" in described
    assert "pip install 'mmemb-deploy[" in described


def test_texts_are_embedded_and_the_gate_decides(run: Run) -> None:
    _, *rows = run("embed_text")
    assert [row.split()[-1] for row in rows] == ["seven", "seven", "six"]
    assert [re.split(r" {2,}", row)[1:3] for row in rows] == [
        ["fast", "-"],
        ["reason", "3+4;3+4=7;"],
        ["reason", "6-8x2;6-8=8;8x2=6;"],
    ]


def test_pictures_are_named_and_computed_with(run: Run) -> None:
    assert [row.rpartition(" ")[2] for row in run("embed_images")] == ["five", "seven", "two"]


def test_a_query_finds_the_page_of_a_document(run: Run) -> None:
    rows = run("embed_documents")
    assert [row.rpartition(",")[0] for row in rows] == [
        "five: letter.pdf, page 2",
        "three times three: report.pdf, page 1",
    ]


def test_a_budget_of_the_gate_is_kept_and_reasoning_pays(run: Run) -> None:
    found = [re.search(r"reasons +(\d+)%  tokens +([\d.]+)  hits ([\d.]+)", row) for row in run("gate_budget")]
    shares, tokens, hits = zip(*([float(value) for value in each.groups()] for each in found if each), strict=True)
    assert len(shares) == 5
    assert (shares[0], shares[-1]) == (0, 100)
    assert 0 < shares[1] <= 10 < shares[3] < 100
    assert tokens[0] == 0 < tokens[1] < tokens[3] < tokens[-1]
    assert hits[0] + 0.1 < hits[3]


def test_a_folder_is_indexed_once_and_searched_by_words_and_by_a_picture(run: Run, tmp_path: Path) -> None:
    load_digits: Any = import_module("sklearn.datasets").load_digits  # which ships no types
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, drawing in enumerate(load_digits().images[:20]):
        picture = Image.fromarray((drawing * 255 / 16).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:02}.png")
    by_words = run("search_folder", folder, "seven")
    assert {row.split()[1] for row in by_words[:2]} == {"07.png", "17.png"}
    index = (tmp_path / "pictures.npz").read_bytes()
    by_picture = run("search_folder", folder, folder / "03.png")
    assert by_picture[0] == "1.00  03.png"
    assert by_picture[1].endswith("13.png")
    assert (tmp_path / "pictures.npz").read_bytes() == index


@pytest.fixture
def portable(tmp_path: Path) -> Path:
    """The embedded bundle, whose manifest says that its graphs are portable: nothing reads them without a GPU."""
    folder = tmp_path / "portable"
    shutil.copytree(NANO, folder)
    manifest = read_manifest(folder)
    graphs = {name: facts.model_copy(update={"form": "portable"}) for name, facts in manifest.graphs.items()}
    write_manifest(folder, manifest.model_copy(update={"graphs": graphs}))
    return folder


@pytest.mark.no_gpu
def test_without_a_gpu_engines_are_refused_before_anything_is_built(run: Run, portable: Path) -> None:
    with pytest.raises(BackendError, match=r"NVIDIA driver.*machine with an NVIDIA GPU"):
        run("tensorrt_engine", "checkpoint", portable)
    assert not (portable / "engines").exists()


def test_a_server_writes_the_rationales_or_the_example_says_that_it_did_not(run: Run, endpoint: Any) -> None:
    endpoint.reply = lambda body: endpoint.answer(body, {"content": "6-8x2;6-8=8;8x2=6;"})
    assert run("remote_vllm", endpoint.url) == [
        "seven: needed no reasoning, so that the server was not asked",
        f"six minus eight times two: 6-8x2;6-8=8;8x2=6; (written by policy at {endpoint.url})",
    ]
    assert [endpoint.asked(body) for body in endpoint.received] == ["six minus eight times two"]
    endpoint.reply = lambda _: (400, {"error": {"message": "no"}})
    assert "embedded without reasoning, since BadRequestError" in run("remote_vllm", endpoint.url)[1]


def test_mteb_scores_what_the_embedder_answers(run: Run) -> None:
    never, auto = run("mteb_model")
    questions = ["seven", "one minus six", "six plus one", "four times four times three"]
    reasoned = sum(detail.route == "reason" for detail in Embedder.load().encode_detailed(questions).details if detail)
    assert re.fullmatch(r"never: NDCG@10 0\.\d+, 0 of 4 questions reasoned", never)
    assert auto == f"auto: NDCG@10 1.000, {reasoned} of 4 questions reasoned"
