"""The planner's counts against torch, transformers and peft themselves; what fits; recipes and their errors."""

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from peft import LoraConfig, LoraModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from typer.testing import CliRunner

from mmemb_deploy.errors import OptionError
from mmemb_training import lora
from mmemb_training.checkpoint import Checkpoint, load_checkpoint
from mmemb_training.encoder import Continuation as Rationale
from mmemb_training.encoder import Encoder
from mmemb_training.losses import info_nce
from mmemb_training.model import _LayerCache, _vision_block, checkpoint_layers  # pyright: ignore[reportPrivateUsage]
from mmemb_training.plan.arithmetic import Load, forward_flops
from mmemb_training.plan.commands import plan
from mmemb_training.plan.devices import DEVICES, Machine, machine
from mmemb_training.plan.memory import (
    GIB,
    Training,
    activation_peaks,
    layer_bytes,
    loss_bytes,
    state_terms,
    vision_layer_bytes,
)
from mmemb_training.plan.planner import Plan, make_plan
from mmemb_training.plan.recipes import Recipe, load_recipe, recipe_names
from mmemb_training.plan.shapes import HUB, MARKER_ROWS, SHAPES, ModelShape, find_shape, read_shape
from mmemb_training.samples import Question, query_row

H100S = machine(8, device="h100")
FULL = Training(method="full", precision="bf16", gpus=8)
PUBLIC = ("qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b")


def config_of(shape: ModelShape) -> dict[str, Any]:
    """The config.json of a shape."""
    text, vision = shape.text, shape.vision
    return {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": text.tied,
        "text_config": {
            "hidden_size": text.hidden,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "head_dim": text.head_dim,
            "intermediate_size": text.intermediate,
            "vocab_size": text.vocabulary,
        },
        "vision_config": {
            "hidden_size": vision.hidden,
            "depth": vision.layers,
            "num_heads": vision.heads,
            "intermediate_size": vision.intermediate,
            "out_hidden_size": vision.out,
            "patch_size": vision.patch,
            "temporal_patch_size": vision.temporal_patch,
            "spatial_merge_size": vision.merge,
            "in_channels": vision.channels,
            "num_position_embeddings": vision.positions,
            "deepstack_visual_indexes": list(vision.deepstack),
        },
    }


def on_meta(shape: ModelShape) -> Any:
    """The model of a shape, without weights."""
    config = config_of(shape)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    """A checkpoint whose widths dominate what it saves, as in real models: 6 layers, heads over groups of 2."""
    text = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]},
    }
    vision = {
        "depth": 5,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_heads": 4,
        "out_hidden_size": 128,
        "deepstack_visual_indexes": [1, 3],
    }
    folder: Path = make_checkpoint(tmp_path_factory.mktemp("small") / "checkpoint", text, vision)
    return folder


def rows_of(checkpoint: Checkpoint, count: int) -> list[Any]:
    """Prompts of one image and the same words."""
    image = np.zeros((16, 16, 3), np.uint8)
    question = Question(key="", task="", content={"image": image, "text": "a few words to read"})
    return [query_row(question, checkpoint.rows)] * count


