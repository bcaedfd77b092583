"""Linear layers of a portable graph in int8, fp8 or int4, as the quantise-dequantise pairs that TensorRT reads.

int8 and fp8 (E4M3): activations with one scale that was measured, weights with one scale per output channel (int8) or
for all (fp8). int4: weights in blocks along the input, activations as they are. All scales are symmetric, in the
graph's own float type, which TensorRT's strong typing takes as the type to compute in.

Axes: K input channels, N output channels, G blocks of K.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnx_ir.tape import Tape

from mmemb_deploy.inputs.preprocess import Floats
from mmemb_export.quantise import Matrix, initializer, int8, linear_layers, replace
from mmemb_export.trace import TURNED

BLOCK = 64
LARGEST = {"int8": 127.0, "fp8": 448.0}
KINDS = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


def insert_qdq(model: ir.Model, precision: str, ranges: Mapping[str, float], keep: Collection[str] = ()) -> ir.Model:
    """Insert the pairs around every linear layer whose weight is not in `keep`, in place; return the model.

    `ranges` holds the largest absolute input of every layer (`mmemb_export.activations.ranges`).
    """
    graph = model.graph
    observed: dict[ir.Value, ir.Value] = {}  # an activation to itself after a pair
    for node, states, weight, bias in linear_layers(graph, keep):
        if precision == "int4" and weight.shape[0] % BLOCK:
            continue
        tape = Tape()
        dtype = states.dtype or ir.DataType.FLOAT
        if precision == "int4":
            out = tape.op("MatMul", [states, _int4_blocks(graph, tape, weight, dtype)])
        else:
            if states not in observed:
                largest = ranges[weight.name.removesuffix(TURNED)]
                observed[states] = _pair(graph, tape, states, largest, precision, dtype)
            out = tape.op("MatMul", [observed[states], _stored(graph, tape, weight, precision, dtype)])
        if bias is not None:
            out = tape.op("Add", [out, bias])
        replace(graph, node, out, tape)
    common.RemoveUnusedNodesPass()(model)
    return model


def _pair(
    graph: ir.Graph, tape: Tape, states: ir.Value, largest: float, precision: str, dtype: ir.DataType
) -> ir.Value:
    name = f"{states.name}.{precision}_scale"
    scale = initializer(graph, name, dtype, (), lambda: np.asarray(max(largest, 1e-8) / LARGEST[precision]))
    zero = initializer(graph, f"{precision}.zero", KINDS[precision], (), lambda: np.zeros(()))
    return tape.op("DequantizeLinear", [tape.op("QuantizeLinear", [states, scale, zero]), scale, zero])


def _stored(graph: ir.Graph, tape: Tape, weight: Matrix, precision: str, dtype: ir.DataType) -> ir.Value:
    outputs = weight.shape[1]
    if precision == "int8":
        values = initializer(graph, f"{weight.name}.q", KINDS["int8"], weight.shape, lambda: int8(weight.read())[0])
        scale = initializer(graph, f"{weight.name}.q_scale", dtype, (outputs,), lambda: int8(weight.read())[1])
        return tape.op("DequantizeLinear", [values, scale], {"axis": 1})

    def scale_of() -> Floats:
        return np.asarray(max(np.abs(weight.read()).max(), 1e-8) / LARGEST["fp8"], np.float32)

    values = initializer(graph, f"{weight.name}.q", KINDS["fp8"], weight.shape, lambda: weight.read() / scale_of())
    scale = initializer(graph, f"{weight.name}.q_scale", dtype, (), scale_of)
    return tape.op("DequantizeLinear", [values, scale])


def _int4_blocks(graph: ir.Graph, tape: Tape, weight: Matrix, dtype: ir.DataType) -> ir.Value:
    inputs, outputs = weight.shape

    def blocks() -> tuple[Floats, Floats]:
        weight_GSN = weight.read().reshape(-1, BLOCK, outputs)
        scale_G1N = np.maximum(np.abs(weight_GSN).max(axis=1, keepdims=True), 1e-8) / np.float32(7)
        return np.rint(weight_GSN / scale_G1N).reshape(inputs, outputs), scale_G1N[:, 0]

    values = initializer(
        graph, f"{weight.name}.q", ir.DataType.INT4, weight.shape, lambda: blocks()[0].astype(ml_dtypes.int4)
    )
    scale = initializer(graph, f"{weight.name}.q_scale", dtype, (inputs // BLOCK, outputs), lambda: blocks()[1])
    return tape.op("DequantizeLinear", [values, scale], {"axis": 0, "block_size": BLOCK})
