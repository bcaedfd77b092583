"""Write cuda_kernels.json: which types the CUDA kernels of the installed onnxruntime-gpu take, asked of itself.

Run `python tests/mmemb_export/cuda_kernels.py` where onnxruntime-gpu and onnx are installed and CUDA works; with --stub
no GPU is needed (stub_cuda.py). For each operator of ours, and each type that ONNX allows it, a graph of that one node
is loaded: the type has a kernel where the node is placed on the GPU. The table that ONNX Runtime publishes,
docs/OperatorKernels.md, may be older than a release.

With files of graphs, it prints for each what runs on the CPU, which inputs are read there, and whether its runs can be
recorded as a CUDA graph, and leaves the table alone.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

if "--stub" in sys.argv:
    import_module("stub_cuda").load()  # beside this file

import onnx
import onnxruntime
from onnx import TensorProto, defs, helper

capi: Any = import_module("onnxruntime.capi.onnxruntime_pybind11_state")  # where its errors are
TABLE = Path(__file__).with_suffix(".json")
PROVIDER = "CUDAExecutionProvider"
OPSETS = (23, 24)
TYPES = {
    "float": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "int4": TensorProto.INT4,
    "float8e4m3fn": TensorProto.FLOAT8E4M3FN,
}
# An operator's attributes and the ranks of its inputs, where they are not none and 4 each; 0 stands for a scalar.
NODES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "Abs": ({}, ()),
    "Add": ({}, ()),
    "And": ({}, ()),
    "ArgMax": ({}, ()),
    "Attention": ({}, (4, 4, 4, 4)),  # with a mask
    "Cast": ({}, ()),
    "Clip": ({}, (4, 0, 0)),
    "Concat": ({"axis": 0}, ()),
    "ConstantOfShape": ({}, (1,)),
    "Conv": ({}, ()),
    "Cos": ({}, ()),
    "CumSum": ({}, (4, 0)),
    "DequantizeLinear": ({}, (4, 0)),
    "Div": ({}, ()),
    "Equal": ({}, ()),
    "Expand": ({}, (4, 1)),
    "Gather": ({}, ()),
    "GatherElements": ({}, ()),
    "GatherND": ({}, ()),
    "Gelu": ({}, ()),
    "Gemm": ({}, (2, 2)),
    "Greater": ({}, ()),
    "GreaterOrEqual": ({}, ()),
    "LayerNormalization": ({}, (4, 1)),
    "Less": ({}, ()),
    "LessOrEqual": ({}, ()),
    "MatMul": ({}, ()),
    "Max": ({}, ()),
    "Min": ({}, ()),
    "Mod": ({}, ()),
    "Mul": ({}, ()),
    "Neg": ({}, ()),
    "Not": ({}, ()),
    "Or": ({}, ()),
    "Pow": ({}, ()),
    "QuantizeLinear": ({}, (4, 0, 0)),
    "RMSNormalization": ({}, (4, 1)),
    "Range": ({}, (0, 0, 0)),
    "Reciprocal": ({}, ()),
    "ReduceL2": ({}, ()),
    "ReduceMax": ({}, ()),
    "ReduceMean": ({}, ()),
    "ReduceSum": ({}, ()),
    "Reshape": ({}, (4, 1)),
    "RotaryEmbedding": ({}, (4, 3, 3)),
    "ScatterElements": ({}, ()),
    "ScatterND": ({}, ()),
    "Shape": ({}, ()),
    "Sigmoid": ({}, ()),
    "Sin": ({}, ()),
    "Slice": ({}, (4, 1, 1)),
    "Softmax": ({}, ()),
    "Split": ({"num_outputs": 1}, ()),
    "Sqrt": ({}, ()),
    "Squeeze": ({}, ()),
    "Sub": ({}, ()),
    "Tanh": ({}, ()),
    "TensorScatter": ({}, (4, 4, 1)),
    "Tile": ({}, (4, 1)),
    "TopK": ({}, (4, 1)),
    "Transpose": ({}, ()),
    "Unsqueeze": ({}, (4, 1)),
    "Where": ({}, ()),
}
CODED = {"Cast": ("to", "T2")}  # an attribute that says a type


def given(schema: Any) -> list[Any]:
    """Return the inputs that a node is given: those that it needs, and those whose ranks are listed."""
    ranks = NODES[schema.name][1]
    optional = defs.OpSchema.FormalParameterOption.Optional
    return [each for index, each in enumerate(schema.inputs) if each.option != optional or index < len(ranks)]


def one_node(schema: Any, opset: int, types: dict[str, str]) -> bytes:
    """Return a graph of one node whose type parameters are `types`."""
    attributes, ranks = NODES[schema.name]
    if schema.name in CODED:
        attribute, parameter = CODED[schema.name]
        attributes = attributes | {attribute: TYPES[types[parameter]]}
    inputs: list[onnx.ValueInfoProto] = []
    for index, each in enumerate(given(schema)):
        own: str = each.type_str
        kind = types.get(own, own.removeprefix("tensor(").removesuffix(")"))
        rank = ranks[index] if index < len(ranks) else 4
        inputs.append(helper.make_tensor_value_info(each.name, TYPES[kind], [f"{each.name}{i}" for i in range(rank)]))
    outputs = [each.name for each in schema.outputs if each.option != defs.OpSchema.FormalParameterOption.Optional]
    node = helper.make_node(schema.name, [each.name for each in inputs], [f"{name}_out" for name in outputs])
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    results = [onnx.ValueInfoProto(name=f"{name}_out") for name in outputs]
    graph = helper.make_graph([node], schema.name, inputs, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    content: bytes = model.SerializeToString()
    return content


def placed(model: bytes) -> bool:
    """Whether ONNX Runtime puts the one node of a graph on the GPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = onnxruntime.InferenceSession(model, options, providers=[PROVIDER], enable_fallback=0)
    except (capi.Fail, capi.NotImplemented):
        return False  # neither the GPU nor the CPU has a kernel
    assert PROVIDER in session.get_providers(), "ONNX Runtime has no CUDA here"
    return [each.ep_name for each in session.get_provider_graph_assignment_info()] == [PROVIDER]


