"""Recipes: the settings of a run over all stages, as TOML that is read into frozen, typed sections.

A recipe says only what it changes: `extends = "NAME"` takes the rest from another recipe of this package. Where a
setting is public, and which are ours, is written beside it in recipes/base.toml.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from mmemb_deploy.errors import OptionError, check_known

BASE = "base"  # what the packaged recipes extend; not a recipe itself: it names no model

Method = Literal["full", "lora"]
METHODS = get_args(Method)
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Listed = Field(min_length=1, strict=False)  # TOML has lists, and no tuples


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Lora(_Section):
    """Adapters on the language model; read where `method` is "lora"."""

    rank: Count
    alpha: Count  # the adapters' output is scaled by alpha / rank
    dropout: Annotated[float, Field(ge=0, lt=1)]
    targets: Annotated[tuple[Projection, ...], Listed]  # projections of every text layer


class Model(_Section):
    """Which model is trained, and which of its weights."""

    source: str = Field(min_length=1)  # hub id or folder
    method: Method
    lora: Lora


class Worker(_Section):
    """Who writes rationales: a model loaded here, or one behind an OpenAI-compatible endpoint."""

    name: str = Field(min_length=1)
    model: str = Field(min_length=1)  # hub id or folder, or the name that the endpoint serves
    base_url: str | None = None  # of the endpoint; None loads the model here
    api_key_variable: str | None = None  # environment variable that holds the endpoint's key


class Pool(_Section):
    """Stage 1."""

    workers: Annotated[tuple[Worker, ...], Listed]
    samples: Count  # rationales per worker and question
    max_tokens: Count  # of one answer
    temperature: NotNegative

    @model_validator(mode="after")
    def _names_differ(self) -> Pool:
        names = [worker.name for worker in self.workers]
        if len(set(names)) < len(names):
            raise ValueError(f"workers are named {', '.join(names)}: each needs a name of its own")
        return self


class Selection(_Section):
    """Stage 2."""

    evaluator: Literal["judge", "embedder"]
    margin_gain: NotNegative  # nats by which a rationale must help its pair
    margin_content: NotNegative  # nats by which it must help more than other questions' rationales
    temperature: Positive  # of the embedder's softmax over candidates
    sampling_temperature: Positive  # nats: kept rationales are drawn in proportion to exp(gain / this)
    hard_negatives: CountOrNone  # candidates beside the target
    foreign: Count  # rationales of other questions that each worker's are compared with


class Joint(_Section):
    """Stage 3."""

    batch: Count  # questions of a step, over all processes
    micro_batch: Count | None = None  # prompts that a process reads at once; None: what fits
    learning_rate: Positive
    warmup: CountOrNone  # steps
    weight_decay: NotNegative
    epochs: Positive | None = None  # one of epochs and steps
    steps: Count | None = None
    temperature: Positive  # of InfoNCE
    lambda_g: NotNegative  # weight of the next-token terms
    lambda_d: NotNegative  # weight of the direct embedding's InfoNCE
    hard_negatives: CountOrNone  # targets of a question beside its own
    dims: Annotated[tuple[Count, ...], Listed]  # Matryoshka sizes, largest first
    max_pixels: Count  # of an image
    max_tokens: Annotated[int, Field(ge=16)]  # of a prompt
    max_rationale_tokens: Count
    video_frames: Annotated[int, Field(ge=2)]
    video_max_pixels: Count  # of a frame
    precision: Literal["bf16", "fp32"]
    gradient_checkpointing: bool

    @model_validator(mode="after")
    def _consistent(self) -> Joint:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs is {self.epochs} and steps is {self.steps}: set exactly one of them")
        if list(self.dims) != sorted(set(self.dims), reverse=True):
            raise ValueError(f"dims is {list(self.dims)}: list each size once, largest first")
        return self


class Control(_Section):
    """Stage 4."""

    group: Annotated[int, Field(ge=2)]  # rollouts of a question
    queries: Count  # questions of a batch of rollouts, over all processes
    steps: Count
    updates: Count  # steps on each batch of rollouts
    learning_rate: Positive
    beta: NotNegative  # of the KL to the stage-3 model
    clip: Annotated[float, Field(gt=0, lt=1)]
    cost: NotNegative  # what a rationale of full length must earn, in reward
    sigma: Positive  # gap, in cosine, that earns the full reward
    well_formed: NotNegative  # weight of that reward
    embedding: NotNegative  # weight of that reward
    anchor: NotNegative  # weight of keeping the embeddings where stage 3 left them


class Recipe(_Section):
    """The settings of a run. `name` is the packaged name or the file's."""

    name: str
    model: Model
    pool: Pool
    selection: Selection
    joint: Joint
    control: Control

    def with_method(self, method: str | None) -> Recipe:
        """Return the recipe with another method; None keeps its own."""
        if method is None:
            return self
        check_known("method", method, METHODS)
        return self.model_copy(update={"model": self.model.model_copy(update={"method": method})})


