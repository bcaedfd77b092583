"""Linear layers of an ONNX Runtime graph in 8 or 4 bits.

int8 (MatMulIntegerToFloat): activations are uint8 with 128 for zero and a scale per token, so that a row's result does
not depend on the rows beside it, as it would with one scale for all (`onnxruntime.quantization.quantize_dynamic`).
Weights are int8 with a scale per output channel. On a CPU without VNNI the kernels add the products of input channels
2i and 2i + 1 in 16 bits, and what passes 32767 is cut off without a word (vpmaddubsw). So two weights of such a pair
add up to 128 at most, in size: activations are 255 at most, and 255 * 128 = 32640; weights of opposite signs cannot
overflow. Every CPU then computes the same, exact integers. It costs a third more rounding error than free 8-bit weights
where these are normally distributed, and next to nothing where a few are much larger than the rest; 7-bit weights would
double it, unsigned ones have no VNNI kernel.

int4 (MatMulNBits): weights in blocks along the input.

Axes: K input channels, N output channels, P pairs of input channels, T scales that are tried, G blocks of K, S size of
a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common
from onnx_ir.tape import Tape

from mmemb_deploy.inputs.preprocess import Floats
from mmemb_export.fuse import MICROSOFT
from mmemb_export.trace import TURNED

BLOCK = 32
PAIR = 128  # the largest sum of two neighbouring weights
LARGEST = range(64, 128, 3)  # what the largest weight may become: from where every pair fits to int8's end
CHUNK = 2**17  # weights that are rounded at once, so that they stay in a CPU's cache
TINY = np.float32(1e-20)  # keeps the scale of nothing but zeros above 0
MIDDLE = 128  # the uint8 that stands for 0 in an activation


def quantise(model: ir.Model, precision: str, keep: Collection[str] = ()) -> ir.Model:
    """Quantise the token table and every linear layer but those whose weight is in `keep`, in place; return the model.

    `keep` holds names of parameters, as `mmemb_export.activations` gives them.
    """
    if precision == "float32":
        return model
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Gather" and (table := _matrix(node.inputs[0], keep)):
            tape = Tape()
            replace(graph, node, _lookup(graph, tape, table, node.inputs[1]), tape)
    quantised: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}  # an activation to its integers and scales
    for node, states, weight, bias in linear_layers(graph, keep):
        tape = Tape()
        out = (
            _int8(graph, tape, states, weight, quantised) if precision == "int8" else _int4(graph, tape, states, weight)
        )
        if bias is not None:
            out = tape.op("Add", [out, bias])
        replace(graph, node, out, tape)
    common.RemoveUnusedNodesPass()(model)
    model.opset_imports[MICROSOFT] = 1
    return model


def linear_layers(
    graph: ir.Graph, keep: Collection[str]
) -> Iterator[tuple[ir.Node, ir.Value, Matrix, ir.Value | None]]:
    """Yield the node, the input, the weight and the bias of every linear layer that is not in `keep`."""
    for node in list(graph):
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        states, weight = node.inputs[0], _matrix(node.inputs[1], keep)
        if states is None or weight is None:
            continue
        turned = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        yield node, states, dataclasses.replace(weight, turned=turned), bias


def replace(graph: ir.Graph, node: ir.Node, out: ir.Value, tape: Tape) -> None:
    """Put a tape's nodes in the place of one node, whose output `out` takes over."""
    graph.insert_before(node, tape.nodes)
    old = node.outputs[0]
    name, out.type, out.shape = old.name, old.type, old.shape
    old.name = f"{name}_float"
    old.replace_all_uses_with(out, replace_graph_outputs=True)
    out.name = name
    graph.remove(node, safe=True)


def _matrix(value: ir.Value | None, keep: Collection[str]) -> Matrix | None:
    """Return a matrix that the graph holds, unless it is kept as it is."""
    tensor = None if value is None else value.const_value
    if value is None or value.name is None or tensor is None or len(tensor.shape) != 2:
        return None
    return None if value.name.removesuffix(TURNED) in keep else Matrix(value.name, tensor)


