"""Linear layers and lookups of a fused graph in the integers that ONNX Runtime computes with, in 8 or 4 bits.

int8 (MatMulIntegerToFloat): activations are uint8 with 128 for zero and a scale per token, so that a row's result does
not depend on the rows beside it, as it would with one scale for all (`onnxruntime.quantization.quantize_dynamic`).
Weights are int8 with a scale per output channel. On a CPU without VNNI the kernels add the products of input channels
2i and 2i + 1 in 16 bits, and what passes 32767 is cut off without a word (vpmaddubsw). So two weights of such a pair
add up to 128 at most, in size: activations are 255 at most, and 255 * 128 = 32640; weights of opposite signs cannot
overflow. Every CPU then computes the same, exact integers. It costs a third more rounding error than free 8-bit weights
where these are normally distributed, and next to nothing where a few are much larger than the rest; 7-bit weights would
double it, unsigned ones have no VNNI kernel.

int4 (MatMulNBits): weights in blocks along the input; the operator rounds activations to 8 bits, a scale per block.

Axes: R rows of activations, K input channels, N output channels, P pairs of input channels, T scales that are tried,
G blocks of K, S size of a block.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from mmemb_deploy.inputs.preprocess import Floats
from mmemb_export.layers import MICROSOFT, Matrix, Quantiser, Stored, constant, held_matrix, replace, store

PAIR = 128  # the largest sum of two neighbouring weights
LARGEST = range(64, 128, 3)  # what the largest weight may become: from where every pair fits to int8's end
CHUNK = 2**17  # weights that are rounded at once, so that they stay in a CPU's cache
BLOCK = 32
MIDDLE = 128  # the uint8 that stands for 0 in an activation
TINY = np.float32(1e-20)  # keeps the scale of nothing but zeros above 0


class Int8(Quantiser):
    """8-bit weights in pairs, 8-bit activations per token."""

    def weight(self, weight_KN: Floats) -> Stored:
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

    def product(self, states_RK: Floats, stored: Stored, _: str, /) -> Floats:
        """Round each row to 8 bits, and multiply integers."""
        states_RK, scale_R1 = _symmetric(states_RK)
        product_RN: Floats = (states_RK @ stored[0].astype(np.float32)) * scale_R1 * stored[1]
        return product_RN

    def write(self, graph: ir.Graph, tape: Tape, states: ir.Value, weight: Matrix) -> ir.Value:
        """Quantise the input, multiply integers, and apply both scales."""
        one = constant(graph, "int8.one", ir.DataType.FLOAT, 1)
        middle = constant(graph, "int8.middle", ir.DataType.UINT8, MIDDLE)
        tiny = constant(graph, "int8.tiny", ir.DataType.FLOAT, TINY)
        step = constant(graph, "int8.step", ir.DataType.FLOAT, 1 / 127)
        last = constant(graph, "int8.last", ir.DataType.INT64, [-1])
        top = tape.op("Max", [tape.op("ReduceMax", [tape.op("Abs", [states]), last]), tiny])
        scale = tape.op("Mul", [top, step])
        integers = tape.op("QuantizeLinear", [tape.op("Div", [states, scale]), one, middle])
        values, scales = store(
            graph,
            self.weight,
            weight,
            (f"{weight.name}.int8", ir.DataType.INT8, weight.shape),
            (f"{weight.name}.int8_scale", ir.DataType.FLOAT, weight.shape[1:]),
        )
        product = tape.op("MatMulIntegerToFloat", [integers, values, one, scales, middle], domain=MICROSOFT)
        return tape.op("Mul", [product, scale])


class Int4(Quantiser):
    """4-bit weights and 8-bit activations, in blocks along the input."""

    def weight(self, weight_KN: Floats) -> Stored:
        """Return two values to a byte (N, G, S / 2), 8 standing for 0, and the scale of every block (N * G,)."""
        inputs, outputs = weight_KN.shape
        weight_NGS = np.pad(weight_KN.T, ((0, 0), (0, -inputs % BLOCK))).reshape(outputs, -1, BLOCK)
        # the value of largest size becomes -8, the end of the range that reaches further
        ends_NG = np.take_along_axis(weight_NGS, np.abs(weight_NGS).argmax(axis=2)[..., None], axis=2)[..., 0]
        scale_NG = np.where(ends_NG == 0, 1, ends_NG / -8).astype(np.float32)
        values_NGS = (np.rint(weight_NGS / scale_NG[..., None]) + 8).clip(0, 15).astype(np.uint8)
        packed_NGS: NDArray[np.uint8] = values_NGS[..., ::2] | values_NGS[..., 1::2] * np.uint8(16)
        return packed_NGS, scale_NG.ravel()

    def product(self, states_RK: Floats, stored: Stored, _: str, /) -> Floats:
        """Round each block of a row to 8 bits, and multiply."""
        packed_NGS, scale_NG = stored
        outputs, blocks, _ = packed_NGS.shape
        values_NGS = np.stack([packed_NGS & 15, packed_NGS >> 4], axis=-1).reshape(outputs, blocks, BLOCK)
        weight_NGS: Floats = (values_NGS - np.float32(8)) * scale_NG.reshape(outputs, blocks, 1)
        padded_RK = np.pad(states_RK, ((0, 0), (0, blocks * BLOCK - states_RK.shape[1])))
        values_RGS, scale_RG1 = _symmetric(padded_RK.reshape(len(states_RK), blocks, BLOCK))
        coarse_RK: Floats = (values_RGS * scale_RG1).reshape(padded_RK.shape)
        product_RN: Floats = coarse_RK @ weight_NGS.reshape(outputs, -1).T
        return product_RN

    def write(self, graph: ir.Graph, tape: Tape, states: ir.Value, weight: Matrix) -> ir.Value:
        """Leave all of it to the operator."""
        inputs, outputs = weight.shape
        blocks = -(-inputs // BLOCK)
        values, scales = store(
            graph,
            self.weight,
            weight,
            (f"{weight.name}.int4", ir.DataType.UINT8, (outputs, blocks, BLOCK // 2)),
            (f"{weight.name}.int4_scale", ir.DataType.FLOAT, (outputs * blocks,)),
        )
        sizes = {"K": inputs, "N": outputs, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        return tape.op("MatMulNBits", [states, values, scales], sizes, domain=MICROSOFT)


INTEGERS: dict[str, type[Quantiser]] = {"int8": Int8, "int4": Int4}


def quantise_tables(model: ir.Model, keep: Collection[str] = ()) -> ir.Model:
    """Let lookups read rows of 8 bits, a scale each, but for the tables in `keep`, in place; return the model."""
    graph = model.graph
    for node in list(graph):
        table = held_matrix(node.inputs[0]) if node.op_type == "Gather" else None
        if table is None or table.parameter in keep:
            continue
        rows, columns = table.shape
        values, scales = store(
            graph,
            _symmetric,
            table,
            (f"{table.name}.row_int8", ir.DataType.INT8, (rows, columns)),
            (f"{table.name}.row_scale", ir.DataType.FLOAT, (rows, 1)),
        )
        tape, index = Tape(), node.inputs[1]
        found = tape.op("Cast", [tape.op("Gather", [values, index])], {"to": ir.DataType.FLOAT})
        replace(graph, node, tape.op("Mul", [found, tape.op("Gather", [scales, index])]), tape)
    return model


def _symmetric(values: Floats) -> tuple[Floats, Floats]:
    """Return values rounded to -127..127, and the scale of what lies along the last axis."""
    scale = np.maximum(np.abs(values).max(axis=-1, keepdims=True), TINY) / np.float32(127)
    return np.rint(values / scale), scale


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
