"""ONNX graphs as engines run them: in whatever float type they are, on the CPU by ONNX Runtime, which knows float32.

Half-precision tensors are widened to float32 and rounded at the graph's boundary alone, so that results are somewhat
more precise than an engine's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
TYPED = ("to", "dtype", "output_dtype", "softmax_precision")  # attributes that name a type
Dims = tuple[int | str, ...]


class Tensor:
    """An input or output: its type, and sizes or names of its axes."""

    def __init__(self, info: onnx.ValueInfoProto) -> None:
        kind = info.type.tensor_type
        self.name, self.elem_type = info.name, kind.elem_type
        self.dtype: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        self.dims: Dims = tuple(
            each.dim_param or "?" if each.WhichOneof("value") != "dim_value" else each.dim_value
            for each in kind.shape.dim
        )

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
        """Return the shape, given sizes of named axes, or None where one is not given.

        The exporter writes axes as expressions of others, such as "(patches//4)".
        """
        try:
            return tuple(dim if isinstance(dim, int) else int(eval(dim, {}, dict(sizes))) for dim in self.dims)
        except NameError:
            return None


class Graph:
    """A model with its weights in it."""

    def __init__(self, content: bytes) -> None:
        self.model = model = onnx.load_from_string(content)
        weights = {each.name for each in model.graph.initializer}
        self.inputs = {each.name: Tensor(each) for each in model.graph.input if each.name not in weights}
        self.outputs = {each.name: Tensor(each) for each in model.graph.output}
        self.aliases = dict(_aliases(model))

    @classmethod
    @lru_cache(16)
    def of(cls, content: bytes) -> Graph:
        """Return the graph of these bytes, and the same one again for the same bytes."""
        return cls(content)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once, in and out in the graph's own types."""
        wide = {name: _widened(value) for name, value in feeds.items()}
        found: Any = self._session.run(list(self.outputs), wide)
        return {
            name: np.asarray(value).astype(self.outputs[name].dtype, copy=False)
            for name, value in zip(self.outputs, found, strict=True)
        }

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        return onnxruntime.InferenceSession(_in_float32(self.model).SerializeToString(), options)


def read_model(source: bytes | Path, folder: Path | None = None) -> onnx.ModelProto:
    """Return a model with its weights in it; `folder` is where a model of bytes has its weight files."""
    if isinstance(source, Path):
        return onnx.load(source)
    model = onnx.load_from_string(source)
    if folder is not None:
        onnx.load_external_data_for_model(model, str(folder))
    return model


def _aliases(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """Yield outputs that a TensorScatter writes into an input, and that input."""
    makers = {name: node for node in model.graph.node for name in node.output}
    inputs = {each.name for each in model.graph.input}
    for output in model.graph.output:
        node = makers.get(output.name)
        while node is not None and node.op_type == "Identity":
            node = makers.get(node.input[0])
        if node is not None and node.op_type == "TensorScatter" and node.input[0] in inputs:
            yield output.name, node.input[0]


def _widened(value: NDArray[Any]) -> NDArray[Any]:
    return value.astype(np.float32) if value.dtype.name in ("bfloat16", "float16") else value


def _in_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose half-precision tensors are float32."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    del graph.value_info[:]
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type in HALF:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    for attribute in attributes:
        if attribute.name in TYPED and attribute.i in HALF:
            attribute.i = TensorProto.FLOAT
    for tensor in (*graph.initializer, *(each.t for each in attributes if each.HasField("t"))):
        if tensor.data_type in HALF:
            tensor.CopyFrom(numpy_helper.from_array(_widened(numpy_helper.to_array(tensor)), tensor.name))
    return wide