def kernels(name: str, opset: int) -> tuple[int, dict[str, list[str]]]:
    """Return the version of an operator at an opset, and the types that its kernel takes for each type parameter."""
    schema = defs.get_schema(name, opset)
    choices = {
        each.type_param_str: [kind for kind in TYPES if f"tensor({kind})" in each.allowed_type_strs]
        for each in schema.type_constraints
    }
    found: dict[str, list[str]] = {}
    for parameter in [each for each in choices if each in parameters(schema)]:
        found[parameter] = [
            kind
            for kind in choices[parameter]
            if any(placed(one_node(schema, opset, types | {parameter: kind})) for types in some(choices))
        ]
        choices[parameter] = found[parameter]
    return schema.since_version, found


def parameters(schema: Any) -> set[str]:
    """Return the type parameters of the inputs that a node is given, and what an attribute codes."""
    return {each.type_str for each in given(schema)} | {CODED.get(schema.name, ("", ""))[1]}


def some(choices: dict[str, list[str]]) -> list[dict[str, str]]:
    """Return choices of types, of which one suits any kernel: the same type everywhere, where it may be."""
    same = ("float", "float16", "bfloat16", "int64")
    return [{name: kind if kind in kinds else kinds[0] for name, kinds in choices.items()} for kind in same]


def describe(graph: str) -> str:
    """Return where the nodes and inputs of a graph are, and whether it can be recorded."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(graph, options, providers=[PROVIDER], enable_fallback=0)
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name != PROVIDER]
    nodes = sorted(node.op_type for part in parts for node in part.get_nodes())
    places = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    inputs = [each.name for each, place in places if place.name != "Cuda"]
    try:
        recorded = [(PROVIDER, {"enable_cuda_graph": "1"})]
        onnxruntime.InferenceSession(graph, options, providers=recorded, enable_fallback=0)
        whole = "can be recorded"
    except capi.Fail as error:
        whole = str(error).rpartition(": ")[2]
    return f"{graph}: on the CPU {nodes}, inputs there {inputs}, {whole}"


def main() -> None:
    if graphs := [argument for argument in sys.argv[1:] if argument != "--stub"]:
        print(*map(describe, graphs), sep="\n")
        return
    table: dict[str, dict[str, Any]] = {}
    for name in NODES:
        for opset in OPSETS if defs.has(name, max_inclusive_version=min(OPSETS)) else OPSETS[1:]:
            version, found = kernels(name, opset)
            table.setdefault(name, {})[str(version)] = found
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(versions)}" for name, versions in table.items())
    TABLE.write_text(f'{{\n "onnxruntime-gpu": "{onnxruntime.__version__}",\n "kernels": {{\n{lines}\n }}\n}}\n')


if __name__ == "__main__":
    main()
