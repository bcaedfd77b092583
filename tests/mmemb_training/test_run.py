"""A recipe runs all stages on data in a public layout, from a public model, and goes on where it stopped."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from rich.console import Console

from mmemb_deploy import OptionError
from mmemb_training.batching import TaskBatches
from mmemb_training.checkpoint import load_checkpoint
from mmemb_training.plan.recipes import load_recipe
from mmemb_training.pool.job import read_pool
from mmemb_training.run import Run, read_samples
from mmemb_training.samples import Question, Sample, Target

INSTRUCTION = "Given an image, find a similar everyday image with the described changes"
RECIPE = """
extends = "qwen3-vl-2b-{method}"
[model]
source = "{source}"
[model.lora]
rank = 4
[pool]
samples = 2
max_tokens = 16
[[pool.workers]]
name = "served"
model = "a-model"
base_url = "http://127.0.0.1:{port}/v1"
[selection]
evaluator = "{evaluator}"
margin_gain = 0.0
margin_content = 0.0
hard_negatives = 2
[joint]
batch = 4
micro_batch = 2
learning_rate = 1e-3
steps = 3
dims = [48, 24]
max_pixels = 256
max_rationale_tokens = 9
precision = "fp32"
[control]
group = 4
queries = 3
steps = 2
"""


@pytest.fixture
def public(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "public"))
    (folder / "mmemb.json").unlink()
    return folder


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A few rows of MMEB-train's CIRR: an image and a change to it, and the image that shows it."""
    root = tmp_path / "MMEB-train"
    rng = np.random.default_rng(0)
    rows = []
    for place in range(8):
        paths = [f"images/CIRR/Train/{side}{place}.png" for side in "qp"]
        for path in paths:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(root / path)
        rows.append(
            {
                "qry": f"<|image_1|>\n{INSTRUCTION}: {place}",
                "qry_image_path": paths[0],
                "pos_text": "<|image_1|>\nRepresent the given image.",
                "pos_image_path": paths[1],
                "neg_text": "",
                "neg_image_path": "",
            }
        )
    (root / "CIRR").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "CIRR" / "original-00000-of-00001.parquet")
    return f"mmeb/CIRR={root}"


class Watched:
    """Runs stages, and remembers which."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def __call__(self, name: str, metrics: Iterator[dict[str, float]], steps: int) -> None:
        assert len(list(metrics)) == steps
        self.stages.append(name)


@pytest.mark.parametrize(("method", "evaluator"), [("full", "embedder"), ("lora", "judge")])
def test_a_recipe_runs_from_a_public_model_to_a_controlled_one(
    endpoint: Any, public: Path, data: str, tmp_path: Path, method: str, evaluator: str
) -> None:
    text = RECIPE.format(source=public, port=endpoint.server_port, method=method, evaluator=evaluator)
    (tmp_path / "recipe.toml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.toml")
    samples, folder, watched = read_samples([data], limit=6), tmp_path / "run", Watched()
    assert len(samples) == 6

    def run() -> None:
        Run(recipe, samples, folder, watched, Console(quiet=True)).upto("control")

    run()
    assert watched.stages == ["joint", "control"]
    assert sorted(read_pool(folder / "pool")) == [f"mmeb/CIRR/{place}" for place in range(6)]
    counts = json.loads((folder / "selection" / "report.json").read_text())["worker"]["served"]
    assert sum(counts.values()) == 12
    requests = len(endpoint.received)
    run()
    assert watched.stages == ["joint", "control"]
    assert len(endpoint.received) == requests
    final = load_checkpoint(folder / "control" / "checkpoint")
    assert final.facts.provenance["stages"] == ["joint", "control"]
    assert final.facts.provenance["source"] == str(public)
    assert final.facts.dims == (48, 24)


def test_data_that_is_not_a_name_and_a_folder_is_refused() -> None:
    with pytest.raises(OptionError, match="is not NAME=FOLDER"):
        read_samples(["mmeb/CIRR"], limit=None)
    with pytest.raises(OptionError, match="data holds no sample"):
        read_samples([], limit=None)


def test_batches_are_of_one_task_and_a_pass_holds_no_sample_twice() -> None:
    samples = [
        Sample(
            question=Question(key=f"{task}{place}", task=task, content="x"),
            wanted="a",
            target=Target(content="y", labels=frozenset("a")),
        )
        for task, count in (("long", 11), ("short", 4), ("tiny", 2))
        for place in range(count)
    ]
    batches = TaskBatches(samples, 3, seed=0)
    assert batches.per_pass == 3 + 1
    for passes in range(3):
        drawn = [batches(passes * batches.per_pass + place) for place in range(batches.per_pass)]
        assert all(len({sample.question.task for sample in batch}) == 1 for batch in drawn)
        keys = [sample.question.key for batch in drawn for sample in batch]
        assert len(keys) == len(set(keys)) == 12
    assert {one.question.key for step in range(40) for one in batches(step)} >= {f"long{place}" for place in range(11)}
    with pytest.raises(OptionError, match="batch is 12: the largest task has 11 samples"):
        TaskBatches(samples, 12, seed=0)
