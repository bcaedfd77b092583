"""Shapes of Qwen3-VL models, and what follows from a shape alone: its parameters and those of its LoRA adapters.

The facts are those of each model's public config.json; `source` says where a shape was read and what confirmed it.
`read_shape` reads the same facts off any checkpoint folder. A count is a closed formula; tests hold it against
transformers' own modules, instantiated on torch's meta device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmemb_deploy.errors import OptionError, check_known

TEXT_KEYS = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate": "intermediate_size",
    "vocabulary": "vocab_size",
}
VISION_KEYS = {
    "hidden": "hidden_size",
    "layers": "depth",
    "heads": "num_heads",
    "intermediate": "intermediate_size",
    "out": "out_hidden_size",
    "patch": "patch_size",
    "temporal_patch": "temporal_patch_size",
    "merge": "spatial_merge_size",
    "channels": "in_channels",
    "positions": "num_position_embeddings",
}
MARKER_ROWS = 2  # rows of the embedding table that LoRA trains: <|disc_emb|> and <|gen_emb|>


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """The language model. Its linear layers have no biases; queries and keys are normalised per head."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool  # the head is the embedding table

    def projections(self) -> dict[str, tuple[int, int]]:
        """Return the (in, out) sizes of a layer's linear maps, by the names that LoRA targets."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    def layer_matrices(self) -> int:
        """Return the parameters of a layer's linear maps."""
        return sum(rows * columns for rows, columns in self.projections().values())

    def layer_parameters(self) -> int:
        """Return the parameters of a layer: linear maps, two norms, the norms of queries and keys."""
        return self.layer_matrices() + 2 * self.hidden + 2 * self.head_dim

    def embedding_parameters(self) -> int:
        """Return the parameters of the embedding table, which are also the head's where the two are tied."""
        return self.vocabulary * self.hidden

    def parameters(self) -> int:
        """Return all parameters, the head's included."""
        tables = self.embedding_parameters() * (1 if self.tied else 2)
        return tables + self.layers * self.layer_parameters() + self.hidden


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """The vision tower. Its linear layers have biases; every DeepStack level has a merger of its own."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    out: int  # the language model's hidden size
    patch: int  # pixels along a side
    temporal_patch: int  # frames
    merge: int  # patches along a side that become one visual token
    channels: int
    positions: int  # rows of the learned position table
    deepstack: tuple[int, ...]  # layers whose output is a DeepStack level

    @property
    def merged(self) -> int:
        """The width of the patches that become one visual token."""
        return self.hidden * self.merge**2

    def patch_matrix(self) -> int:
        """Return the weights that embed a patch."""
        return self.channels * self.temporal_patch * self.patch**2 * self.hidden

    def layer_matrices(self) -> int:
        """Return the weights of a layer's linear maps: queries, keys, values, output, and two of the MLP."""
        return 4 * self.hidden**2 + 2 * self.hidden * self.intermediate

    def merger_matrices(self) -> int:
        """Return the weights of one merger's two linear maps."""
        return self.merged**2 + self.merged * self.out

    def layer_parameters(self) -> int:
        """Return the parameters of a layer: linear maps, their biases, two LayerNorms."""
        return self.layer_matrices() + 9 * self.hidden + self.intermediate

    def parameters(self) -> int:
        """Return all parameters. The last merger normalises single patches, those of DeepStack merged ones."""
        mergers = (1 + len(self.deepstack)) * (self.merger_matrices() + self.merged + self.out)
        norms = 2 * self.hidden + len(self.deepstack) * 2 * self.merged
        tables = self.patch_matrix() + self.hidden + self.positions * self.hidden
        return tables + self.layers * self.layer_parameters() + mergers + norms


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A Qwen3-VL: where its facts come from, its language model, its vision tower."""

    name: str
    source: str
    text: TextShape
    vision: VisionShape

    def parameters(self) -> int:
        """Return all parameters."""
        return self.text.parameters() + self.vision.parameters()

    def lora_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Return what LoRA trains: two factors per target and layer, and the markers' rows of the embedding table."""
        sizes = self.text.projections()
        factors = sum(sum(sizes[name]) for name in targets)
        return self.text.layers * rank * factors + MARKER_ROWS * self.text.hidden


