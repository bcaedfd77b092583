"""What the machine can do at most, measured.

Prefill is bound by arithmetic, decoding by reading the weights once a step. So the ceilings are the rate of a large
matrix product in the type that the bundle multiplies in, and the rate at which memory is copied.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import matmul
from typing import Any

import numpy as np
from pydantic import BaseModel

from mmemb_benchmarks.timing import timed
from mmemb_deploy.errors import BackendError, MissingExtraError

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


def cpu_ceiling(precision: str, threads: int) -> Ceiling:
    """Measure a CPU with so many threads."""
    product = PRODUCT_OF.get(precision, "float32")
    multiply = _median_seconds(_cpu_product(product, threads))
    return _ceiling(COPIED, _cpu_copy_seconds(threads), SIDE, multiply, product)


def gpu_ceiling(device: int = 0) -> Ceiling:
    """Measure the GPU of an index, by torch, in bfloat16.

    Raises MissingExtraError without torch, BackendError where it is one for CPUs.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtraError("torch", "train") from error
    if not torch.cuda.is_available():
        raise BackendError(f"torch {torch.__version__} does not run on a GPU here: install its build for CUDA")
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
