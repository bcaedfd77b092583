"""What the machine can do at most, measured, and what a bundle's decoder asks of it.

Prefill is bound by arithmetic, decoding by reading the weights once a step. So the ceilings are the rate of a large
matrix product in the type that the bundle multiplies in, and the rate at which memory is copied.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from operator import matmul
from typing import Any

import numpy as np
from pydantic import BaseModel

from mmemb_benchmarks.timing import timed
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.errors import MissingExtraError

SIDE = 2048  # of the matrices
COPIED = 256 * 2**20  # bytes
RUNS = 5
PRODUCTS = {  # ONNX operator, types of its inputs and of its output
    "float32": ("MatMul", "float", "float", "float"),
    "int8": ("MatMulInteger", "uint8", "int8", "int32"),
}
# 4-bit weights are multiplied as 8-bit ones; a CPU has no product in a half precision
PRODUCT_OF = {"float32": "float32", "int8": "int8", "int4": "int8", "bfloat16": "float32", "float16": "float32"}


class Ceiling(BaseModel, frozen=True):
    """What is read and written a second by copying, and multiplied by a large matrix product."""

    copy_gb_per_s: float
    matmul_gflop_per_s: float
    matmul_type: str


class Reached(Ceiling, frozen=True):
    """A ceiling, and the shares of it that prefill (of the product) and decoding (of the copy) reach."""

    prefill_share: float
    decode_share: float


@dataclass(frozen=True)
class Work:
    """What a graph of the decoder asks, its attention left out: operations, and bytes of weights that a run reads."""

    token_operations: float  # of the linear layers, for every token
    row_operations: float  # of the vocabulary's head, which only a row's last token enters
    weight_bytes: float


def cpu_ceiling(precision: str, threads: int) -> Ceiling:
    """Measure a CPU with so many threads."""
    product = PRODUCT_OF.get(precision, "float32")
    multiply = _median_seconds(_cpu_product(product, threads))
    return _ceiling(COPIED, _cpu_copy_seconds(threads), SIDE, multiply, product)


def gpu_ceiling(device: int = 0) -> Ceiling:
    """Measure the GPU of an index, by torch, in bfloat16. Raises MissingExtraError without torch."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtraError("torch", "train") from error
    side, copied, place = 4 * SIDE, 16 * COPIED, f"cuda:{device}"

    def seconds(make: Callable[[], Any], run: Callable[[Any, Any], Any]) -> float:
        first, second = make(), make()

        def synchronised() -> None:
            run(first, second)
            torch.cuda.synchronize(place)

        return _median_seconds(synchronised)

    multiply = seconds(lambda: torch.randn(side, side, device=place, dtype=torch.bfloat16), matmul)
    copy = seconds(
        lambda: torch.empty(copied, dtype=torch.uint8, device=place), lambda target, source: target.copy_(source)
    )
    torch.cuda.empty_cache()  # or torch would keep 8 GiB beside the engine that is measured next
    return _ceiling(copied, copy, side, multiply, "bfloat16")


def _ceiling(copied: int, copy_seconds: float, side: int, product_seconds: float, product: str) -> Ceiling:
    return Ceiling(
        copy_gb_per_s=2 * copied / copy_seconds / 1e9,
        matmul_gflop_per_s=2 * side**3 / product_seconds / 1e9,
        matmul_type=product,
    )


def decoder_work(bundle: Bundle, name: str) -> Work:
    """Count the weights of the embedder's or the generator's graph. Raises MissingExtraError without onnx."""
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnx", "bench") from error
    graph = onnx.load(str(bundle.graph(name)), load_external_data=False).graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    vocabulary = bundle.manifest.model.vocabulary_size
    token = row = 0
    used: set[str] = set()
    for node in graph.node:
        if node.op_type == "Gather":  # a lookup reads the rows of its tokens only
            continue
        used |= held.keys() & set(node.input)
        sizes = _matrix(node, held)
        if vocabulary in sizes:
            row += int(np.prod(sizes))
        else:
            token += int(np.prod(sizes)) if sizes else 0
    halves = onnx.TensorProto.INT4, onnx.TensorProto.UINT4
    weight_bytes = 0.0
    for tensor in (held[name] for name in used):
        size = 0.5 if tensor.data_type in halves else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        weight_bytes += size * int(np.prod(tensor.dims))
    return Work(2.0 * token, 2.0 * row, weight_bytes)


def _matrix(node: Any, held: dict[str, Any]) -> tuple[int, ...]:
    """Return the sides of the matrix that a node multiplies by, or reads for another to multiply by."""
    if node.op_type == "MatMulNBits":
        sizes = {attribute.name: int(attribute.i) for attribute in node.attribute}
        return sizes["K"], sizes["N"]
    if node.op_type not in ("MatMul", "Gemm", "MatMulInteger", "MatMulIntegerToFloat", "DequantizeLinear", "Cast"):
        return ()
    matrices = [tuple(held[name].dims) for name in node.input if name in held and len(held[name].dims) == 2]
    return matrices[0] if matrices else ()


def _cpu_product(product: str, threads: int) -> Callable[[], Any]:
    import onnxruntime
    from onnx import parser

    operator, left, right, out = PRODUCTS[product]
    square = f"[{SIDE},{SIDE}]"
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g ({left}{square} a, {right}{square} b) => ({out}{square} c)'
        f" {{ c = {operator}(a, b) }}"
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session: Any = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    types = {"float": np.float32, "uint8": np.uint8, "int8": np.int8}
    arrays = {
        name: rng.integers(0, 100, (SIDE, SIDE)).astype(types[kind]) for name, kind in (("a", left), ("b", right))
    }
    return partial(session.run, None, arrays)


def _cpu_copy_seconds(threads: int) -> float:
    source, target = np.ones(COPIED, np.uint8), np.empty(COPIED, np.uint8)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        return _median_seconds(lambda: list(pool.map(lambda part: np.copyto(*part), parts)))


def _median_seconds(run: Callable[[], Any]) -> float:
    """Time runs after one that warms up."""
    return statistics.median([timed(run)[1] for _ in range(RUNS + 1)][1:])
