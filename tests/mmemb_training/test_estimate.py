"""The estimate's counts against torch, transformers and peft themselves, and what fits."""

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, LoraModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3VLForConditionalGeneration

from mmemb_deploy.errors import OptionError
from mmemb_deploy.inputs.prompts import PromptEncoder
from mmemb_training.checkpoint import Checkpoint, load_checkpoint
from mmemb_training.encoder import Continuation, Encoder
from mmemb_training.lora import TRAINED_MARKERS, add_lora
from mmemb_training.losses import info_nce
from mmemb_training.model import _LayerCache, _vision_block, checkpoint_layers  # pyright: ignore[reportPrivateUsage]
from mmemb_training.prepare import PROMPT
from mmemb_training.random_checkpoint import model_config
from mmemb_training.recipes.counts import (
    PromptSize,
    activation_bytes,
    forward_flops,
    layer_bytes,
    longest_prompt,
    loss_bytes,
    vision_layer_bytes,
)
from mmemb_training.recipes.estimate import Estimate, estimate
from mmemb_training.recipes.host import DECODED
from mmemb_training.recipes.load import load_recipe, recipe_names
from mmemb_training.recipes.machines import DEVICES, Machine, machine
from mmemb_training.recipes.settings import PROJECTIONS, LoraSettings, RolloutServer, RunRecipe, TrainedWeights
from mmemb_training.recipes.shapes import HUB, MARKER_ROWS, SHAPES, ModelShape, find_shape, read_shape
from mmemb_training.samples import Question, query_row
from mmemb_training.tokenizer import train_tokenizer

H100S = machine(8, device="h100")
FULL = TrainedWeights(method="full", precision="bf16", gradient_checkpointing=True)
PUBLIC = ("qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b")


def config_of(shape: ModelShape) -> Any:
    """transformers' config of a shape."""
    return model_config(shape, PromptEncoder(train_tokenizer([PROMPT.system], 300), PROMPT))


def on_meta(shape: ModelShape) -> Any:
    """The model of a shape, without weights."""
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config_of(shape))
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


def size_of(row: Any, rationales: int, tokens: int) -> PromptSize:
    """What `rows_of` asks of the model."""
    grid = row.visuals[0].grid
    size = PromptSize(tokens=row.length, frames=1, patches=grid[0] * grid[1])
    return size.followed(rationales, tokens) if rationales else size


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
    config_of(SHAPES["qwen3-vl-4b"]).save_pretrained(tmp_path)
    read = read_shape(tmp_path)
    assert (read.text, read.vision) == (SHAPES["qwen3-vl-4b"].text, SHAPES["qwen3-vl-4b"].vision)


def test_unreadable_shapes_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'qwen3-vl-2b'"):
        find_shape("qwen3-vl-2")
    with pytest.raises(OptionError, match=r"no config\.json"):
        find_shape(str(tmp_path))
    config = config_of(SHAPES["qwen3-vl-2b"]).to_dict()
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
    shape, settings = SHAPES[name], load_recipe(f"{name}-lora").weights.lora
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
    settings = LoraSettings(rank=3, targets=("q_proj", "down_proj"))
    add_lora(tiny, settings)
    trained = sum(weight.numel() for weight in tiny.model.parameters() if weight.requires_grad)
    assert read_shape(tiny_checkpoint).lora_parameters(3, settings.targets) == trained


def test_the_names_of_projections_and_markers_are_those_of_training() -> None:
    assert set(SHAPES["qwen3-vl-2b"].text.projections()) == set(PROJECTIONS)
    assert len(TRAINED_MARKERS) == MARKER_ROWS


# Arithmetic and memory


