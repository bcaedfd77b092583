"""Linear layers in the precision of a recipe: which quantiser writes them, and which layers it leaves."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir
from onnx_ir.passes import common
from onnx_ir.tape import Tape

from mmemb_export.integers import INTEGERS
from mmemb_export.layers import MICROSOFT, Quantiser, linear_layers, replace
from mmemb_export.qdq import QDQ


def quantiser(form: str, precision: str, floats: str, ranges: Mapping[str, float]) -> Quantiser:
    """Return what writes a form's linear layers in a precision, which is no float type.

    `ranges` holds the largest absolute input of every layer (`mmemb_export.activations.ranges`), if it is `measured`.
    """
    return INTEGERS[precision]() if form == "fused" else QDQ[precision](floats=floats, ranges=ranges)


def quantise(model: ir.Model, quantiser: Quantiser, keep: Collection[str] = ()) -> ir.Model:
    """Quantise every linear layer that a quantiser takes and whose weight is not in `keep`, in place; return the model.

    `keep` holds names of parameters, as `mmemb_export.activations` gives them.
    """
    graph = model.graph
    for node, states, weight, bias in linear_layers(graph):
        if weight.parameter in keep or weight.shape[0] % quantiser.block:
            continue
        tape = Tape()
        out = quantiser.write(graph, tape, states, weight)
        if bias is not None:
            out = tape.op("Add", [out, bias])
        replace(graph, node, out, tape)
    common.CommonSubexpressionEliminationPass()(model)  # layers of one input quantise it once
    common.RemoveUnusedNodesPass()(model)
    if any(node.domain == MICROSOFT for node in graph):
        model.opset_imports[MICROSOFT] = 1
    return model