def load_of(row: Any, paths: int, words: int) -> Load:
    """What `rows_of` asks of the model."""
    grid = row.visuals[0].grid
    return Load(tokens=row.length, frames=1, patches=grid[0] * grid[1], paths=paths, words=words)


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are alive, but for those of `known` tensors."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self._seen:
                storage = leaf.untyped_storage()
                self._seen.add(storage.data_ptr())
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return found

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def saved_bytes(run: Any, known: list[Tensor]) -> int:
    """What autograd saves of a computation, but for `known` tensors."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no two storages share an address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


# Shapes


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_shape_has_as_many_parameters_as_transformers_own_model(name: str) -> None:
    shape = SHAPES[name]
    model = on_meta(shape)
    assert shape.parameters() == sum(weight.numel() for weight in model.parameters())
    assert shape.vision.parameters() == sum(weight.numel() for weight in model.model.visual.parameters())


def test_a_checkpoint_folder_states_its_own_shape(tiny_checkpoint: Path, small: Path) -> None:
    for folder in (tiny_checkpoint, small):
        model = load_checkpoint(folder).model
        assert find_shape(str(folder)).parameters() == sum(weight.numel() for weight in model.parameters())


def test_the_shape_that_is_read_is_the_shape_that_was_written(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(SHAPES["qwen3-vl-4b"])))
    read = read_shape(tmp_path)
    assert (read.text, read.vision) == (SHAPES["qwen3-vl-4b"].text, SHAPES["qwen3-vl-4b"].vision)


def test_unreadable_shapes_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'qwen3-vl-2b'"):
        find_shape("qwen3-vl-2")
    with pytest.raises(OptionError, match=r"no config\.json"):
        find_shape(str(tmp_path))
    config = config_of(SHAPES["qwen3-vl-2b"])
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(OptionError, match="model_type is 'llama'"):
        find_shape(str(tmp_path))
    del config["vision_config"]["depth"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OptionError, match="has no 'depth'"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OptionError, match="cannot be read"):
        find_shape(str(tmp_path))


@pytest.mark.parametrize("name", PUBLIC[:2])
def test_adapters_are_as_large_as_those_of_peft(name: str) -> None:
    shape, settings = SHAPES[name], load_recipe(f"{name}-lora").model.lora
    config = LoraConfig(
        r=settings.rank,
        target_modules=rf".*language_model.*\.({'|'.join(settings.targets)})",
        trainable_token_indices={"embed_tokens": list(range(MARKER_ROWS))},
    )
    with torch.device("meta"):
        model = LoraModel(on_meta(shape), config, "default", low_cpu_mem_usage=True)
    trained = {id(weight): weight.numel() for weight in model.parameters() if weight.requires_grad}
    assert shape.lora_parameters(settings.rank, settings.targets) == sum(trained.values())


def test_adapters_are_as_large_as_those_that_training_adds(tiny: Checkpoint, tiny_checkpoint: Path) -> None:
    settings = lora.LoraSettings(rank=3, targets=("q_proj", "down_proj"))
    lora.add_lora(tiny, settings)
    trained = sum(weight.numel() for weight in tiny.model.parameters() if weight.requires_grad)
    assert read_shape(tiny_checkpoint).lora_parameters(3, settings.targets) == trained


def test_the_names_of_projections_and_markers_are_those_of_training() -> None:
    assert set(SHAPES["qwen3-vl-2b"].text.projections()) == set(lora.PROJECTIONS)
    assert len(lora.TRAINED_MARKERS) == MARKER_ROWS


# Arithmetic and memory


@pytest.mark.parametrize("paths", [0, 2])
def test_operations_are_those_that_torch_counts(small: Path, paths: int) -> None:
    checkpoint = load_checkpoint(small)
    rows = rows_of(checkpoint, 2)
    rationales = [Rationale(place, [5] * 9) for place in range(2) for _ in range(paths)]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Encoder(checkpoint)(rows, rationales)
    expected = 2 * forward_flops(read_shape(small), load_of(rows[0], paths, 9))
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(("new", "context"), [(40, 40), (12, 60)])
def test_autograd_saves_of_a_text_layer_what_the_formula_says(small: Path, new: int, context: int) -> None:
    checkpoint = load_checkpoint(small)
    layer = checkpoint.model.model.language_model.layers[0].to(torch.bfloat16)
    half = torch.bfloat16
    states = torch.randn(3, new, 128, dtype=half, requires_grad=True)
    rotary = torch.randn(3, new, 32, dtype=half), torch.randn(3, new, 32, dtype=half)
    mask = torch.ones(3, 1, new, context, dtype=torch.bool)
    past = [torch.randn(3, 2, context - new, 32, dtype=half) for _ in range(2)]
    cache = _LayerCache((past[0], past[1]) if context > new else None)
    saved = saved_bytes(
        lambda: layer(states, position_embeddings=rotary, attention_mask=mask, past_key_values=cache),
        [*layer.parameters(), *rotary, mask],
    )
    assert saved == 3 * layer_bytes(read_shape(small), new, context, 2)


def test_autograd_saves_of_a_vision_layer_what_the_formula_says(small: Path) -> None:
    block = load_checkpoint(small).model.model.visual.blocks[0].to(torch.bfloat16)
    states = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    rotary = torch.randn(16, 16), torch.randn(16, 16)
    saved = saved_bytes(lambda: _vision_block(block, states, *rotary), [*block.parameters(), *rotary])
    assert saved == 2 * vision_layer_bytes(read_shape(small), 16, 2)


@pytest.mark.parametrize(("prompts", "words"), [(4, 40), (2, 300)])
def test_a_real_backward_pass_peaks_just_below_the_estimate(small: Path, prompts: int, words: int) -> None:
    checkpoint = load_checkpoint(small)
    model = checkpoint.model.to(torch.bfloat16).train()
    checkpoint_layers(model)
    encoder = Encoder(checkpoint).train()
    rows = rows_of(checkpoint, prompts)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    weights = list(model.parameters())
    known = [*weights, *(weight.grad for weight in weights if weight.grad is not None), *model.buffers()]
    with Live(known) as live:
        reading = encoder(rows, [Rationale(place, [5] * words) for place in range(prompts)])
        torch.stack([part.float().sum() for part in reading]).sum().backward()
    shape = read_shape(small)
    peaks = activation_peaks(shape, FULL, load_of(rows[0], 1, words), prompts)
    waiting = next(term for term in state_terms(shape, FULL) if term.name == "waiting gradients")
    estimate = max(peaks.values()) + waiting.bytes
    assert live.peak <= estimate <= 1.2 * live.peak


def test_the_loss_saves_what_the_formula_says() -> None:
    queries, candidates = torch.randn(60, 16, requires_grad=True), torch.randn(90, 16, requires_grad=True)
    relevant = torch.eye(60, 90).bool()
    saved = saved_bytes(lambda: info_nce(queries, candidates, relevant, 0.02, (16, 8)), [queries, candidates, relevant])
    both, passing = 2 * saved, 2 * 16 * 60 * 90
    assert loss_bytes(60, 90, 2) - passing <= both <= 1.2 * loss_bytes(60, 90, 2)


def test_optimizer_and_gradients_take_what_torch_allocates(tiny: Checkpoint, tiny_checkpoint: Path) -> None:
    weights = list(tiny.model.parameters())
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.numel() > 1)
    terms = {
        term.name: term.bytes
        for term in state_terms(read_shape(tiny_checkpoint), Training(method="full", precision="fp32", gpus=1))
    }
    assert terms["optimizer"] == moments
    assert terms["weights"] == terms["gradients"] == sum(weight.nbytes for weight in weights)


# Plans


def planned(recipe: str, where: Machine = H100S, **options: Any) -> Plan:
    """The plan of a packaged recipe for its own model."""
    loaded = load_recipe(recipe)
    return make_plan(SHAPES[HUB[loaded.model.source]], loaded, where, **options)


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_fits_eight_large_gpus(name: str) -> None:
    made = planned(name)
    assert made.fits
    assert made.changes == ()
    assert made.micro_batch * made.chunks >= 1024 / 8
    assert all(line.basis for line in made.lines)
    memory = [line for line in made.lines if line.section == "memory of a GPU, stage 3 (joint)"]
    parts = sum(line.value or 0 for line in memory if line.unit == "B" and line.name not in ("all", "usable"))
    assert parts == pytest.approx(made.line(memory[0].section, "all").value)


def test_one_prompt_more_at_once_would_not_fit() -> None:
    made, recipe = planned("qwen3-vl-4b-full"), load_recipe("qwen3-vl-4b-full")
    assert 1 < made.micro_batch < 1024 / 8
    more = recipe.model_copy(update={"joint": recipe.joint.model_copy(update={"micro_batch": made.micro_batch + 1})})
    larger = make_plan(SHAPES["qwen3-vl-4b"], more, H100S)
    assert not larger.fits
    assert larger.changes[0].startswith("micro_batch = ")


def test_what_is_too_large_is_named_with_changes_that_fit() -> None:
    small_gpu = machine(1, device="rtx4090")
    made = planned("qwen3-vl-4b-full", small_gpu)
    assert not made.fits
    assert made.reason is not None
    assert "the largest term is optimizer, 33.1 GiB" in made.reason
    assert "method = lora" in made.changes
    assert planned("qwen3-vl-4b-lora", small_gpu).fits
    gpus = next(change for change in made.changes if change.endswith(" GPUs"))
    count = int(gpus.split()[0])
    assert planned("qwen3-vl-4b-full", machine(count, device="rtx4090")).fits
    assert not planned("qwen3-vl-4b-full", machine(count // 2, device="rtx4090")).fits
    needed = float(made.changes[-1].split()[0])
    assert planned("qwen3-vl-4b-full", machine(1, memory_gib=needed)).fits


def test_a_loss_over_too_many_pairs_asks_for_a_smaller_batch() -> None:
    made = planned("qwen3-vl-2b-full", batch=2**18)
    assert not made.fits
    assert made.reason is not None
    assert "the largest term is loss" in made.reason
    batch = int(made.changes[0].removeprefix("a batch of "))
    assert planned("qwen3-vl-2b-full", batch=batch).fits
    assert not planned("qwen3-vl-2b-full", batch=2 * batch).fits


def test_checkpointing_is_the_first_change_where_it_was_off() -> None:
    recipe = load_recipe("qwen3-vl-2b-full")
    joint = recipe.joint.model_copy(update={"gradient_checkpointing": False})
    made = make_plan(SHAPES["qwen3-vl-2b"], recipe.model_copy(update={"joint": joint}), machine(8, device="rtx4090"))
    assert made.changes[0] == "gradient_checkpointing = true"


def test_hours_follow_from_operations_peak_and_utilisation() -> None:
    made = planned("qwen3-vl-4b-full", machine(4, device="a100", utilisation=0.5), examples=2048)
    step, hours = made.line("arithmetic", "step of stage 3").value, made.line("time", "3 joint").value
    assert step is not None
    assert hours == pytest.approx(2 * step / (4 * 312e12 * 0.5) / 3600)


def test_generation_is_no_faster_than_memory_allows() -> None:
    fast, slow = (machine(1, memory_gib=80, tflops=989.5, bandwidth=speed) for speed in (3350, 100))
    one, other = (planned("qwen3-vl-2b-lora", where).line("time", "1 pool").value for where in (fast, slow))
    assert one is not None
    assert other is not None
    assert other > 5 * one


def test_hours_are_not_known_without_a_peak() -> None:
    made = planned("qwen3-vl-2b-lora", machine(2, memory_gib=40))
    assert made.fits
    assert made.line("time", "3 joint").value is None
    assert made.line("time", "all").value is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: machine(0, device="h100"), "gpus is 0"),
        (lambda: machine(1), "memory_gib is not given"),
        (lambda: machine(1, memory_gib=-1), "memory_gib is -1"),
        (lambda: machine(1, device="h10"), "did you mean 'h100'"),
        (lambda: machine(1, device="h100", utilisation=1.5), r"utilisation is 1\.5"),
        (lambda: machine(1, memory_gib=10, tflops=float("nan")), "tflops is nan"),
        (lambda: planned("qwen3-vl-2b-lora", examples=0), "examples is 0"),
        (lambda: planned("qwen3-vl-2b-lora", fill=0.0), r"fill is 0\.0"),
        (lambda: planned("qwen3-vl-2b-lora", batch=4), "batch is 4: each of 8 GPUs"),
        (lambda: make_plan(SHAPES["qwen3-vl-2b"], load_recipe("qwen3-vl-4b-lora"), H100S), "dims holds 2560"),
    ],
)
def test_values_that_no_run_can_have_are_refused(call: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()


def test_pixels_that_do_not_fit_a_prompt_are_refused(tmp_path: Path) -> None:
    for key in ("max_pixels", "video_max_pixels"):
        path = tmp_path / "wide.toml"
        path.write_text(f'extends = "qwen3-vl-2b-lora"\n[joint]\n{key} = 3000000')
        with pytest.raises(OptionError, match=f"joint.{key} is 3000000"):
            make_plan(SHAPES["qwen3-vl-2b"], load_recipe(path), H100S)


def test_every_device_names_its_source() -> None:
    assert {"a100", "h100", "h200", "l40s", "rtx4090", "b200"} == set(DEVICES)
    assert all("NVIDIA" in device.source and device.tflops and device.bandwidth for device in DEVICES.values())


# Recipes


def recipe_of(folder: Path, text: str) -> Recipe:
    """A user's recipe."""
    path = folder / "mine.toml"
    path.write_text(f'extends = "qwen3-vl-2b-lora"\n{text}')
    return load_recipe(path)