@pytest.mark.parametrize("paths", [0, 2])
def test_operations_are_those_that_torch_counts(small: Path, paths: int) -> None:
    checkpoint = load_checkpoint(small)
    rows = rows_of(checkpoint, 2)
    rationales = [Continuation(index, [5] * 9) for index in range(2) for _ in range(paths)]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Encoder(checkpoint)(rows, rationales)
    expected = 2 * forward_flops(read_shape(small), size_of(rows[0], paths, 9))
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(("new", "context"), [(40, 40), (12, 60)])
def test_autograd_saves_of_a_text_layer_what_the_formula_says(small: Path, new: int, context: int) -> None:
    checkpoint = load_checkpoint(small)
    layer = checkpoint.model.model.language_model.layers[0].to(torch.bfloat16)
    half = torch.bfloat16
    states = torch.randn(3, new, 128, dtype=half, requires_grad=True)
    rotary = torch.randn(3, new, 32, dtype=half), torch.randn(3, new, 32, dtype=half)
    mask = torch.ones(3, 1, new, context, dtype=torch.bool) if context > new else None
    past = [torch.randn(3, 2, context - new, 32, dtype=half) for _ in range(2)]
    cache = _LayerCache((past[0], past[1]) if context > new else None)
    saved = saved_bytes(
        lambda: layer(states, position_embeddings=rotary, attention_mask=mask, past_key_values=cache),
        [*layer.parameters(), *rotary, *([] if mask is None else [mask])],
    )
    assert saved == 3 * layer_bytes(read_shape(small), new, context, 2)


def test_autograd_saves_of_a_vision_layer_what_the_formula_says(small: Path) -> None:
    block = load_checkpoint(small).model.model.visual.blocks[0].to(torch.bfloat16)
    states = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    rotary = torch.randn(16, 16), torch.randn(16, 16)
    saved = saved_bytes(lambda: _vision_block(block, states, *rotary), [*block.parameters(), *rotary])
    assert saved == 2 * vision_layer_bytes(read_shape(small), 16, 2)


@pytest.mark.parametrize(("prompts", "rationales", "tokens"), [(4, 1, 40), (2, 1, 300), (6, 0, 0), (8, 4, 30)])
def test_a_real_backward_pass_peaks_just_below_the_estimate(
    small: Path, prompts: int, rationales: int, tokens: int
) -> None:
    checkpoint = load_checkpoint(small)
    model = checkpoint.model.to(torch.bfloat16).train()
    checkpoint_layers(model)
    encoder = Encoder(checkpoint).train()
    rows = rows_of(checkpoint, prompts)
    paths = [Continuation(index, [5] * tokens) for index in range(prompts) for _ in range(rationales)]
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    weights = list(model.parameters())
    known = [*weights, *(weight.grad for weight in weights if weight.grad is not None), *model.buffers()]
    with Live(known) as live:
        torch.stack([part.float().sum() for part in encoder(rows, paths)]).sum().backward()
    shape = read_shape(small)
    activations = prompts * activation_bytes(shape, FULL, 8, size_of(rows[0], rationales, tokens))
    waiting = estimate(shape, recipe_for(shape, FULL), H100S).stages["joint"].terms["waiting gradients"].value
    assert waiting
    assert live.peak <= activations + (waiting if rationales else 0) <= 1.2 * live.peak


def test_the_loss_saves_what_the_formula_says() -> None:
    queries, candidates = torch.randn(60, 16, requires_grad=True), torch.randn(90, 16, requires_grad=True)
    relevant = torch.eye(60, 90).bool()
    once = {"copies_Q": torch.ones(60), "copies_C": torch.ones(90)}
    known = [queries, candidates, relevant]
    saved = saved_bytes(lambda: info_nce(queries, candidates, relevant, 0.02, (16, 8), **once), known)
    both, passing = 2 * saved, 2 * 16 * 60 * 90
    assert loss_bytes(60, 90, 2) - passing <= both <= 1.2 * loss_bytes(60, 90, 2)


