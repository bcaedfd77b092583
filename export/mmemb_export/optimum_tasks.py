"""The decoder's graphs as optimum describes exports: importing this registers them for the backend "mmemb".

    TasksManager.get_exporter_config_constructor("mmemb", model_type="qwen3_vl", task="feature-extraction")(config)

gives the names and the axes of a graph's inputs and outputs, and inputs to try it with. The export itself is
`mmemb_export.write.export_bundle`, or `optimum-cli export mmemb`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from optimum.exporters.base import ExporterConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils import NormalizedConfig
from torch import Tensor

from mmemb_deploy.bundle import abi
from mmemb_export.graphs import Axes, embedder_inputs, generator_inputs

BACKEND = "mmemb"
register: Any = TasksManager.create_register(BACKEND, overwrite_existing=True)  # annotated wrongly there


class GraphConfig(ExporterConfig):  # type: ignore[misc]  # optimum is not typed
    """A graph of a `Qwen3VLConfig`; its sizes are those that export traces with."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    ATOL_FOR_VALIDATION = 1e-4

    def __init__(self, config: Any, task: str, **options: Any) -> None:
        super().__init__(config, task, **options)
        self.model_config = config

    made: tuple[str, str]
    """Outputs with one row for every input; the others are the cache's."""

    cached: str
    """The axis of the cache's tokens."""

    @abstractmethod
    def examples(self) -> tuple[dict[str, Tensor], Axes]:
        """Return inputs by name, and the axes that vary."""

    @property
    def inputs(self) -> Axes:
        """Return the axes that vary, by input."""
        return self.examples()[1]

    @property
    def outputs(self) -> Axes:
        """Return the axes that vary, by output."""
        present = abi.present_names(self.model_config.text_config.num_hidden_layers)
        return {name: {0: "batch"} for name in self.made} | {name: {0: "batch", 2: self.cached} for name in present}

    def generate_dummy_inputs(self, framework: str = "pt", **shapes: Any) -> dict[str, Tensor]:
        """Return inputs to try the graph with, as torch tensors; their shapes are fixed."""
        if framework != "pt" or shapes:
            raise ValueError(f"dummy inputs are torch tensors of fixed shapes, not {framework!r} with {shapes}")
        return self.examples()[0]


@register("qwen3_vl", "feature-extraction")
class EmbedderConfig(GraphConfig):
    """Prompts to embeddings, the gate's input and the KV cache."""

    made = abi.EMBEDDING, abi.STATE
    cached = "tokens"

    def examples(self) -> tuple[dict[str, Tensor], Axes]:
        """Return the inputs of `abi.EMBEDDER`."""
        return embedder_inputs(self.model_config)


@register("qwen3_vl", "text-generation-with-past")
class GeneratorConfig(GraphConfig):
    """New tokens after a KV cache to logits, embeddings and the longer cache."""

    SUPPORTS_PAST = True
    made = abi.LOGITS, abi.EMBEDDING
    cached = "all_tokens"

    def __init__(self, config: Any, task: str, *, use_past: bool, **options: Any) -> None:
        """Describe the graph of a config. Raises ValueError without `use_past`: it always continues a cache."""
        if not use_past:
            raise ValueError(f"use_past is {use_past}: the generator continues a KV cache, ask for {task}-with-past")
        super().__init__(config, task, **options)

    def examples(self) -> tuple[dict[str, Tensor], Axes]:
        """Return the inputs of `abi.GENERATOR`."""
        return generator_inputs(self.model_config)