@dataclass(frozen=True)
class Matrix:
    """A weight that is read when it is asked for: (K, N), or (N, K) where it is turned."""

    name: str
    tensor: ir.TensorProtocol
    turned: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Return (K, N)."""
        rows, columns = self.tensor.shape.numpy()
        return (columns, rows) if self.turned else (rows, columns)

    def read(self) -> Floats:
        """Return the values (K, N) in float32."""
        values = self.tensor.numpy().astype(np.float32, copy=False)
        return values.T if self.turned else values


def _lookup(graph: ir.Graph, tape: Tape, table: Matrix, places: ir.Value | None) -> ir.Value:
    """Look rows up in 8 bits, a scale each, whatever the precision of the linear layers."""
    rows, columns = table.shape
    integers = initializer(
        graph, f"{table.name}.row_int8", ir.DataType.INT8, (rows, columns), lambda: int8(table.read().T)[0].T
    )
    scales = initializer(
        graph, f"{table.name}.row_scale", ir.DataType.FLOAT, (rows, 1), lambda: int8(table.read().T)[1][:, None]
    )
    found = tape.op("Cast", [tape.op("Gather", [integers, places])], {"to": ir.DataType.FLOAT})
    return tape.op("Mul", [found, tape.op("Gather", [scales, places])])


def _int8(
    graph: ir.Graph, tape: Tape, states: ir.Value, weight: Matrix, quantised: dict[ir.Value, tuple[ir.Value, ir.Value]]
) -> ir.Value:
    one = initializer(graph, "int8.one", ir.DataType.FLOAT, (), lambda: np.float32(1))
    middle = initializer(graph, "int8.middle", ir.DataType.UINT8, (), lambda: np.uint8(MIDDLE))
    if states not in quantised:
        tiny = initializer(graph, "int8.tiny", ir.DataType.FLOAT, (), lambda: np.float32(1e-20))
        top = initializer(graph, "int8.top", ir.DataType.FLOAT, (), lambda: np.float32(1 / 127))
        axes = initializer(graph, "int8.axes", ir.DataType.INT64, (1,), lambda: np.array([-1]))
        largest = tape.op("ReduceMax", [tape.op("Abs", [states]), axes])
        scale = tape.op("Mul", [tape.op("Max", [largest, tiny]), top])
        quantised[states] = tape.op("QuantizeLinear", [tape.op("Div", [states, scale]), one, middle]), scale
    integers, scale = quantised[states]
    values = initializer(
        graph, f"{weight.name}.int8", ir.DataType.INT8, weight.shape, lambda: paired_int8(weight.read())[0]
    )
    scales = initializer(
        graph, f"{weight.name}.scale", ir.DataType.FLOAT, weight.shape[1:], lambda: paired_int8(weight.read())[1]
    )
    product = tape.op("MatMulIntegerToFloat", [integers, values, one, scales, middle], domain=MICROSOFT)
    return tape.op("Mul", [product, scale])


def int8(weight_KN: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Return integers (K, N) within -127..127 and the scale of every output channel (N,)."""
    scale_N = np.maximum(np.abs(weight_KN).max(axis=0), np.finfo(np.float32).tiny) / np.float32(127)
    return np.rint(weight_KN / scale_N).astype(np.int8), scale_N.astype(np.float32)


