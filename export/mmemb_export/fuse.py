"""The decoder in ONNX Runtime's own operators: one graph for prompts and for single tokens, over one KV cache.

Every `Attention` with what surrounds it (repeated heads, a mask, a cache that is concatenated) becomes one
`GroupQueryAttention`, which reads the key-value heads as they are and writes the cache in place.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnx_ir.tape import Tape

from mmemb_deploy.bundle import abi
from mmemb_export.layers import MICROSOFT, constant


def fuse(model: ir.Model, *, heads: int, kv_heads: int) -> ir.Model:
    """Fuse a decoder that `trace` made of `mmemb_export.decoder.Decoder`, in place; return it."""
    graph = model.graph
    lengths = ir.Value(name=abi.LENGTHS, shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(lengths)
    attentions = [node for node in graph if node.op_type == "Attention"]
    one = constant(graph, "fused.one", ir.DataType.INT64, [1])
    flat = constant(graph, "fused.flat", ir.DataType.INT64, [0, 0, -1])
    tape = Tape()
    last_index = tape.op("Cast", [tape.op("Sub", [lengths, one])], {"to": ir.DataType.INT32})
    longest = tape.op("Cast", [tape.op("ReduceMax", [lengths], {"keepdims": 0})], {"to": ir.DataType.INT32})
    graph.insert_before(graph[0], tape.nodes)
    for layer, attention in enumerate(attentions):
        _fuse_attention(graph, attention, layer, flat, (last_index, longest), heads=heads, kv_heads=kv_heads)
    common.RemoveUnusedNodesPass()(model)
    for value in list(graph.inputs):
        if not value.uses():
            graph.inputs.remove(value)
    model.opset_imports[MICROSOFT] = 1
    return model


def _fuse_attention(
    graph: ir.Graph,
    attention: ir.Node,
    layer: int,
    flat: ir.Value,
    counts: tuple[ir.Value, ir.Value],
    *,
    heads: int,
    kv_heads: int,
) -> None:
    outputs = {value.name: value for value in graph.outputs}
    present_key, present_value = outputs[f"present.{layer}.key"], outputs[f"present.{layer}.value"]
    past_key, new_key = _producer(present_key, "Concat").inputs
    past_value, new_value = _producer(present_value, "Concat").inputs
    tape = Tape()
    query_BSD = _rotated_flat(tape, attention.inputs[0], flat, heads)
    key_BSD = _rotated_flat(tape, new_key, flat, kv_heads)
    value_BSD = tape.op("Reshape", [_producer(new_value, "Transpose").inputs[0], flat])
    mixed, key, value = tape.op_multi_out(
        "GroupQueryAttention",
        [query_BSD, key_BSD, value_BSD, past_key, past_value, *counts],
        {"num_heads": heads, "kv_num_heads": kv_heads, "scale": attention.attributes["scale"].as_float()},
        domain=MICROSOFT,
        num_outputs=3,
    )
    (transpose,) = attention.outputs[0].consumers()
    (reshape,) = transpose.outputs[0].consumers()
    graph.insert_before(reshape, tape.nodes)
    reshape.outputs[0].replace_all_uses_with(mixed)
    for old, new in ((present_key, key), (present_value, value)):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        graph.outputs[list(graph.outputs).index(old)] = new
        old.name = f"{old.name}_concatenated"


def _rotated_flat(tape: Tape, rotated: ir.Value | None, flat: ir.Value, heads: int) -> ir.Value:
    """Rotate (B, S, heads x E) in place of (B, heads, S, E)."""
    rotary = _producer(rotated, "RotaryEmbedding")
    by_head, cos, sin = rotary.inputs
    states = _producer(by_head, "Transpose").inputs[0]
    return tape.op(
        "RotaryEmbedding", [tape.op("Reshape", [states, flat]), cos, sin], {"num_heads": heads, "interleaved": 0}
    )


def _producer(value: ir.Value | None, op_type: str) -> ir.Node:
    node = None if value is None else value.producer()
    assert node is not None, f"the exporter's graph changed: {value} has no node"
    assert node.op_type == op_type, f"the exporter's graph changed: {value} comes from no {op_type}"
    return node
