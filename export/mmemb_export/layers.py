"""A graph's linear layers, and what a quantiser is: how such a layer becomes coarse, in numbers and in nodes.

Axes: R rows of activations, K input channels, N output channels.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from mmemb_deploy.inputs.preprocess import Floats
from mmemb_export.trace import TRANSPOSED

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators

Stored = tuple[NDArray[Any], Floats]  # a weight's values and scales, as a graph holds them
Spec = tuple[str, ir.DataType, tuple[int, ...]]  # an initializer's name, type and shape


class Quantiser(ABC):
    """One precision of one form. A layer that `write` wrote computes `product`, up to the order of its sums."""

    measured = False
    """Whether it needs to know how large the inputs of every layer are."""

    block = 1
    """What the number of a layer's input channels must be a multiple of; other layers keep the float type."""

    @abstractmethod
    def weight(self, weight_KN: Floats) -> Stored:
        """Return the values and the scales of a weight."""

    @abstractmethod
    def product(self, states_RK: Floats, stored: Stored, name: str, /) -> Floats:
        """Return what the layer whose weight has that name makes of its input, (R, N)."""

    @abstractmethod
    def write(self, graph: ir.Graph, tape: Tape, states: ir.Value, weight: Matrix) -> ir.Value:
        """Add the layer to a tape, and what it stores to a graph; return the layer's output."""


@dataclass(frozen=True)
class Matrix:
    """A weight that is read when it is asked for: (K, N), or (N, K) where it is transposed."""

    name: str
    tensor: ir.TensorProtocol
    transposed: bool = False

    @property
    def parameter(self) -> str:
        """Return its name in `mmemb_training.parts`."""
        return self.name.removesuffix(TRANSPOSED)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (K, N)."""
        rows, columns = self.tensor.shape.numpy()
        return (columns, rows) if self.transposed else (rows, columns)

    def read(self) -> Floats:
        """Return the values (K, N) in float32."""
        values = self.tensor.numpy().astype(np.float32, copy=False)
        return values.T if self.transposed else values


def held_matrix(value: ir.Value | None) -> Matrix | None:
    """Return the matrix that a graph holds under a value, if it does."""
    tensor = None if value is None else value.const_value
    if value is None or value.name is None or tensor is None or len(tensor.shape) != 2:
        return None
    return Matrix(value.name, tensor)


def linear_layers(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value, Matrix, ir.Value | None]]:
    """Yield the node, the input, the weight and the bias of every linear layer."""
    for node in list(graph):
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        states, weight = node.inputs[0], held_matrix(node.inputs[1])
        if states is None or weight is None:
            continue
        transposed = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        yield node, states, dataclasses.replace(weight, transposed=transposed), bias


def replace(graph: ir.Graph, node: ir.Node, out: ir.Value, tape: Tape) -> None:
    """Put a tape's nodes in the place of one node, whose output `out` takes over."""
    graph.insert_before(node, tape.nodes)
    old = node.outputs[0]
    name, out.type, out.shape = old.name, old.type, old.shape
    old.name = f"{name}_float"
    old.replace_all_uses_with(out, replace_graph_outputs=True)
    out.name = name
    graph.remove(node, safe=True)


def constant(graph: ir.Graph, name: str, dtype: ir.DataType, value: Any) -> ir.Value:
    """Return the initializer of that name, which holds `value`; it is added if there is none."""
    values = np.asarray(value)
    return _initializer(graph, (name, dtype, values.shape), lambda: values)


def store(
    graph: ir.Graph, quantise: Callable[[Floats], Stored], weight: Matrix, values: Spec, scales: Spec
) -> tuple[ir.Value, ir.Value]:
    """Return a weight's values and scales as initializers, both made by one reading when the graph is written."""
    left: dict[int, Any] = {}

    def take(part: int) -> Any:
        if part not in left:
            left.update(enumerate(quantise(weight.read())))
        return left.pop(part)  # so that no values stay in memory once they are written

    return _initializer(graph, values, lambda: take(0)), _initializer(graph, scales, lambda: take(1))


def _initializer(graph: ir.Graph, spec: Spec, read: Callable[[], Any]) -> ir.Value:
    name, dtype, sizes = spec
    if name in graph.initializers:
        return graph.initializers[name]
    shape = ir.Shape(sizes)
    tensor = ir.LazyTensor(
        lambda: ir.tensor(np.asarray(read()).astype(dtype.numpy(), copy=False), dtype=dtype, name=name),
        dtype,
        shape,
        name=name,
    )
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
