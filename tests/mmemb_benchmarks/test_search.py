"""Ways to search are compared on vectors that have neighbours, against all of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from mmemb_benchmarks import commands
from mmemb_benchmarks.measure.search import FLAT, NUMPY, clustered


def test_vectors_have_neighbours_and_no_axis_of_their_own() -> None:
    vectors_ND, queries_QD = clustered(5000, 64, 50, seed=1)
    assert np.linalg.norm(vectors_ND, axis=1) == pytest.approx(1, abs=1e-5)
    scores_QN = np.sort(queries_QD @ vectors_ND.T, axis=1)
    assert scores_QN[:, -10:].mean() > scores_QN.mean() + 0.3
    spread_D = vectors_ND.std(axis=0)
    assert spread_D.max() < 3 * spread_D.min()
    assert (clustered(5000, 64, 50, seed=1)[0] == vectors_ND).all()


def test_the_command_measures_every_way_against_numpy(tmp_path: Path) -> None:
    app = typer.Typer()
    commands.register(app)
    target = tmp_path / "search.json"
    words = ["bench", "search", "--rows", "2000", "--rows", "1000", "--dim", "64", "--queries", "32"]
    run = CliRunner().invoke(app, [*words, "--out", str(target)])
    assert run.exit_code == 0, run.exception
    written = json.loads(target.read_text())
    assert (written["kind"], written["bundle"]) == ("search", None)
    assert [(each["rows"], each["dim"]) for each in written["result"]["settings"]] == [(2000, 64), (1000, 64)]
    ways = written["result"]["settings"][0]["ways"]
    for exact in (NUMPY, FLAT, "float32, exact"):
        assert ways[exact]["recall_at_10"] == pytest.approx(1, abs=0.01)  # equal scores may change places
    assert ways["ubinary"]["recall_at_10"] < ways["ubinary + float32"]["recall_at_10"]
    assert ways["index + float32"]["recall_at_10"] > 0.9
    assert ways["int8, exact"]["bytes"] < ways["float32, exact"]["bytes"] / 3
    assert "index + float32" in run.stdout