def test_a_recipe_changes_what_it_says_and_takes_the_rest(tmp_path: Path) -> None:
    mine, base = recipe_of(tmp_path, "[joint]\nbatch = 64\nsteps = 10"), load_recipe("qwen3-vl-2b-lora")
    assert (mine.name, mine.joint.batch, mine.joint.steps, mine.joint.epochs) == ("mine", 64, 10, None)
    assert mine.joint.learning_rate == base.joint.learning_rate == 5e-5
    assert mine.control == base.control


def test_public_settings_are_those_that_were_published() -> None:
    recipe = load_recipe("qwen3-vl-4b-full")
    joint, control = recipe.joint, recipe.control
    assert (joint.temperature, joint.lambda_g, joint.lambda_d) == (0.02, 1.0, 1.0)
    assert (control.group, control.beta, control.learning_rate) == (8, 0.04, 1e-6)
    assert (recipe.model.lora.rank, recipe.model.lora.alpha) == (32, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[joint]\nlambda_x = 3", "did you mean 'lambda_g'"),
        ("[joit]\nbatch = 3", "did you mean 'joint'"),
        ("[model.lora]\nrnk = 3", "did you mean 'rank'"),
        ('[[pool.workers]]\nname = "a"\nmodl = "b"', "did you mean 'model'"),
        ('[[pool.workers]]\nname = "a"', r"pool\.workers\.0\.model is not set"),
        ("[joint]\nbatch = 0", r"joint\.batch is 0: .*greater than or equal to 1"),
        ("[joint]\nbatch = true", r"joint\.batch is True"),
        ("[joint]\nbatch = 2.5", r"joint\.batch is 2\.5"),
        ("[joint]\nlearning_rate = nan", r"joint\.learning_rate is nan"),
        ("[joint]\nsteps = 5\nepochs = 2.0", r"joint\.epochs is 2\.0 and steps is 5"),
        ("[joint]\ndims = [64, 128]", r"joint\.dims is \[64, 128\]"),
        ("[model.lora]\ndropout = 1.0", r"model\.lora\.dropout is 1\.0: .*less than 1"),
        ('[model.lora]\ntargets = ["q_prj"]', r"model\.lora\.targets\.0 is 'q_prj'"),
        ("[model.lora]\ntargets = []", r"model\.lora\.targets is \[\]"),
        ("[control]\ngroup = 1", r"control\.group is 1: .*greater than or equal to 2"),
        ("[joint", "is not TOML"),
        ('name = "x"', "named by its file"),
    ],
)
def test_a_bad_recipe_names_key_value_and_limit(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        recipe_of(tmp_path, text)


def test_workers_of_one_name_are_refused(tmp_path: Path) -> None:
    worker = '[[pool.workers]]\nname = "a"\nmodel = "b"\n'
    with pytest.raises(OptionError, match=r"pool\.workers are named a, a"):
        recipe_of(tmp_path, worker + worker)


def test_unknown_recipes_name_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'qwen3-vl-2b-lora'"):
        load_recipe("qwen3-vl-2b-lor")
    with pytest.raises(OptionError, match="does not exist"):
        load_recipe("nowhere.toml")


# The command


def run_plan(*arguments: str) -> str:
    """What `mmemb train plan` prints."""
    app = typer.Typer()
    app.command()(plan)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0
    return result.output


def test_the_command_prints_the_plan_as_json() -> None:
    arguments = ("--model", "qwen3-vl-2b", "--gpus", "8", "--memory-gib", "80", "--method", "full", "--json")
    made = json.loads(run_plan(*arguments, "--device", "h100", "--batch", "512"))
    assert made["fits"] is True
    assert made["recipe"] == "qwen3-vl-2b-full"
    optimizer = next(line for line in made["lines"] if line["name"] == "optimizer")
    assert optimizer["value"] == 8 * SHAPES["qwen3-vl-2b"].parameters() / 8


def test_the_command_draws_a_table_and_says_what_does_not_fit() -> None:
    assert "fits: " in run_plan("--model", "Qwen/Qwen3-VL-2B-Instruct", "--gpus", "8", "--device", "h100")
    shown = run_plan("--model", "qwen3-vl-4b", "--method", "full", "--device", "rtx4090")
    assert "does not fit: " in shown
    assert "fits with method = lora" in shown


def test_a_model_without_a_recipe_asks_for_one() -> None:
    with pytest.raises(OptionError, match="no recipe is named 'qwen3-vl-8b-lora'"):
        run_plan("--model", "qwen3-vl-8b", "--device", "h100")
    with pytest.raises(OptionError, match="method 'lra' is not known"):
        run_plan("--method", "lra", "--device", "h100")
    made = json.loads(
        run_plan("--model", "qwen3-vl-8b", "--recipe", "qwen3-vl-4b-lora", "--memory-gib", "80", "--json")
    )
    assert made["model"] == "qwen3-vl-8b"


def test_the_optimizer_is_the_largest_state_of_full_training_on_one_gpu() -> None:
    shape = SHAPES["qwen3-vl-2b"]
    states = state_terms(shape, Training(method="full", precision="bf16", gpus=1))
    assert max(states, key=lambda term: term.bytes).name == "optimizer"
    assert sum(term.bytes for term in states if term.name in ("weights", "gradients", "optimizer")) / GIB == (
        pytest.approx(16 * shape.parameters() / GIB)
    )
