"""A graph to ONNX at opset 23, traced without its weights: they are bound to the result one by one, when it is written.

Weights stand as inputs while the exporter optimises, so that nothing folds them; then every one of them becomes an
initializer that reads its tensor only when it is asked for.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch._subclasses.fake_tensor import FakeTensor

from mmemb_export.graphs import Inputs, Traceable
from mmemb_training.parts import Part

TRANSPOSED = ".T"  # ends the name of a parameter that a graph holds transposed
OPSET = 23  # the first with Attention and RMSNormalization

Weights = Callable[[str], torch.Tensor]  # the name of a parameter or buffer of a part to its values


def trace(graph: Traceable, weights: Weights) -> ir.Model:
    """Trace a graph over fake tensors; its inputs, outputs and the axes that vary carry the ABI's names."""
    part, model = graph.part, capture(graph)
    for value in model.graph.inputs[len(part.inputs) :]:
        model.graph.inputs.remove(value)
        _bind(model.graph, value, weights)
    for node in model.graph:
        for value in node.outputs:  # the tracer calls a token lookup "embedding", as the ABI calls an output
            if value.name in part.outputs and not value.is_graph_output():
                value.name = f"{value.name}_inner"
    _name_axes(model.graph, graph.inputs)
    common.CommonSubexpressionEliminationPass()(model)
    common.ClearMetadataAndDocStringPass()(model)  # stack traces, with paths of the exporting machine
    return model


def capture(graph: Traceable) -> ir.Model:
    """Return what torch makes of a graph, with the part's inputs first and then one for each of its weights."""
    part = graph.part.eval()
    given = [graph.inputs[name] for name in part.inputs]
    with _quiet(), graph.mode, torch.no_grad():
        program = torch.onnx.export(
            part,
            _arguments(part, [example for example, _ in given]),
            dynamic_shapes=_arguments(part, [dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for _, axes in given]),
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        _free_weights(program.model)
        program.optimize()
    return program.model


def _arguments(part: Part, values: list[Any]) -> tuple[Any, ...]:
    """Return one value for each argument of a part's `forward`, the last of which may be a list."""
    split = len(values) - part.listed
    return (*values[:split], values[split:]) if part.listed else tuple(values)


@contextmanager
def _quiet() -> Generator[None]:
    """Silence the exporter's notes on its own internals; its errors are raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _free_weights(model: ir.Model) -> None:
    """Turn the initializers that have no values yet into inputs."""
    for name, value in list(model.graph.initializers.items()):
        assert not name.startswith("lifted_tensor"), "a constant made inside a part has no values in fake mode"
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            del model.graph.initializers[name]
            value.const_value = None
            model.graph.inputs.append(value)


def _bind(graph: ir.Graph, value: ir.Value, weights: Weights) -> None:
    """Make a weight an initializer; one that is only ever transposed is stored transposed."""
    name, shape, dtype = value.name, value.shape, value.dtype
    assert name is not None
    assert isinstance(shape, ir.Shape)
    assert dtype is not None
    kind = torch.float32 if dtype == ir.DataType.FLOAT else getattr(torch, dtype.name.lower())

    def bound(stored: ir.Value, *, transposed: bool) -> None:
        def read() -> ir.TensorProtocol:
            values = weights(name).to(kind)
            return ir.tensor((values.T if transposed else values).contiguous(), name=stored.name)

        assert isinstance(stored.shape, ir.Shape)
        stored.const_value = ir.LazyTensor(read, dtype, stored.shape, name=stored.name)
        graph.register_initializer(stored)

    for node, _ in value.uses():
        if node.op_type == "Transpose" and len(shape) == 2:
            stored = ir.Value(name=f"{name}{TRANSPOSED}", shape=ir.Shape(tuple(shape)[::-1]), type=ir.TensorType(dtype))
            bound(stored, transposed=True)
            node.outputs[0].replace_all_uses_with(stored)
            graph.remove(node, safe=True)
    if value.uses():
        bound(value, transposed=False)


def _name_axes(graph: ir.Graph, inputs: Inputs) -> None:
    """Replace the tracer's symbols ("s22 + s70") by the axes' names ("new_tokens + past_tokens")."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        assert value.name is not None
        assert value.shape is not None
        for axis, name in inputs[value.name][1].items():
            names[str(value.shape[axis])] = name
    for value in [*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([_named(size, names) for size in value.shape])


def _named(size: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    symbols = size.value if isinstance(size, ir.SymbolicDim) else None
    if symbols is None:
        return None if isinstance(size, ir.SymbolicDim) else size
    return re.sub(r"s\d+", lambda found: names.get(found[0], found[0]), symbols)
