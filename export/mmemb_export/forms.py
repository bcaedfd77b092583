"""The decoder's three forms, made of one trace: each writes its own attention in place of the trace's.

The trace repeats heads, joins a cache to the new keys and values, and masks; each form does with less:
- slotted: TensorScatter writes new keys and values into their slots, Attention reads those that are filled;
- fused: ONNX Runtime's GroupQueryAttention does both at once, and reads heads as the projections lay them out;
- direct: Attention over the new tokens alone, with no cache.

Padding lies behind a row's own tokens, so that being causal is all that hides it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common
from onnx_ir.tape import Tape

from mmemb_deploy.bundle import abi
from mmemb_export.layers import MICROSOFT, constant, replace

SLOTS_OPSET = 24  # the first with TensorScatter, and with an Attention that is told how many keys there are


@dataclass(frozen=True)
class Layer:
    """What one layer's attention reads, and its scale; queries (B, heads, T, E), keys and values (B, H, T, E)."""

    scale: float
    queries: ir.Value
    keys: ir.Value
    values: ir.Value
    past_keys: ir.Value
    past_values: ir.Value


Written = tuple[ir.Value, ...]  # the mixed values, then the longer keys and values where they are kept


def slotted(model: ir.Model) -> ir.Model:
    """Return a copy of the traced decoder in standard ONNX, over slots."""
    model = model.clone()
    graph = model.graph
    tape = Tape()
    end = _ends(graph, tape)
    _before_all(graph, tape)
    start = _input(graph, abi.START)

    def attend(tape: Tape, layer: Layer) -> Written:
        keys = tape.op("TensorScatter", [layer.past_keys, layer.keys, start], {"axis": 2})
        values = tape.op("TensorScatter", [layer.past_values, layer.values, start], {"axis": 2})
        inputs = [layer.queries, keys, values, None, None, None, end]
        return tape.op("Attention", inputs, {"scale": layer.scale, "is_causal": 1}), keys, values

    _rewrite(graph, attend)
    model.opset_imports[""] = SLOTS_OPSET
    return _swept(model)


def direct(model: ir.Model) -> ir.Model:
    """Return a copy of the traced decoder that reads and writes no cache, and makes embeddings and states alone."""
    model = model.clone()
    graph = model.graph

    def attend(tape: Tape, layer: Layer) -> Written:
        inputs = [layer.queries, layer.keys, layer.values]
        return (tape.op("Attention", inputs, {"scale": layer.scale, "is_causal": 1}),)

    _rewrite(graph, attend)
    _keep_outputs(graph, lambda name: name in (abi.EMBEDDING, abi.STATE))
    for node, _ in list(_input(graph, abi.START).uses()):
        if node.op_type == "Shape":  # the trace reads the number of rows off it
            tape = Tape()
            rows = tape.op("Shape", [_input(graph, abi.TOKEN_IDS)], {"start": 0, "end": 1})
            replace(graph, node, rows, tape)
    return _swept(model)


def fused(model: ir.Model, *, heads: int, kv_heads: int) -> ir.Model:
    """Return a copy of the traced decoder in ONNX Runtime's own operators, over slots.

    It runs where the host is the device: that reads the likeliest token off the logits, and feeds nothing back.
    """
    model = model.clone()
    graph = model.graph
    _keep_outputs(graph, lambda name: name not in abi.FED_BACK)
    tape = Tape()
    one = constant(graph, "fused.one", ir.DataType.INT64, [1])
    new = tape.op("Shape", [_input(graph, abi.TOKEN_IDS)], {"start": 1, "end": 2})
    end = tape.op("Add", [_input(graph, abi.START), new])
    last = tape.op("Cast", [tape.op("Sub", [end, one])], {"to": ir.DataType.INT32})
    longest = tape.op("Cast", [tape.op("ReduceMax", [end], {"keepdims": 0})], {"to": ir.DataType.INT32})
    _before_all(graph, tape)

    def attend(tape: Tape, layer: Layer) -> Written:
        values = _producer(_producer(layer.values, "Transpose").inputs[0], "Reshape").inputs[0]
        rotated = [
            _rotated_flat(graph, tape, each, count) for each, count in ((layer.queries, heads), (layer.keys, kv_heads))
        ]
        written = tape.op_multi_out(
            "GroupQueryAttention",
            [*rotated, values, layer.past_keys, layer.past_values, last, longest],
            {"num_heads": heads, "kv_num_heads": kv_heads, "scale": layer.scale},
            domain=MICROSOFT,
            num_outputs=3,
        )
        return tuple(written)

    _rewrite(graph, attend, flat=True)
    model.opset_imports[MICROSOFT] = 1
    return _swept(model)


