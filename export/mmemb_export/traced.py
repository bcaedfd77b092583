"""A checkpoint's graphs, traced once, and written in the precisions of a recipe as often as its certificate takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.manifest import GraphFacts, TensorFacts
from mmemb_deploy.bundle.precision import FLOATS
from mmemb_export.forms import direct, fused, slotted
from mmemb_export.graphs import DECODER, traceables
from mmemb_export.integers import quantise_tables
from mmemb_export.quantise import quantise, quantiser
from mmemb_export.recipe import Recipe
from mmemb_export.trace import TRANSPOSED, Weights, trace
from mmemb_export.weights import save
from mmemb_training.checkpoint import Checkpoint

FILES = {  # of weights, and the graphs that read them
    abi.VISION: [abi.VISION],
    DECODER: [abi.DIRECT, abi.EMBEDDER, abi.GENERATOR],
    abi.GATE: [abi.GATE],
}


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What was measured on a checkpoint before its graphs are written."""

    kept: tuple[str, ...] = ()
    """Weights that stay in the float type although the precision is coarser."""

    ranges: Mapping[str, float] = field(default_factory=dict)
    """The largest absolute input of every linear layer, for int8 and fp8 in portable graphs."""


class TracedGraphs:
    """The graphs of a recipe's form, without their weights, which are read when the graphs are written."""

    def __init__(
        self, outline: Checkpoint, weights: Weights, recipe: Recipe, report: Callable[[str], None] = lambda _: None
    ) -> None:
        """Trace them in the outline's float type; `report` hears what is being done, here and in `write`."""
        self._recipe, self._report = recipe, report
        self._compute = str(outline.model.dtype).removeprefix("torch.")
        traced: dict[str, ir.Model] = {}
        for graph in traceables(outline):
            report(f"exporting {graph.name}")
            traced[graph.name] = trace(graph, weights)
        traced |= _decoders(traced.pop(DECODER), outline, recipe.form)
        self._traced = {name: traced[name] for name in abi.GRAPHS if name in traced}

    def write(self, folder: Path, choices: Choices, recipe: Recipe | None = None) -> dict[str, GraphFacts]:
        """Write the graphs and their weights to a folder; return their facts in the order of `abi.GRAPHS`.

        Another recipe has the form and the float type of the one that they were traced for.
        """
        recipe = self._recipe if recipe is None else recipe
        facts, models = dict[str, GraphFacts](), dict[str, ir.Model]()
        precisions = {abi.GENERATOR: recipe.generator, abi.GATE: recipe.floats}
        one_decoder = abi.GENERATOR in self._traced and recipe.precision == recipe.generator
        for name, traced in self._traced.items():
            file = f"{DECODER if one_decoder and name in (abi.EMBEDDER, abi.GENERATOR) else name}.onnx"
            precision = precisions.get(name, recipe.precision)
            if file not in models:
                models[file] = _quantised(traced, precision, recipe, choices)
            graph = models[file].graph
            kept = () if precision in FLOATS else _kept(traced.graph, graph)
            if kept:
                self._report(f"{name} keeps in {recipe.floats}: {', '.join(kept)}")
            facts[name] = GraphFacts(
                file=file,
                precision=precision,
                form="fused" if recipe.form == "fused" else "portable",
                compute=self._compute,
                inputs=tuple(_tensor(value) for value in graph.inputs),
                outputs=tuple(_tensor(value) for value in graph.outputs),
                kept=kept,
            )
        for data, names in FILES.items():
            files = list(dict.fromkeys(facts[name].file for name in names if name in facts))
            if files:
                self._report(f"writing the weights of {' and '.join(files)}")
                save([models[file] for file in files], [folder / file for file in files], folder / f"{data}.onnx.data")
        return facts


def _quantised(traced: ir.Model, precision: str, recipe: Recipe, choices: Choices) -> ir.Model:
    """Return a copy of a traced graph in a precision; weights are in neither."""
    model = traced.clone()
    if precision in FLOATS:
        return model
    if recipe.form == "fused":
        quantise_tables(model, choices.kept)
    return quantise(model, quantiser(recipe.form, precision, recipe.floats, choices.ranges), choices.kept)


def _decoders(traced: ir.Model, outline: Checkpoint, form: str) -> dict[str, ir.Model]:
    """Return a decoder's graphs in a form; a model that does not reason keeps no cache but in a fused one."""
    text = outline.model.config.text_config
    roles = (abi.EMBEDDER, abi.GENERATOR) if outline.facts.prompt.reasons else ()
    if form == "fused":
        one = fused(traced, heads=text.num_attention_heads, kv_heads=text.num_key_value_heads)
        return dict.fromkeys(roles or (abi.EMBEDDER,), one)
    return {abi.DIRECT: direct(traced)} | (dict.fromkeys(roles, slotted(traced)) if roles else {})


def _kept(traced: ir.Graph, written: ir.Graph) -> tuple[str, ...]:
    """Return the weights, of two axes or more, that a graph still holds in the float type in which it was traced."""
    return tuple(
        name.removesuffix(TRANSPOSED)
        for name, value in traced.initializers.items()
        if name in written.initializers and (tensor := value.const_value)
        if len(tensor.shape) > 1 and tensor.dtype.is_floating_point()
    )


def _tensor(value: ir.Value) -> TensorFacts:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return TensorFacts(name=value.name, dtype=str(value.dtype.numpy()), shape=shape)
