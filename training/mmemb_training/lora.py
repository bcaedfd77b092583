"""LoRA by peft: adapters on the language model's projections, and the rows of the new markers trained beside them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from mmemb_deploy.errors import MissingExtraError, OptionError
from mmemb_deploy.inputs import prompts
from mmemb_training.checkpoint import Checkpoint

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINED_MARKERS = (prompts.DISC_EMB, prompts.GEN_EMB)  # rows that a public checkpoint does not have


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Adapters of a rank on the named projections of every text layer; their output is scaled by alpha / rank."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError(f"rank is {self.rank}: it must be at least 1")
        unknown = set(self.targets) - set(PROJECTIONS)
        if unknown:
            raise OptionError(f"targets holds {', '.join(sorted(unknown))}: choose from {', '.join(PROJECTIONS)}")


def add_lora(checkpoint: Checkpoint, settings: LoraSettings) -> Any:
    """Freeze a checkpoint's model but for new adapters and the markers' rows, in place; return what merges them."""
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
        trainable_token_indices={"embed_tokens": [ids[marker] for marker in TRAINED_MARKERS]},
    )
    adapter = LoraModel(checkpoint.model, config, "default")
    for weight in checkpoint.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # small steps vanish in bf16, which the frozen weights may be in
    return adapter


def merge_lora(adapter: Any) -> None:
    """Fold the adapters into the weights, in place: the model is an ordinary one again, whole in every process."""
    for module in adapter.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(weight, DTensor):
                module.register_parameter(name, nn.Parameter(weight.full_tensor(), weight.requires_grad))
    adapter.merge_and_unload()


@contextmanager
def without_lora(adapter: Any) -> Generator[None]:
    """Run the model as it was before its adapters."""
    adapter.disable_adapter_layers()
    try:
        yield
    finally:
        adapter.enable_adapter_layers()