def _ends(graph: ir.Graph, tape: Tape) -> ir.Value:
    """Return how many tokens each row has once the new ones are written, padding included, (B,).

    The new ones are counted, and not read off a shape: what ONNX Runtime adds to a shape it adds on the CPU, where it
    would need `start` too, and would take it from a binding once and for ever.
    """
    ids = _input(graph, abi.TOKEN_IDS)
    along = constant(graph, "rows.tokens_axis", ir.DataType.INT64, [1])
    each = tape.op("Cast", [tape.op("Equal", [ids, ids])], {"to": ir.DataType.INT64})
    new = tape.op("ReduceSum", [each, along], {"keepdims": 0})
    return tape.op("Add", [_input(graph, abi.START), new])


def _input(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.inputs if value.name == name)


def _keep_outputs(graph: ir.Graph, kept: Callable[[str], bool]) -> None:
    outputs = [output for output in graph.outputs if kept(str(output.name))]
    graph.outputs.clear()
    graph.outputs.extend(outputs)


def _before_all(graph: ir.Graph, tape: Tape) -> None:
    graph.insert_before(graph[0], tape.nodes)


def _rewrite(graph: ir.Graph, attend: Callable[[Tape, Layer], Written], *, flat: bool = False) -> None:
    """Put what `attend` writes in the place of every attention; with `flat` its result is (B, T, heads x E) already."""
    for index, attention in enumerate([node for node in graph if node.op_type == "Attention"]):
        outputs = {value.name: value for value in graph.outputs}
        kept = [outputs[f"present.{index}.{kind}"] for kind in ("key", "value")]
        (past_keys, keys), (past_values, values) = (_producer(value, "Concat").inputs for value in kept)
        tape = Tape()
        read = [attention.inputs[0], keys, values, past_keys, past_values]
        layer = Layer(attention.attributes["scale"].as_float(), *filter(None, read))
        mixed, *longer = attend(tape, layer)
        before, old = attention, attention.outputs[0]
        if flat:
            (transpose,) = old.consumers()
            (before,) = transpose.outputs[0].consumers()
            old = before.outputs[0]
        else:
            mixed.shape, mixed.type = old.shape, old.type
        graph.insert_before(before, tape.nodes)
        old.replace_all_uses_with(mixed)
        for present, new in zip(kept, longer, strict=False):
            _take_over(graph, present, new)


def _take_over(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Make `new` the graph's output in the place of `old`."""
    new.name, new.type, new.shape = old.name, old.type, old.shape
    graph.outputs[list(graph.outputs).index(old)] = new
    old.name = f"{old.name}_joined"


def _swept(model: ir.Model) -> ir.Model:
    """Drop what nothing uses any more, and name the slots' axis."""
    graph = model.graph
    common.RemoveUnusedNodesPass()(model)
    for value in list(graph.inputs):
        if not value.uses():
            graph.inputs.remove(value)
    for value in [*graph.inputs, *graph.outputs]:
        if str(value.name).startswith(("past.", "present.")):
            assert value.shape is not None
            value.shape = ir.Shape([value.shape[0], value.shape[1], "slots", value.shape[3]])
    return model


def _rotated_flat(graph: ir.Graph, tape: Tape, rotated: ir.Value, heads: int) -> ir.Value:
    """Norm and rotate (B, T, heads x E) in place of (B, heads, T, E), parted into heads by constant shapes.

    On a CPU, ONNX Runtime hands RMSNormalization to its threads vector by vector, which takes longer than the norm of a
    head. The operator that adds first shares them out in runs; that every value is doubled changes no bit.
    """
    rotary = _producer(rotated, "RotaryEmbedding")
    transposed, cos, sin = rotary.inputs
    norm = _producer(_producer(transposed, "Transpose").inputs[0], "RMSNormalization")
    weight, epsilon = norm.inputs[1], norm.attributes["epsilon"].as_float()
    assert weight is not None
    assert isinstance(weight.shape, ir.Shape)
    (size,) = weight.shape.numpy()
    by_head, flat = (
        constant(graph, f"fused.vectors_of_{each}", ir.DataType.INT64, [0, -1, each]) for each in (size, heads * size)
    )
    vectors = tape.op("Reshape", [_producer(norm.inputs[0], "Reshape").inputs[0], by_head])
    inputs = [vectors, vectors, weight]
    normed = tape.op("SkipSimplifiedLayerNormalization", inputs, {"epsilon": 4 * epsilon}, domain=MICROSOFT)
    together = tape.op("Reshape", [normed, flat])
    return tape.op("RotaryEmbedding", [together, cos, sin], {"num_heads": heads, "interleaved": 0})


def _producer(value: ir.Value | None, op_type: str) -> ir.Node:
    node = None if value is None else value.producer()
    assert node is not None, f"the exporter's graph changed: {value} has no node"
    assert node.op_type == op_type, f"the exporter's graph changed: {value} comes from no {op_type}"
    return node
