"""Which weights train: all of them, or by peft adapters on the language model's projections and the markers' rows."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from mmemb_deploy.errors import MissingExtraError
from mmemb_deploy.inputs import prompts
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.model import checkpoint_layers
from mmemb_training.recipes.settings import LoraSettings, TrainedWeights

TRAINED_MARKERS = (prompts.DISC_EMB, prompts.GEN_EMB)  # rows that a public checkpoint does not have


def add_lora(checkpoint: Checkpoint, settings: LoraSettings, *, markers: bool = True) -> Any:
    """Freeze a checkpoint's model but for new adapters, in place; return what merges them.

    With `markers`, the markers' rows of the embedding table train too.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ModuleNotFoundError as error:
        raise MissingExtraError("peft", "train") from error
    ids = checkpoint.rows.prompt.ids
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=rf".*language_model.*\.({'|'.join(settings.targets)})",
        trainable_token_indices={"embed_tokens": [ids[marker] for marker in TRAINED_MARKERS]} if markers else None,
    )
    adapter = LoraModel(checkpoint.model, config, "default")
    for weight in checkpoint.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # small steps vanish in bf16, which the frozen weights may be in
    return adapter


@contextmanager
def trainable(checkpoint: Checkpoint, weights: TrainedWeights, *, markers: bool = True) -> Generator[Any]:
    """Make a checkpoint's model train as `weights` say, and whole again after the block; yield the adapters, if any.

    Beside adapters, the markers' rows train where `markers` says so.
    """
    adapter = None if weights.adapters is None else add_lora(checkpoint, weights.adapters, markers=markers)
    if weights.gradient_checkpointing:
        checkpoint_layers(checkpoint.model)
    yield adapter
    checkpoint.model.eval()
    if adapter is not None:
        merge_lora(adapter)


def merge_lora(adapter: Any) -> None:
    """Fold the adapters into the weights, in place: the model is an ordinary one again, whole in every process.

    It is float32 from then on: what adapters learn is often less than half a step of a bf16 weight, and would be lost.
    """
    adapter.float()
    for module in adapter.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(weight, DTensor):
                module.register_parameter(name, nn.Parameter(weight.full_tensor(), weight.requires_grad))
    adapter.merge_and_unload()


def save_lora(adapter: Any, folder: Path) -> None:
    """Write adapters as peft does, for a server to load: adapter_config.json and adapter_model.safetensors."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(adapter, adapter_name="default")
    folder.mkdir(parents=True)
    save_file(
        {f"base_model.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    adapter.peft_config["default"].save_pretrained(str(folder))


@contextmanager
def without_lora(adapter: Any) -> Generator[None]:
    """Run the model as it was before its adapters."""
    adapter.disable_adapter_layers()
    try:
        yield
    finally:
        adapter.enable_adapter_layers()