def paired_int8(weight_KN: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Return integers (K, N) and a scale per output channel (N,): of those tried, the one that loses least."""
    inputs, outputs = weight_KN.shape
    values_KN = np.empty((inputs, outputs), np.int8)
    scale_N: Floats = np.empty(outputs, np.float32)
    channels = max(1, CHUNK // inputs)
    for first in range(0, outputs, channels):
        part = slice(first, first + channels)
        weight_2NP: Floats = np.zeros((2, len(scale_N[part]), -(-inputs // 2)), np.float32)
        weight_2NP[0], weight_2NP[1, :, : inputs // 2] = weight_KN[::2, part].T, weight_KN[1::2, part].T
        scale_N[part] = _best_scale(weight_2NP)
        even_NP, odd_NP = _paired(weight_2NP / scale_N[part, None])
        values_KN[::2, part], values_KN[1::2, part] = even_NP.T, odd_NP[:, : inputs // 2].T
    return values_KN, scale_N


def _best_scale(weight_2NP: Floats) -> Floats:
    """Return, of the scales that make the largest weight one of LARGEST, that with the least squared error, (N,)."""
    scale_TN = np.maximum(np.abs(weight_2NP).max(axis=(0, 2)), TINY) / np.array(LARGEST, np.float32)[:, None]
    error_TN = np.empty_like(scale_TN)
    for trial, scale_N in enumerate(scale_TN):
        exact_2NP = weight_2NP / scale_N[:, None]
        lost_2NP = _paired(exact_2NP) - exact_2NP
        error_TN[trial] = np.einsum("inp,inp->n", lost_2NP, lost_2NP) / LARGEST[trial] ** 2
    best_N: Floats = np.take_along_axis(scale_TN, error_TN.argmin(axis=0)[None], axis=0)[0]
    return best_N


def _paired(weight_2NP: Floats) -> Floats:
    """Round weights that are given in steps of their scale; a pair whose sum is too large moves back to the bound."""
    even_NP, odd_NP = weight_2NP
    excess_NP = even_NP + odd_NP
    excess_NP -= excess_NP.clip(-PAIR, PAIR)
    rounded_2NP = np.empty_like(weight_2NP)
    np.rint(even_NP - excess_NP / 2, out=rounded_2NP[0])
    np.rint(odd_NP, out=rounded_2NP[1])
    rounded_2NP[1].clip(-PAIR - rounded_2NP[0], PAIR - rounded_2NP[0], out=rounded_2NP[1])
    return rounded_2NP


def _int4(graph: ir.Graph, tape: Tape, states: ir.Value, weight: Matrix) -> ir.Value:
    inputs, outputs = weight.shape
    blocks = -(-inputs // BLOCK)
    shape = outputs, blocks, BLOCK // 2
    values = initializer(graph, f"{weight.name}.int4", ir.DataType.UINT8, shape, lambda: int4(weight.read())[0])
    scales = initializer(
        graph, f"{weight.name}.block_scale", ir.DataType.FLOAT, (outputs * blocks,), lambda: int4(weight.read())[1]
    )
    sizes = {"K": inputs, "N": outputs, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
    return tape.op("MatMulNBits", [states, values, scales], sizes, domain=MICROSOFT)


def int4(weight_KN: Floats) -> tuple[NDArray[np.uint8], Floats]:
    """Return two values to a byte (N, G, S / 2), 8 standing for 0, and the scale of every block (N * G,)."""
    inputs, outputs = weight_KN.shape
    weight_NGS = np.pad(weight_KN.T, ((0, 0), (0, -inputs % BLOCK))).reshape(outputs, -1, BLOCK)
    # the value of largest size becomes -8, the end of the range that reaches further
    ends_NG = np.take_along_axis(weight_NGS, np.abs(weight_NGS).argmax(axis=2)[..., None], axis=2)[..., 0]
    scale_NG = np.where(ends_NG == 0, 1, ends_NG / -8).astype(np.float32)
    values = (np.rint(weight_NGS / scale_NG[..., None]) + 8).clip(0, 15).astype(np.uint8)
    packed_NGS: NDArray[np.uint8] = values[..., ::2] | values[..., 1::2] * np.uint8(16)
    return packed_NGS, scale_NG.ravel()


def initializer(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...], read: Callable[[], Any]
) -> ir.Value:
    """Return the initializer of that name, added if there is none; its values are read when they are asked for."""
    if name in graph.initializers:
        return graph.initializers[name]
    sizes = ir.Shape(shape)
    tensor = ir.LazyTensor(
        lambda: ir.tensor(np.asarray(read()).astype(dtype.numpy()), dtype=dtype, name=name), dtype, sizes, name=name
    )
    value = ir.Value(name=name, shape=sizes, type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
