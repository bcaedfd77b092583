"""What a bundle's graphs are made for, and how they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.certificate import Bounds
from mmemb_deploy.bundle.manifest import GraphFacts, TensorFacts
from mmemb_deploy.bundle.precision import FLOATS, PRECISIONS, coarsest
from mmemb_deploy.errors import OptionError, check_known
from mmemb_export.fuse import fuse
from mmemb_export.graphs import DECODER, fused_graphs, portable_graphs
from mmemb_export.qdq import insert_qdq
from mmemb_export.quantise import quantise
from mmemb_export.trace import TURNED, Weights, trace
from mmemb_export.weights import save
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.runtime import MAX_BATCH_TOKENS

FORMS = ("portable", "fused")
FUSED = tuple(name for name, precision in PRECISIONS.items() if precision.fused)
BATCH_TOKENS = {"portable": MAX_BATCH_TOKENS, "fused": 1024}  # of a padded batch: more leave a CPU's caches


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Raises OptionError for a value that is not known, and for a precision that the form does not have."""

    form: str = "portable"
    """ "portable": standard ONNX, for every engine; "fused": in ONNX Runtime's own operators, for the CPU."""

    precision: str = "float32"
    """Of vision and embedder."""

    generator_precision: str | None = None
    """Of the generator; None takes `precision`, and then both paths of a fused bundle run one decoder graph."""

    compute: str | None = None
    """Float type of activations and KV cache; None takes the precision if that is one, else float32 in a fused bundle
    and bfloat16 in a portable one."""

    min_cosine: float | None = None
    """What the certificate must reach; None takes the bound of the coarser precision, as in the next two."""

    max_flips: float | None = None
    """Share of inputs that the gate may route otherwise than the reference does."""

    min_token_agreement: float | None = None
    """Share of the rationales' tokens that must be the reference's own choice."""

    def __post_init__(self) -> None:
        check_known("form", self.form, FORMS)
        if self.compute is not None:
            check_known("compute", self.compute, FLOATS)
        for precision in (self.precision, self.generator):
            check_known("precision", precision, PRECISIONS)
            if self.form == "fused" and precision not in FUSED:
                raise OptionError(
                    f"precision {precision!r} needs form='portable': fused graphs take {', '.join(FUSED)}"
                )
            if precision in FLOATS and precision != self.floats:
                raise OptionError(
                    f"precision {precision!r} beside compute {self.floats!r}: both paths share one KV cache, so that "
                    "their float type must be the same"
                )

    @property
    def floats(self) -> str:
        """Float type of activations and KV cache."""
        if self.compute is not None:
            return self.compute
        if self.precision in FLOATS:
            return self.precision
        return "float32" if self.form == "fused" else "bfloat16"

    @property
    def batch_tokens(self) -> int:
        """Tokens of a padded batch; more inputs than fit are embedded in more batches."""
        return BATCH_TOKENS[self.form]

    @property
    def generator(self) -> str:
        """Precision of the generator."""
        return self.precision if self.generator_precision is None else self.generator_precision

    @property
    def coarser(self) -> str:
        """The coarser of the two precisions."""
        return coarsest((self.precision, self.generator))

    def bounds(self, inputs: int) -> Bounds:
        """Return what a certificate over so many inputs must reach: the bounds of the coarser precision."""
        given = {
            "min_cosine": self.min_cosine,
            "gate_flips": None if self.max_flips is None else int(self.max_flips * inputs),
            "token_agreement": self.min_token_agreement,
        }
        due = Bounds.of({self.precision, self.generator}, inputs)
        return due.model_copy(update={name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What was measured on a checkpoint before its graphs are written."""

    kept: tuple[str, ...] = ()
    """Weights that stay in the float type although the precision is coarser."""

    ranges: Mapping[str, float] = field(default_factory=dict)
    """The largest absolute input of every linear layer, for int8 and fp8 in portable graphs."""


def write_graphs(
    outline: Checkpoint, weights: Weights, folder: Path, recipe: Recipe, choices: Choices, report: Callable[[str], None]
) -> dict[str, GraphFacts]:
    """Write the graphs of a checkpoint and their weights to a folder; return their facts in the order of abi.GRAPHS."""
    traced = _traced(outline, weights, recipe, report)
    names = [name for name in abi.GRAPHS if name in traced]
    precisions: dict[str, str] = dict.fromkeys(names, recipe.precision)
    precisions |= {abi.GENERATOR: recipe.generator, abi.GATE: recipe.floats}
    stems: dict[str, str] = {name: name for name in names}
    if traced[abi.EMBEDDER] is traced.get(abi.GENERATOR):
        stems |= {abi.EMBEDDER: DECODER, abi.GENERATOR: DECODER}
    models: dict[str, ir.Model] = {}
    for name, stem in stems.items():
        if stem not in models:
            models[stem] = _quantised(traced[name], precisions[name], recipe, choices)
    facts = {
        name: describe(models[stem], f"{stem}.onnx", precisions[name], choices.kept) for name, stem in stems.items()
    }
    for data, group in {abi.VISION: [abi.VISION], DECODER: [abi.EMBEDDER, abi.GENERATOR], abi.GATE: [abi.GATE]}.items():
        files = list(dict.fromkeys(stems[name] for name in group if name in stems))
        if files:
            report(f"writing the weights of {' and '.join(files)}")
            paths = [folder / f"{file}.onnx" for file in files]
            save([models[file] for file in files], paths, folder / f"{data}.onnx.data")
    return facts


def _traced(
    outline: Checkpoint, weights: Weights, recipe: Recipe, report: Callable[[str], None]
) -> dict[str, ir.Model]:
    """Trace the graphs of a recipe's form; embedder and generator are one model where they are one graph."""
    traced = {}
    for graph in portable_graphs(outline) if recipe.form == "portable" else fused_graphs(outline):
        report(f"exporting {graph.name}")
        traced[graph.name] = trace(graph, weights)
    if recipe.form == "fused":
        text = outline.model.config.text_config
        decoder = fuse(traced.pop(DECODER), heads=text.num_attention_heads, kv_heads=text.num_key_value_heads)
        traced[abi.EMBEDDER] = decoder
        if outline.facts.prompt.reasons:
            traced[abi.GENERATOR] = decoder if recipe.precision == recipe.generator else decoder.clone()
    return traced


def _quantised(model: ir.Model, precision: str, recipe: Recipe, choices: Choices) -> ir.Model:
    if precision in FLOATS:
        return model
    if recipe.form == "fused":
        return quantise(model, precision, choices.kept)
    return insert_qdq(model, precision, choices.ranges, choices.kept)


def describe(model: ir.Model, file: str, precision: str, kept: Sequence[str]) -> GraphFacts:
    """Read a graph's ABI off its ONNX form, and which of the weights `kept` it holds."""
    inputs, outputs = (
        tuple(_tensor(value) for value in values) for values in (model.graph.inputs, model.graph.outputs)
    )
    held = {name.removesuffix(TURNED) for name in model.graph.initializers}
    own = tuple(name for name in kept if name in held)
    return GraphFacts(file=file, precision=precision, inputs=inputs, outputs=outputs, kept=own)


def _tensor(value: ir.Value) -> TensorFacts:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return TensorFacts(name=value.name, dtype=str(value.dtype.numpy()), shape=shape)
