"""Every node of every precision has a CUDA kernel in ONNX Runtime, or the bundle is refused before it is loaded.

cuda_kernels.json, written by cuda_kernels.py, says which types the kernels of a release take.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, defs

from mmemb_deploy import BackendError
from mmemb_deploy.backends.placement import check_kernels
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.precision import FLOATS, PRECISIONS
from mmemb_export.quantise import quantise, quantiser
from mmemb_export.recipe import Recipe
from mmemb_export.traced import Choices, TracedGraphs
from mmemb_export.weights import CheckpointWeights
from mmemb_training.checkpoint import outline_checkpoint

TABLE = json.loads(Path(__file__).with_name("cuda_kernels.json").read_text())
QUANTISED = [name for name in PRECISIONS if name not in FLOATS]
PAIRS = [(precision, compute) for compute in FLOATS for precision in (compute, *QUANTISED)]


@pytest.fixture(scope="module")
def float_graphs(
    tmp_path_factory: pytest.TempPathFactory, uneven_checkpoint: Path, tiny_bundle: Path
) -> dict[str, list[ir.Model]]:
    """The graphs of each float type. Those of float16 are bfloat16's, which differ from them in the type alone."""
    folder = tmp_path_factory.mktemp("bfloat16")
    outline = outline_checkpoint(uneven_checkpoint, dtype="bfloat16")
    traced = TracedGraphs(outline, CheckpointWeights(uneven_checkpoint, outline), Recipe(precision="bfloat16"))
    facts = traced.write(folder, Choices())
    files = {"float32": tiny_bundle, "bfloat16": folder, "float16": folder}
    names = {each.file for each in facts.values()}
    return {kind: [ir.load(files[kind] / name) for name in sorted(names)] for kind in files}


def test_the_table_is_of_the_release_that_is_pinned() -> None:
    constraints = Path("constraints.txt").read_text().splitlines()
    assert f"onnxruntime-gpu=={TABLE['onnxruntime-gpu']}" in constraints


@pytest.mark.parametrize(("precision", "compute"), PAIRS)
def test_a_bundle_is_refused_where_a_node_has_no_kernel_and_nowhere_else(
    precision: str, compute: str, float_graphs: dict[str, list[ir.Model]], tiny_bundle: Path
) -> None:
    found = {lack for model in float_graphs[compute] for lack in lacking(typed(model, precision, compute), compute)}
    refused = precision in QUANTISED and compute == "bfloat16"
    assert bool(found) == refused, found
    bundle = in_precision(Bundle.open(tiny_bundle), precision, compute)
    if refused:
        assert {operator for operator, _ in found} <= {"QuantizeLinear", "DequantizeLinear"}
        with pytest.raises(BackendError, match=rf"{precision} weights with bfloat16 scales.*--compute float16, or run"):
            check_kernels(bundle)
    else:
        check_kernels(bundle)


def test_fused_graphs_are_refused(fused_bundle: Path) -> None:
    with pytest.raises(BackendError, match="--form portable"):
        check_kernels(Bundle.open(fused_bundle))


def typed(model: ir.Model, precision: str, compute: str) -> onnx.ModelProto:
    """Return a graph in a precision, with the type of every value."""
    if precision in QUANTISED:
        ranges = dict.fromkeys([name.removesuffix(".T") for name in model.graph.initializers], 1.0)
        held = "bfloat16" if compute == "float16" else compute
        model = quantise(model.clone(), quantiser("portable", precision, held, ranges))
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True)


def lacking(model: onnx.ModelProto, compute: str) -> Iterator[tuple[str, str]]:
    """Yield the operator and the type of what has no kernel."""
    graph, (opset,) = model.graph, (each.version for each in model.opset_import if each.domain == "")
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    kinds |= {
        value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.value_info, *graph.output]
    }
    for node in graph.node:
        assert node.domain == ""
        schema = defs.get_schema(node.op_type, opset)
        types = TABLE["kernels"][node.op_type][str(schema.since_version)]
        for names, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
            for index, name in enumerate(names):
                parameter = formal[min(index, len(formal) - 1)].type_str
                kind = TensorProto.DataType.Name(kinds[name]).lower() if name else ""
                if compute == "float16" and kind == "bfloat16":
                    kind = "float16"
                if name and parameter in types and kind not in types[parameter]:
                    yield node.op_type, kind


def in_precision(bundle: Bundle, precision: str, compute: str) -> Bundle:
    """Return a bundle that says that it is in a precision."""
    graphs: dict[str, Any] = {
        name: graph.model_copy(update={"compute": compute, "precision": compute if name == abi.GATE else precision})
        for name, graph in bundle.manifest.graphs.items()
    }
    return Bundle(bundle.folder, bundle.manifest.model_copy(update={"graphs": graphs}))
