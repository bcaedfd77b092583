"""Graphs to ONNX files at opset 23, with weights in external files that graphs share where their bytes are equal."""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx
import torch
from onnx.external_data_helper import set_external_data

from mmemb_deploy.bundle import GraphFacts, TensorFacts
from mmemb_export.graphs import Graph

OPSET = 23  # the first with Attention and RMSNormalization
EXTERNAL_BYTES = 1024  # smaller tensors stay inside the graph
ALIGNMENT = 4096  # of a tensor in a weight file, in bytes, so that it can be mapped into memory


def to_onnx(graph: Graph) -> onnx.ModelProto:
    """Trace one graph; its inputs, outputs and the axes that vary carry the ABI's names."""
    part = graph.part
    values = [graph.examples[name] for name in part.inputs]
    shapes = [dict.fromkeys(graph.axes.get(name, {}), torch.export.Dim.DYNAMIC) for name in part.inputs]
    split = len(values) - part.listed
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            part.eval(),
            (*values[:split], *([values[split:]] if part.listed else [])),
            dynamic_shapes=(*shapes[:split], *([shapes[split:]] if part.listed else [])),
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph:
        for value in node.outputs:  # the tracer calls a token lookup "embedding", as the ABI calls an output
            if value.name in part.outputs and not value.is_graph_output():
                value.name = f"{value.name}_inner"
    model: onnx.ModelProto = program.model_proto
    _name_axes(model, graph)
    _drop_traces(model)
    return model


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


def _name_axes(model: onnx.ModelProto, graph: Graph) -> None:
    """Replace the tracer's symbols ("s22 + s70") by the graph's names ("new_tokens + past_tokens")."""
    names: dict[str, str] = {}
    for value in model.graph.input:
        for axis, name in graph.axes.get(value.name, {}).items():
            names[value.type.tensor_type.shape.dim[axis].dim_param] = name
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = re.sub(
                    r"s\d+", lambda symbol: names.get(symbol[0], symbol[0]), dimension.dim_param
                )


def _drop_traces(model: onnx.ModelProto) -> None:
    """Drop what the tracer notes on every node and tensor: stack traces, with paths of the exporting machine."""
    model.ClearField("metadata_props")
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def save(models: Sequence[onnx.ModelProto], paths: Sequence[Path], weights: Path) -> None:
    """Write graphs beside one weight file, which holds tensors of equal bytes once."""
    written: dict[str, tuple[int, int]] = {}
    with weights.open("wb") as file:
        for model in models:
            for tensor in model.graph.initializer:
                if len(tensor.raw_data) >= EXTERNAL_BYTES:
                    _externalise(tensor, file, weights.name, written)
    for model, path in zip(models, paths, strict=True):
        path.write_bytes(model.SerializeToString())


def _externalise(tensor: onnx.TensorProto, file: BinaryIO, name: str, written: dict[str, tuple[int, int]]) -> None:
    data = tensor.raw_data
    key = hashlib.sha256(data).hexdigest()
    if key not in written:
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        written[key] = file.tell(), len(data)
        file.write(data)
    offset, length = written[key]
    set_external_data(tensor, location=name, offset=offset, length=length)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL


def describe(model: onnx.ModelProto, file: str, precision: str) -> GraphFacts:
    """Read a graph's ABI off its ONNX form."""
    return GraphFacts(
        file=file,
        precision=precision,
        inputs=tuple(_tensor(value) for value in model.graph.input),
        outputs=tuple(_tensor(value) for value in model.graph.output),
    )


def _tensor(value: onnx.ValueInfoProto) -> TensorFacts:
    tensor = value.type.tensor_type
    return TensorFacts(
        name=value.name,
        dtype=str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)),
        shape=tuple(dimension.dim_param or dimension.dim_value for dimension in tensor.shape.dim),
    )
