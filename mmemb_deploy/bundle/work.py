"""What a graph asks of the machine that runs it, counted from its nodes and the shapes of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.errors import BundleError, MissingExtraError

TYPES = {  # ONNX's names of the types that weights are stored in, and the precision that each belongs to
    "FLOAT": "float32",
    "FLOAT16": "float16",
    "BFLOAT16": "bfloat16",
    "INT8": "int8",
    "UINT8": "int8",
    "FLOAT8E4M3FN": "fp8",
    "INT4": "int4",
    "UINT4": "int4",
}
MULTIPLIED = ("MatMul", "Gemm", "MatMulInteger", "MatMulIntegerToFloat", "DequantizeLinear", "Cast")
MERGER = "merger"  # in the names of the weights that patches meet once they are merged

Operations = Mapping[str, float]  # multiplications and additions, by the precision of the weights


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations of a graph's linear layers and attention, and the bytes of its weights.

    Left out are norms, activations and the embedding of patches, less than a hundredth of what a public model does.
    """

    token: Operations  # for every token or patch
    merged: Operations  # for every visual token: mergers
    row: Operations  # for every row, whose last token alone enters the vocabulary's head
    pair: float  # for every pair of tokens of which one attends to the other
    heads: int  # of one attention
    head_size: int
    widest: int  # values of a token in the widest linear layer's output, the head's aside
    weight_bytes: float  # of all weights
    read_bytes: float  # of those that a run reads whole: not the tables, of which it reads the rows of its tokens

    @property
    def token_operations(self) -> float:
        """Return the operations of linear layers for every token."""
        return sum(self.token.values())

    @property
    def row_operations(self) -> float:
        """Return the operations of the vocabulary's head for every row."""
        return sum(self.row.values())


def graph_work(bundle: Bundle, name: str) -> Work:
    """Count a graph's work; its weights are not read.

    Raises MissingExtraError without onnx, BundleError where the graph does not say the shape of what attends.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnx", "tensorrt") from error
    path = bundle.graph(name)
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False)).graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.value_info}
    vocabulary = bundle.manifest.model.vocabulary_size
    counted: dict[str, dict[str, float]] = {"token": {}, "merged": {}, "row": {}}
    pair, heads, head_size, widest, used = 0.0, 0, 0, 0, set[str]()
    for node in graph.node:
        if node.op_type == "Attention":
            fixed = [dim.dim_value for dim in shapes.get(node.input[0], ()) if dim.dim_value]
            if len(fixed) != 2:
                raise BundleError(f"{path} does not say the shape of {node.input[0]}, which attends; export it again")
            heads, head_size = fixed
            pair += 4.0 * heads * head_size
        if node.op_type == "Gather":
            continue
        weights = [each for each in node.input if each in held]
        used.update(weights)
        precision, sides = _matrix(node, [held[each] for each in weights])
        if not sides:
            continue
        if vocabulary in sides:
            kind = "row"
        else:
            kind = "merged" if any(MERGER in each for each in weights) else "token"
            widest = max(widest, *sides)
        counted[kind][precision] = counted[kind].get(precision, 0.0) + 2.0 * math.prod(sides)
    sizes = {each: _nbytes(tensor) for each, tensor in held.items()}
    return Work(
        **counted,
        pair=pair,
        heads=heads,
        head_size=head_size,
        widest=widest,
        weight_bytes=sum(sizes.values()),
        read_bytes=sum(sizes[each] for each in used),
    )


def _matrix(node: Any, weights: list[Any]) -> tuple[str, tuple[int, ...]]:
    """Return precision and sides of the matrix that a node multiplies by, or reads for another to multiply by."""
    if node.op_type == "MatMulNBits":
        values = {attribute.name: int(attribute.i) for attribute in node.attribute}
        return f"int{values['bits']}", (values["K"], values["N"])
    matrices = [tensor for tensor in weights if len(tensor.dims) == 2]
    if node.op_type not in MULTIPLIED or not matrices:
        return "", ()
    return TYPES[_type(matrices[0])], tuple(matrices[0].dims)


def _type(tensor: Any) -> str:
    from onnx import TensorProto

    name: str = TensorProto.DataType.Name(tensor.data_type)
    return name


def _nbytes(tensor: Any) -> float:
    from onnx.helper import tensor_dtype_to_np_dtype

    size = 0.5 if _type(tensor) in ("INT4", "UINT4") else float(tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    return size * math.prod(int(side) for side in tensor.dims)