def recipe_names() -> list[str]:
    """Return the names of the packaged recipes."""
    files = (item.name for item in _folder().iterdir())
    names = sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))
    return [name for name in names if name != BASE]


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Load a packaged recipe by name, or a file that ends in `.toml`.

    Raises OptionError naming the key, its value and its limit, or the nearest known name of an unknown key.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise OptionError(f"recipe {str(path)!r} does not exist")
        label, text = path.stem, path.read_text()
    else:
        label = str(name_or_path)
        check_known("recipe", label, recipe_names())
        text = _packaged(label)
    try:
        return Recipe.model_validate({"name": label, **_settings(text, str(name_or_path))})
    except ValidationError as error:
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")  # a typo explains what is missing
        raise OptionError(f"recipe {str(name_or_path)!r}: {_explain(first)}") from error


def _folder() -> Any:
    return resources.files("mmemb_training.plan") / "recipes"


def _packaged(name: str) -> str:
    return cast(str, (_folder() / f"{name}.toml").read_text(encoding="utf-8"))


def _settings(text: str, label: str) -> dict[str, Any]:
    """Return a recipe's tables over those of what it extends."""
    try:
        own = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"recipe {label!r} is not TOML: {error}") from error
    base = own.pop("extends", None)
    if "name" in own:
        raise OptionError(f"recipe {label!r}: a recipe is named by its file, remove the key 'name'")
    if base is None:
        return own
    check_known(f"recipe {label!r}: extends", base, [*recipe_names(), BASE])
    return _over(_settings(_packaged(base), base), own)


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return two trees of tables as one; of epochs and steps, the one that `above` sets stands."""
    if {"epochs", "steps"} & above.keys():
        below = {key: value for key, value in below.items() if key not in ("epochs", "steps")}
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _explain(error: ErrorDetails) -> str:
    """Return what is wrong with a key, its value, and what is accepted."""
    *sections, key = error["loc"] or ("recipe",)
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        try:
            check_known(f"key '{where}':", str(key), [name for name in _keys(sections) if name != "name"])
        except OptionError as unknown:
            return str(unknown)
    if error["type"] == "missing":
        return f"{where} is not set"
    if error["type"] == "value_error":
        return f"{where}.{error['ctx']['error']}" if "ctx" in error else error["msg"]
    return f"{where} is {error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _keys(sections: list[int | str]) -> list[str]:
    """Return the keys of a section, found by walking the models' annotations."""
    model: type[BaseModel] = Recipe
    for section in sections:
        if isinstance(section, str):
            annotation = model.model_fields[section].annotation
            inner = [one for one in get_args(annotation) if isinstance(one, type) and issubclass(one, BaseModel)]
            model = inner[0] if inner else cast("type[BaseModel]", annotation)
    return list(model.model_fields)
