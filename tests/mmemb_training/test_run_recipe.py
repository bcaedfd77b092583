"""A recipe runs all stages on data in a public layout, from a public model, and goes on where it stopped."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from accelerate import Accelerator, DistributedType
from PIL import Image
from rich.console import Console

from fake_vllm import FakeVllm, serving
from mmemb_deploy import BackendError, OptionError
from mmemb_training.checkpoint import load_checkpoint
from mmemb_training.data.table import read_samples
from mmemb_training.micro_batches import CPU_MICRO_BATCH, with_micro_batches
from mmemb_training.pool.build import read_pool
from mmemb_training.recipes.estimate import estimate
from mmemb_training.recipes.load import load_recipe
from mmemb_training.recipes.machines import Machine
from mmemb_training.recipes.settings import ControlRecipe, JointRecipe, changed
from mmemb_training.recipes.shapes import SHAPES
from mmemb_training.run_recipe import Run
from mmemb_training.samples import held_apart
from mmemb_training.selection.select import KeptRationales
from mmemb_training.stage import Metrics
from mmemb_training.task_batches import TaskBatches

INSTRUCTION = "Given an image, find a similar everyday image with the described changes"
RECIPE = """
extends = "qwen3-vl-2b-{method}"
[model]
source = "{source}"
max_pixels = 256
max_rationale_tokens = 9
video_max_pixels = 256
[weights]
precision = "fp32"
[weights.lora]
rank = 4
[pool]
samples = 2
max_tokens = 16
held_apart = 2
[[pool.workers]]
name = "served"
model = "a-model"
base_url = "http://127.0.0.1:{port}/v1"
[selection]
evaluator = "{evaluator}"
hard_negatives = 2
[selection.margins]
gain = 0.0
content = 0.0
[joint]
batch = 4
micro_batch = 2
[joint.schedule]
learning_rate = 1e-3
steps = 3
[joint.objective]
dims = [48, 24]
[control]
group = 4
queries = 2
[control.schedule]
steps = 2
"""


@pytest.fixture
def public(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint as a public model, whose tokenizer has the markers already."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "public"))
    (folder / "mmemb.json").unlink()
    return folder


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A few rows of MMEB-train's CIRR: an image and a change to it, and the image that shows it."""
    root = tmp_path / "MMEB-train"
    rng = np.random.default_rng(0)
    rows = []
    for index in range(12):
        paths = [f"images/CIRR/Train/{side}{index}.png" for side in "qp"]
        for path in paths:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(root / path)
        rows.append(
            {
                "qry": f"<|image_1|>\n{INSTRUCTION}: {index}",
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
    samples, folder, watched = read_samples([data], 8, tmp_path / "samples"), tmp_path / "run", Watched()
    assert len(samples) == 8
    apart_N = held_apart(samples.question_keys(), samples.task_N, 2)
    taught, apart = ([samples[int(index)] for index in np.flatnonzero(mask_N)] for mask_N in (~apart_N, apart_N))

    def rambling(body: dict[str, Any]) -> Any:
        status, content = endpoint.answer(body)
        if endpoint.asked(body).endswith(taught[3].question.key.rpartition("/")[2]):
            content["choices"][1]["message"]["content"] = "on and on " * 200
        return status, content

    endpoint.reply = rambling

    def run() -> None:
        Run(recipe, samples, folder, watched, Console(quiet=True)).upto("control")

    run()
    assert watched.stages == ["joint", "control"]
    assert read_pool(folder / "pool").keys() == {sample.question.key for sample in taught}
    assert len(apart) == 2
    drawn = json.loads((folder / "control" / "run.json").read_text())["data"]
    assert drawn == {"samples": 2}  # which the others never saw
    counts = json.loads((folder / "selection" / "report.json").read_text())["worker"]["served"]
    assert sum(counts.values()) == 11  # 2 of each, but for one that is longer than the runtime writes
    requests = len(endpoint.received)
    run()
    assert watched.stages == ["joint", "control"]
    assert len(endpoint.received) == requests
    final = load_checkpoint(folder / "control" / "checkpoint")
    assert final.facts.provenance["stages"] == ["joint", "control"]
    assert final.facts.provenance["source"] == str(public)
    assert final.facts.dims == (48, 24)
    cheaper = changed(changed(recipe, "joint.micro_batch", 1), "model.planned_tokens", 1024)
    Run(cheaper, samples, folder, watched, Console(quiet=True)).upto("control")
    assert watched.stages == ["joint", "control"]
    for path, value, differing in (
        ("model.max_pixels", 512, "max_pixels"),
        ("selection.hard_negatives", 1, "evaluator"),
        ("joint.hard_negatives", 0, "recipe"),
        ("selection.sampling_temperature", 1.0, "selection"),
        ("control.group", 6, "recipe"),
    ):
        other = Run(changed(recipe, path, value), samples, folder, watched, Console(quiet=True))
        with pytest.raises(OptionError, match=f"the work of another job, with another {differing}: "):
            other.upto("control")
    assert watched.stages == ["joint", "control"]


def test_samples_held_apart_are_the_same_in_any_order_and_of_every_task() -> None:
    tasks = [task for task, count in (("large", 80), ("small", 20), ("lone", 1)) for _ in range(count)]
    keys, task_N = [f"{task}/{index}" for index, task in enumerate(tasks)], np.unique(tasks, return_inverse=True)[1]
    apart_N = held_apart(keys, task_N, 10)
    counts = {task: int(apart_N[np.array(tasks) == task].sum()) for task in set(tasks)}
    assert counts == {"large": 8, "small": 2, "lone": 0}
    assert held_apart(keys[::-1], task_N[::-1], 10)[::-1].tolist() == apart_N.tolist()
    assert held_apart(keys, task_N, 10_000).sum() == 16 + 4  # a fifth at most
    assert not held_apart(keys, task_N, 0).any()


def test_an_embedder_that_was_never_taught_to_embed_is_refused_as_evaluator_before_the_pool(
    endpoint: Any, public: Path, data: str, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as of a public model, which knows no such marker
        text = (public / name).read_text().replace("<|disc_emb|>", "<|some_tok|>")
        (public / name).write_text(text)
    text = RECIPE.format(source=public, port=endpoint.server_port, method="full", evaluator="embedder")
    (tmp_path / "recipe.toml").write_text(text)
    run = Run(
        load_recipe(tmp_path / "recipe.toml"),
        read_samples([data], 6, tmp_path / "samples"),
        tmp_path / "run",
        Watched(),
        Console(quiet=True),
    )
    with pytest.raises(OptionError, match=r"evaluator is 'embedder', and .* has no trained <\|disc_emb\|>"):
        run.upto("selection")
    assert not endpoint.received


def test_a_recipe_names_the_server_that_writes_its_rollouts(
    endpoint: Any, public: Path, data: str, tmp_path: Path
) -> None:
    text = RECIPE.format(source=public, port=endpoint.server_port, method="lora", evaluator="judge")
    rollouts = '[control.rollouts]\nbase_url = "{url}"\nmodel = "policy"\n[control.schedule]\n'
    samples, folder, path = read_samples([data], 8, tmp_path / "samples"), tmp_path / "run", tmp_path / "recipe.toml"

    def run(url: str, upto: str) -> None:
        path.write_text(text.replace("[control.schedule]\n", rollouts.format(url=url)))
        Run(load_recipe(path), samples, folder, Watched(), Console(quiet=True)).upto(upto)

    with pytest.raises(OptionError, match="base_url is 'nowhere'"):
        run("nowhere", "control")
    assert not endpoint.received
    start = r"Serve what stage 3 left: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve .*joint/checkpoint .*-rank 4$"
    with pytest.raises(BackendError, match=start):
        run("http://127.0.0.1:9/v1", "control")
    vllm = FakeVllm(folder / "joint" / "checkpoint")
    with serving(vllm) as url:
        run(url, "control")
    assert vllm.prompts
    assert load_checkpoint(folder / "control" / "checkpoint").facts.provenance["stages"] == ["joint", "control"]
    run("http://127.0.0.1:9/v1", "control")  # which is done, and asks nobody


SMALL_GPU = Machine(name="a GPU", source="a test", memory_gib=24)


@pytest.mark.parametrize("name", ["qwen3-vl-2b-lora", "qwen3-vl-4b-lora"])
def test_a_run_without_a_micro_batch_takes_what_the_estimate_says_fits(name: str) -> None:
    recipe, shape = load_recipe(name), SHAPES[name.removesuffix("-lora")]
    said: list[str] = []
    taken = with_micro_batches(recipe, shape, SMALL_GPU, ("joint", "control"), said.append)
    stages = estimate(shape, recipe, SMALL_GPU).stages
    assert (taken.joint.micro_batch, taken.control.micro_batch) == tuple(one.micro_batch for one in stages.values())
    assert [line.split(":")[0] for line in said] == ["joint", "control"]
    assert f"{stages['joint'].micro_batch} questions at once, as fit into 21.6 GiB" in said[0]


def test_a_run_that_cannot_fit_names_what_would_before_it_starts() -> None:
    recipe, shape = load_recipe("qwen3-vl-4b-full"), SHAPES["qwen3-vl-4b"]
    with pytest.raises(OptionError, match=r"stage 3 \(joint\) needs .* GiB .* It fits with .*method = lora"):
        with_micro_batches(recipe, shape, SMALL_GPU, ("joint",), print)


def test_a_micro_batch_of_the_recipe_s_own_always_holds() -> None:
    recipe, shape = load_recipe("qwen3-vl-4b-full"), SHAPES["qwen3-vl-4b"]
    own = replace(recipe, joint=replace(recipe.joint, micro_batch=1024))
    for machine, also in ((None, ""), (SMALL_GPU, ", although stage 3 (joint) needs ")):
        said: list[str] = []
        assert with_micro_batches(own, shape, machine, ("joint",), said.append) == own
        assert said[0].startswith(f"joint: 1024 questions at once, as the recipe says{also}")


def test_without_a_gpu_a_few_questions_are_read_at_once_and_the_run_says_so() -> None:
    said: list[str] = []
    recipe = load_recipe("qwen3-vl-4b-full")
    taken = with_micro_batches(recipe, SHAPES["qwen3-vl-4b"], None, ("joint", "control"), said.append)
    assert taken.joint.micro_batch == taken.control.micro_batch == CPU_MICRO_BATCH
    assert "there is no GPU" in said[0]


def test_what_fits_the_gpus_that_are_there_is_what_training_is_given(
    public: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = RECIPE.format(source=public, port=1, method="full", evaluator="judge").replace("micro_batch = 2\n", "")
    text = text.replace("held_apart = 2\n", "held_apart = 0\n")
    text = text.replace("batch = 4\n", "batch = 12\n").replace("queries = 2\n", "queries = 10\n")
    (tmp_path / "recipe.toml").write_text(text)
    recipe, samples = load_recipe(tmp_path / "recipe.toml"), read_samples([data], None, tmp_path / "samples")
    begun: list[str] = []
    given: list[JointRecipe | ControlRecipe] = []

    class Stages(Run):
        def pool(self) -> None:
            begun.append("pool")

        def selection(self) -> dict[str, KeptRationales]:
            return {key: KeptRationales() for key in samples.question_keys()}

    def train(_checkpoint: Any, _draw: Any, recipe: JointRecipe | ControlRecipe, *_: Any, **__: Any) -> Metrics:
        given.append(recipe)
        return iter(())

    monkeypatch.setattr("mmemb_training.run_recipe.train_jointly", train)
    monkeypatch.setattr("mmemb_training.run_recipe.train_control", train)

    def run(memory_gib: float) -> None:
        gpus = Machine(name="a GPU", source="a test", memory_gib=memory_gib)
        monkeypatch.setattr("mmemb_training.run_recipe.machine_here", lambda _: gpus)
        Stages(recipe, samples, tmp_path / "run", lambda *_: None, Console(quiet=True)).upto("control")

    with pytest.raises(OptionError, match=r"stage 3 \(joint\) needs"):
        run(0.001)
    assert not begun
    run(80)
    assert [(one.micro_batch, one.schedule.length) for one in given] == [(12, 3), (10, 2)]  # all of a step at once
    assert isinstance(given[0], JointRecipe)
    assert given[0].chunks(processes=1) == 1


def test_one_start_does_not_shard_all_weights_and_train_adapters_beside_whole_ones(
    public: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.format(source=public, port=1, method="full", evaluator="judge"))
    recipe, samples = load_recipe(tmp_path / "recipe.toml"), read_samples([data], None, tmp_path / "samples")
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    run = Run(recipe, samples, tmp_path / "run", lambda *_: None, Console(quiet=True))
    with pytest.raises(OptionError, match="add --upto joint, and then run the same command without it"):
        run.upto("control")
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    full = replace(recipe, control=replace(recipe.control, method=None))
    with pytest.raises(OptionError, match="control trains all weights on 2 GPUs"):
        Run(full, samples, tmp_path / "run", lambda *_: None, Console(quiet=True)).upto("control")


def test_a_worker_without_an_endpoint_is_loaded_here_and_one_without_a_key_takes_none_from_the_environment(
    endpoint: Any, public: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = RECIPE.format(source=public, port=endpoint.server_port, method="full", evaluator="judge")
    here = f'[[pool.workers]]\nname = "here"\nmodel = "{public}"\n[selection]\n'
    text = text.replace("held_apart = 2\n", "held_apart = 0\n")
    (tmp_path / "recipe.toml").write_text(text.replace("[selection]\n", here))
    monkeypatch.setenv("OPENAI_API_KEY", "a secret")
    recipe, samples, folder = (
        load_recipe(tmp_path / "recipe.toml"),
        read_samples([data], 2, tmp_path / "samples"),
        tmp_path / "run",
    )
    Run(recipe, samples, folder, Watched(), Console(quiet=True)).upto("pool")
    assert {one.worker for row in read_pool(folder / "pool").values() for one in row} == {"served", "here"}
    assert len(endpoint.received) == len(samples)
    assert {body["model"] for body in endpoint.received} == {"a-model"}
    assert endpoint.keys == {"Bearer unused"}


def test_data_that_is_not_a_name_and_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is not NAME=FOLDER"):
        read_samples(["mmeb/CIRR"], None, tmp_path)
    with pytest.raises(OptionError, match="data holds no sample"):
        read_samples([], None, tmp_path)


def test_batches_are_of_one_task_and_a_pass_holds_no_sample_twice() -> None:
    task_N = np.repeat([2, 0, 1], [11, 4, 2])
    batches = TaskBatches(task_N, 3, seed=0)
    assert batches.per_pass == 3 + 1
    for passes in range(3):
        drawn = [batches(passes * batches.per_pass + index) for index in range(batches.per_pass)]
        assert all(len(set(task_N[batch])) == 1 for batch in drawn)
        places = [place for batch in drawn for place in batch]
        assert len(places) == len(set(places)) == 12
    assert {place for step in range(40) for place in batches(step)} >= set(range(11))
    with pytest.raises(OptionError, match="batch is 12: the largest task has 11 samples"):
        TaskBatches(task_N, 12, seed=0)
