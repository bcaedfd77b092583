"""What ONNX Runtime runs on a GPU: the precisions it has CUDA kernels for, and where it put the nodes of a graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.precision import FLOATS
from mmemb_deploy.errors import BackendError

SCALES: Final = ("float32", "float16")  # of the CUDA kernels of QuantizeLinear and DequantizeLinear
# Sizes of tensors are host memory, so ONNX Runtime computes with them on the CPU. Lookups are not among these: a table
# of embeddings must not be left there.
SHAPE_ARITHMETIC: Final = {
    *("Add", "Sub", "Mul", "Div", "Cast", "Range"),
    *("Shape", "ConstantOfShape", "Concat", "Slice", "Reshape", "Squeeze", "Unsqueeze"),
}


def check_kernels(bundle: Bundle) -> None:
    """Raise BackendError for a bundle whose graphs ONNX Runtime has no CUDA kernels for.

    The tests hold the graphs of every precision against the kernels of a release.
    """
    manifest = bundle.manifest
    if manifest.fused:
        raise BackendError(f"{bundle.folder} holds fused graphs, which run on the CPU: export it with --form portable")
    quantised = [name for name in manifest.precisions if name not in FLOATS]
    if quantised and manifest.compute not in SCALES:
        raise BackendError(
            f"{bundle.folder} holds {' and '.join(quantised)} weights with {manifest.compute} scales, and the CUDA "
            f"kernels of ONNX Runtime's QuantizeLinear and DequantizeLinear take {' and '.join(SCALES)}: export it "
            "again with --compute float16, or run `mmemb build` for TensorRT"
        )


def misplaced(nodes: Iterable[tuple[str, str]], provider: str) -> list[str]:
    """Return the operators that do not run on a provider although they do more than compute with shapes.

    `nodes` holds the provider and the operator of every node of a graph.
    """
    return sorted({operator for place, operator in nodes if place != provider} - SHAPE_ARITHMETIC)