_TEXT_2B = TextShape(
    hidden=2048, layers=28, heads=16, kv_heads=8, head_dim=128, intermediate=6144, vocabulary=151936, tied=True
)
_TEXT_4B = replace(_TEXT_2B, hidden=2560, layers=36, heads=32, intermediate=9728)
_TEXT_8B = replace(_TEXT_2B, hidden=4096, layers=36, heads=32, intermediate=12288, tied=False)
_VISION_2B = VisionShape(
    hidden=1024,
    layers=24,
    heads=16,
    intermediate=4096,
    out=2048,
    patch=16,
    temporal_patch=2,
    merge=2,
    channels=3,
    positions=2304,
    deepstack=(5, 11, 17),
)
_VISION_4B = replace(_VISION_2B, out=2560)
_VISION_8B = replace(_VISION_2B, hidden=1152, layers=27, intermediate=4304, out=4096, deepstack=(8, 16, 24))
_EMBEDDING = (
    "layers and width: README of github.com/QwenLM/Qwen3-VL-Embedding; the rest: its base model, whose class it loads. "
)

SHAPES = {
    name: ModelShape(name=name, text=text, vision=vision, source=source)
    for name, text, vision, source in (
        (
            "small",
            replace(_TEXT_2B, hidden=1024, layers=12, intermediate=3072),
            replace(_VISION_2B, hidden=512, layers=8, heads=8, intermediate=2048, out=1024, deepstack=(1, 3, 5)),
            "no public model: a shape of 0.2 billion parameters beside its token table, to measure with",
        ),
        (
            "qwen3-vl-2b",
            _TEXT_2B,
            _VISION_2B,
            "config.json of Qwen/Qwen3-VL-2B-Instruct, as torchtitan's experiments/qwen3_vl restates it",
        ),
        (
            "qwen3-vl-4b",
            _TEXT_4B,
            _VISION_4B,
            "config.json of Qwen/Qwen3-VL-4B-Instruct, in the copies that derived models publish",
        ),
        (
            "qwen3-vl-8b",
            _TEXT_8B,
            _VISION_8B,
            "config.json of Qwen/Qwen3-VL-8B-Instruct, as torchtitan's experiments/qwen3_vl restates it; the "
            "same in ollama's metadata of qwen3-vl:8b-instruct",
        ),
        ("qwen3-vl-embedding-2b", _TEXT_2B, _VISION_2B, _EMBEDDING + "2B: tied"),
        (
            "qwen3-vl-embedding-8b",
            _TEXT_8B,
            _VISION_8B,
            _EMBEDDING + "8B: counted with the base's untied head, which the method needs and an embedding model may "
            "not bring",
        ),
    )
}
HUB = {
    "Qwen/Qwen3-VL-2B-Instruct": "qwen3-vl-2b",
    "Qwen/Qwen3-VL-2B-Thinking": "qwen3-vl-2b",
    "Qwen/Qwen3-VL-4B-Instruct": "qwen3-vl-4b",
    "Qwen/Qwen3-VL-4B-Thinking": "qwen3-vl-4b",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3-vl-8b",
    "Qwen/Qwen3-VL-8B-Thinking": "qwen3-vl-8b",
    "Qwen/Qwen3-VL-Embedding-2B": "qwen3-vl-embedding-2b",
    "Qwen/Qwen3-VL-Embedding-8B": "qwen3-vl-embedding-8b",
}
"""The name here of every public model whose shape is known."""


def find_shape(model: str) -> ModelShape:
    """Return the shape of a name here, of a public model's hub id, or of a checkpoint folder.

    Raises OptionError for anything else, naming what is known.
    """
    if (Path(model) / "config.json").is_file():
        return read_shape(Path(model))
    if Path(model).is_dir():
        raise OptionError(f"model is {model!r}: the folder has no config.json")
    name = HUB.get(model, model)
    check_known("model", name, SHAPES)
    return SHAPES[name]


def read_shape(folder: Path) -> ModelShape:
    """Return the shape that a checkpoint folder's config.json states.

    Raises OptionError for a model of another family, and for a key that is missing.
    """
    path = folder / "config.json"
    try:
        config: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "qwen3_vl":
        raise OptionError(f"{path}: model_type is {kind!r}; an estimate is for 'qwen3_vl', dense Qwen3-VL models")
    try:
        return _shape(folder.name, str(path), config)
    except KeyError as error:
        raise OptionError(f"{path} has no {error.args[0]!r}: a Qwen3-VL's config.json states it") from error


def _shape(name: str, source: str, config: Mapping[str, Any]) -> ModelShape:
    text, vision = config["text_config"], config["vision_config"]
    if text.get("attention_bias"):
        raise OptionError(f"{source}: attention_bias is true; Qwen3-VL has no such biases")
    return ModelShape(
        name=name,
        source=source,
        text=TextShape(
            tied=bool(config.get("tie_word_embeddings", False)),
            **{field: text[key] for field, key in TEXT_KEYS.items()},
        ),
        vision=VisionShape(
            deepstack=tuple(vision["deepstack_visual_indexes"]),
            **{field: vision[key] for field, key in VISION_KEYS.items()},
        ),
    )