def test_optimizer_and_gradients_take_what_torch_allocates(tiny: Checkpoint, tiny_checkpoint: Path) -> None:
    weights = list(tiny.model.parameters())
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.numel() > 1)
    shape = read_shape(tiny_checkpoint)
    lasting = estimate(shape, recipe_for(shape, TrainedWeights()), machine(1, memory_gib=80)).stages["joint"].terms
    terms = {name: term.value for name, term in lasting.items()}
    assert terms["optimizer"] == moments
    assert terms["weights"] == terms["gradients"] == sum(weight.nbytes for weight in weights)


# Estimates


def recipe_for(shape: ModelShape, weights: TrainedWeights) -> RunRecipe:
    """A recipe for a shape that no packaged one is for."""
    recipe = load_recipe("qwen3-vl-2b-full")
    objective = replace(recipe.joint.objective, dims=(shape.text.hidden,))
    return replace(
        recipe,
        model=replace(recipe.model, max_pixels=1024, video_max_pixels=256),
        weights=weights,
        joint=replace(recipe.joint, objective=objective),
    )


def made_of(
    recipe: str, where: Machine = H100S, *, examples: int = 100_000, fill: float = 0.5, **joint: Any
) -> Estimate:
    """The estimate of a packaged recipe for its own model; `joint` changes its stage 3."""
    loaded = load_recipe(recipe)
    changed = replace(loaded, joint=replace(loaded.joint, **joint))
    return estimate(SHAPES[HUB[loaded.model.source]], changed, where, examples=examples, fill=fill)


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_fits_eight_large_gpus(name: str) -> None:
    made = made_of(name)
    assert made.fits
    assert made.changes == ()
    joint = made.stages["joint"]
    assert joint.micro_batch * joint.chunks >= 1024 / 8
    assert all(figure.basis for figures in made.figures.values() for figure in figures.values())
    memory = made.figures["memory of a GPU, stage 3 (joint)"]
    parts = [
        figure.value or 0 for name, figure in memory.items() if figure.unit == "B" and name not in ("all", "usable")
    ]
    assert sum(parts) == pytest.approx(memory["all"].value)


def test_one_question_more_at_once_would_not_fit() -> None:
    size = made_of("qwen3-vl-4b-full").stages["joint"].micro_batch
    assert 1 < size < 1024 / 8
    larger = made_of("qwen3-vl-4b-full", micro_batch=size + 1)
    assert not larger.fits
    assert larger.changes[0].startswith("joint.micro_batch = ")


@pytest.mark.parametrize("negatives", [0, 1, 7])
def test_the_targets_of_the_questions_read_at_once_fit_too(negatives: int) -> None:
    recipe, shape = load_recipe("qwen3-vl-4b-lora"), SHAPES["qwen3-vl-4b"]
    joint = made_of("qwen3-vl-4b-lora", hard_negatives=negatives).stages["joint"]
    prompt = longest_prompt(shape, recipe.model)
    targets = joint.micro_batch * (1 + negatives) * activation_bytes(shape, recipe.weights, 8, prompt)
    questions = joint.micro_batch * activation_bytes(shape, recipe.weights, 8, prompt.followed(1, 256))
    assert joint.terms["activations"].value == max(questions, targets)
    assert joint.fits


