"""Linear layers of a portable graph in int8, fp8 or int4, as the quantise-dequantise pairs that TensorRT reads.

int8 and fp8 (E4M3): activations with one scale that was measured, weights with one scale per output channel (int8) or
for all (fp8). int4: weights in blocks of 64 along the input, activations as they are; a layer whose inputs are no
multiple of 64 keeps the float type (of the public sizes, only 8B's vision encoder has such: 1.5% of the weights). All
scales are symmetric, and of the float type of activations, in which TensorRT's strong typing computes.

Axes: R rows of activations, K input channels, N output channels, G blocks of K, S size of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from mmemb_deploy.inputs.preprocess import Floats
from mmemb_export.layers import Matrix, Quantiser, Stored, constant, store

BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class Qdq(Quantiser):
    """The values that a precision has, which of them share a scale, and how large the layers' inputs are."""

    dtype: ir.DataType
    largest: int
    shared: tuple[int, ...]
    """Axes of a weight (G, S, N) along which the scale is one."""

    attributes: Mapping[str, int]
    """Of the weight's DequantizeLinear."""

    measured: bool = True
    """Whether activations are quantised, which takes `ranges`."""

    block: int = 1
    """S, where a weight has more than one block."""

    floats: str
    """The type that scales are rounded to."""

    ranges: Mapping[str, float]
    """The largest absolute input of every layer, by its weight's name (`mmemb_export.activations.ranges`)."""

    def weight(self, weight_KN: Floats) -> Stored:
        """Return values (K, N) and the scales that divided them."""
        weight_GSN = weight_KN.reshape(self._blocks(*weight_KN.shape))
        scale_GSN = self._scale(np.abs(weight_GSN).max(axis=self.shared, keepdims=True))
        return self._rounded(weight_GSN / scale_GSN).reshape(weight_KN.shape), scale_GSN.squeeze(self.shared)

    def product(self, states_RK: Floats, stored: Stored, name: str, /) -> Floats:
        """Round weight and, with the measured scale, activations."""
        values_KN, scales = stored
        values_GSN = values_KN.astype(np.float32).reshape(self._blocks(*values_KN.shape))
        weight_KN: Floats = (values_GSN * np.expand_dims(scales, self.shared)).reshape(values_KN.shape)
        if self.measured:
            scale = self._scale(self.ranges[name])
            states_RK = self._rounded(states_RK / scale).astype(np.float32) * scale
        product_RN: Floats = states_RK @ weight_KN
        return product_RN

    def write(self, graph: ir.Graph, tape: Tape, states: ir.Value, weight: Matrix) -> ir.Value:
        """Dequantise the weight, quantise and dequantise the activations, and multiply in the float type."""
        dtype = states.dtype or ir.DataType.FLOAT
        sizes = tuple(size for axis, size in enumerate(self._blocks(*weight.shape)) if axis not in self.shared)
        values, scales = store(
            graph,
            self.weight,
            weight,
            (f"{weight.name}.q", self.dtype, weight.shape),
            (f"{weight.name}.q_scale", dtype, sizes),
        )
        if self.measured:
            scale = constant(graph, f"{states.name}.q_scale", dtype, self._scale(self.ranges[weight.parameter]))
            zero = constant(graph, f"{self.dtype.name.lower()}.zero", self.dtype, 0)
            pair = tape.op("QuantizeLinear", [states, scale, zero]), scale, zero
            states = tape.op("DequantizeLinear", pair)
        return tape.op("MatMul", [states, tape.op("DequantizeLinear", [values, scales], self.attributes)])

    def _blocks(self, inputs: int, outputs: int) -> tuple[int, int, int]:
        """Return (G, S, N)."""
        size = inputs if self.block == 1 else self.block
        return inputs // size, size, outputs

    def _scale(self, top: Any) -> Floats:
        """Return the scale of values up to `top`, as `floats` holds it; what is smaller than any scale becomes 0."""
        scale = (top / np.float32(self.largest)).astype(self.floats).astype(np.float32)
        return np.where(scale > 0, scale, np.float32(1))

    def _rounded(self, values: Floats) -> NDArray[Any]:
        """Return values in units of the scale as they are stored."""
        lowest = -self.largest - 1 if self.dtype.is_integer() else -self.largest
        values = values.clip(lowest, self.largest)
        return (np.rint(values) if self.dtype.is_integer() else values).astype(self.dtype.numpy())


QDQ = {
    "int8": partial(Qdq, dtype=ir.DataType.INT8, largest=127, shared=(0, 1), attributes={"axis": 1}),
    "fp8": partial(Qdq, dtype=ir.DataType.FLOAT8E4M3FN, largest=448, shared=(0, 1, 2), attributes={}),
    "int4": partial(
        Qdq,
        dtype=ir.DataType.INT4,
        largest=7,
        shared=(1,),
        attributes={"axis": 0, "block_size": BLOCK},
        measured=False,
        block=BLOCK,
    ),
}