def test_what_is_too_large_is_named_with_changes_that_fit() -> None:
    small_gpu = machine(1, device="rtx-4090")
    made = made_of("qwen3-vl-4b-full", small_gpu)
    assert not made.fits
    assert "the largest term is optimizer, 33.1 GiB" in made.reason
    assert "method = lora" in made.changes
    assert made_of("qwen3-vl-4b-lora", small_gpu).fits
    gpus = next(change for change in made.changes if change.endswith(" GPUs"))
    count = int(gpus.split()[0])
    assert made_of("qwen3-vl-4b-full", machine(count, device="rtx-4090")).fits
    assert not made_of("qwen3-vl-4b-full", machine(count // 2, device="rtx-4090")).fits
    needed = float(made.changes[-1].split()[0])
    assert made_of("qwen3-vl-4b-full", machine(1, memory_gib=needed)).fits


def test_a_loss_over_too_many_pairs_asks_for_a_smaller_batch() -> None:
    made = made_of("qwen3-vl-2b-full", batch=2**18)
    assert not made.fits
    assert "the largest term is loss" in made.reason
    batch = int(made.changes[0].removeprefix("joint.batch = "))
    assert made_of("qwen3-vl-2b-full", batch=batch).fits
    assert not made_of("qwen3-vl-2b-full", batch=2 * batch).fits


def test_checkpointing_is_the_first_change_where_it_was_off() -> None:
    recipe = load_recipe("qwen3-vl-2b-full")
    recipe = replace(recipe, weights=replace(recipe.weights, gradient_checkpointing=False))
    made = estimate(SHAPES["qwen3-vl-2b"], recipe, machine(8, device="rtx-4090"))
    assert made.changes[0] == "weights.gradient_checkpointing = true"


def test_hours_follow_from_operations_peak_and_utilisation() -> None:
    made = made_of("qwen3-vl-4b-full", machine(4, device="a100-80", utilisation=0.5), examples=2048)
    flops, hours = made.figures["arithmetic"]["3 joint"], made.figures["time"]["3 joint"]
    assert flops.basis.startswith("2 steps: 1024 queries with a rationale, 2048 targets; ")
    assert flops.value is not None
    assert hours.value == pytest.approx(flops.value / (4 * 312e12 * 0.5) / 3600)
    twice = made_of("qwen3-vl-4b-full", machine(4, device="a100-80", utilisation=0.5), examples=4096)
    assert twice.figures["arithmetic"]["3 joint"].value == 2 * flops.value


def test_generation_is_no_faster_than_memory_allows() -> None:
    fast, slow = (machine(1, memory_gib=80, tflops=989.5, bandwidth=speed) for speed in (3350, 100))
    one, other = (made_of("qwen3-vl-2b-lora", where).figures["time"]["1 pool"].value for where in (fast, slow))
    assert one is not None
    assert other is not None
    assert other > 5 * one


def test_hours_are_not_known_without_a_peak() -> None:
    made = made_of("qwen3-vl-2b-lora", machine(2, memory_gib=40))
    assert made.fits
    assert made.figures["time"]["3 joint"].value is None
    assert made.figures["time"]["all"].value is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: machine(0, device="h100"), "gpus is 0"),
        (lambda: machine(1), "memory_gib is not given"),
        (lambda: machine(1, memory_gib=-1), "memory_gib is -1"),
        (lambda: machine(1, device="h10"), "did you mean 'h100'"),
        (lambda: machine(1, device="h100", utilisation=1.5), r"utilisation is 1\.5"),
        (lambda: machine(1, memory_gib=10, tflops=float("nan")), "tflops is nan"),
        (lambda: made_of("qwen3-vl-2b-lora", examples=0), "examples is 0"),
        (lambda: made_of("qwen3-vl-2b-lora", fill=0.0), r"fill is 0\.0"),
        (lambda: made_of("qwen3-vl-2b-lora", batch=4), "batch is 4: each of 8 GPUs"),
        (lambda: estimate(SHAPES["qwen3-vl-2b"], load_recipe("qwen3-vl-4b-lora"), H100S), "dims holds 2560"),
    ],
)
def test_values_that_no_run_can_have_are_refused(call: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()


def test_pixels_that_do_not_fit_a_prompt_are_refused(tmp_path: Path) -> None:
    for key in ("max_pixels", "video_max_pixels"):
        path = tmp_path / "wide.toml"
        path.write_text(f'extends = "qwen3-vl-2b-lora"\n[model]\n{key} = 3000000')
        with pytest.raises(OptionError, match=f"model.{key} is 3000000"):
            estimate(SHAPES["qwen3-vl-2b"], load_recipe(path), H100S)


def test_machines_are_the_devices_that_can_train() -> None:
    assert {"a100-80", "h100", "h200", "l40s", "rtx-4090", "b200"} <= set(DEVICES)
    assert "t4" not in DEVICES  # it has no bfloat16
    assert "jetson-thor" not in DEVICES


def test_the_optimizer_is_the_largest_state_of_full_training_on_one_gpu() -> None:
    shape = SHAPES["qwen3-vl-2b"]
    terms = made_of("qwen3-vl-2b-full", machine(1, device="h200")).stages["joint"].terms
    states = {name: term.value or 0 for name, term in terms.items() if name != "activations"}
    assert max(states, key=lambda name: states[name]) == "optimizer"
    assert sum(states[name] for name in ("weights", "gradients", "optimizer")) == 16 * shape.parameters()


def test_rollouts_that_a_server_writes_take_none_of_the_time_here() -> None:
    recipe, where = load_recipe("qwen3-vl-2b-lora"), machine(1, device="h100")
    server = RolloutServer(base_url="http://somewhere:8000/v1", model="policy")
    served = replace(recipe, control=replace(recipe.control, rollouts=server))
    here, there = (estimate(SHAPES["qwen3-vl-2b"], one, where).figures for one in (recipe, served))
    assert (there["time"]["4 control"].value or 0) < 0.9 * (here["time"]["4 control"].value or 0)
    assert "rollouts by the server at http://somewhere:8000/v1, not counted" in there["arithmetic"]["4 control"].basis
    assert "[control.rollouts] names a server" in here["arithmetic"]["4 control"].basis
    assert "instruct, thinking: served, and counted as if by these GPUs" in here["arithmetic"]["1 pool"].basis


def with_full_control(name: str) -> RunRecipe:
    recipe = load_recipe(name)
    return replace(recipe, control=replace(recipe.control, method="full"))


def test_all_weights_train_sharded_but_control_s_are_adapters_beside_the_weights_that_are_their_reference() -> None:
    stages = made_of("qwen3-vl-4b-full").stages
    assert stages["joint"].terms["optimizer"].value == 8 * SHAPES["qwen3-vl-4b"].parameters() / 8
    control = stages["control"].terms
    assert control["frozen weights"].value == 2 * SHAPES["qwen3-vl-4b"].parameters()
    assert "reference" not in control


def test_what_a_million_pairs_take_beside_the_gpus_grows_with_them_but_for_a_step() -> None:
    few, many = (
        made_of("qwen3-vl-4b-full", examples=count).figures["beside the GPUs"] for count in (100_000, 1_000_000)
    )
    for name in ("samples, on disk", "rationales, in memory"):
        assert many[name].value == 10 * (few[name].value or 0)
    for name in ("images of two steps", "a state of stage 3, on disk", "embeddings, on disk"):
        assert many[name].value == few[name].value
    assert many["a state of stage 3, on disk"].value == 2 * 12 * SHAPES["qwen3-vl-4b"].parameters()
    assert many["images a second"].value == pytest.approx(few["images a second"].value, rel=0.02)
    assert many["cores that decode"].value == (many["images a second"].value or 0) / DECODED


def test_control_of_all_weights_is_refused_on_several_gpus_and_adapters_are_what_makes_it_fit_one() -> None:
    recipe, shape = with_full_control("qwen3-vl-4b-full"), SHAPES["qwen3-vl-4b"]
    with pytest.raises(OptionError, match=r"control trains all weights on 8 GPUs: .*set control\.method = 'lora'"):
        estimate(shape, recipe, H100S)
    lora = replace(recipe, weights=replace(recipe.weights, method="lora"))
    made = estimate(shape, lora, machine(1, device="h100"))
    assert made.stages["joint"].fits
    assert not made.stages["control"].fits
    assert "control.method = lora" in made.changes
    assert not any("GPUs" in change for change in made.changes)
